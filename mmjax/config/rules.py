"""Which settings are allowed, and what is said of those that are not: field, value, rule and nearest fix."""

import math

from mmjax.config.history import removed_remark
from mmjax.config.schema import Config, ModelConfig, RuntimeConfig, flatten
from mmjax.config.sublayers import SUBLAYERS
from mmjax.config.wording import nearest, quote, short
from mmjax.errors import UserError

CHOICES = {
  'model.sublayer': SUBLAYERS,
  'memory.input': ('attention', 'residual'),
  'memory.scores': ('none', 'scale'),
  'memory.score_activation': ('softmax', 'relu'),
  'memory.query_key_norm': ('none', 'l2'),
  'memory.bank_init': ('normal', 'file'),
  'memory.bank_update': ('dense', 'lazy'),
  'data.on_bad_line': ('fail', 'skip'),
  'data.layout': ('packed', 'padded'),
  'train.dtype': ('float32', 'bfloat16'),
  'runtime.attention': ('auto', 'xla', 'xla_blocked', 'cudnn'),
  'runtime.remat': ('none', 'block'),
}
INT_MOST = 2**31 - 1  # of a whole number: sizes, steps and the seed are counted in 32 bits
RATE = (0, 10)
MULTIPLIER = (0, 1e4)  # of a rate or a decay
WEIGHT = (0, 1e3)  # of a loss, or a standard deviation
# The least and the most of every number. With these, and what _check_decay says, an update of finite parameters by a
# finite gradient is finite in float32, but for what `may_overflow` of mmjax.training.optimizer names.
RANGES = {
  'seed': (0, INT_MOST),
  'model.vocab_size': (2, INT_MOST), 'model.dim': (2, INT_MOST), 'model.n_layers': (1, 10_000),
  'model.n_heads': (1, INT_MOST), 'model.n_kv_heads': (1, INT_MOST), 'model.max_seq_len': (2, INT_MOST),
  'model.norm_eps': (1e-20, 1), 'model.rope_theta': (1, 1e15), 'model.dropout': (0, 1),
  'model.hidden_dim': (0, INT_MOST), 'model.knowledge_num': (1, INT_MOST), 'model.knowledge_dim': (2, INT_MOST),
  'model.num_selected': (1, INT_MOST), 'model.n_experts': (1, INT_MOST), 'model.experts_per_token': (1, INT_MOST),
  'model.aux_loss_weight': WEIGHT,
  'memory.n_heads': (1, 8), 'memory.key_dim': (0, INT_MOST), 'memory.ffn_dim': (0, INT_MOST),
  'memory.bank_std': WEIGHT, 'memory.bank_lr_multiplier': MULTIPLIER,
  'memory.bank_lr_final_multiplier': MULTIPLIER, 'memory.bank_decay_multiplier': MULTIPLIER,
  'memory.knowledge_length': (2, INT_MOST),
  'data.valid_fraction': (0, 1), 'data.workers': (0, 4096),
  'train.batch_size': (1, INT_MOST), 'train.accumulation_steps': (1, INT_MOST), 'train.epochs': (0, 1e9),
  'train.max_steps': (0, INT_MOST), 'train.learning_rate': RATE, 'train.embedding_lr_multiplier': MULTIPLIER,
  'train.final_learning_rate': RATE, 'train.warmup_steps': (0, INT_MOST), 'train.beta1': (0, 1),
  'train.beta2': (0, 1), 'train.eps': (1e-30, 1), 'train.weight_decay': (0, 100), 'train.grad_clip': (0, 1e19),
  'train.log_interval': (1, INT_MOST), 'train.eval_interval': (1, INT_MOST),
  'train.checkpoint_interval': (1, INT_MOST), 'train.max_loss_factor': (0, 1e6),
  'train.max_skipped_updates': (1, INT_MOST), 'train.profile_steps': (0, INT_MOST),
  'runtime.data_devices': (0, INT_MOST), 'runtime.row_devices': (1, INT_MOST),
  'runtime.num_processes': (1, INT_MOST), 'runtime.process_id': (0, INT_MOST),
}  # fmt: skip
BELOW_ONE = ('model.dropout', 'data.valid_fraction', 'train.beta1', 'train.beta2')
NEAREST_ONE = 1 - 1e-6  # for these: what is nearer to 1 may be 1 in float32
LEAST_CLIP = 1e-6  # a gradient that is cut to less moves nothing: Adam's square of it is 0


def check_fields(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if a setting by itself breaks a rule."""
  flat = flatten(config.to_dict())
  for name, choices in CHOICES.items():
    if flat[name] not in choices:
      remark = removed_remark(name, flat[name]) or nearest(flat[name], choices)
      raise UserError(f'{name}={quote(flat[name])} must be one of {", ".join(choices)}{remark}')
  for name in BELOW_ONE:
    if not 0 <= flat[name] < 1:
      raise UserError(f'{name}={flat[name]} must be at least 0 and below 1')
    if flat[name] > NEAREST_ONE:
      raise UserError(f'{name}={flat[name]} must be at most {NEAREST_ONE}: nearer to 1 it may be 1 in float32')
  for name, (least, most) in RANGES.items():
    if isinstance(flat[name], int) and flat[name] > most:  # first: it may be too large for a float
      raise UserError(f'{name}={short(flat[name])} must be at most {most}')
    if not (math.isfinite(flat[name]) and flat[name] >= least):
      raise UserError(f'{name}={short(flat[name])} must be a finite number of at least {least}')
    if flat[name] > most:
      raise UserError(f'{name}={short(flat[name])} must be at most {most:g}')
  if 0 < config.train.grad_clip < LEAST_CLIP:
    raise UserError(f'train.grad_clip={config.train.grad_clip} must be at least {LEAST_CLIP}, or 0 for no clipping')
  if 0 < config.train.max_loss_factor <= 1:
    raise UserError(f'train.max_loss_factor={config.train.max_loss_factor} must be above 1, or 0 to skip no spikes')
  if config.memory.key_dim % 2:
    raise UserError(
      f'memory.key_dim={config.memory.key_dim} must be even: it is two halves; nearest: {config.memory.key_dim + 1}'
    )
  if not config.experiment or set(config.experiment) & set('/\\\0') or config.experiment.startswith('.'):
    raise UserError(f'experiment={quote(config.experiment)} must be a plain folder name')


def check_together(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if settings break a rule together."""
  if not config.train.epochs and not config.train.max_steps:
    raise UserError('train.epochs=0.0 must be above 0, or train.max_steps: nothing would be trained')
  _check_decay(config)
  if config.memory.bank_init == 'file' and not config.memory.bank_file:
    raise UserError("memory.bank_init='file' needs memory.bank_file; python -m mmjax.tools.bank build makes one")
  _check_ngrams(config)
  _check_model(config.model)
  _check_processes(config.runtime)


def _check_decay(config: Config) -> None:
  """Raises UserError if an update would take more from a parameter than there is: it would grow without end."""
  train, memory = config.train, config.memory
  peak = max(train.learning_rate, train.final_learning_rate)
  of_bank = max(memory.bank_lr_multiplier, memory.bank_lr_final_multiplier)
  for what, rate, decay in (
    ('train.learning_rate', peak, train.weight_decay),
    ('train.learning_rate x train.embedding_lr_multiplier', peak * train.embedding_lr_multiplier, train.weight_decay),
    (
      'train.learning_rate x memory.bank_lr_multiplier',
      peak * of_bank,
      train.weight_decay * memory.bank_decay_multiplier,
    ),
  ):
    if rate * decay >= 1:
      raise UserError(
        f'{what}, {rate:g}, times its weight decay, {decay:g}, must be below 1: an update would take more from a '
        'parameter than there is (train.weight_decay)'
      )


def _check_ngrams(config: Config) -> None:
  memory = config.memory
  memory.ngram_of_heads()
  if not memory.ngram_layer_numbers(config.model.n_layers):
    return
  if memory.score_activation != 'softmax':
    raise UserError(
      f"memory.score_activation={quote(memory.score_activation)} must be 'softmax' with memory.ngram_layers: "
      'n-grams have no scores'
    )


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
