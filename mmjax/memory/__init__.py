"""Memories for anybody's model: rows of one bank that each token picks and adds to its residual stream.

A memory is a frozen dataclass of sizes, which are named by keyword, with two pure functions:

  memory = MemoryBag(dim=256, n_rows=65_536, row_dim=64, n_heads=4, rows_per_head=16)
  params = memory.init(key)                    # a nested dict of float32 arrays
  out = memory.apply(params, x_BTD, bank_MP)   # out.delta_BTD is what to add to x_BTD

`MemoryLayer(memory, rngs=rngs)` is the same as a module of flax.nnx. The bank is an array (`init_bank`), and any number
of memories may read it. Nothing here needs more than JAX, Flax and NumPy. mmjax's own models are made of the same
memories (mmjax/model/sublayers). `help` of a memory lists its sizes. Names of arrays end in their axes. These letters
are a part of the legend in mmjax/kernels/__init__.py, and what stands after a colon is the size of a memory:

  B  sequences of a batch                      h  heads of a memory: n_heads
  T  tokens of a sequence                      r  rows that a head reads: rows_per_head
  D  width of the residual stream: dim         R  rows that a token reads = h * r
  M  rows of the bank: n_rows                  C  sub-keys of a codebook; C * C = M
  P  width of a row: row_dim                   Q  width of a memory's query: query_dim or key_dim
  n  tokens of an n-gram                       p  width of a sub-key = Q / 2
"""

from mmjax.kernels.bank import TappedBank, add_reads, no_reads
from mmjax.memory.bag import EngramBag, MemoryBag, NgramBag, NgramBucket
from mmjax.memory.base import Memory
from mmjax.memory.cross_attention import CrossAttention
from mmjax.memory.docstrings import with_inherited_attributes
from mmjax.memory.fusion import GatedFusion
from mmjax.memory.ngram import cached_last_tokens, last_tokens
from mmjax.memory.params import MemoryLayer, init_bank
from mmjax.memory.types import SublayerOutput

__all__ = [
  'CrossAttention',
  'EngramBag',
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

for _memory in (CrossAttention, GatedFusion, MemoryBag, NgramBag, NgramBucket, EngramBag):
  _memory.__doc__ = with_inherited_attributes(_memory)
