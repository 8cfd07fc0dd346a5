"""What a sublayer is: the part of a block that follows attention, the one thing in which the experiments differ.

A sublayer is an nnx.Module built as `Sublayer(model, memory, rngs=rngs)`, from these sections of a config, and called
as `sublayer(h_BTD, h_attn_BTD, bank_MP, dtype, ngram_BThr) -> SublayerOutput`, where
  h_BTD       float32 residual stream after attention was added,
  h_attn_BTD  what attention added to it, in the compute dtype,
  bank_MP     the shared bank, float32, perhaps tapped (mmjax.kernels.bank), or None in a model without one,
  dtype       of the matrix products,
  ngram_BThr  int32 rows that the last tokens address (mmjax.model.ngram); None in a model where none of these is read.
What else the code must know of it stands in its row of mmjax/config/sublayers.py.
"""

from typing import NamedTuple

from jax import Array


class SublayerOutput(NamedTuple):
  """What a sublayer adds to the residual stream and to the training loss, and what it read.

  Rows are int32, head by head and best first in each; their scores are float32, before any activation.
  Rows that n-grams address are in no order, and their scores are 0.
  """

  delta_BTD: Array
  row_BTR: Array | None = None
  score_BTR: Array | None = None
  aux_loss: Array | float = 0.0
