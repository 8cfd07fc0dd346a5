"""AdamW as the record used it: clip by global norm, cosine schedule, decay on what gets a gradient; or Muon.

Any parameter may have a rate, a decay and betas of its own: mmjax/config/parameters.py has the table. A bank that is
updated row by row is the work of mmjax/training/lazy_bank.py.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mmjax.config import Config, TrainConfig
from mmjax.config.optimizers import OPTIMIZERS
from mmjax.config.parameters import MATRIX, SAYS, Rule, betas_of, first_rule, moments_of, parameter_table, read_rules
from mmjax.config.sublayers import SUBLAYERS, layer_kinds
from mmjax.errors import UserError
from mmjax.files import first_three, named_leaves, path_name
from mmjax.model.params import BANK, Params, abstract_params, without_bank
from mmjax.training.row_gradients import is_lazy


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> optax.Schedule:
  """Returns linear warm-up to the peak, then what falls to the final rate at `total_steps` updates.

  That is a cosine, or the peak and a line over the last train.warmdown_share of all updates, as in nanochat
  (https://github.com/karpathy/nanochat).
  """
  falls = max(total_steps - train.warmup_steps, 1)
  from_1_to_0 = optax.cosine_decay_schedule(1.0, falls)
  if train.schedule == 'warmdown':
    steps = min(max(round(train.warmdown_share * total_steps), 1), falls)
    from_1_to_0 = optax.linear_schedule(1.0, 0.0, steps, falls - steps)
  final = train.final_learning_rate

  def decline(count: jax.Array | int) -> jax.Array:
    return final + (train.learning_rate - final) * from_1_to_0(count)

  if not train.warmup_steps:
    return decline
  # From 1/warmup, not from 0: the first update moves the parameters too.
  warmup = optax.linear_schedule(train.learning_rate / train.warmup_steps, train.learning_rate, train.warmup_steps - 1)
  return optax.join_schedules([warmup, decline], [train.warmup_steps])


def gets_gradient(config: Config, params: Params) -> Params:
  """Returns a dict like `params` with False where no gradient ever arrives (the gate of 1.4.2), else True.

  Torch's AdamW skips parameters without a gradient; optax would still decay them.
  """
  patterns = [
    rf'layers/{layer}/sublayer/{pattern}'
    for layer, kind in enumerate(layer_kinds(config.model, config.memory))
    for pattern in SUBLAYERS[kind].without_gradient(config.memory)
  ]

  def learns(path: tuple, _: jax.Array) -> bool:
    return not any(re.search(pattern, path_name(path)) for pattern in patterns)

  return jax.tree_util.tree_map_with_path(learns, params)


def check_parameters(config: Config) -> str:
  """Returns what a user should know of the rates of parameters: which of them are 0; '' where none is.

  Raises:
    UserError: if a rule of train.parameters sets nothing: no parameter fits and learns, or all are set above.
  """
  train, rules, table = config.train, read_rules(config.train.parameters), parameter_table(config)
  params = abstract_params(config)
  names = [name for name, learns in named_leaves(gets_gradient(config, params)) if learns]
  is_adam = OPTIMIZERS[train.optimizer].is_adam
  is_matrix = dict(named_leaves(by_muon(config, params)))
  by_adam = {name for name in names if is_adam and not is_matrix[name]}
  for rule in rules:
    fitting = [name for name in names if re.search(rule.pattern, name)]
    if not fitting:
      known = dict.fromkeys(re.sub(r'/\d+/', '/N/', name) for name in names)
      raise UserError(f'train.parameters: {rule.pattern!r} fits no parameter that learns; those are {", ".join(known)}')
    for what in SAYS:
      averaged = {name for name in by_adam if what != 'beta1' or moments_of(config, name) == 'full'}
      if what.startswith('beta') and getattr(rule, what) is not None and not averaged.intersection(fitting):
        why = 'keeps no such average of what it fits' if by_adam.intersection(fitting) else 'moves nothing that it fits'
        raise UserError(
          f'train.parameters: the {what} of {rule.pattern!r} does nothing, because Adam {why}; leave it out'
        )
      if getattr(rule, what) is not None and not any(first_rule(rules, name, what) is rule for name in fitting):
        raise UserError(
          f'train.parameters: the {what} of {rule.pattern!r} does nothing, because earlier rules give one to every '
          'parameter that it fits; put it before them or leave it out'
        )
  still = not max(train.learning_rate, train.final_learning_rate)
  frozen = [name for name in names if still or ((rule := first_rule(table, name, 'lr')) and not any(rule.rates))]
  said = f'{len(frozen)} of {len(names)} parameters have a learning rate of 0 and do not learn: '
  return said + first_three(frozen, 'parameters') if frozen else ''


def rate_multiplier(rule: Rule, total_steps: int) -> optax.Schedule:
  """Returns what a rule makes of everyone's learning rate: linear from the first update to the last."""
  return optax.linear_schedule(*rule.rates, max(total_steps - 1, 1))


def bank_rate(config: Config, total_steps: int) -> optax.Schedule:
  """Returns the bank's learning rate as a function of the updates made before."""
  everyones = learning_rate_schedule(config.train, total_steps)
  own = rate_multiplier(first_rule(parameter_table(config), BANK, 'lr'), total_steps)
  return lambda count: everyones(count) * own(count)


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
  """Returns the gradient transformation of a run of `total_steps` optimizer updates.

  Of a bank that is updated lazily it takes the norm of the gradient instead, for clipping, and makes nothing of it.

  Raises:
    UserError: as `check_parameters` does.
  """
  clip = [optax.clip_by_global_norm(config.train.grad_clip)] if config.train.grad_clip else []
  check_parameters(config)
  params = abstract_params(config)
  if config.memory.teach_rows:
    rate = bank_rate(config, total_steps)
    return optax.chain(*clip, of_bank_alone(optax.chain(_direction(config, BANK), optax.scale_by_learning_rate(rate))))
  if is_lazy(config):
    return optax.chain(*clip, apart_from_bank(optax.chain(*_steps(config, without_bank(params), total_steps))))
  return optax.chain(*clip, *_steps(config, params, total_steps))


def may_overflow(config: Config) -> bool:
  """Tells whether Adam could make of finite gradients and moments a step that is not finite.

  A step is mean / (sqrt(square) + eps) with both corrected. Where beta1 < sqrt(beta2) the mean fades before the square
  does, so that their ratio is bounded, whatever the gradients were, by (1 - beta1) / sqrt(1 - beta2) / (1 - beta1 /
  sqrt(beta2)); the moments themselves are averages of values that are finite where the gradient's norm is. Else only
  eps bounds it. Of other steps, such as the gradient itself, only clipping is known to bound one.
  """
  train, float32 = config.train, jnp.finfo(jnp.float32)
  largest_mean = train.grad_clip or float(float32.max) ** 0.5
  if not OPTIMIZERS[train.optimizer].is_adam:
    return not train.grad_clip
  sources = [train, *read_rules(train.parameters)]
  beta1s, beta2s = ({getattr(source, what) for source in sources} - {None} for what in ('beta1', 'beta2'))
  bounded = max(beta1s) ** 2 < min(beta2s) or max(beta1s) == 0
  return train.eps < float(float32.tiny) or not (bounded or largest_mean / train.eps < 1e20)


def apart_from_bank(others: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a transformation that leaves the bank's gradient as it is and keeps no state for it."""

  def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    updates, state = others.update(without_bank(grads), state, without_bank(params))
    return updates | {BANK: grads[BANK]}, state

  return optax.GradientTransformation(lambda params: others.init(without_bank(params)), update)


def of_bank_alone(steps: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a transformation that makes updates of the bank, and none of anything else."""

  def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    return steps.update({BANK: grads[BANK]}, state, {BANK: params[BANK]})

  return optax.GradientTransformation(lambda params: steps.init({BANK: params[BANK]}), update)


def gradient_step(train: TrainConfig, beta1: float, beta2: float) -> optax.GradientTransformation:
  """Returns the gradient as it is."""
  return optax.identity()


def adam_step(train: TrainConfig, beta1: float, beta2: float) -> optax.GradientTransformation:
  """Returns Adam's step (Kingma and Ba 2015, arXiv:1412.6980)."""
  return optax.scale_by_adam(beta1, beta2, train.eps)


class SquareState(NamedTuple):
  """Updates made, int32, and mean squares, float32, like the parameters; by row (..., 1)."""

  count: jax.Array
  square: Params


def square_step(train: TrainConfig, beta2: float, *, by_row: bool) -> optax.GradientTransformation:
  """Returns Adam's step without a mean; `by_row`: with one mean square for each row, the last axis.

  What has no gradient stays where it is.

  Source: by row it is the AdaGrad of Lerer et al. 2019, arXiv:1903.12287, with Adam's moving average instead of a sum.
  """

  def squared(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x), axis=-1, keepdims=True) if by_row else jnp.square(x)

  def init(params: Params) -> SquareState:
    return SquareState(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.zeros_like(squared(x)), params))

  def update(grads: Params, state: SquareState, params: Params | None = None) -> tuple[Params, SquareState]:
    count = optax.safe_increment(state.count)
    square = jax.tree.map(lambda old, g: beta2 * old + (1 - beta2) * squared(g), state.square, grads)
    steps = jax.tree.map(lambda g, new: g / (jnp.sqrt(new / (1 - beta2**count)) + train.eps), grads, square)
    return steps, SquareState(count, square)

  return optax.GradientTransformation(init, update)


def muon_step(train: TrainConfig) -> optax.GradientTransformation:
  """Returns Muon for matrices (in, out): momentum, orthogonalised, times sqrt(max(1, out / in)).

  Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, through optax.contrib.
  """

  def widen(updates: Params, params: Params | None) -> Params:
    return jax.tree.map(lambda x: x * max(1.0, x.shape[1] / x.shape[0]) ** 0.5, updates)

  def in_and_out(params: Params) -> Params:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)

  return optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=in_and_out), optax.stateless(widen))


def by_muon(config: Config, params: Params) -> Params:
  """Returns a dict like `params` with True where Muon moves one, and not Adam."""
  muon = bool(OPTIMIZERS[config.train.optimizer].matrices)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: muon and leaf.ndim == 2 and bool(re.search(MATRIX, path_name(path))), params
  )


def _direction(config: Config, name: str) -> optax.GradientTransformation:
  """Returns the step before its rate of a parameter that Muon does not move."""
  if (moments := moments_of(config, name)) != 'full':
    return square_step(config.train, betas_of(config, name)[1], by_row=moments == 'row')
  return OPTIMIZERS[config.train.optimizer].make(config.train, betas_of(config, name))


def _steps(config: Config, params: Params, total_steps: int) -> list[optax.GradientTransformation]:
  """Returns the steps after clipping. Their order, with none for a rule at 1, is the layout of the state on disk."""
  train, table = config.train, parameter_table(config)
  decays = [rule for rule in table if rule.decay not in (None, 1)]
  learns = gets_gradient(config, params)

  def mask(what: str, follows: Callable[[Rule | None], bool]) -> Params:
    """Returns a dict like `params` with True where one learns and the rule that says `what` of it `follows`."""
    return jax.tree_util.tree_map_with_path(
      lambda path, learns: learns and follows(first_rule(table, path_name(path), what)), learns
    )

  matrix = by_muon(config, params)

  def kind(name: str) -> tuple:
    return betas_of(config, name), moments_of(config, name)

  kinds = {kind(name): name for name, moved in named_leaves(matrix) if not moved}
  steps = [_direction(config, name) for name in kinds.values()]
  by_matrices = OPTIMIZERS[train.optimizer].matrices
  if by_matrices or len(kinds) > 1:
    for i, own in enumerate(kinds):
      follows = jax.tree_util.tree_map_with_path(
        lambda path, moved, own=own: not moved and kind(path_name(path)) == own, matrix
      )
      steps[i] = optax.masked(steps[i], follows)
  if by_matrices:
    steps.append(optax.masked(OPTIMIZERS[train.optimizer].make_of_matrices(train), matrix))
  steps.append(optax.add_decayed_weights(train.weight_decay, mask=mask('decay', lambda rule: rule not in decays)))
  for rule in decays:
    own = mask('decay', lambda other, rule=rule: other is rule)
    steps.append(optax.add_decayed_weights(train.weight_decay * rule.decay, mask=own))
  for rule in table:
    if rule.rates != (1, 1):
      changes = isinstance(rule.lr, tuple)
      scale = optax.scale_by_schedule(rate_multiplier(rule, total_steps)) if changes else optax.scale(rule.lr)
      steps.append(optax.masked(scale, mask('lr', lambda other, rule=rule: other is rule)))
  steps.append(optax.scale_by_learning_rate(learning_rate_schedule(train, total_steps)))
  return steps
