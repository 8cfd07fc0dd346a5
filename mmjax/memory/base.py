"""What every memory is: sizes, first parameters, and what it adds to its input. Next: gate.py, which rows it reads."""

import dataclasses
from abc import ABC, abstractmethod

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from mmjax.choices import NORM_EPS
from mmjax.kernels.matmul import at_least_float32
from mmjax.kernels.mesh import on_any_mesh
from mmjax.memory.checks import check_inputs, check_sizes
from mmjax.memory.types import Bank, Params, Read, Selection, SublayerOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(ABC):
  """Sizes of a memory, which norms its input, selects rows for each token and reads them.

  Attributes:
    dim: D, width of the residual stream.
    n_rows: M, rows of the bank.
    row_dim: P, width of a row.
    n_heads: h; each reads rows of its own.
    rows_per_head: r, rows that a head reads at each position.
    norm_eps: of the root-mean-square norm of the input.
  """

  dim: int
  n_rows: int
  row_dim: int
  n_heads: int = 1
  rows_per_head: int = 1
  norm_eps: float = NORM_EPS

  signs = False  # whether memories of this class take signs of n-grams

  def __post_init__(self):
    """Raises ValueError if a size is no number of its kind above 0 (of rows, an int32), or a switch no bool."""
    check_sizes(self)

  def init(self, key: Array | nnx.Rngs) -> Params:
    """Returns the first parameters, a nested dict of float32 arrays.

    Args:
      key: a key of `jax.random`; or streams of keys, which move on.
    """
    rngs = key if isinstance(key, nnx.Rngs) else nnx.Rngs(key)
    return self.init_gate(rngs) | self.init_read(rngs)

  def apply(
    self,
    params: Params,
    x_BTD: Array,
    bank_MP: Bank,
    row_BThr: Array | None = None,
    sign_BTh: Array | None = None,
    kept_BTh: Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
  ) -> SublayerOutput:
    """Reads the bank.

    Args:
      params: as `init` makes them, or NumPy arrays. Narrower floats count as the float32 that they stand for; a scan
        over layers keeps those float32 for its backward pass, unless `jax.checkpoint` is around `apply`.
      x_BTD: float, the residual stream; it is normed here.
      bank_MP: float32; as `mmjax.kernels.bank` describes, it may be sharded by rows, a part, tapped, or packed.
      row_BThr: int32, the rows that n-grams address, for a memory that reads those; see `NgramBag.rows`.
      sign_BTh: int32, the numbers of their signs, for a memory that has signs; see `NgramBag.signs_of`.
      kept_BTh: float32, factors of what the rows of each head of a bag say: 0 drops them. None: 1.
      dtype: of the matrix products. Rows are selected in float32 whatever it is, of an input that a GPU rounds to it.
        Sums are of float32, so that 'float64' is no more exact than that.

    Returns:
      SublayerOutput. Add `delta_BTD`, in `dtype`, to the stream, and `aux_loss` to the loss: its value is 0, and with a
      selection bias its gradient evens out the use of the rows.

    Raises:
      ValueError: if an array has not the shape that the sizes say or is not of floats, the input has no position, or
        rows or signs of n-grams are missing, not read or out of range (within `jax.jit` nobody can look).
    """
    check_inputs(self, params, x_BTD, bank_MP, row_BThr, sign_BTh, kept_BTh, dtype)
    params = jax.tree.map(at_least_float32, params)  # in bf16 a gate would select other rows

    def run(x_BTD: Array, params: Params, bank_MP: Bank, *of_ngrams: Array | None) -> tuple:
      row_BThr, sign_BTh, kept_BTh = of_ngrams
      selection = self.select(params, x_BTD, row_BThr, dtype)._replace(sign_BTh=sign_BTh, kept_BTh=kept_BTh)
      delta_BTD, score_BThr = self.read(params, x_BTD, selection, bank_MP, dtype)
      return delta_BTD, *(x.reshape(*x.shape[:2], -1) for x in (selection.row_BThr, score_BThr)), selection.aux_loss

    def specs(of_x: PartitionSpec) -> tuple:
      like_rows = PartitionSpec(*of_x[:2])
      return of_x, like_rows, like_rows, PartitionSpec()

    # Calls `run`; where a mesh has explicit axes, `specs` says how its results lie on them.
    return SublayerOutput(*on_any_mesh(run, specs, x_BTD, params, bank_MP, row_BThr, sign_BTh, kept_BTh))

  def addresses(self, last_BTn: Array | None) -> tuple[Array | None, Array | None]:
    """Returns what `apply` takes, int32 `row_BThr` and `sign_BTh`, from the last tokens at each position: here none."""
    return None, None

  def flops(self) -> dict[str, int]:
    """Returns the FLOPs of a training step for a token by part: of its matrix products, as in mmjax.model.cost."""
    return {}

  def init_gate(self, rngs: nnx.Rngs) -> Params:
    """Returns the parameters of the norm, `scale`, float32 (D,), and of what selects rows, here none."""
    return {'norm': {'scale': jnp.ones(self.dim, jnp.float32)}}

  @abstractmethod
  def init_read(self, rngs: nnx.Rngs) -> Params:
    """Returns the parameters of what becomes of the rows, float32."""

  @abstractmethod
  def select(self, params: Params, x_BTD: Array, row_BThr: Array | None, dtype: DTypeLike) -> Selection:
    """Returns what to read, of `row_BThr`, int32, where the last tokens address rows; `x_BTD` is still to be normed."""

  @abstractmethod
  def read(self, params: Params, x_BTD: Array, selection: Selection, bank_MP: Bank, dtype: DTypeLike) -> Read:
    """Returns delta_BTD in `dtype`, and the scores of the rows; `x_BTD` is still to be normed."""
