"""Every setting of a run, stated once: name, type, default, meaning, least and most or choices, what it needs.

A setting is a field of a frozen dataclass. configs/base.py lists them all for users, as `python -m mmjax.config` prints
them; mmjax/config/sublayers.py says which belong to which sublayer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.choices import ATTENTION_BACKENDS, NORM_EPS, QUERY_KEY_NORM, SCORE_ACTIVATION, SCORES, in_turns
from mmjax.config.optimizers import OPTIMIZERS
from mmjax.config.parameters import MOST, NEAREST_ONE, first_rule, read_rules
from mmjax.config.setting import field, settings_of
from mmjax.config.wording import quote
from mmjax.errors import UserError

MULTIPLIER = {'least': 0, 'most': MOST}  # of a rate or a decay
FIT_ALL = ('.*', '.+', '.')  # patterns of train.parameters that every name fits


def _unsaid(name: str, what: str) -> Callable[['Config'], bool]:
  """Tells whether train.parameters leaves the rate or the decay of a parameter to other settings."""
  return lambda config: first_rule(read_rules(config.train.parameters), name, what) is None


def _said_of_all(config: 'Config', what: str) -> bool:
  """Tells whether train.parameters gives a rate, a decay or a beta to every parameter."""
  return any(
    rule.pattern in FIT_ALL and getattr(rule, what) is not None for rule in read_rules(config.train.parameters)
  )


# fmt: off
# What a setting needs: whether a config has it, and what is said after 'does nothing' where it has not.
BANK_FILE = (lambda c: c.memory.bank_init == 'file', "without memory.bank_init='file'")
NO_BANK_FILE = (lambda c: c.memory.bank_init != 'file', "when memory.bank_init='file' gives the rows")
BANK_RATE = (_unsaid('memory_bank', 'lr'), "when train.parameters gives the bank's rate")
EMBEDDING_RATE = (_unsaid('embedding', 'lr'), "when train.parameters gives the embedding's rate")
BANK_DECAY = (lambda c: c.train.weight_decay > 0 and _unsaid('memory_bank', 'decay')(c),
  'when train.weight_decay is 0 or train.parameters gives the decay of the bank')
TRAIN_FILES = (lambda c: c.data.train_files, 'without data.train_files')
NO_VALID_FILES = (lambda c: not c.data.valid_files, 'when data.valid_files is set')
PACKED = (lambda c: c.data.layout == 'packed', "without data.layout='packed'")
MUON_RATE = 'muon_lr_multiplier'
WITH_MUON_RATE = [name for name, optimizer in OPTIMIZERS.items() if optimizer.rate_of_matrices == MUON_RATE]
MUON = (lambda c: OPTIMIZERS[c.train.optimizer].rate_of_matrices == MUON_RATE and not _said_of_all(c, 'lr'),
  f"without train.optimizer={' or '.join(map(repr, WITH_MUON_RATE))}, or when train.parameters gives every rate")
NO_ADAM = "with a train.optimizer that is not Adam's"
ADAM = (lambda c: OPTIMIZERS[c.train.optimizer].is_adam, NO_ADAM)
BETA1, BETA2 = (
  (lambda c, what=what: ADAM[0](c) and not _said_of_all(c, what),
    f'{NO_ADAM}, or when train.parameters gives every {what}')
  for what in ('beta1', 'beta2')
)
DECAY = (lambda c: not _said_of_all(c, 'decay') or any(rule.decay for rule in read_rules(c.train.parameters)),
  'when train.parameters sets every decay to 0')
WARMDOWN = (lambda c: c.train.schedule == 'warmdown', "without train.schedule='warmdown'")
NO_STEPS = (lambda c: not c.train.max_steps, 'when train.max_steps is set; max_steps=0 lets epochs end the run')
ADDRESS = (lambda c: c.runtime.coordinator != 'auto', "with runtime.coordinator='auto'")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes of the network."""

  vocab_size: int = field(6400, 'V: pieces of a tokenizer that is trained; a given tokenizer may have fewer', 2)
  dim: int = field(512, 'D: width of the residual stream', 2)
  n_layers: int = field(8, '', 1, 10_000)
  n_heads: int = field(32, 'N: query heads, each dim / n_heads wide', 1)
  n_kv_heads: int = field(8, 'K: key and value heads; the record names none, and 8 gives its parameter count', 1)
  max_seq_len: int = field(512, 'T: positions in a row', 2)
  norm_eps: float = field(NORM_EPS, '', 1e-20, 1)
  rope_theta: float = field(1e6, '', 1, 1e15)
  dropout: float = field(0.0, 'drops values of the embedding and of what each sublayer adds, but no attention weights',
    0, NEAREST_ONE)
  qk_norm: bool = field(False, "True: each head's queries and keys pass an RMSNorm with a learned scale", before=False)
  value_embeddings: str = field(
    '', "layers whose values get an embedding of the token: '1,3', 'all', 'alternate'; '': none",
    before='')
  sublayer: str = field('gated_fusion',
    'what follows attention: a row of mmjax/config/sublayers.py')
  hidden_dim: int = field(0, 'F of the dense sublayer and of each expert; 0: 64 * ceil(int(8 * dim / 3) / 64)')
  knowledge_num: int = field(65536,
    'M: rows of the bank; a square with product keys (sqrt(M) sub-keys in each half)', 1)
  knowledge_dim: int = field(128, 'P: width of a row; even, if it is also that of queries', 2)
  num_selected: int = field(8, 'rows that each head of a memory reads for a token', 1)
  n_experts: int = field(4, "E: routed experts of the 'moe' sublayer", 1)
  experts_per_token: int = field(2, 'routed experts that a token uses; a shared one comes on top', 1)
  aux_loss_weight: float = field(0.1, "weight of the experts' load-balance loss", 0, 1e3)

  def value_embedding_layers(self) -> tuple[int, ...]:
    """Returns the layers, numbered from 0, that `value_embeddings` means.

    Raises:
      UserError: if it is not understood or names a layer that is not there.
    """
    return _layer_numbers('model.value_embeddings', self.value_embeddings, self.n_layers, also='alternate')

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
    """F of the dense sublayer, rounded as in the record's code where the config leaves it at 0."""
    return self.hidden_dim or 64 * math.ceil(int(8 * self.dim / 3) / 64)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Which memory there is, where it stands, how it starts and learns."""

  layers: str = field(
    'all', "layers with a memory: also 'middle' (all but the first and last quarter), '2,3'; 0 is first")
  ngram_layers: str = field('', "those of memory.layers with an 'ngram_bag' instead of a gate: '1,3'; '': none",
    before='')
  value_layers: str = field('', "layers whose values get rows of n-grams: '1,3', 'all', 'alternate'; '': none",
    before='')
  input: str = field('attention', "the memory reads what attention added; 'residual': it reads the residual stream",
    choices=('attention', 'residual'))
  n_heads: int = field(1, '1 to 64; each has queries and sub-keys, or hashes, of its own; all read the one bank', 1, 64)
  ngrams: str = field('1', "how many of the last tokens address a row or bucket; '2,3': heads take turns",
    before='1')
  ngram_ranges: str = field(
    'shared', "'own': each head has a range of rows to itself; single tokens need no hash in it",
    choices=('shared', 'own'), before='shared')
  ngram_signs: bool = field(False, "True: a second hash of an n-gram flips signs in what its rows give", before=False)
  row_dropout: float = field(0.0, "probability that training drops what a head read; the rest is scaled up",
    0, NEAREST_ONE, before=0.0)
  scores: str = field(
    'none', "'scale' multiplies rows by their weights, so that the gate learns; a 'memory_bag' always does",
    choices=SCORES)
  score_activation: str = field('softmax', "makes weights of the scores of a head's rows; also 'relu'",
    choices=SCORE_ACTIVATION)
  query_key_norm: str = field(
    'none', "'l2': halves of queries and sub-keys have length 1, and scores have a learned scale",
    choices=QUERY_KEY_NORM)
  key_dim: int = field(
    0, "width of a query, which is two sub-keys, or in an 'ngram_bucket' one key; even; 0: knowledge_dim", before=0)
  bag_gate: bool = field(True, "multiplies a bag's sums by silu(m Wu) before their projection; False: does not",
    before=True)
  ffn_dim: int = field(0, 'F of a feed-forward layer next to each memory; 0: none')
  selection_bias: bool = field(
    False, 'True: learned biases, used only to choose rows, even out how often rows are read',
    before=False)
  bank_init: str = field(
    'normal', "first values of the bank: 'normal' draws them with bank_std, 'file' reads bank_file",
    choices=('normal', 'file'))
  bank_file: str = field('', 'made by python -m mmjax.tools.bank build', is_path=True, needs=BANK_FILE)
  knowledge_length: int = field(32, 'tokens in a snippet of text that becomes a row of a bank file', 2, needs=BANK_FILE)
  bank_std: float = field(
    1.0, "standard deviation of the bank's first values; also of those in a bank file that is built",
    0, 1e3, needs=NO_BANK_FILE)
  bank_lr_multiplier: float = field(1.0, "factor of the bank's learning rate at the first update",
    **MULTIPLIER, needs=BANK_RATE)
  bank_lr_final_multiplier: float = field(1.0, 'that factor at the last update; linear in between',
    **MULTIPLIER, needs=BANK_RATE)
  bank_decay_multiplier: float = field(1.0, "factor of the bank's weight decay; 0: none",
    **MULTIPLIER, needs=BANK_DECAY)
  bank_update: str = field('dense', "Adam on all rows; 'lazy': on those that an update read; pays if they are few",
    choices=('dense', 'lazy'), before='dense')
  bank_moments: str = field(
    'full', "Adam's: 'full', mean and square of values; 'square', no mean; 'row', one square a row",
    choices=('full', 'square', 'row'), before='full')
  teach_rows: int = field(
    0, 'with --init_from: at most so many rows learn in an update, much read now, little before; 0: all', before=0)

  def ngram_of_heads(self) -> tuple[int, ...]:
    """Returns how many tokens each head looks at where n-grams address rows: those of `ngrams`, in turns.

    Raises:
      UserError: if `ngrams` is not understood.
    """
    sizes = [int(part) for part in self.ngrams.split(',') if re.fullmatch(r' *[1-9] *', part)]
    if len(sizes) != self.ngrams.count(',') + 1 or len(sizes) > self.n_heads:
      raise UserError(
        f"memory.ngrams={quote(self.ngrams)} must be numbers of tokens from 1 to 9, such as '2,3', "
        f'and no more of them than memory.n_heads={self.n_heads}'
      )
    return in_turns(sizes, self.n_heads)

  def query_dim(self, model: ModelConfig) -> int:
    """Returns Q, the width of a query of the gate and of two sub-keys: that of a row where `key_dim` is 0."""
    return self.key_dim or model.knowledge_dim

  def layer_numbers(self, n_layers: int) -> tuple[int, ...]:
    """Returns the layers, numbered from 0, that `layers` means in a model of so many.

    Raises:
      UserError: if it is not understood or names a layer that is not there.
    """
    return _layer_numbers('memory.layers', self.layers, n_layers)

  def ngram_layer_numbers(self, n_layers: int) -> tuple[int, ...]:
    """Returns those of these layers that `ngram_layers` means.

    Raises:
      UserError: if it is not understood or names a layer that is not one of them.
    """
    numbers = _layer_numbers('memory.ngram_layers', self.ngram_layers, n_layers)
    if without := set(numbers) - set(self.layer_numbers(n_layers)):
      raise UserError(
        f'memory.ngram_layers={quote(self.ngram_layers)} has layer {min(without)}, '
        f'which is not among memory.layers={quote(self.layers)}'
      )
    return numbers

  def value_layer_numbers(self, n_layers: int) -> tuple[int, ...]:
    """Returns the layers, of any kind, that `value_layers` means.

    Raises:
      UserError: if it is not understood or names a layer that is not there.
    """
    return _layer_numbers('memory.value_layers', self.value_layers, n_layers, also='alternate')


def _layer_numbers(field: str, text: str, n_layers: int, also: str = 'middle') -> tuple[int, ...]:
  if text == 'all':
    return tuple(range(n_layers))
  if not text and field != 'memory.layers':
    return ()
  if text == also == 'alternate':
    return tuple(range((n_layers - 1) % 2, n_layers, 2))
  if text == also == 'middle':
    return tuple(range(n_layers // 4, n_layers - n_layers // 4))
  parts = [part.strip() for part in text.split(',')]
  numbers = sorted({int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 10})
  if len(numbers) != len(parts) or numbers[-1] >= n_layers:
    raise UserError(
      f"{field}={quote(text)} must be 'all', '{also}' or different layers such as '0,2', "
      f'from 0 to {n_layers - 1}'
    )
  return tuple(numbers)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes rows."""

  train_files: str = field(
    '', "comma-separated paths, globs: .jsonl .txt .md .py (.gz .xz .zst) .parquet; '': embedded corpus")
  valid_files: str = field('', "the same, held out; '': a share of the training documents")
  valid_fraction: float = field(0.01, "that share, by a hash of each text, or one of few; 0 (prepare only): none",
    0, NEAREST_ONE, needs=NO_VALID_FILES)
  text_key: str = field('text', 'key of the text in a jsonl line, or its column in a parquet file', needs=TRAIN_FILES)
  on_bad_line: str = field('fail', "'fail' stops at the first bad line and names it; 'skip' counts and reports them",
    choices=('fail', 'skip'), needs=TRAIN_FILES)
  tokenizer: str = field('', "a SentencePiece model or a tokenizer.json; '': train one on the training text",
    is_path=True)
  layout: str = field('packed', "'packed': one stream cut into rows; 'padded': one document a row, as in the record",
    choices=('packed', 'padded'))
  isolate_documents: bool = field(False, 'packed rows only: True keeps attention within a document', needs=PACKED)
  prepared_dir: str = field(
    'out/data', 'where token shards are written and found; or, without train_files, prepared text', is_path=True)
  workers: int = field(0, 'tokenizer processes; 0: one for each CPU core, at most 16', 0, 4096)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimization, and when to report, evaluate and save."""

  batch_size: int = field(64, 'B: rows in a micro-batch, over all devices', 1)
  accumulation_steps: int = field(
    8, 'micro-batches in an update; a run may go on with another split of the same product', 1)
  epochs: float = field(3.0, 'passes over the training rows; max_steps takes their place', 0, 1e9, needs=NO_STEPS)
  max_steps: int = field(0, 'optimizer updates; 0: as many as the epochs give')
  optimizer: str = field(
    'adamw', "also 'muon': matrices of layers by Muon, all else by AdamW; 'sgd': plain gradient descent",
    before='adamw')
  learning_rate: float = field(2e-4, 'peak', 0, 10)
  muon_lr_multiplier: float = field(5.0, 'factor of the learning rate of the matrices that Muon moves',
    **MULTIPLIER, before=5.0, needs=MUON)
  embedding_lr_multiplier: float = field(
    1.0, "factor of the embedding's learning rate; the embedding is also the output layer",
    **MULTIPLIER, before=1.0, needs=EMBEDDING_RATE)
  parameters: str = field('', "rates, decays and betas by name: 'gate lr=0.5; norm decay=0'; '': none", before='')
  schedule: str = field('cosine', "after the warm-up; also 'warmdown': the peak, then linear to the final rate",
    choices=('cosine', 'warmdown'), before='cosine')
  warmdown_share: float = field(0.4, 'share of all updates, at the end, in which the rate falls', 0, 1, before=0.4,
    needs=WARMDOWN)
  final_learning_rate: float = field(0.0, 'at the end of the schedule', 0, 10)
  warmup_steps: int = field(0, 'linear, before the schedule')
  beta1: float = field(0.9, '', 0, NEAREST_ONE, needs=BETA1)
  beta2: float = field(0.999, '', 0, NEAREST_ONE, needs=BETA2)
  eps: float = field(1e-8, '', 1e-30, 1, needs=ADAM)
  weight_decay: float = field(0.01, 'on every parameter that gets a gradient', 0, 100, needs=DECAY)
  grad_clip: float = field(1.0, 'largest global gradient norm; 0: no clipping', 0, 1e19)
  dtype: str = field('bfloat16', 'dtype of matrix products; parameters, optimizer and row selection stay float32',
    choices=('float32', 'bfloat16'))
  log_interval: int = field(10, 'updates between lines of metrics', 1)
  eval_interval: int = field(500, 'updates between evaluations on the whole validation set', 1)
  checkpoint_interval: int = field(500, 'updates between checkpoints', 1)
  max_loss_factor: float = field(
    0.0, 'skips updates whose loss is above this many times its running average; 0: none', 0, 1e6, before=0.0)
  max_skipped_updates: int = field(10, 'this many skipped updates in a row end the run',
    1)
  profile_steps: int = field(0, 'updates to trace into <workdir>/profile, from the second of a start to a save; 0: off',
    before=0)

  @property
  def update_rows(self) -> int:
    """A x B, the rows of one optimizer update."""
    return self.accumulation_steps * self.batch_size


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """How the machine is used; beyond rounding it changes only the masks of dropout, by the number of devices."""

  data_devices: int = field(0, 'devices that divide the batch; 0: all that row_devices leaves')
  row_devices: int = field(1, 'devices over which the rows of the bank are divided; they share the batch, too', 1)
  attention: str = field('auto', "'xla', 'xla_blocked', 'cudnn'; 'auto': cudnn on NVIDIA, blocked on a CPU",
    choices=('auto', *ATTENTION_BACKENDS))
  remat: str = field('none', "'block' recomputes each block in the backward pass: less memory, more time",
    choices=('none', 'block'))
  triton_gemm: bool = field(
    False, "True lets XLA use its Triton kernels on NVIDIA; False: cuBLAS and XLA's own fusions", before=False)
  coordinator: str = field('', "host:port of the first of several processes; 'auto': JAX detects it; '': one process",
    before='')
  num_processes: int = field(1, 'processes of the run, if runtime.coordinator is a host:port',
    1, before=1, needs=ADDRESS)
  process_id: int = field(0, 'number of this process, from 0', before=0, needs=ADDRESS)
  compilation_cache_dir: str = field(
    '', "keep compiled steps here, '': nowhere; XLA's warnings mean nothing on the same CPU", is_path=True)


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run."""

  experiment: str = field(
    'base', "the run's name; its work directory is out/<experiment> unless --workdir says otherwise")
  seed: int = field(0, 'initial weights, dropout and the order of rows')
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)

  @property
  def update_positions(self) -> int:
    """Positions of an update, padding too."""
    return self.train.update_rows * self.model.max_seq_len

  def to_dict(self) -> dict[str, Any]:
    """Returns nested plain dicts, as config.json holds them."""
    return dataclasses.asdict(self)

  def with_settings(self, settings: Mapping[str, Any]) -> 'Config':
    """Returns the config with other values of settings, {'train.batch_size': 8}; no rule is looked at."""
    config = self
    for name, value in settings.items():
      section, _, field = name.rpartition('.')
      part = dataclasses.replace(getattr(config, section) if section else config, **{field: value})
      config = dataclasses.replace(config, **{section: part}) if section else part
    return config

  def without_teaching(self) -> 'Config':
    """Returns the settings of the same model elsewhere, where nobody can tell which of its rows were taught."""
    return self.with_settings({'memory.teach_rows': 0})

# fmt: on

SETTINGS = dict(settings_of(Config))
