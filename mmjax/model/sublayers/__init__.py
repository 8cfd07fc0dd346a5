"""What follows attention in a block, the one thing in which the experiments differ: a module for each.

A row of the table (mmjax/config/sublayers.py) names what makes a sublayer, a class or a function that is called as
`make(model, memory, rngs=rngs)` with these sections of a config. What it makes is an nnx.Module that is called as
`sublayer(inputs, dtype) -> SublayerOutput`, with a `SublayerInput` and the dtype of the matrix products. It has a
method `flops()`, which returns the FLOPs of a training step for a token by part (see mmjax.model.cost). What else the
code must know of it stands in its row.

It works position by position: what it adds at a position may depend on the inputs there alone. Decoding calls it with
the new position and keeps nothing of the earlier ones, and no sublayer sees where a document ends. Text is carried on
by attention and `last_BTn`. tests/test_generate.py compares decoding with whole texts for each row of the table.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from mmjax.config import Config
from mmjax.config.sublayers import bank_readers
from mmjax.memory.gate import score_weights
from mmjax.memory.types import Bank, SublayerOutput

__all__ = ['SublayerInput', 'SublayerOutput', 'row_weights']


class SublayerInput(NamedTuple):
  """What a sublayer may read.

  Attributes:
    h_BTD: float32 residual stream after attention was added.
    h_attn_BTD: what attention added to it, in the compute dtype.
    bank_MP: the shared bank, float32, perhaps tapped (mmjax.kernels.bank), or None in a model without one.
    last_BTn: int32, the last tokens at each position (mmjax.memory.ngram); None in a model where they address no row.
    key: a PRNG key, in training with dropout; otherwise None.
  """

  h_BTD: Array
  h_attn_BTD: Array
  bank_MP: Bank | None = None
  last_BTn: Array | None = None
  key: Array | None = None


def row_weights(config: Config, score_LBTR: Array) -> Array:
  """Returns how much each row that a token read counts, float32 weight_LBTR, from `Output.score_LBTR`.

  Where scores weigh rows: `score_weights` within each head, so with 'softmax' the weights of a head sum to 1.
  Where they do not: 1 / num_selected each, times the value of the gate where the sublayer gates tokens.
  """
  memory, r = config.memory, config.model.num_selected
  score_LBThr = score_LBTR.reshape(*score_LBTR.shape[:-1], memory.n_heads, r)
  weight_LBThr = [
    score_weights(score_BThr, memory.score_activation)
    if reader.scores_weigh(memory)
    else (score_BThr if reader.gates_tokens else jnp.ones_like(score_BThr)) / r
    for reader, score_BThr in zip(bank_readers(config).values(), score_LBThr, strict=True)
  ]
  return jnp.stack(weight_LBThr).reshape(score_LBTR.shape)
