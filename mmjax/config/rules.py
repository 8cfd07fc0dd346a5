"""Which settings are allowed, and what is said of those that are not: field, value, rule and nearest fix."""

import math

from mmjax.config.history import removed_remark
from mmjax.config.parameters import Row, parameter_table, read_rows
from mmjax.config.schema import SETTINGS, Config, ModelConfig, RuntimeConfig
from mmjax.config.setting import flatten
from mmjax.config.sublayers import SUBLAYERS
from mmjax.config.wording import nearest, quote, short
from mmjax.errors import UserError

CHOICES = {name: setting.choices for name, setting in SETTINGS.items() if setting.choices}
CHOICES['model.sublayer'] = tuple(SUBLAYERS)
LEAST_CLIP = 1e-6  # a gradient that is cut to less moves nothing: Adam's square of it is 0


def check_fields(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if a setting by itself breaks a rule."""
  for name, value in flatten(config.to_dict()).items():
    if name in CHOICES and value not in CHOICES[name]:
      remark = removed_remark(name, value) or nearest(value, CHOICES[name])
      raise UserError(f'{name}={quote(value)} must be one of {", ".join(CHOICES[name])}{remark}')
    if type(value) in (int, float):
      _check_range(name, value, SETTINGS[name].least, SETTINGS[name].most)
  if 0 < config.train.grad_clip < LEAST_CLIP:
    raise UserError(f'train.grad_clip={config.train.grad_clip} must be at least {LEAST_CLIP}, or 0 for no clipping')
  if 0 < config.train.max_loss_factor <= 1:
    raise UserError(f'train.max_loss_factor={config.train.max_loss_factor} must be above 1, or 0 to skip no spikes')
  if config.memory.key_dim % 2:
    raise UserError(
      f'memory.key_dim={config.memory.key_dim} must be even: it is two halves; nearest: {config.memory.key_dim + 1}'
    )
  read_rows(config.train.parameters)
  if not config.experiment or set(config.experiment) & set('/\\\0') or config.experiment.startswith('.'):
    raise UserError(f'experiment={quote(config.experiment)} must be a plain folder name')


def _check_range(name: str, value: float, least: float, most: float) -> None:
  # With these ranges, and what `_check_decay` says, an update of finite parameters by a finite gradient is finite in
  # float32, but for what `may_overflow` of mmjax.training.optimizer names.
  if isinstance(value, int) and value > most:  # first: it may be too large for a float
    raise UserError(f'{name}={short(value)} must be at most {most}')
  if not (math.isfinite(value) and value >= least):
    raise UserError(f'{name}={short(value)} must be a finite number of at least {least}')
  if value > most:
    raise UserError(f'{name}={short(value)} must be at most {most:g}')


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
  train = config.train
  if not train.weight_decay and any(row.decay is not None for row in read_rows(train.parameters)):
    raise UserError(f'train.parameters={quote(train.parameters)}: a decay does nothing where train.weight_decay is 0')
  peak = max(train.learning_rate, train.final_learning_rate)
  for row in (Row('', stated_in=''), *parameter_table(config)):
    rate = peak * max(row.rates)
    decay = train.weight_decay * (1 if row.decay is None else row.decay)
    if rate * decay >= 1:
      what = f'train.learning_rate x {row.stated_in}'.removesuffix(' x ')
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
