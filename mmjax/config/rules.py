"""Which settings are allowed, and what is said of those that are not: field, value, rule and nearest fix."""

import math
import re
from typing import Any

from mmjax.choices import ONE_ROW, least_rows_of_ranges, not_even, not_square
from mmjax.config.history import removed_remark
from mmjax.config.optimizers import OPTIMIZERS
from mmjax.config.parameters import OF_BANK, OF_EMBEDDING, Rule, first_rule, parameter_table, read_rules
from mmjax.config.schema import SETTINGS, Config, ModelConfig
from mmjax.config.setting import flatten
from mmjax.config.sublayers import SUBLAYERS, bank_readers, layer_kinds
from mmjax.config.wording import nearest, quote, short
from mmjax.errors import UserError

CHOICES = {name: setting.choices for name, setting in SETTINGS.items() if setting.choices}
CHOICES |= {'model.sublayer': tuple(SUBLAYERS), 'train.optimizer': tuple(OPTIMIZERS)}
LEAST_CLIP = 1e-6  # a gradient that is cut to less moves nothing: Adam's square of it is 0


def check_fields(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if a setting by itself breaks a rule."""
  for name, value in flatten(config.to_dict()).items():
    if name in CHOICES and value not in CHOICES[name]:
      remark = removed_remark(name, value) or nearest(value, CHOICES[name])
      raise UserError(f'{name}={quote(value)} must be one of {", ".join(CHOICES[name])}{remark}')
    if isinstance(value, str):
      _refuse('\0' in value, f'{name}={quote(value)} must not hold the character NUL, which ends a path')
    if type(value) in (int, float):
      _check_range(f'{name}={short(value)}', value, SETTINGS[name].least, SETTINGS[name].most)
  clip, spike = config.train.grad_clip, config.train.max_loss_factor
  _refuse(0 < clip < LEAST_CLIP, f'train.grad_clip={clip} must be at least {LEAST_CLIP}, or 0 for no clipping')
  _refuse(0 < spike <= 1, f'train.max_loss_factor={spike} must be above 1, or 0 to skip no spikes')
  read_rules(config.train.parameters)
  name = config.experiment
  strange = not name.strip() or not name.isprintable() or set(name) & set('/\\') or name.startswith('.')
  _refuse(strange, f'experiment={quote(name)} must be a plain folder name')


def _refuse(broken: Any, said: str) -> None:
  if broken:
    raise UserError(said)


def _check_range(said: str, value: float, least: float, most: float) -> None:
  # With these ranges, and what `_check_decay` says, an update of finite parameters by a finite gradient is finite in
  # float32, but for what `may_overflow` of mmjax.training.optimizer names.
  _refuse(isinstance(value, int) and value > most, f'{said} must be at most {most}')  # it may be too large for a float
  finite = isinstance(value, int) or math.isfinite(value)
  _refuse(not (finite and value >= least), f'{said} must be a finite number of at least {least}')
  _refuse(value > most, f'{said} must be at most {most:g}')


def check_together(config: Config) -> None:
  """Raises UserError with field, value, rule and nearest fix if settings break a rule together."""
  memory, train, runtime = config.memory, config.train, config.runtime
  untrained = not train.epochs and not train.max_steps
  _refuse(untrained, 'train.epochs=0.0 and train.max_steps=0 would train nothing: one of them must be above 0')
  _check_decay(config)
  _refuse(
    memory.bank_init == 'file' and not memory.bank_file,
    "memory.bank_init='file' needs memory.bank_file; python -m mmjax.tools.bank build makes one",
  )
  memory.ngram_of_heads()  # raises, as the next do
  config.model.value_embedding_layers()
  memory.ngram_layer_numbers(config.model.n_layers)
  memory.value_layer_numbers(config.model.n_layers)
  _check_model(config.model)
  _check_rows(config)
  for name, default in (('bank_update', 'dense'), ('bank_moments', 'full')):
    _refuse(
      (value := getattr(memory, name)) != default and not OPTIMIZERS[train.optimizer].is_adam,
      f"memory.{name}={value!r} is Adam's; with train.optimizer={train.optimizer!r} it must be {default!r}",
    )
  _check_processes(runtime.coordinator, runtime.num_processes, runtime.process_id)


def check_learning(config: Config) -> None:
  """Raises UserError if something would not learn though it is there to; runs that were begun nevertheless go on."""
  model, optimizer = config.model, config.train.optimizer
  _refuse(
    config.memory.selection_bias and not OPTIMIZERS[optimizer].is_adam,
    f'memory.selection_bias=True needs a train.optimizer of Adam, not {optimizer!r}: the gradient of the biases is so '
    'small that no other moves them',
  )
  _refuse(
    model.sublayer == 'moe' and model.experts_per_token == 1 < model.n_experts and not model.aux_loss_weight,
    'model.experts_per_token=1 must be at least 2 with model.aux_loss_weight=0: the weight of one expert is always 1, '
    'so the router would not learn',
  )


def _check_decay(config: Config) -> None:
  """Raises UserError if an update would take more from a parameter than there is: it would grow without end.

  Of the bank and the embedding one rule may say the rate and another the decay. Where rows are taught, nothing decays.
  """
  train, table = config.train, parameter_table(config)
  named = [pattern.strip('^$') for pattern in (OF_BANK, OF_EMBEDDING)]
  _refuse(
    not train.weight_decay and any(rule.decay is not None for rule in read_rules(train.parameters)),
    f'train.parameters={quote(train.parameters)}: a decay does nothing when train.weight_decay is 0',
  )
  rules = [Rule('', stated_in=''), *(rule for rule in table if rule.pattern.strip('^$') not in named)]
  pairs = [(rule, rule) for rule in rules]
  pairs += [(first_rule(table, name, 'lr'), first_rule(table, name, 'decay')) for name in named]
  for of_rate, of_decay in () if config.memory.teach_rows else pairs:
    rate = max(train.learning_rate, train.final_learning_rate) * max(of_rate.rates)
    decay = train.weight_decay * (1 if of_decay is None or of_decay.decay is None else of_decay.decay)
    what = f'train.learning_rate x {of_rate.stated_in}'.removesuffix(' x ')
    _refuse(
      rate * decay >= 1,
      f'{what} ({rate:g}) times its weight decay ({decay:g}) must be below 1, or an update would take more from a '
      'parameter than there is (train.weight_decay)',
    )


def _check_model(model: ModelConfig) -> None:
  dim, heads, experts = model.dim, model.n_heads, model.n_experts
  kv_heads = model.n_kv_heads
  if dim % heads:
    others = [n for n in _divisors(dim) if n % kv_heads == 0 and dim // n % 2 == 0]
    also = f' or {_nearest(others, heads)} heads' if others else ''
    fits = max(round(dim / (2 * heads)), 1) * 2 * heads
    raise UserError(f'model.dim={dim} must be divisible by model.n_heads={heads}; nearest: model.dim={fits}{also}')
  rule = f'model.n_heads={heads} must be divisible by model.n_kv_heads={kv_heads}'
  _refuse(heads % kv_heads, f'{rule}; nearest: {_nearest(_divisors(heads), kv_heads)} kv heads')
  width = f'model.dim={dim} / model.n_heads={heads} = {model.head_dim}'
  _refuse(model.head_dim % 2, f'{width} must be even: RoPE rotates pairs; nearest: model.dim={dim + heads}')
  chosen = f'model.experts_per_token={model.experts_per_token}'
  _refuse(model.experts_per_token > experts, f'{chosen} must be at most model.n_experts={experts}')


def _check_rows(config: Config) -> None:
  """Raises UserError if the layers of a model cannot select the rows that the settings say."""
  model, memory = config.model, config.memory
  kinds = [SUBLAYERS[kind] for kind in layer_kinds(model, memory)]
  bank, C = model.knowledge_num, model.n_sub_keys
  selected = f'model.num_selected={model.num_selected} must be at most'
  if any(kind.has_gate for kind in kinds):
    name = 'memory.key_dim' if memory.key_dim else 'model.knowledge_dim'
    if said := not_square('model.knowledge_num', bank) or not_even(name, memory.query_dim(model)):
      raise UserError(said)
    _refuse(model.num_selected > C, f'{selected} the {C} sub-keys that model.knowledge_num={bank} gives each half')
    weighs = memory.score_activation == 'softmax' and any(kind.has_gate and kind.scores_weigh(memory) for kind in kinds)
    _refuse(
      weighs and model.num_selected == 1,
      f"model.num_selected=1 must be at least 2: {ONE_ROW}; or memory.score_activation must be 'relu'",
    )
  elif bank_readers(config):
    _refuse(model.num_selected > bank, f'{selected} model.knowledge_num={bank}, all rows of the bank')
  if memory.ngram_ranges == 'own' and any(reader.reads_ngrams for reader in bank_readers(config).values()):
    least = least_rows_of_ranges(memory.ngram_of_heads(), model.num_selected, model.vocab_size)
    _refuse(
      bank < least,
      f"model.knowledge_num={bank} must be at least {least} with memory.ngram_ranges='own': where one token addresses "
      f'rows, a head needs model.num_selected x model.vocab_size = {model.num_selected * model.vocab_size}',
    )
  if taught := memory.teach_rows:
    said = f'memory.teach_rows={taught}'
    _refuse(taught > bank, f'{said} must be at most model.knowledge_num={bank}, all rows of the bank')
    name = config.train.optimizer
    others = ' or '.join(repr(other) for other, optimizer in OPTIMIZERS.items() if not optimizer.matrices)
    wrong = []
    if memory.bank_update != 'dense':
      wrong.append(f"memory.bank_update='dense', not {quote(memory.bank_update)}")
    if OPTIMIZERS[name].matrices:
      wrong.append(f'train.optimizer={others}, not {name!r}, which is for matrices')
    _refuse(bool(wrong), f'{said} needs {", and ".join(wrong)}')


def _divisors(number: int) -> list[int]:
  small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
  return [*small, *(number // n for n in small)]


def _nearest(numbers: list[int], wanted: int) -> int:
  return min(numbers, key=lambda n: abs(n - wanted))


def _check_processes(address: str, processes: int, process: int) -> None:
  rule = f'runtime.process_id={process} must be below runtime.num_processes={processes}'
  _refuse(process >= processes, rule)
  found = re.fullmatch(r'(?:[^\s:]+|\[[^\s\]]+\]):([0-9]{1,5})', address)
  known = address in ('', 'auto') or (found and 0 < int(found[1]) < 2**16)
  rule = "host:port, such as 'node0:1234', with a port from 1 to 65535, or 'auto'"
  _refuse(not known, f'runtime.coordinator={address!r} must be {rule}')
  rule = f'runtime.num_processes={processes} needs runtime.coordinator, the host:port of process 0'
  _refuse(not address and processes > 1, rule)
