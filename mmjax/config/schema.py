"""What a run's settings are: frozen dataclasses, a section each. Their meaning and defaults are in configs/base.py."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from mmjax.config.wording import quote
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
  ngram_layers: str
  input: str
  n_heads: int
  scores: str
  score_activation: str
  ngrams: str
  query_key_norm: str
  key_dim: int
  bag_gate: bool
  ffn_dim: int
  selection_bias: bool
  bank_init: str
  bank_file: str
  knowledge_length: int
  bank_std: float
  bank_lr_multiplier: float
  bank_lr_final_multiplier: float
  bank_decay_multiplier: float
  bank_update: str

  def ngram_of_heads(self) -> tuple[int, ...]:
    """Returns how many tokens each head looks at where n-grams address rows: those of `ngrams`, in turns.

    Raises:
      UserError: if `ngrams` is not understood.
    """
    sizes = [int(part) for part in self.ngrams.split(',') if re.fullmatch(r' *[1-9] *', part)]
    if len(sizes) != self.ngrams.count(',') + 1 or len(sizes) > self.n_heads:
      raise UserError(
        f"memory.ngrams={quote(self.ngrams)} must be numbers of tokens like '2,3', from 1 to 9 and no more than "
        f'memory.n_heads={self.n_heads}'
      )
    return tuple(sizes[head % len(sizes)] for head in range(self.n_heads))

  def query_dim(self, model: ModelConfig) -> int:
    """Returns Q, the width of a query of the gate and of two sub-keys: that of a row where `key_dim` is 0."""
    return self.key_dim or model.knowledge_dim

  def layer_numbers(self, n_layers: int) -> tuple[int, ...]:
    """Returns the layers, numbered from 0, that `layers` means in a model of so many.

    Raises:
      UserError: if it is not understood or names a layer that is not there.
    """
    return _layer_numbers('layers', self.layers, n_layers)

  def ngram_layer_numbers(self, n_layers: int) -> tuple[int, ...]:
    """Returns those of these layers that `ngram_layers` means.

    Raises:
      UserError: if it is not understood or names a layer that is not one of them.
    """
    numbers = _layer_numbers('ngram_layers', self.ngram_layers, n_layers) if self.ngram_layers else ()
    if without := set(numbers) - set(self.layer_numbers(n_layers)):
      raise UserError(
        f'memory.ngram_layers={quote(self.ngram_layers)} has layer {min(without)}, '
        f'which is not among memory.layers={quote(self.layers)}'
      )
    return numbers


def _layer_numbers(field: str, text: str, n_layers: int) -> tuple[int, ...]:
  if text == 'all':
    return tuple(range(n_layers))
  if text == 'middle':
    return tuple(range(n_layers // 4, n_layers - n_layers // 4))
  parts = [part.strip() for part in text.split(',')]
  numbers = sorted({int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 10})
  if len(numbers) != len(parts) or numbers[-1] >= n_layers:
    raise UserError(
      f"memory.{field}={quote(text)} must be 'all', 'middle' or different layers like '0,2', "
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
  embedding_lr_multiplier: float
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

  @property
  def update_rows(self) -> int:
    """A x B, the rows of one optimizer update."""
    return self.accumulation_steps * self.batch_size


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """How the machine is used; none of it changes what is computed beyond rounding."""

  data_devices: int
  row_devices: int
  attention: str
  remat: str
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


def flatten(settings: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Turns nested dicts into one dict with dotted names."""
  flat = {}
  for name, value in settings.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat
