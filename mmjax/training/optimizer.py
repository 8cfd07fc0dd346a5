"""AdamW as the record used it: clip by global norm, cosine schedule, decay on what gets a gradient."""

import re

import jax
import optax

from mmjax.config import Config, TrainConfig
from mmjax.model.lm import Params, abstract_params
from mmjax.model.sublayers import SUBLAYERS


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
  patterns = [rf'sublayer/{pattern}' for pattern in SUBLAYERS[config.model.sublayer].without_gradient]

  def learns(path: tuple, _: jax.Array) -> bool:
    return not any(re.search(pattern, path_name(path)) for pattern in patterns)

  return jax.tree_util.tree_map_with_path(learns, params)


def make_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
  """Returns the gradient transformation of a run of `total_steps` optimizer updates."""
  train = config.train
  steps = []
  if train.grad_clip:
    steps.append(optax.clip_by_global_norm(train.grad_clip))
  steps += [
    optax.scale_by_adam(train.beta1, train.beta2, train.eps),
    optax.add_decayed_weights(train.weight_decay, mask=gets_gradient(config, abstract_params(config))),
    optax.scale_by_learning_rate(learning_rate_schedule(train, total_steps)),
  ]
  return optax.chain(*steps)
