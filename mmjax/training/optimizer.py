"""AdamW as the record used it: clip by global norm, cosine schedule, decay on what gets a gradient.

The embedding may have a learning rate of its own, the bank also a decay; mmjax/training/lazy_bank.py updates
the bank row by row.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax.config import Config, MemoryConfig, TrainConfig
from mmjax.files import path_name
from mmjax.model.lm import BANK, Params, abstract_params, without_bank
from mmjax.model.sublayers import SUBLAYERS, layer_kinds
from mmjax.training.lazy_bank import is_lazy


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> optax.Schedule:
  """Returns linear warm-up to the peak, then a cosine that reaches the final rate at `total_steps` updates."""
  from_1_to_0 = optax.cosine_decay_schedule(1.0, max(total_steps - train.warmup_steps, 1))
  final = train.final_learning_rate

  def cosine(count: jax.Array | int) -> jax.Array:
    return final + (train.learning_rate - final) * from_1_to_0(count)

  if not train.warmup_steps:
    return cosine
  # From 1/warmup, not from 0: the first update moves the parameters too.
  warmup = optax.linear_schedule(train.learning_rate / train.warmup_steps, train.learning_rate, train.warmup_steps - 1)
  return optax.join_schedules([warmup, cosine], [train.warmup_steps])


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


def named(params: Params, name: str) -> Params:
  """Returns a dict like `params` with True for the parameter of this name alone."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) == name, params)


def bank_rate(config: Config, total_steps: int) -> optax.Schedule:
  """Returns the bank's learning rate as a function of the updates made before."""
  everyones, own = learning_rate_schedule(config.train, total_steps), bank_lr_multiplier(config.memory, total_steps)
  return lambda count: everyones(count) * own(count)


def bank_lr_multiplier(memory: MemoryConfig, total_steps: int) -> optax.Schedule:
  """Returns the bank's learning rate over that of all others: linear from the first update to the last."""
  first, last = memory.bank_lr_multiplier, memory.bank_lr_final_multiplier
  return optax.linear_schedule(first, last, max(total_steps - 1, 1))


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
  """Returns the gradient transformation of a run of `total_steps` optimizer updates.

  A bank that is updated lazily has its gradient, then of another shape, clipped with the others and no more.
  """
  clip = [optax.clip_by_global_norm(config.train.grad_clip)] if config.train.grad_clip else []
  params = abstract_params(config)
  if is_lazy(config):
    return optax.chain(*clip, apart_from_bank(optax.chain(*_adamw(config, without_bank(params), total_steps))))
  return optax.chain(*clip, *_adamw(config, params, total_steps))


def may_overflow(config: Config) -> bool:
  """Tells whether Adam could make of finite gradients and moments a step that is not finite.

  A step is mean / (sqrt(square) + eps) with both corrected. Where beta1 < sqrt(beta2) the mean fades before the square
  does, so that their ratio is bounded, whatever the gradients were, by (1 - beta1) / sqrt(1 - beta2) / (1 - beta1 /
  sqrt(beta2)); the moments themselves are averages of values that are finite where the gradient's norm is. Else only
  eps bounds it.
  """
  train, float32 = config.train, jnp.finfo(jnp.float32)
  largest_mean = train.grad_clip or float(float32.max) ** 0.5
  bounded = train.beta1**2 < train.beta2 or train.beta1 == 0
  return train.eps < float(float32.tiny) or not (bounded or largest_mean / train.eps < 1e20)


def apart_from_bank(others: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a transformation that leaves the bank's gradient as it is and keeps no state for it."""

  def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    updates, state = others.update(without_bank(grads), state, without_bank(params))
    return updates | {BANK: grads[BANK]}, state

  return optax.GradientTransformation(lambda params: others.init(without_bank(params)), update)


def _adamw(config: Config, params: Params, total_steps: int) -> list[optax.GradientTransformation]:
  train, memory = config.train, config.memory
  learns, bank = gets_gradient(config, params), named(params, BANK)
  steps = [optax.scale_by_adam(train.beta1, train.beta2, train.eps)]
  if memory.bank_decay_multiplier == 1:
    steps.append(optax.add_decayed_weights(train.weight_decay, mask=learns))
  else:
    others = jax.tree.map(lambda learns, bank: learns and not bank, learns, bank)
    steps.append(optax.add_decayed_weights(train.weight_decay, mask=others))
    steps.append(optax.add_decayed_weights(train.weight_decay * memory.bank_decay_multiplier, mask=bank))
  if (memory.bank_lr_multiplier, memory.bank_lr_final_multiplier) != (1, 1):
    steps.append(optax.masked(optax.scale_by_schedule(bank_lr_multiplier(memory, total_steps)), bank))
  if train.embedding_lr_multiplier != 1:
    steps.append(optax.masked(optax.scale(train.embedding_lr_multiplier), named(params, 'embedding')))
  steps.append(optax.scale_by_learning_rate(learning_rate_schedule(train, total_steps)))
  return steps
