"""What `import mmjax` offers beside a trained model: training, as train.py does it from the command line."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmjax.config import load_config, user_path
from mmjax.environment import keep_freed_memory
from mmjax.errors import UserError, refuse_wrong_jaxlib
from mmjax.report.write import write_report
from mmjax.run.processes import is_main
from mmjax.training.loop import fit


def train(
  config: str | Path,
  workdir: str | Path,
  settings: Mapping[str, Any] | None = None,
  *,
  allow_config_change: bool = False,
  init_from: str | Path | None = None,
) -> Path:
  """Trains a model in a directory, or goes on with the one that is there, and writes its report.

  The same call goes on where it stopped. An interrupt stops it after it has saved. On Linux the process uses freed
  memory again from then on (`mmjax.environment.keep_freed_memory`), as mmjax's commands do.

  Args:
    config: a config file, as train.py takes it: 'configs/quickstart_ngram_rows.py'.
    workdir: run directory, created if it does not exist.
    settings: by name, {'train.max_steps': 500}; they override those of the file. Numbers, switches and text.
    allow_config_change: whether to go on although settings of the schedule differ.
    init_from: RUN[@best|last|STEP], a run whose weights and tokenizer a new run starts from.

  Returns:
    The run directory, as `mmjax.load` takes it.

  Raises:
    UserError: if a setting, the text or the directory is not usable.
    DivergedError: after train.max_skipped_updates skipped updates in a row.
    StorageError: if it cannot save.
    StoppedError: if a signal ended it; its state is saved.
  """
  refuse_wrong_jaxlib()
  keep_freed_memory()
  settings = {} if settings is None else settings
  if not isinstance(config, str | os.PathLike):
    raise UserError(f"config must be a config file, such as the config.json of a run's directory, not {config!r:.80}")
  if not isinstance(settings, Mapping):
    raise UserError(f'settings must be a dict, not {settings!r:.80}')
  for name, value in settings.items():
    if value is None or isinstance(value, Collection) and not isinstance(value, str):
      raise UserError(f'{name}={value!r:.80} must be a number, a switch or text, which has commas between several')
  overrides = [f'--config.{name}={value}' for name, value in settings.items()]
  path, origin = user_path(workdir), None if init_from is None else str(init_from)
  fit(load_config(str(config), overrides), path, allow_config_change=allow_config_change, init_from=origin)
  if is_main():
    write_report(path)
  return path
