"""Which settings are allowed, and what is said of those that are not: field, value, rule and nearest fix."""

import math

from mmjax.config.schema import Config, ModelConfig, RuntimeConfig, flatten
from mmjax.config.sublayers import SUBLAYERS
from mmjax.config.wording import nearest, quote, short
from mmjax.errors import UserError

CHOICES = {
  'model.sublayer': SUBLAYERS,
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
  'seed': 0, 'model.vocab_size': 2, 'model.dim': 2, 'model.n_layers': 1, 'model.n_heads': 1, 'model.n_kv_heads': 1,
  'model.max_seq_len': 2, 'model.norm_eps': 0, 'model.rope_theta': 1, 'model.dropout': 0, 'model.hidden_dim': 0,
  'model.knowledge_num': 1, 'model.knowledge_dim': 2, 'model.num_selected': 1, 'model.n_experts': 1,
  'model.experts_per_token': 1, 'model.aux_loss_weight': 0, 'memory.n_heads': 1, 'memory.key_dim': 0,
  'memory.ffn_dim': 0, 'memory.balance_loss_weight': 0, 'memory.bank_std': 0, 'memory.bank_lr_multiplier': 0,
  'memory.bank_lr_final_multiplier': 0, 'memory.bank_decay_multiplier': 0, 'memory.bank_grad_clip': 0,
  'memory.revive_after': 0, 'memory.revive_noise': 0,
  'memory.knowledge_length': 2, 'data.workers': 0,
  'train.batch_size': 1, 'train.accumulation_steps': 1, 'train.epochs': 0, 'train.max_steps': 0,
  'train.learning_rate': 0, 'train.embedding_lr_multiplier': 0, 'train.final_learning_rate': 0,
  'train.warmup_steps': 0, 'train.beta1': 0,
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


def check_fields(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if a setting by itself breaks a rule."""
  flat = flatten(config.to_dict())
  for name, choices in CHOICES.items():
    if flat[name] not in choices:
      raise UserError(f'{name}={quote(flat[name])} must be one of {", ".join(choices)}{nearest(flat[name], choices)}')
  for name, least in AT_LEAST.items():
    if isinstance(flat[name], int) and flat[name] > MOST:
      raise UserError(f'{name}={short(flat[name])} must be at most {MOST}')
    if not (math.isfinite(flat[name]) and flat[name] >= least):
      raise UserError(f'{name}={short(flat[name])} must be a finite number of at least {least}')
  for name in BELOW_ONE:
    if not 0 <= flat[name] < 1:
      raise UserError(f'{name}={flat[name]} must be at least 0 and below 1')
  if 0 < config.train.max_loss_factor <= 1:
    raise UserError(f'train.max_loss_factor={config.train.max_loss_factor} must be above 1, or 0 to skip no spikes')
  if config.memory.key_dim % 2:
    raise UserError(
      f'memory.key_dim={config.memory.key_dim} must be even: it is two halves; nearest: {config.memory.key_dim + 1}'
    )
  if config.memory.n_heads > MAX_MEMORY_HEADS:
    raise UserError(f'memory.n_heads={config.memory.n_heads} must be at most {MAX_MEMORY_HEADS}')
  if config.model.n_layers > MAX_LAYERS:
    raise UserError(f'model.n_layers={config.model.n_layers} must be at most {MAX_LAYERS}')
  if not config.experiment or set(config.experiment) & set('/\\\0') or config.experiment.startswith('.'):
    raise UserError(f'experiment={quote(config.experiment)} must be a plain folder name')


def check_together(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if settings break a rule together."""
  if config.memory.bank_init == 'file' and not config.memory.bank_file:
    raise UserError("memory.bank_init='file' needs memory.bank_file; python -m mmjax.tools.bank build makes one")
  if config.memory.bank_update == 'lazy' and config.runtime.scan_layers:
    raise UserError("memory.bank_update='lazy' needs runtime.scan_layers=False: a scan reads one bank in all layers")
  if config.memory.selection_bias and config.memory.revive_after and config.memory.revive_keys:
    raise UserError('memory.revive_keys=True would copy sub-keys without their bias: memory.selection_bias needs False')
  _check_ngrams(config)
  _check_model(config.model)
  _check_processes(config.runtime)


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
  if memory.revive_after:
    raise UserError(f'memory.revive_after={memory.revive_after} must be 0 where n-grams address rows: they reach all')


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
