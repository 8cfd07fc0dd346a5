"""AdamW as the record used it: clip by global norm, cosine schedule, decay on what gets a gradient.

The bank may have a learning rate, a decay and a clip of its own.
"""

import re

import jax
import jax.numpy as jnp
import optax

from mmjax.config import Config, TrainConfig
from mmjax.model.lm import Params, abstract_params
from mmjax.model.sublayers import SUBLAYERS, layer_kinds


def path_name(path: tuple) -> str:
  """Turns a tree path into 'layers/0/sublayer/gate/keys', as patterns and messages name parameters."""
  return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> optax.Schedule:
  """Returns linear warm-up to the peak, then a cosine that reaches the final rate at `total_steps` updates."""
  cosine_steps = max(total_steps - train.warmup_steps, 1)
  final_share = train.final_learning_rate / train.learning_rate if train.learning_rate else 0.0
  cosine = optax.cosine_decay_schedule(train.learning_rate, cosine_steps, alpha=final_share)
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


def is_bank(params: Params) -> Params:
  """Returns a dict like `params` with True for the bank alone."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) == 'memory_bank', params)


def clip_bank_apart(largest: float, largest_of_bank: float) -> optax.GradientTransformation:
  """Clips the norm of the bank's gradient, and on its own that of all others; a limit of 0 does not clip."""

  def clip(grads: Params, params: Params | None) -> Params:
    others = {name: grad for name, grad in grads.items() if name != 'memory_bank'}
    clipped = _clip(others, largest)
    if 'memory_bank' in grads:
      clipped['memory_bank'] = _clip(grads['memory_bank'], largest_of_bank)
    return clipped

  return optax.stateless(clip)


def _clip(grads: Params, largest: float) -> Params:
  if not largest:
    return grads
  scale = jnp.minimum(1.0, largest / jnp.maximum(optax.global_norm(grads), 1e-30))
  return jax.tree.map(lambda grad: grad * scale, grads)


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
  """Returns the gradient transformation of a run of `total_steps` optimizer updates."""
  train, memory = config.train, config.memory
  params = abstract_params(config)
  learns, bank = gets_gradient(config, params), is_bank(params)
  steps = []
  if memory.bank_grad_clip:
    steps.append(clip_bank_apart(train.grad_clip, memory.bank_grad_clip))
  elif train.grad_clip:
    steps.append(optax.clip_by_global_norm(train.grad_clip))
  steps.append(optax.scale_by_adam(train.beta1, train.beta2, train.eps))
  if memory.bank_decay_multiplier == 1:
    steps.append(optax.add_decayed_weights(train.weight_decay, mask=learns))
  else:
    others = jax.tree.map(lambda learns, bank: learns and not bank, learns, bank)
    steps.append(optax.add_decayed_weights(train.weight_decay, mask=others))
    steps.append(optax.add_decayed_weights(train.weight_decay * memory.bank_decay_multiplier, mask=bank))
  if (memory.bank_lr_multiplier, memory.bank_lr_final_multiplier) != (1, 1):
    multiplier = optax.linear_schedule(
      memory.bank_lr_multiplier, memory.bank_lr_final_multiplier, max(total_steps - 1, 1)
    )
    steps.append(optax.masked(optax.scale_by_schedule(multiplier), bank))
  steps.append(optax.scale_by_learning_rate(learning_rate_schedule(train, total_steps)))
  return optax.chain(*steps)
