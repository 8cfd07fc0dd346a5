"""Bags of rows: each head's weighted sum of its rows, gated by the token and projected.

Sources: the output (y * silu(m Wu)) Wd follows Memory+ in Berges et al. 2024, arXiv:2412.09764; the weighted sum Lample
et al. 2019, arXiv:1907.05242; rows that the last tokens address, Cheng et al. 2026, arXiv:2601.07372, and for rows of
the token alone, Sadhukhan et al. 2026, arXiv:2601.10639; a row picked by context in a token's bucket, Tseng and De Sa
2026, arXiv:2601.21461. The gate of EngramBag is that of Cheng et al., with the root that their code takes.
"""

import dataclasses
from abc import abstractmethod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from mmjax.choices import in_turns, least_rows_of_ranges
from mmjax.kernels.bank import bank_bag, bank_lookup
from mmjax.kernels.forms import recomputed_on_gpu
from mmjax.kernels.matmul import TRAINED, matmul
from mmjax.kernels.mesh import on_any_mesh
from mmjax.kernels.norm import inverse_rms, normed_matmul
from mmjax.memory.base import Memory
from mmjax.memory.checks import check_bank, check_numbers
from mmjax.memory.gate import GatedMemory
from mmjax.memory.ngram import last_tokens, ngram_rows, ngram_signs, own_ranges, with_signs
from mmjax.memory.params import init_kernels
from mmjax.memory.types import Bank, Params, Read, Selection, shape_of

LEAST_MATCH = 1e-6  # of which EngramBag takes the root: at 0 its slope would be infinite


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bag(Memory):
  """What becomes of a bag's rows.

  Attributes:
    output_gate: whether the sums are multiplied by silu(m Wu), element by element, before they are projected.
  """

  output_gate: bool = True

  def init_read(self, rngs: nnx.Rngs) -> Params:
    """Returns the float32 kernels `up`, of the output's gate, (D, h * P), and `down`, (h * P, D)."""
    width = self.n_heads * self.row_dim
    up = {'up': (self.dim, width)} if self.output_gate else {}
    return init_kernels(rngs, **up, down=(width, self.dim))

  def flops(self) -> dict[str, int]:
    """Adds those of the projections, and of the weighted sums of rows."""
    width = self.n_heads * self.row_dim
    projections = (2 if self.output_gate else 1) * self.dim * width
    own = {'bag': TRAINED * 2 * projections, 'bag_reads': TRAINED * 2 * self.rows_per_head * width}
    return super().flops() | own

  @jax.named_scope('bag')
  def read(self, params: Params, x_BTD: Array, selection: Selection, bank_MP: Bank, dtype: DTypeLike) -> Read:
    """Returns (y * silu(m @ up)) @ down, or y @ down, in `dtype`, and scores; y are the heads' sums, of X = h * P."""
    y_BTX = self.sums(selection, bank_MP).reshape(*x_BTD.shape[:-1], -1).astype(dtype)
    if not self.output_gate:
      return matmul(y_BTX, params['down']['kernel']), selection.score_BThr
    return self.gated(params, x_BTD, y_BTX, selection.score_BThr)

  def gated(self, params: Params, x_BTD: Array, y_BTX: Array, score_BThr: Array) -> Read:
    """Returns what `read` does where there is a gate of the output."""
    down, dtype = params['down']['kernel'], y_BTX.dtype

    def project(y_BTX: Array, up_BTX: Array) -> Array:
      return matmul(y_BTX * jax.nn.silu(up_BTX), down)

    up_BTX = normed_matmul(x_BTD, params['norm']['scale'], params['up']['kernel'], self.norm_eps, dtype)
    return recomputed_on_gpu(project)(y_BTX, up_BTX), score_BThr

  def sums(self, selection: Selection, bank_MP: Bank) -> Array:
    """Returns the weighted sum of each head's rows, float32 sum_BThP."""
    weight_BThr = self.weights(selection)
    if selection.kept_BTh is not None:
      weight_BThr *= selection.kept_BTh[..., None]
    sum_BThP = bank_bag(bank_MP, selection.row_BThr, weight_BThr)
    return sum_BThP if selection.sign_BTh is None else with_signs(sum_BThP, selection.sign_BTh)

  @abstractmethod
  def weights(self, selection: Selection) -> Array:
    """Returns how much each row counts in the sum of its head, float32 weight_BThr."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryBag(GatedMemory, _Bag):
  """A bag of rows that a gate selects; their weights come from their scores, so that the gate learns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramBag(_Bag):
  """A bag of rows that the last tokens address: no gate, and the mean of each head's rows.

  What the rows hold depends on the n-gram alone; what becomes of them, on everything before it, through the gate of the
  output.

  Attributes:
    ngrams: how many of the last tokens address a head's rows; heads take turns.
    vocab_size: V, above every token id; each row of a head then has a range of the bank of its own, in which one token
      alone finds a row without a hash: see `own_ranges` of mmjax.memory.ngram. None: all heads share all rows.
    signs: whether a head's sum is multiplied, value by value, by +1 or -1 as another hash of the n-gram says.
  """

  ngrams: tuple[int, ...] = (1,)
  vocab_size: int | None = None
  signs: bool = False

  def __post_init__(self):
    """Raises ValueError if a size or `ngrams` breaks its rule, or the bank has too few rows for ranges of heads."""
    super().__post_init__()
    tokens = self.ngrams if isinstance(self.ngrams, tuple) else ()
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 1 for n in tokens)
    if not tokens or not whole or len(tokens) > self.n_heads:
      raise ValueError(
        f'ngrams={self.ngrams!r} must be a tuple of numbers of tokens, from 1, no more than n_heads={self.n_heads}'
      )
    object.__setattr__(self, 'ngrams', tuple(map(int, tokens)))
    if self.vocab_size is None:
      return
    least = least_rows_of_ranges(self.ngram_of_heads(), self.rows_per_head, self.vocab_size)
    if self.n_rows < least:
      raise ValueError(f'n_rows={self.n_rows} must be at least {least}, so that each head has a range of its own')

  def rows(self, tokens_BT: Array, segment_BT: Array | None = None) -> Array:
    """Returns the rows that the last tokens address at each position, int32 row_BThr.

    Args:
      tokens_BT: integers of any dtype that fit int32, whole rows of a batch.
      segment_BT: int32; tokens of another segment do not count. None: each row is one segment.

    Raises:
      ValueError: if a token id does not fit int32, or is not in [0, vocab_size), where that is given; within `jax.jit`
        nobody can look, and such a token reads the row of another.
    """
    return self.rows_of(last_tokens(tokens_BT, max(self.ngrams), segment_BT))

  def rows_of(self, last_BTn: Array) -> Array:
    """Does what `rows` does, from the last tokens at each position, int32: see `cached_last_tokens`.

    Raises:
      ValueError: if there are too few of them, or a position's own id is one that `rows` refuses.
    """
    addresses, size = self.rows_per_head // self.bucket_size, self.bucket_size
    bucket = ngram_rows(last_BTn, self.ngram_of_heads(), addresses, self.n_rows // size, self.vocab_size)
    return bucket * size + jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, size), 3)

  def signs_of(self, last_BTn: Array) -> Array | None:
    """Returns which signs the n-grams of `rows_of` have, int32 sign_BTh; None where they have none."""
    return ngram_signs(last_BTn, self.ngram_of_heads()) if self.signs else None

  def addresses(self, last_BTn: Array) -> tuple[Array, Array | None]:
    """Returns what `rows_of` and `signs_of` do, int32."""
    return self.rows_of(last_BTn), self.signs_of(last_BTn)

  @jax.named_scope('bag')
  def sums_of(self, last_BTn: Array, bank_MP: Bank) -> tuple[Selection, Array]:
    """Returns the rows that the last tokens address, and the mean of each head's, float32 sum_BThP.

    This is all of a bag that needs no input, and what attention may add to its values.

    Args:
      last_BTn: int32, from `last_tokens` or `cached_last_tokens`.
      bank_MP: as in `apply`.

    Raises:
      ValueError: if the last tokens are what `rows_of` refuses, or the bank is what `apply` does.
    """
    check_bank(self, bank_MP)

    def selected(row_BThr: Array, sign_BTh: Array | None) -> Selection:
      return Selection(row_BThr, jnp.zeros(row_BThr.shape, jnp.float32), sign_BTh=sign_BTh)

    def run(row_BThr: Array, sign_BTh: Array | None, bank_MP: Bank) -> Array:
      return self.sums(selected(row_BThr, sign_BTh), bank_MP)

    row_BThr, sign_BTh = self.addresses(last_BTn)
    sum_BThP = on_any_mesh(run, lambda of_rows: PartitionSpec(*of_rows[:3]), row_BThr, sign_BTh, bank_MP)
    return selected(row_BThr, sign_BTh), sum_BThP

  def range_of(self, row: int) -> tuple[int, int | None] | None:
    """Returns the head in whose range a row is, and the token that alone reads it, None where a hash finds it.

    None where heads share all rows, and for a row that no head reads.
    """
    if self.vocab_size is None:
      return None
    slots, address = self.rows_per_head // self.bucket_size, row // self.bucket_size
    first_R, size_R = own_ranges(self.ngram_of_heads(), slots, self.n_rows // self.bucket_size, self.vocab_size)
    for slot in np.flatnonzero((first_R <= address) & (address < first_R + size_R)).tolist():
      head = slot // slots
      return head, int(address - first_R[slot]) if self.ngram_of_heads()[head] == 1 else None
    return None

  @property
  def bucket_size(self) -> int:
    """How many neighbouring rows an n-gram addresses at once; what is left of the bank is never read."""
    return 1

  def ngram_of_heads(self) -> tuple[int, ...]:
    """Returns how many of the last tokens address the rows of each head."""
    return in_turns(self.ngrams, self.n_heads)

  def select(self, params: Params, x_BTD: Array, row_BThr: Array | None, dtype: DTypeLike) -> Selection:
    """Returns the rows that it got, with float32 scores of 0.

    Raises:
      ValueError: if there are none, or they have another shape, are no integers or not in [0, M).
    """
    shape = (*x_BTD.shape[:2], self.n_heads, self.rows_per_head)
    if row_BThr is None:
      raise ValueError('row_BThr=None: a memory of n-grams needs the rows that they address: see NgramBag.rows')
    if (found := shape_of(row_BThr)) != shape:
      raise ValueError(f'the rows of n-grams must have the shape (B, T, n_heads, rows_per_head)={shape}, not {found}')
    check_numbers('row_BThr', row_BThr, self.n_rows)
    return Selection(row_BThr, jnp.zeros(shape, jnp.float32))

  def weights(self, selection: Selection) -> Array:
    """Returns 1 / r for each row, float32 weight_BThr."""
    return jnp.full(selection.row_BThr.shape, 1 / self.rows_per_head, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramBucket(NgramBag):
  """A bag whose rows are a bucket that the last tokens address; the context weighs them, so that it picks among them.

  Each row of the bank has a key. Keys start at 0, so that a head starts as the mean of its bucket. There is no search:
  a token scores the rows of its buckets and no others. With one row a bucket is what `NgramBag` reads.

  Attributes:
    key_dim: Q, of a key and of a head's query.
  """

  rows_per_head: int = 8
  key_dim: int = 16

  def __post_init__(self):
    """Raises ValueError as a bag of n-grams does, and if the bank has no whole bucket."""
    super().__post_init__()
    if self.n_rows < self.rows_per_head:
      raise ValueError(f'n_rows={self.n_rows} must be at least rows_per_head={self.rows_per_head}, one bucket')

  def init_gate(self, rngs: nnx.Rngs) -> Params:
    """Returns the parameters of the norm, and of the gate, float32: the kernel `query`, (D, h * Q), `keys`, (M, Q)."""
    gate = init_kernels(rngs, query=(self.dim, self.n_heads * self.key_dim))
    return super().init_gate(rngs) | {'gate': gate | {'keys': jnp.zeros((self.n_rows, self.key_dim), jnp.float32)}}

  def flops(self) -> dict[str, int]:
    """Adds those of the query, and of its scores against the keys of the rows that it reads."""
    query_and_scores = self.key_dim * (self.dim + self.rows_per_head)
    return super().flops() | {'gate': TRAINED * 2 * self.n_heads * query_and_scores}

  @property
  def bucket_size(self) -> int:
    """All rows of a head."""
    return self.rows_per_head

  @jax.named_scope('gate')
  def select(self, params: Params, x_BTD: Array, row_BThr: Array | None, dtype: DTypeLike) -> Selection:
    """Returns the rows that it got, each with the float32 product of its key and its head's query, over sqrt(Q).

    Raises:
      ValueError: as that of `NgramBag` does.
    """
    row_BThr, gate = super().select(params, x_BTD, row_BThr, dtype).row_BThr, params['gate']
    query = normed_matmul(x_BTD, params['norm']['scale'], gate['query']['kernel'], self.norm_eps, dtype)
    query_BThQ = query.reshape(*row_BThr.shape[:3], self.key_dim)
    key_BThrQ = bank_lookup(gate['keys'], row_BThr, dtype)
    score_BThr = jnp.einsum('BThQ,BThrQ->BThr', query_BThQ, key_BThrQ, preferred_element_type=jnp.float32)
    return Selection(row_BThr, score_BThr * self.key_dim**-0.5)

  def weights(self, selection: Selection) -> Array:
    """Returns the softmax over the rows of each bucket, float32 weight_BThr."""
    return jax.nn.softmax(selection.score_BThr, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngramBag(NgramBag):
  """A bag of n-grams with the gate of Engram: one number from 0 to 1 for a token, by how well its rows match its input.

  The rows make a key, and the normed input is the query. Here it stands after attention. Engram's short convolution,
  its smaller vocabulary for addresses and its branches are left out.

  Attributes:
    output_gate: whether there is this gate; without it the bag is an `NgramBag` without one.
  """

  def init_read(self, rngs: nnx.Rngs) -> Params:
    """Returns, float32, the kernels `key` and `down`, (h * P, D), and the `scale` of the key's norm, (D,)."""
    if not self.output_gate:
      return super().init_read(rngs)
    kernel = self.n_heads * self.row_dim, self.dim
    return init_kernels(rngs, key=kernel, down=kernel) | {'key_norm': {'scale': jnp.ones(self.dim, jnp.float32)}}

  def gated(self, params: Params, x_BTD: Array, y_BTX: Array, score_BThr: Array) -> Read:
    """Returns g * (y @ down) and g, with g = sigmoid(sign(s) sqrt(|s|)) and s = m . norm(y @ key) / sqrt(D)."""

    def weigh(x_BTD: Array, key_BTD: Array, value_BTD: Array) -> tuple[Array, Array]:
      x_BTD, key_BTD = x_BTD.astype(jnp.float32), key_BTD.astype(jnp.float32)
      scale_11D = (params['norm']['scale'] * params['key_norm']['scale'])[None, None]
      # Divided after the product, so that neither norm need be written down.
      match_BT1 = jnp.mean(x_BTD * scale_11D * key_BTD, axis=-1, keepdims=True) * self.dim**0.5
      match_BT1 *= inverse_rms(x_BTD, self.norm_eps) * inverse_rms(key_BTD, self.norm_eps)
      root_BT1 = jnp.sign(match_BT1) * jnp.sqrt(jnp.maximum(jnp.abs(match_BT1), LEAST_MATCH))
      gate_BT1 = jax.nn.sigmoid(root_BT1)
      return value_BTD * gate_BT1.astype(value_BTD.dtype), gate_BT1

    products = (matmul(y_BTX, params[name]['kernel']) for name in ('key', 'down'))
    delta_BTD, gate_BT1 = recomputed_on_gpu(weigh)(x_BTD, *products)
    return delta_BTD, jnp.broadcast_to(gate_BT1[..., None], score_BThr.shape)
