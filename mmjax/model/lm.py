"""The language model: tied embedding, blocks of attention and a sublayer, final norm.

A model is a graph definition and a nested dict of float32 parameters; `nnx.merge(graphdef, params)(tokens_BT)` runs
it. One bank is passed to every block. Next on the way is what a block does with it, mmjax/model/sublayers/memory.py.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.config.sublayers import SUBLAYERS, VALUE_ROWS, layer_kinds, uses_bank
from mmjax.kernels.forms import KEEP
from mmjax.kernels.matmul import uniform
from mmjax.memory.ngram import last_tokens
from mmjax.memory.params import init_bank
from mmjax.memory.types import Bank, SublayerOutput
from mmjax.model.layers import Attention, LayerCache, RMSNorm, add_to_stream, dropout, rope_angles
from mmjax.model.sublayers import SublayerInput


class Output(NamedTuple):
  """What a model computes.

  Attributes:
    hidden_BTD: final hidden states in the compute dtype.
    row_LBTR: int32 rows that each of `memory_layers` read, as in SublayerOutput; None without a bank.
    score_LBTR: their float32 scores; None without a bank.
    aux_loss: sum of the layers' aux losses.
    kvs: keys and values of each layer's attention, for a cache.
  """

  hidden_BTD: Array
  row_LBTR: Array | None
  score_LBTR: Array | None
  aux_loss: Array
  kvs: list[LayerCache]


Attend = Callable[[Attention, Array, RMSNorm], tuple[Array, LayerCache]]
BankOfReader = Callable[[int, Array], Bank]


class Block(nnx.Module):
  """h = x + attention(norm(x)); out = h + sublayer.

  Args:
    model, memory, rngs: sections of a config, and what draws first values.
    number: of the layer, from 0: some add to the values of attention.
    kind: a name in the table of sublayers.
  """

  def __init__(self, model: ModelConfig, memory: MemoryConfig, number: int, kind: str, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(model.dim, model.norm_eps)
    self.attention = Attention(
      dim=model.dim,
      n_kv_heads=model.n_kv_heads,
      head_dim=model.head_dim,
      qk_norm_eps=model.norm_eps if model.qk_norm else None,
      vocab_size=model.vocab_size if number in model.value_embedding_layers() else None,
      row_width=memory.n_heads * model.knowledge_dim if number in memory.value_layer_numbers(model.n_layers) else None,
      rngs=rngs,
    )
    self.sublayer = SUBLAYERS[kind].build(model, memory, rngs=rngs)
    self.kind, self.uses_bank = kind, SUBLAYERS[kind].uses_bank
    self.dropout = model.dropout

  def __call__(
    self,
    x_BTD: Array,
    bank_MP: Bank | None,
    last_BTn: Array | None,
    key: Array | None,
    *,
    attend: Attend,
    dtype: DTypeLike,
  ) -> tuple[Array, SublayerOutput, LayerCache]:
    """Returns the float32 residual stream, what the sublayer gave, keys and values.

    `x_BTD` is the float32 stream, `attend` calls attention on it, and `key`, of dropout, is None outside training.
    `bank_MP` and `last_BTn` are as in `SublayerInput`, and `dtype` is that of matrix products.
    """
    attention_key, sublayer_key = (None, None) if key is None else jax.random.split(key)
    h_attn_BTD, kv = attend(self.attention, x_BTD, self.attention_norm)
    h_attn_BTD = dropout(h_attn_BTD, self.dropout, attention_key)
    h_BTD = add_to_stream(x_BTD, h_attn_BTD)
    own_key = None if key is None else jax.random.fold_in(key, 2)  # split gave 0 and 1
    inputs = SublayerInput(h_BTD, h_attn_BTD, bank_MP, last_BTn, own_key)
    with jax.named_scope(self.kind):
      out = self.sublayer(inputs, dtype)
    return add_to_stream(h_BTD, dropout(out.delta_BTD, self.dropout, sublayer_key)), out, kv

  def flops(self, length: int) -> dict[str, int]:
    """Returns the FLOPs of a training step for a token by part, averaged over a row of `length` tokens."""
    return self.attention.flops(length) | self.sublayer.flops()


class LM(nnx.Module):
  """Tokens in, final hidden states out; `logits` applies the tied head. `Block` says what its arguments are."""

  def __init__(self, model: ModelConfig, memory: MemoryConfig, *, rngs: nnx.Rngs):
    shape = (model.vocab_size, model.dim)
    # The record's code ties the embedding to the output layer's weight, so it starts as a linear layer does.
    self.embedding = nnx.Param(uniform(rngs.params(), shape, fan_in=model.dim))
    if uses_bank(model, memory):
      self.memory_bank = nnx.Param(
        init_bank(rngs.params(), n_rows=model.knowledge_num, row_dim=model.knowledge_dim, std=memory.bank_std)
      )
    else:
      self.memory_bank = None
    kinds = layer_kinds(model, memory)
    self.layers = nnx.List([Block(model, memory, number, kind, rngs=rngs) for number, kind in enumerate(kinds)])
    self.value_bag = VALUE_ROWS.build(model, memory, rngs=rngs) if memory.value_layers else None
    reads_ngrams = self.value_bag or any(SUBLAYERS[kind].reads_ngrams for kind in kinds)
    self.n_last = max(memory.ngram_of_heads()) if reads_ngrams else 0
    self.norm = RMSNorm(model.dim, model.norm_eps)
    self.head_dim = model.head_dim
    self.rope_theta = model.rope_theta
    self.dropout = model.dropout

  def __call__(
    self,
    tokens_BT: Array,
    segment_BT: Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    attention: str = 'xla',
    remat: str = 'none',
    dropout_key: Array | None = None,
    bank_of_reader: BankOfReader | None = None,
  ) -> Output:
    """Runs whole rows.

    Args:
      tokens_BT: int32 in [0, V).
      segment_BT: int32; attention stays within a segment. None: each row is one segment.
      dtype: of the matrix products; the residual stream is float32.
      attention: backend, see mmjax.kernels.attention.
      remat: 'block' recomputes each block in the backward pass; 'none' keeps its activations.
      dropout_key: a PRNG key turns dropout on.
      bank_of_reader: is called with a reader's place in `memory_layers`, from 0, and the bank; returns what it reads.
    """
    angle_BTa = rope_angles(jnp.arange(tokens_BT.shape[1])[None], self.head_dim, self.rope_theta)
    last_BTn = last_tokens(tokens_BT, self.n_last, segment_BT) if self.n_last else None
    bank_MP = None if self.memory_bank is None else self.memory_bank[...]
    parts = len(self.layers) + 1
    keys = [None] * parts if dropout_key is None else list(jax.random.split(dropout_key, parts))
    with jax.named_scope('embedding'):
      x_BTD = dropout(self.embedding[...][tokens_BT], self.dropout, keys[-1])

    readers = count()

    def bank_to_read() -> Bank:
      return bank_of_reader(next(readers), bank_MP) if bank_of_reader else bank_MP

    reads, sum_BThP = [], None
    if self.value_bag:
      selection, sum_BThP = self.value_bag.sums_of(last_BTn, bank_to_read())
      reads.append([x.reshape(*tokens_BT.shape, -1) for x in selection[:2]])

    def attend(layer: Attention, x_BTD: Array, norm: RMSNorm) -> tuple[Array, LayerCache]:
      return layer(x_BTD, norm, angle_BTa, tokens_BT, segment_BT, dtype, attention, sum_BThP)

    outs, kvs = [], []
    for number, layer in enumerate(self.layers):
      bank = bank_to_read() if layer.uses_bank else bank_MP
      run = partial(layer, attend=attend, dtype=dtype)
      run = jax.checkpoint(run, policy=KEEP) if remat == 'block' else run
      x_BTD, out, kv = run(x_BTD, bank, last_BTn, keys[number])
      outs.append(out)
      kvs.append(kv)
    reads += [(out.row_BTR, out.score_BTR) for out in outs if out.row_BTR is not None]
    row_LBTR, score_LBTR = (jnp.stack(x) for x in zip(*reads, strict=True)) if reads else (None, None)
    aux_loss = sum((out.aux_loss for out in outs), jnp.zeros((), jnp.float32))
    return Output(self.norm(x_BTD, dtype).astype(dtype), row_LBTR, score_LBTR, aux_loss, kvs)

  def logits(self, hidden: Array) -> Array:
    """Maps hidden states (..., D) to float32 logits (..., V) with the tied head."""
    kernel_VD = self.embedding[...].astype(hidden.dtype)
    return jnp.einsum('...D,VD->...V', hidden, kernel_VD, preferred_element_type=jnp.float32)
