"""What a run reads and writes before its first step: settings of earlier starts, text, and the record of this start.

Bad input is refused before anything is written into the work directory or compiled: settings against those of an
earlier start first, then devices, text, the directory's lock, the state, the compiler.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.config import Config, check_learning
from mmjax.config.sublayers import uses_bank
from mmjax.data.bank_file import read_bank
from mmjax.data.index import INDEX, data_sha256, read_index
from mmjax.data.loader import (
  TokenSplit,
  check_fills_batch,
  cut_remark,
  open_split,
  row_settings,
  steps_of_epochs,
)
from mmjax.data.overlap import overlap_remark
from mmjax.data.tokenizer import Tokenizer
from mmjax.errors import UserError
from mmjax.files import write_file
from mmjax.run.compressed import refuse_compressed
from mmjax.run.directory import RunDir, write_tokenizer
from mmjax.run.identity import bank_identity, check_bank, compare_configs, compare_models, settings_changed
from mmjax.run.origin import Origin, check_origin, parse_origin, refuse_starts, settle_origin, with_bank_of
from mmjax.run.processes import is_main
from mmjax.run.sharding import make_mesh
from mmjax.training.remarks import evaluation_remark, passes_remark, warmup_remark


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a run reads: rows to learn from, rows held out, and the tokenizer that made them."""

  tokenizer: Tokenizer
  train: TokenSplit
  valid: TokenSplit
  data_sha256: str  # of the shards' hashes
  total_steps: int
  remarks: list[str]  # what a user should know of the text and of the schedule


def settle_config(
  run: RunDir, config: Config, allow_config_change: bool, init_from: str | None = None
) -> tuple[Config, Origin | None]:
  """Compares the settings with those of an earlier start in the directory; looks only, writes nothing.

  An imported model that was never trained binds the architecture alone: data, batches and schedule are free.

  Returns:
    The settings to train with, and the other run whose weights a run that has none of its own yet starts from.

  Raises:
    UserError: if the directory holds a run with other settings or cannot hold one, or the bank or the other run that a
      new run starts from does not fit.
  """
  run.check_usable()
  refuse_compressed(run, 'trained')
  recorded = run.read_record().get('init_from')
  origin = None if init_from is None else parse_origin(init_from)
  if config.memory.teach_rows and not (origin or recorded):
    raise UserError(
      f'memory.teach_rows={config.memory.teach_rows} needs --init_from RUN: rows are taught to a model that has learned'
    )
  if origin and (run.was_trained or run.config_path.exists()):
    check_origin(origin, run)
  if recorded:
    origin = Origin(Path(recorded['run']), recorded['step'])
  if not (run.config_path.exists() or any(run.steps())):  # with steps it must be there: reading it says so
    check_learning(config)
    if origin:
      return settle_origin(origin, config), origin
    if config.memory.bank_init == 'file' and uses_bank(config.model, config.memory):
      read_bank(Path(config.memory.bank_file), (config.model.knowledge_num, config.model.knowledge_dim))
    return config, None
  old, given = run.read_config(to_train=run.was_trained), config
  if recorded:
    config = with_bank_of(old, config)
  if run.was_trained:
    compare_configs(old, config, allow_config_change)
    check_bank(run, given)
  else:
    compare_models(old, config, str(run.path))
    refuse_starts(run, old, given)
  return config, origin


def open_inputs(config: Config, prepared: Path) -> Inputs:
  """Opens both splits of a prepared directory.

  Raises:
    UserError: if the shards are not what they must be, or give less than one batch.
  """
  train = config.train
  train_split, valid_split = (open_split(prepared, name, **row_settings(config)) for name in ('train', 'valid'))
  batch_rows = train.update_rows
  check_fills_batch(train_split, batch_rows)
  valid_split.scored_bytes  # noqa: B018 - now, and not at the first evaluation, it is found that it cannot be known
  steps = train.max_steps or steps_of_epochs(train_split.n_rows, batch_rows, train.epochs)
  index = read_index(prepared)
  valid = index['splits']['valid']
  remarks = [
    cut_remark({'training': train_split, 'validation': valid_split}),
    overlap_remark(valid, valid.get('also_in_train'), config.data.layout),
    warmup_remark(train, steps),
    evaluation_remark(train, steps, valid_split.read_tokens, train_split.read_tokens / train_split.n_rows),
    passes_remark(config, steps * batch_rows / train_split.n_rows),
  ]
  return Inputs(train_split.tokenizer, train_split, valid_split, data_sha256(index), steps, list(filter(None, remarks)))


def record_run(run: RunDir, config: Config, inputs: Inputs, step: int, origin: Mapping[str, Any] | None = None) -> None:
  """Writes what the run is made of into its directory: settings, tokenizer, what data and weights are, this start.

  Raises:
    UserError: if the run has made more updates than the settings give, or was started with other data.
  """
  if step > inputs.total_steps:
    raise UserError(
      f'{run.path} has made {step} updates, more than the {inputs.total_steps} that train.max_steps or train.epochs '
      f'give; let it make at least {step}'
    )
  if not is_main():
    return
  identity = {'data_sha256': inputs.data_sha256, 'tokenizer_sha256': inputs.tokenizer.sha256}
  if origin:
    identity |= origin['bank']
  elif not run.ever_saved:
    identity |= bank_identity(config)
  facts = {
    'prepared_dir': str(inputs.train.directory.absolute()),
    'remarks': inputs.remarks,
    'device_count': make_mesh(config).size,  # those that it uses
  }
  if run.was_trained and run.config_path.exists():  # settings of the schedule, which a start may change
    facts['changed'] = settings_changed(run.read_config(), config)[1]
  run.record_start(identity, step, origin, **facts)  # first: it refuses other data, before anything is replaced
  write_tokenizer(run.path / inputs.tokenizer.path.name, inputs.tokenizer)
  write_file(run.path / 'data.json', (inputs.train.directory / INDEX).read_bytes())
  run.write_config(config)
