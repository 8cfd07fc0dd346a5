"""Memories for anybody's model: rows of one bank that each token picks and adds to its residual stream.

A memory is a frozen dataclass of sizes, which are named by keyword, with two pure functions:

  memory = MemoryBag(dim=256, n_rows=65_536, row_dim=64, n_heads=4, rows_per_head=16)
  params = memory.init(key)                    # a nested dict of float32 arrays
  out = memory.apply(params, x_BTD, bank_MP)   # out.delta_BTD is what to add to x_BTD

`MemoryLayer(memory, rngs=rngs)` is the same as a module of flax.nnx. The bank is an array (`init_bank`), and any number
of memories may read it. Nothing here needs more than JAX, Flax and NumPy. mmjax's own models are made of the same
memories (mmjax/model/sublayers). Names of arrays end in their axes: B batch, T position, D dim, M rows of the bank, P
row_dim, h n_heads, r rows_per_head, R = h * r, n last tokens, C = sqrt(M), Q query_dim or key_dim, p = Q / 2; `help`
of a memory lists its sizes.
"""

from mmjax.kernels.bank import TappedBank, add_reads, no_reads
from mmjax.memory.bag import MemoryBag, NgramBag, NgramBucket
from mmjax.memory.base import Memory
from mmjax.memory.cross_attention import CrossAttention
from mmjax.memory.docstrings import with_inherited_attributes
from mmjax.memory.fusion import GatedFusion
from mmjax.memory.ngram import cached_last_tokens, last_tokens
from mmjax.memory.params import MemoryLayer, init_bank
from mmjax.memory.types import SublayerOutput

__all__ = [
  'CrossAttention',
  'GatedFusion',
  'Memory',
  'MemoryBag',
  'MemoryLayer',
  'NgramBag',
  'NgramBucket',
  'SublayerOutput',
  'TappedBank',
  'add_reads',
  'cached_last_tokens',
  'init_bank',
  'last_tokens',
  'no_reads',
]

for _memory in (CrossAttention, GatedFusion, MemoryBag, NgramBag, NgramBucket):
  _memory.__doc__ = with_inherited_attributes(_memory)
