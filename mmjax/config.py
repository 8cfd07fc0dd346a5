"""A run's settings: read a config file, apply overrides, check every value, explain what is wrong.

Defaults live in configs/base.py and nowhere else; here are the types and the rules. The dataclasses are frozen: after
`load_config` nothing changes a setting.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes of the network. See configs/base.py for what each field means."""

  vocab_size: int
  dim: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  max_seq_len: int
  norm_eps: float
  rope_theta: float
  dropout: float
  sublayer: str
  hidden_dim: int
  knowledge_num: int
  knowledge_dim: int
  num_selected: int
  n_experts: int
  experts_per_token: int
  aux_loss_weight: float

  @property
  def head_dim(self) -> int:
    """H, the width of one attention head."""
    return self.dim // self.n_heads

  @property
  def n_sub_keys(self) -> int:
    """C, the number of sub-keys in each half of the gate."""
    return math.isqrt(self.knowledge_num)

  @property
  def dense_hidden_dim(self) -> int:
    """F of the dense sublayer, with the seeds' rounding where the config leaves it at 0."""
    return self.hidden_dim or 64 * math.ceil(int(8 * self.dim / 3) / 64)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Which memory there is, where it stands, how it starts and learns."""

  layers: str
  input: str
  n_heads: int
  scores: str
  score_activation: str
  query_key_norm: str
  keys_init: str
  ffn_dim: int
  balance_loss_weight: float
  selection_bias: bool
  bank_init: str
  bank_file: str
  knowledge_length: int
  bank_std: float
  bank_lr_multiplier: float
  bank_lr_final_multiplier: float
  bank_decay_multiplier: float
  bank_grad_clip: float
  bank_update: str
  revive_after: int
  revive_noise: float
  revive_keys: bool

  def layer_numbers(self, n_layers: int) -> tuple[int, ...]:
    """Returns the layers, numbered from 0, that `layers` means in a model of so many.

    Raises:
      UserError: if it is not understood or names a layer that is not there.
    """
    if self.layers == 'all':
      return tuple(range(n_layers))
    if self.layers == 'middle':
      return tuple(range(n_layers // 4, n_layers - n_layers // 4))
    parts = [part.strip() for part in self.layers.split(',')]
    numbers = sorted({int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 10})
    if len(numbers) != len(parts) or numbers[-1] >= n_layers:
      raise UserError(
        f"memory.layers={_quote(self.layers)} must be 'all', 'middle' or different layers like '0,2', "
        f'numbered from 0 to {n_layers - 1}'
      )
    return tuple(numbers)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes rows."""

  train_files: str
  valid_files: str
  valid_fraction: float
  text_key: str
  on_bad_line: str
  tokenizer: str
  layout: str
  isolate_documents: bool
  prepared_dir: str
  workers: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimization, and when to report, evaluate and save."""

  batch_size: int
  accumulation_steps: int
  epochs: float
  max_steps: int
  learning_rate: float
  final_learning_rate: float
  warmup_steps: int
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  grad_clip: float
  dtype: str
  log_interval: int
  eval_interval: int
  checkpoint_interval: int
  max_loss_factor: float
  max_skipped_updates: int
  profile_steps: int


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """How the machine is used; none of it changes what is computed beyond rounding."""

  data_devices: int
  row_devices: int
  attention: str
  remat: str
  scan_layers: bool
  triton_gemm: bool
  coordinator: str
  num_processes: int
  process_id: int
  compilation_cache_dir: str


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run."""

  experiment: str
  seed: int
  model: ModelConfig
  memory: MemoryConfig
  data: DataConfig
  train: TrainConfig
  runtime: RuntimeConfig

  def to_dict(self) -> dict[str, Any]:
    """Returns nested plain dicts, as config.json holds them."""
    return dataclasses.asdict(self)


CHOICES = {
  'model.sublayer': ('dense', 'cross_attention', 'gated_fusion', 'memory_bag', 'moe'),
  'memory.input': ('attention', 'residual'),
  'memory.scores': ('none', 'scale'),
  'memory.score_activation': ('softmax', 'relu', 'none'),
  'memory.query_key_norm': ('none', 'l2', 'layer_norm'),
  'memory.keys_init': ('normal', 'uniform'),
  'memory.bank_init': ('normal', 'file'),
  'memory.bank_update': ('dense', 'lazy'),
  'data.on_bad_line': ('fail', 'skip'),
  'data.layout': ('packed', 'padded'),
  'train.dtype': ('float32', 'bfloat16'),
  'runtime.attention': ('auto', 'xla', 'xla_blocked', 'cudnn'),
  'runtime.remat': ('none', 'block'),
}
AT_LEAST = {
  'seed': 0, 'model.vocab_size': 300, 'model.dim': 2, 'model.n_layers': 1, 'model.n_heads': 1, 'model.n_kv_heads': 1,
  'model.max_seq_len': 2, 'model.norm_eps': 0, 'model.rope_theta': 1, 'model.dropout': 0, 'model.hidden_dim': 0,
  'model.knowledge_num': 1, 'model.knowledge_dim': 2, 'model.num_selected': 1, 'model.n_experts': 1,
  'model.experts_per_token': 1, 'model.aux_loss_weight': 0, 'memory.n_heads': 1,
  'memory.ffn_dim': 0, 'memory.balance_loss_weight': 0, 'memory.bank_std': 0, 'memory.bank_lr_multiplier': 0,
  'memory.bank_lr_final_multiplier': 0, 'memory.bank_decay_multiplier': 0, 'memory.bank_grad_clip': 0,
  'memory.revive_after': 0, 'memory.revive_noise': 0,
  'memory.knowledge_length': 2, 'data.workers': 0,
  'train.batch_size': 1, 'train.accumulation_steps': 1, 'train.epochs': 0, 'train.max_steps': 0,
  'train.learning_rate': 0, 'train.final_learning_rate': 0, 'train.warmup_steps': 0, 'train.beta1': 0,
  'train.beta2': 0, 'train.eps': 0, 'train.weight_decay': 0, 'train.grad_clip': 0, 'train.log_interval': 1,
  'train.eval_interval': 1, 'train.checkpoint_interval': 1, 'train.max_loss_factor': 0,
  'train.max_skipped_updates': 1,
  'train.profile_steps': 0,
  'runtime.data_devices': 0, 'runtime.row_devices': 1, 'runtime.num_processes': 1, 'runtime.process_id': 0,
}  # fmt: skip
MOST = 2**31 - 1  # of a whole number: sizes, steps and the seed are counted in 32 bits
MAX_LAYERS = 10_000
MAX_MEMORY_HEADS = 8
BELOW_ONE = ('model.dropout', 'data.valid_fraction', 'train.beta1', 'train.beta2')


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
  """Reads a config file and applies command-line overrides.

  Args:
    path: a Python file with `get_config() -> ConfigDict`, as in configs/.
    overrides: `--config.section.field=value` arguments; a value is read as the type of the field it replaces.

  Returns:
    The checked config.

  Raises:
    UserError: if there is no such file, it has no get_config, or a setting is unknown or breaks a rule.
  """
  settings = _read_config_file(path)
  for override in overrides:
    _apply_override(settings, override)
  return config_from_dict(settings.to_dict())


def config_from_dict(settings: Mapping[str, Any]) -> Config:
  """Builds and checks a config from nested dicts, as read from config.json.

  Raises:
    UserError: if a field is missing, unknown, of the wrong type or against a rule.
  """
  config = _build(Config, {name: value for name, value in settings.items() if name != 'sha256'}, '')
  check_config(config)
  return config


def check_config(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if a setting breaks a rule."""
  flat = flatten(config.to_dict())
  for name, choices in CHOICES.items():
    if flat[name] not in choices:
      raise UserError(f'{name}={_quote(flat[name])} must be one of {", ".join(choices)}{_nearest(flat[name], choices)}')
  for name, least in AT_LEAST.items():
    if isinstance(flat[name], int) and flat[name] > MOST:
      raise UserError(f'{name}={_short(flat[name])} must be at most {MOST}')
    if not (math.isfinite(flat[name]) and flat[name] >= least):
      raise UserError(f'{name}={_short(flat[name])} must be a finite number of at least {least}')
  for name in BELOW_ONE:
    if not 0 <= flat[name] < 1:
      raise UserError(f'{name}={flat[name]} must be at least 0 and below 1')
  if 0 < config.train.max_loss_factor <= 1:
    raise UserError(f'train.max_loss_factor={config.train.max_loss_factor} must be above 1, or 0 to skip no spikes')
  if not config.experiment or set(config.experiment) & set('/\\\0') or config.experiment.startswith('.'):
    raise UserError(f'experiment={_quote(config.experiment)} must be a plain folder name')
  if config.memory.bank_init == 'file' and not config.memory.bank_file:
    raise UserError("memory.bank_init='file' needs memory.bank_file; python -m mmjax.tools.bank build makes one")
  if config.memory.bank_update == 'lazy' and config.runtime.scan_layers:
    raise UserError("memory.bank_update='lazy' needs runtime.scan_layers=False: a scan reads one bank in all layers")
  if config.memory.selection_bias and config.memory.revive_after and config.memory.revive_keys:
    raise UserError('memory.revive_keys=True would copy sub-keys without their bias: memory.selection_bias needs False')
  if config.memory.n_heads > MAX_MEMORY_HEADS:
    raise UserError(f'memory.n_heads={config.memory.n_heads} must be at most {MAX_MEMORY_HEADS}')
  if config.model.n_layers > MAX_LAYERS:
    raise UserError(f'model.n_layers={config.model.n_layers} must be at most {MAX_LAYERS}')
  config.memory.layer_numbers(config.model.n_layers)
  _check_model(config.model)
  _check_processes(config.runtime)


def _check_model(model: ModelConfig) -> None:
  if model.dim % model.n_heads:
    small = [n for n in range(1, math.isqrt(model.dim) + 1) if model.dim % n == 0]
    nearest = min([*small, *(model.dim // n for n in small)], key=lambda n: abs(n - model.n_heads))
    raise UserError(
      f'model.dim={model.dim} must be divisible by model.n_heads={model.n_heads}; nearest: {nearest} heads'
    )
  if model.n_heads % model.n_kv_heads:
    raise UserError(f'model.n_heads={model.n_heads} must be divisible by model.n_kv_heads={model.n_kv_heads}')
  if model.head_dim % 2:
    raise UserError(
      f'model.dim={model.dim} / model.n_heads={model.n_heads} = {model.head_dim} must be even: RoPE turns pairs'
    )
  c = model.n_sub_keys
  if c * c != model.knowledge_num:
    raise UserError(f'model.knowledge_num={model.knowledge_num} must be a square; nearest: {c * c} and {(c + 1) ** 2}')
  if model.knowledge_dim % 2:
    raise UserError(
      f'model.knowledge_dim={model.knowledge_dim} must be even: it is two halves; nearest: {model.knowledge_dim + 1}'
    )
  if model.experts_per_token > model.n_experts:
    raise UserError(
      f'model.experts_per_token={model.experts_per_token} must be at most model.n_experts={model.n_experts}'
    )
  if model.num_selected > c:
    raise UserError(
      f'model.num_selected={model.num_selected} must be at most the {c} sub-keys that '
      f'model.knowledge_num={model.knowledge_num} gives each half'
    )


def _check_processes(runtime: RuntimeConfig) -> None:
  if runtime.process_id >= runtime.num_processes:
    raise UserError(
      f'runtime.process_id={runtime.process_id} must be below runtime.num_processes={runtime.num_processes}'
    )
  _, colon, port = runtime.coordinator.rpartition(':')
  if runtime.coordinator not in ('', 'auto') and not (colon and port.isascii() and port.isdigit()):
    raise UserError(f"runtime.coordinator={runtime.coordinator!r} must be host:port, such as 'node0:1234', or 'auto'")
  if not runtime.coordinator and runtime.num_processes > 1:
    raise UserError(
      f'runtime.num_processes={runtime.num_processes} needs runtime.coordinator, the host:port of process 0'
    )


def flatten(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Turns nested dicts into one dict with dotted names."""
  flat = {}
  for name, value in settings.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def call_python_file(path: str, what: str, function: str, arguments: Mapping[str, Any]) -> Any:
  """Runs a Python file of settings and returns what a function in it returns; the folder above its own is importable.

  Args:
    path: the file, as in configs/ and sweeps/.
    what: 'config file', 'sweep file': for messages.
    function: its name.
    arguments: of the function, by name.

  Raises:
    UserError: if there is no such file, it or the function fails, or the function has no such argument.
  """
  file = Path(path)
  if not file.is_file():
    known = sorted(str(p) for p in file.parent.glob('*.py')) if file.parent.is_dir() else []
    raise UserError(f'no {what} {path!r}{_nearest(path, known)}')
  root = str(file.resolve().parent.parent)
  if root not in sys.path:  # so that a config can say `from configs import base`
    sys.path.insert(0, root)
  spec = importlib.util.spec_from_file_location(f'settings_{file.stem}', file)
  if spec is None or spec.loader is None:
    raise UserError(f'{what} {path!r} must be a Python file (.py)')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    called = getattr(module, function)
    known = inspect.signature(called).parameters
    for name in arguments:
      if name not in known:
        raise UserError(f'{function}() has no argument {name!r}{_nearest(name, known)}')
    return called(**arguments)
  except UserError as error:
    raise UserError(f'{what} {path!r}: {error}') from error
  except Exception as error:  # noqa: BLE001 - a user's file may raise anything
    raise UserError(f'{what} {path!r} cannot be read: {type(error).__name__}: {error}') from error


def _read_config_file(path: str) -> ConfigDict:
  settings = call_python_file(path, 'config file', 'get_config', {})
  if not isinstance(settings, ConfigDict):
    raise UserError(f'config file {path!r}: get_config() must return an ml_collections.ConfigDict')
  return settings


def _apply_override(settings: ConfigDict, override: str) -> None:
  name, equals, text = override.removeprefix('--config.').partition('=')
  if not override.startswith('--config.') or not equals:
    raise UserError(f'argument {_quote(override)} is not understood; overrides look like --config.train.batch_size=32')
  flat = flatten(settings.to_dict())
  if name not in flat:
    raise UserError(f'no setting {_quote(name)}{_nearest(name, flat)}')
  section, _, field = name.rpartition('.')
  owner = settings[section] if section else settings
  with owner.ignore_type():
    owner[field] = _parse_value(name, text, type(flat[name]))


def _parse_value(name: str, text: str, kind: type) -> Any:
  if kind is str:
    return text
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise UserError(f'{name}={_quote(text)} must be True or False')
    return text.lower() == 'true'
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = None
  if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value % 1):
    raise UserError(f'{name}={_quote(text)} must be {"a whole number" if kind is int else "a number"}')
  return _convert(name, value, kind)


def _convert(name: str, value: float, kind: type) -> float:
  try:
    return kind(value)
  except OverflowError:  # a whole number beyond what a float holds
    raise UserError(f'{name}={_short(value)} must be a finite number') from None


def _short(value: float) -> str:
  """Writes a number; of one with a hundred digits the first ones."""
  return _cut(str(value))


def _quote(value: Any) -> str:
  """Writes what a user gave; of a page of it the beginning."""
  return _cut(repr(value), 300)


def _cut(text: str, length: int = 30) -> str:
  return text if len(text) <= length else f'{text[:length]}... ({len(text)} characters)'


def _build(cls: type, settings: Mapping[str, Any], prefix: str) -> Any:
  fields = {field.name: field.type for field in dataclasses.fields(cls)}
  for name in settings:
    if name not in fields:
      raise UserError(f'no setting {_quote(prefix + name)}{_nearest(name, fields, prefix)}')
  values = {}
  for name, kind in fields.items():
    if name not in settings:
      raise UserError(f'setting {prefix + name!r} is missing')
    value = settings[name]
    if dataclasses.is_dataclass(kind):
      if not isinstance(value, Mapping):
        raise UserError(f'{prefix + name}={_quote(value)} must be a section of settings')
      values[name] = _build(kind, value, f'{prefix}{name}.')
      continue
    if kind is float and type(value) is int:
      value = _convert(prefix + name, value, float)
    if type(value) is not kind:
      raise UserError(f'{prefix + name}={_quote(value)} must be of type {kind.__name__}')
    values[name] = value
  return cls(**values)


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any], prefix: str = '') -> str:
  """Returns '; did you mean X?' for the known name most like `name`, or nothing."""
  found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
  if not found:  # a field that was put into the wrong section
    field = str(name).rpartition('.')[2]
    found = [k for k in known if k.rpartition('.')[2] == field][:1]
  return f'; did you mean {prefix + found[0]!r}?' if found else ''
