"""A run directory from a file of weights, and a file from a run. The commands: mmjax/tools/convert.py.

A model that the PyTorch code has goes under its names, any other under mmjax's own. A .safetensors that `export_run`
wrote tells all settings of its model; what a state dict of the PyTorch code cannot tell comes from a config.
"""

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mmjax import __version__
from mmjax.choices import not_square
from mmjax.config import (
  Config,
  TrainConfig,
  as_of_today,
  config_from_dict,
  flatten,
  idle_settings,
  load_config,
  overrides_of,
)
from mmjax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file_name
from mmjax.errors import UserError
from mmjax.files import removed_unless_whole, sha256_of
from mmjax.interop.files import format_of, read_metadata, read_tensors, write_tensors
from mmjax.interop.names import (
  TIED,
  canonical,
  check_accounted,
  not_in_pytorch,
  tensor_shapes,
  to_params,
  to_tensors,
)
from mmjax.interop.sizes import fitting_heads, read_kv_heads, read_sizes, untold_settings
from mmjax.model.cost import count_params
from mmjax.model.params import Params
from mmjax.run.checkpoint import NO_TRAINING, TOKENIZER_SHA256, Checkpoints
from mmjax.run.compressed import read_params, refuse_compressed
from mmjax.run.directory import RunDir, open_run, refuse_used, write_tokenizer
from mmjax.run.identity import CUT, compare_models
from mmjax.run.leaves import refuse_non_finite
from mmjax.training.optimizer import make_optimizer
from mmjax.training.state import init_state

HEADER = 'mmjax'  # key in the header of a .safetensors: a JSON object
DTYPE = 'train.dtype'  # key in that object: what the model was trained in, which files of earlier versions do not say


def import_run(
  source: Path, out: Path, config_file: str, overrides: Sequence[str], tokenizer: str | None, dtype: str | None
) -> None:
  """Makes a run directory at step 0 from a file of weights. Nothing is written before everything fits.

  Args:
    source: .pth, .pt or .safetensors with the PyTorch code's names, or a .safetensors with mmjax's.
    out: new run directory.
    config_file: where settings come from that the file does not tell.
    overrides: `--config.section.field=value` arguments.
    tokenizer: file of the tokenizer that the weights were trained with.
    dtype: 'float32' casts tensors of other dtypes; None refuses them.

  Raises:
    UserError: if the file, the settings and the tokenizer do not fit each other, or `out` is in use.
  """
  refuse_used(out)
  tensors = as_float32(canonical(read_tensors(source), str(source)), str(source), cast=dtype is not None)
  header = read_header(source)
  shapes = {name: value.shape for name, value in tensors.items()}
  config = fitting_config(shapes, str(source), config_file, overrides, header.get('settings', {}))
  if rows := config.memory.teach_rows:
    raise UserError(f'memory.teach_rows={rows} must be 0 in an import: it is for train.py --init_from')
  check_accounted(shapes, tensor_shapes(config), str(source))
  vocabulary = None if tokenizer is None else load_tokenizer(tokenizer, most=config.model.vocab_size)
  stated = header.get(TOKENIZER_SHA256)
  if vocabulary and stated not in (None, vocabulary.sha256):
    raise UserError(f'tokenizer {tokenizer!r} is not that of {source}, as the hash in its header shows; give that one')

  params = to_params(tensors, config)
  with RunDir(out) as run, removed_unless_whole(out, 'config.json'):
    found = {'step_before': header.get('step'), TOKENIZER_SHA256: vocabulary.sha256 if vocabulary else stated}
    counters = NO_TRAINING | {name: value for name, value in found.items() if value}
    Checkpoints(out).save(0, init_state(config, make_optimizer(config, 1), params), counters)
    if vocabulary:
      write_tokenizer(out / tokenizer_file_name(vocabulary.path), vocabulary)
    run.write_config(config)
  _say_imported(config, params, out, vocabulary)


def read_header(source: Path) -> dict[str, Any]:
  """Returns what `export_run` wrote into the header of a file: `settings` and more; {} for files of others.

  The settings are those of the model and, where it says that, train.dtype.

  Raises:
    UserError: if it is damaged.
  """
  metadata = read_metadata(source)
  if HEADER not in metadata:
    return {}
  try:
    header = json.loads(metadata[HEADER])
    settings = {section: dict(values) for section, values in header['settings'].items()}
    settings = as_of_today(settings, to_train=False)
    settings.get('memory', {}).pop('teach_rows', None)  # files of earlier versions hold it
    if type(header.get('step', 0)) is not int or header.get('step', 0) < 0:
      raise ValueError(f'step={header["step"]!r} must be a whole number')
    if not isinstance(header.get(TOKENIZER_SHA256, ''), str):
      raise ValueError(f'{TOKENIZER_SHA256}={header[TOKENIZER_SHA256]!r} must be text')
  except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{source}: its header {HEADER!r} is damaged: {error!r}') from None
  unknown = [name for name in flatten(settings) if not name.startswith(('model.', 'memory.')) and name not in CUT]
  if unknown:
    raise UserError(f'{source}: its header {HEADER!r} sets {unknown[0][:80]!r}, which is no setting of a model')
  return header | {'settings': settings | ({'train': {'dtype': header[DTYPE]}} if DTYPE in header else {})}


def export_run(workdir: Path, target: Path, which: str, dtype: str | None) -> None:
  """Writes a run's weights into a file, under the PyTorch code's names if it has such a model, else under mmjax's.

  The header of a .safetensors holds the settings of the model, train.dtype, the step and the hash of the tokenizer.

  Args:
    workdir: run directory.
    target: new file, .pth, .pt or .safetensors; `<target>.sha256` is written beside it.
    which: 'best', 'last' or the number of a step.
    dtype: cast to this; None keeps float32.

  Raises:
    UserError: if there is no such run, a .pth is asked for and the PyTorch code has no such model, a value is too large
      for `dtype`, or `target` is there already.
  """
  tells_settings = format_of(target).read_metadata is not None
  run = open_run(workdir, needs_tokenizer=False)
  config = run.read_config()
  refuse_compressed(run, 'exported')
  foreign = not_in_pytorch(config)
  if foreign and not tells_settings:
    raise UserError(f'the PyTorch code has no {foreign} and could not read {str(target)!r}; use .safetensors')
  tensors, step, tokenizer_sha256 = read_weights(run, config, which, dtype)
  if not foreign:
    tensors[TIED] = tensors['tok_embeddings.weight']
  header = {'version': __version__, 'names': 'mmjax' if foreign else 'pytorch', 'step': step}
  header |= {'settings': _model_settings(config), DTYPE: config.train.dtype}
  if run.tokenizer_path.exists():
    tokenizer_sha256 = sha256_of(run.tokenizer_path)
  if tokenizer_sha256:
    header[TOKENIZER_SHA256] = tokenizer_sha256
  digest = write_tensors(target, tensors, {HEADER: json.dumps(header)} | ({} if foreign else {'format': 'pt'}))
  print(f'{target}: {len(tensors)} tensors of {dtype or "float32"} from step {step} of {workdir}; sha256 {digest}')
  if foreign:
    print(f"Written under mmjax's names, because the PyTorch code has no {foreign}")
  if tells_settings:
    print(f'The header holds all settings of the model and {DTYPE}, so import needs no --config')
  else:
    print(f'The tensors do not say: {untold_settings(config)}')


def _model_settings(config: Config) -> dict[str, dict[str, Any]]:
  """Returns the settings of a model in a file, which holds its bank; of training, the bank's own rates and rule."""
  own = config.without_teaching().with_settings({'memory.bank_init': 'normal', 'memory.bank_file': ''})
  own, settings = dataclasses.replace(own, train=TrainConfig()), {}
  for name, value in flatten(own.to_dict()).items():
    section, _, field = name.partition('.')
    if (section in ('model', 'memory') or name in CUT) and name not in idle_settings(own):
      settings.setdefault(section, {})[field] = value
  return settings


def read_weights(
  run: RunDir, config: Config, which: str, dtype: str | None
) -> tuple[dict[str, np.ndarray], int, str | None]:
  """Returns the tensors of a run's checkpoint as `to_tensors` names them, cast to `dtype`; its step; a hash or None.

  The step of an import is that of the run that it was exported from; the hash is that of its tokenizer.

  Raises:
    UserError: if there is no such checkpoint, or a value is too large for `dtype`.
  """
  params, counters, step = read_params(run, config, which)
  tensors = to_tensors(params, config)
  if dtype:
    tensors = {name: _cast(name, value, np.dtype(dtype)) for name, value in tensors.items()}
  return tensors, step or counters.get('step_before', 0), counters.get(TOKENIZER_SHA256)


def _cast(name: str, value: np.ndarray, dtype: DTypeLike) -> np.ndarray:
  with np.errstate(over='ignore'):
    cast = value.astype(dtype, copy=False)
  if cast is value:
    return value
  if np.isfinite(value).all() and not np.isfinite(cast).all():
    most, advice = np.abs(value).max(), '; bfloat16 holds them' if np.dtype(dtype) == np.float16 else ''
    raise UserError(f'{name} has values up to {most:.3g}, too large for {np.dtype(dtype).name}{advice}')
  return cast


def as_float32(tensors: Mapping[str, np.ndarray], source: str, *, cast: bool) -> dict[str, np.ndarray]:
  """Returns float32 tensors.

  Raises:
    UserError: if some have another dtype and `cast` is False, or values that are not finite in float32.
  """
  others = sorted({value.dtype.name for value in tensors.values()} - {'float32'})
  if others and not cast:
    raise UserError(
      f'{source} holds tensors of {" and ".join(others)}; run directories hold float32: --dtype float32 casts them'
    )
  if others:
    print(f'Casting tensors of {" and ".join(others)} to float32')
  tensors = {name: _cast(name, value, np.float32) for name, value in tensors.items()}
  refuse_non_finite(tensors, f'{source} cannot be imported')
  return tensors


def fitting_config(
  shapes: Mapping[str, tuple[int, ...]],
  source: str,
  config_file: str,
  overrides: Sequence[str],
  told: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
  """Returns the config with every setting that the file tells, and says which ones those are.

  Args:
    shapes: canonical name -> shape.
    source: the file, for messages.
    config_file: where all other settings come from.
    overrides: `--config.section.field=value` arguments.
    told: sections of settings in the file's header; without any, sizes are read off PyTorch's names and shapes.

  Raises:
    UserError: if an override contradicts the file, or the result breaks a rule.
  """
  if told:
    return _config_of_header(told, source, config_file, overrides)
  if any('/' in name for name in shapes) and 'tok_embeddings.weight' not in shapes:
    print(
      f'{source} has no settings in its header, so all come from the config; those of an exported run: RUN/config.json'
    )
    return load_config(config_file, overrides)
  return _config_of_shapes(shapes, source, config_file, overrides)


def _config_of_shapes(
  shapes: Mapping[str, tuple[int, ...]], source: str, config_file: str, overrides: Sequence[str]
) -> Config:
  sizes = read_sizes(shapes, source)
  if 'dim' not in sizes:
    raise UserError(f'{source}: tok_embeddings.weight is missing, or is no matrix')
  overridden = dict(override.removeprefix('--config.').partition('=')[::2] for override in overrides)
  kind = overridden.get('model.sublayer', sizes['sublayer'])
  if kind != sizes['sublayer']:  # before the others, which mean nothing in another model
    raise UserError(
      f'model.sublayer={kind!r} contradicts {source}, whose tensors say {sizes["sublayer"]!r}; leave it out'
    )
  if said := not_square('rows of memory_bank', sizes.get('knowledge_num', 1)):
    raise UserError(f'{source}: {said}')
  heads = overridden.get('model.n_heads')
  if heads is None:
    with contextlib.suppress(UserError):  # of a file that is no config without overrides
      heads = str(load_config(config_file).model.n_heads)
  if heads and heads.isdecimal():  # before a rule refuses them for the width, which the file says
    read_kv_heads(shapes, sizes['dim'], int(heads), source)
  first = load_config(config_file, [*_as_overrides(sizes, 'model.'), *overrides, '--config.model.n_kv_heads=1']).model
  sizes['n_kv_heads'] = read_kv_heads(shapes, first.dim, first.n_heads, source)
  hidden_dim = sizes.get('hidden_dim')
  if hidden_dim == dataclasses.replace(first, hidden_dim=0).dense_hidden_dim:
    sizes['hidden_dim'] = 0  # what the config calls the usual width
  config = load_config(config_file, [*_as_overrides(sizes, 'model.'), *overrides])
  if foreign := not_in_pytorch(config):
    given = foreign.partition('=')[0] in overridden
    mend = 'leave it out' if given else f'{config_file} says so: name another config'
    raise UserError(f'the PyTorch code has no {foreign}, and {source} has its names; {mend}')
  for name, value in sizes.items():
    given = getattr(config.model, name)
    if given != value and not (name == 'hidden_dim' and config.model.dense_hidden_dim == hidden_dim):
      raise UserError(f'model.{name}={given!r} contradicts {source}, whose tensors say {value!r}; leave it out')
  told = sizes | ({'hidden_dim': hidden_dim} if hidden_dim else {})
  print('Read from the tensors: ' + ', '.join(f'{name} {value}' for name, value in told.items()))
  print(f'Taken from the config: {untold_settings(config)}')
  others = [n for n in fitting_heads(shapes, config.model.dim) if n != config.model.n_heads]
  if others and 'model.n_heads' not in overridden:
    numbers = ', '.join(map(str, others))
    print(f'Numbers of heads that fit, too, and make another model: {numbers} (--config.model.n_heads)')
  if kind == 'cross_attention' and 'model.num_selected' not in overridden:
    rows = config.model.num_selected
    print(f'The tensors do not tell how many rows a token reads: {rows} are assumed (--config.model.num_selected)')
  return config


def _config_of_header(
  told: Mapping[str, Mapping[str, Any]], source: str, config_file: str, overrides: Sequence[str]
) -> Config:
  settings = load_config(config_file).to_dict()
  try:
    own = config_from_dict(settings | {section: settings[section] | values for section, values in told.items()})
  except UserError as error:
    raise UserError(f'header of {source}: {error}') from None
  config = load_config(config_file, [*_as_overrides(overrides_of(own, config_file)), *overrides])
  compare_models(own, config, source)
  trained_in = f', and {DTYPE} {own.train.dtype}' if 'train' in told and own.train.dtype == config.train.dtype else ''
  print(f'Read from the header: the settings of the model{trained_in}')
  return config


def _as_overrides(settings: Mapping[str, Any], section: str = '') -> list[str]:
  return [f'--config.{section}{name}={value}' for name, value in settings.items()]


def _say_imported(config: Config, params: Params, out: Path, tokenizer: Tokenizer | None) -> None:
  total, without_bank = count_params(params)
  place = shlex.quote(str(out))
  print(f'{out}: {total:,} parameters ({without_bank:,} without the bank), step 0, fresh optimizer')
  if tokenizer:
    if spare := config.model.vocab_size - tokenizer.vocab_size:
      print(f'The tokenizer has {tokenizer.vocab_size} pieces, so {spare} rows of the embedding are spare')
    print(f'Evaluate: python eval.py --workdir {place} --valid_files TEXT')
    print(f'Sample:   python -m mmjax.tools.sample --workdir {place}')
  else:
    print('No --tokenizer was given, so this run reads and writes token ids instead of text')
  more = '' if tokenizer else ' --config.data.tokenizer=FILE'
  train_on = f"--config {place}/config.json --workdir {place} --config.data.train_files='TEXT'{more}"
  print(f'Train on: python train.py {train_on}')
