"""Experiment 1.4.2: rows and the memory's input, concatenated, through a SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

import jax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.kernels.fusion import normed_gated_mlp
from mmjax.kernels.matmul import TRAINED
from mmjax.memory.gate import RowsMemory
from mmjax.memory.params import init_kernels
from mmjax.memory.types import Bank, Params, Read, Selection


class GatedFusion(RowsMemory):
  """down(silu(gate(z)) * up(z)) with z = (m, R rows, by head and score); `gate` and `up` are (D + R * P, D)."""

  def init_read(self, rngs: nnx.Rngs) -> Params:
    """Returns the float32 kernels of the fusion, `gate` and `up`, (D + R * P, D), and `down`, (D, D)."""
    width = self.dim + self.n_heads * self.rows_per_head * self.row_dim
    return {'fusion': init_kernels(rngs, gate=(width, self.dim), up=(width, self.dim), down=(self.dim, self.dim))}

  def flops(self) -> dict[str, int]:
    """Adds those of the fusion."""
    width = self.dim + self.n_heads * self.rows_per_head * self.row_dim
    return super().flops() | {'fusion': TRAINED * 2 * (2 * width * self.dim + self.dim * self.dim)}

  def read(self, params: Params, x_BTD: Array, selection: Selection, bank_MP: Bank, dtype: DTypeLike) -> Read:
    """Returns the fusion of the normed input and the rows, joined to X = R * P, delta_BTD in `dtype`, and scores."""
    rows_BTX = self.rows(selection, bank_MP, dtype).reshape(*x_BTD.shape[:-1], -1)
    with jax.named_scope('fusion'):
      kernels = (params['fusion'][name]['kernel'] for name in ('gate', 'up', 'down'))
      delta_BTD = normed_gated_mlp(x_BTD, params['norm']['scale'], (rows_BTX,), *kernels, self.norm_eps, dtype)
    return delta_BTD, selection.score_BThr
