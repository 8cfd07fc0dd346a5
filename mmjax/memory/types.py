"""What goes into a memory and comes out of it."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mmjax.kernels.bank import Bank as Bank

Params = dict[str, Any]
Read = tuple[Array, Array]  # what becomes of the rows, delta_BTD, and their float32 scores, score_BThr


def shape_of(value: Any) -> tuple[int, ...] | str | None:
  """Returns the shape of an array; of anything else but None its type, for a message."""
  return value if value is None else getattr(value, 'shape', type(value).__name__)


def outside(number: Array, first: int, end: int, at: Any = ...) -> int | None:
  """Returns one of number[at] that is not in [first, end), which holds 0; None if all are, or nobody can look: traced.

  Args:
    number: whole numbers of any dtype and shape.
    first: of the range.
    end: of the range.
    at: an index.
  """
  if isinstance(number, jax.core.Tracer):
    return None
  known = np.asarray(number)[at]  # in NumPy, because within a trace JAX would put this into it
  return next((int(x) for x in (known.min(initial=0), known.max(initial=0)) if not first <= x < end), None)


class Selection(NamedTuple):
  """What is read at each position.

  Attributes:
    row_BThr: int32 in [0, M), best first; with a selection bias in the order of score plus bias.
    score_BThr: float32, before any softmax and without a bias.
    aux_loss: float32, of the choice.
    sign_BTh: int32, the numbers of the signs that n-grams have; None without signs.
    kept_BTh: float32 factors of the heads' sums, 0 where one is dropped; None without dropout.
  """

  row_BThr: Array
  score_BThr: Array
  aux_loss: Array | float = 0.0
  sign_BTh: Array | None = None
  kept_BTh: Array | None = None


class SublayerOutput(NamedTuple):
  """What a memory, or another sublayer, adds to the residual stream and to the training loss, and what it read.

  Rows are int32, head by head and best first in each; their scores are float32, before any activation. Rows that
  n-grams address are as they were given, in no order; their scores are 0 where the context does not weigh them, and the
  value of the gate in an `EngramBag`.
  """

  delta_BTD: Array
  row_BTR: Array | None = None
  score_BTR: Array | None = None
  aux_loss: Array | float = 0.0
