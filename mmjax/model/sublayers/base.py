"""What a sublayer is: the part of a block that follows attention, the one thing in which the experiments differ.

A row of the table (mmjax/config/sublayers.py) names what makes it, a class or a function that is called as
`make(model, memory, rngs=rngs)` with these sections of a config; what it makes is an nnx.Module that takes its sizes by
keyword and is called as `sublayer(h_BTD, h_attn_BTD, bank_MP, dtype, ngram_BThr) -> SublayerOutput`, where
  h_BTD       float32 residual stream after attention was added,
  h_attn_BTD  what attention added to it, in the compute dtype,
  bank_MP     the shared bank, float32, perhaps tapped (mmjax.kernels.bank), or None in a model without one,
  dtype       of the matrix products,
  ngram_BThr  int32 rows that the last tokens address (mmjax.memory.ngram); None in a model where none of these is read.
What else the code must know of it stands in its row.
"""

from mmjax.memory.base import SublayerOutput

__all__ = ['SublayerOutput']
