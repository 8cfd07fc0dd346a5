"""Rows that n-grams address: against hashing with Python's integers, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.config import load_config
from mmjax.config.sublayers import SUBLAYERS, layer_kinds, memory_layers
from mmjax.errors import UserError
from mmjax.kernels.bank import TappedBank, add_reads, no_reads
from mmjax.memory import NgramBag, NgramBucket, init_bank
from mmjax.memory.ngram import (
  FIRST_OF_SIGNS,
  NO_TOKEN,
  SIGN_VECTORS,
  cached_last_tokens,
  last_tokens,
  ngram_rows,
  ngram_signs,
  own_ranges,
  sign_vectors,
)
from mmjax.model.sublayers import SublayerInput, row_weights
from tests.helpers import build_model, random_batch, rarely, tiny_config

NGRAM = {'model__sublayer': 'ngram_bag', 'model__num_selected': 2, 'memory__n_heads': 3, 'memory__ngrams': '2,3'}


def mix(x: int) -> int:
  x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
  return x ^ (x >> 16)


def rows_by_hand(tokens: list[int], number: int, knowledge_num: int) -> int:
  """The row that the tokens, the last one first, address for the `number`-th row of all heads."""
  for token in tokens:
    number = mix(number ^ mix(token % 2**32))
  return number % knowledge_num


def own_rows_by_hand(tokens: list[int], ngrams: list[int], knowledge_num: int, vocab_size: int) -> list[int]:
  """The rows that the tokens address where each of `ngrams`, one for each row of a head, has a range of its own."""
  alone = sum(n == 1 for n in ngrams)
  size = (knowledge_num - alone * vocab_size) // max(1, len(ngrams) - alone)
  while any(size % d == 0 for d in range(2, size)):
    size -= 1
  first, rows = 0, []
  for number, n in enumerate(ngrams):
    rows.append(first + (tokens[0] if n == 1 else rows_by_hand(tokens[:n], number, size)))
    first += vocab_size if n == 1 else size
  assert first <= knowledge_num
  return rows


def signs_by_hand(tokens: list[int], head: int, row_dim: int) -> np.ndarray:
  """The signs of the n-gram in a head."""
  vector = rows_by_hand(tokens, FIRST_OF_SIGNS + head, SIGN_VECTORS)
  return np.array([-1.0 if mix(vector * row_dim + at + 1) >= 2**31 else 1.0 for at in range(row_dim)])


def test_last_tokens_are_those_of_the_segment_and_of_the_cache():
  tokens = np.random.default_rng(0).integers(0, 99, (2, 7), np.int32)
  segment = np.array([[0, 0, 0, 1, 1, 1, 1], [4, 5, 5, 5, 5, 6, 6]], np.int32)
  for segments in (None, segment):
    found = last_tokens(jnp.asarray(tokens), 3, segments)
    for b in range(2):
      for t in range(7):
        for back in range(3):
          same = t >= back and (segments is None or segment[b, t - back] == segment[b, t])
          assert found[b, t, back] == (tokens[b, t - back] if same else NO_TOKEN)
  assert last_tokens(jnp.asarray(tokens[:, :2]), 9).shape == (2, 2, 9)
  np.testing.assert_array_equal(last_tokens(jnp.asarray(tokens, jnp.uint16), 3), last_tokens(jnp.asarray(tokens), 3))
  position = jnp.array([[4, 5], [0, 1]])
  cached = cached_last_tokens(jnp.asarray(tokens), position, 3)
  np.testing.assert_array_equal(cached, cached_last_tokens(jnp.asarray(tokens, jnp.uint16), position, 3))
  whole = last_tokens(jnp.asarray(tokens), 3)
  np.testing.assert_array_equal(cached, np.stack([whole[0, 4:6], whole[1, :2]]))


def test_rows_are_those_of_a_hash_of_as_many_tokens_as_the_head_looks_at():
  token = np.random.default_rng(0).integers(-1, 6400, (2, 5, 3), np.int32)
  found = ngram_rows(jnp.asarray(token), (2, 3, 1), 2, 65536)
  assert found.shape == (2, 5, 3, 2) and found.dtype == jnp.int32
  for b, t, head, r in np.ndindex(found.shape):
    n = (2, 3, 1)[head]
    assert found[b, t, head, r] == rows_by_hand(token[b, t, :n].tolist(), 2 * head + r, 65536)


def test_bucket_is_neighbouring_rows_at_a_hash_and_of_one_row_the_same():
  token = np.random.default_rng(0).integers(-1, 6400, (2, 5, 2), np.int32)
  sizes = {'dim': 8, 'n_rows': 1026, 'row_dim': 4, 'n_heads': 2, 'ngrams': (2, 1)}
  found = NgramBucket(**sizes, rows_per_head=4).rows_of(jnp.asarray(token))
  assert found.shape == (2, 5, 2, 4) and found.dtype == jnp.int32
  for b, t, head in np.ndindex(found.shape[:3]):
    first = 4 * rows_by_hand(token[b, t, : (2, 1)[head]].tolist(), head, 1026 // 4)
    assert found[b, t, head].tolist() == [first, first + 1, first + 2, first + 3]
  one = NgramBucket(**sizes, rows_per_head=1).rows_of(jnp.asarray(token))
  np.testing.assert_array_equal(one, ngram_rows(jnp.asarray(token), (2, 1), 1, 1026))


@pytest.mark.parametrize(('token', 'dtype'), [(2**32 + 5, np.int64), (2**32 - 1, np.uint32), (-(2**32) + 5, np.int64)])
@pytest.mark.parametrize('vocab_size', [None, 10])
def test_token_that_is_no_int32_is_not_taken_for_another(token, dtype, vocab_size):
  memory = NgramBag(dim=8, n_rows=64, row_dim=4, ngrams=(1, 2), n_heads=2, vocab_size=vocab_size)
  tokens = np.full((1, 3), token, dtype)
  for find in (memory.rows, lambda tokens: ngram_rows(tokens[..., None], (1,), 1, 64, vocab_size)):
    with pytest.raises(ValueError, match=f'token id {token} must fit int32'):
      find(tokens)


@pytest.mark.parametrize('token', [-1, 10])
def test_token_that_is_not_in_the_vocabulary_reads_no_row_of_another(token):
  memory = NgramBag(dim=8, n_rows=64, row_dim=4, ngrams=(1, 2), n_heads=2, vocab_size=10)
  with pytest.raises(ValueError, match=f'token id {token} must be from 0 to 9'):
    memory.rows(jnp.array([[3, token, 5]]))
  assert memory.rows(jnp.array([[3, 9, 0]])).shape == (1, 3, 2, 1)


@pytest.mark.parametrize('ngrams', [(1, 2, 3), (2, 3, 2), (1, 1, 1)])
def test_ranges_of_their_own_are_disjoint_prime_and_exact_for_single_tokens(ngrams):
  token = np.random.default_rng(0).integers(0, 99, (2, 5, 3), np.int32)
  rows = np.asarray(ngram_rows(jnp.asarray(token), ngrams, 2, 1009, 99))
  sizes = {'dim': 8, 'n_rows': 1009, 'row_dim': 4, 'n_heads': 3, 'rows_per_head': 2, 'vocab_size': 99}
  buckets = np.asarray(NgramBucket(**sizes, ngrams=ngrams).rows_of(jnp.asarray(token)))
  for b, t in np.ndindex(2, 5):
    last = token[b, t].tolist()
    assert rows[b, t].ravel().tolist() == own_rows_by_hand(last, [n for n in ngrams for _ in 'ab'], 1009, 99)
    firsts = [2 * bucket for bucket in own_rows_by_hand(last, list(ngrams), 1009 // 2, 99)]
    assert buckets[b, t].tolist() == [[first, first + 1] for first in firsts]
  first_R, size_R = own_ranges(ngrams, 2, 2**24, 6400)  # as large as banks may be
  assert first_R[0] == 0 and np.all(first_R[1:] == first_R[:-1] + size_R[:-1]) and first_R[-1] + size_R[-1] <= 2**24
  every = np.stack([np.arange(99)] * 2, -1)[None].astype(np.int32)  # no two tokens share a row, nor do two heads
  exact = np.asarray(ngram_rows(jnp.asarray(every), (1, 2, 1), 1, 300, 99))[0, :, ::2, 0]
  assert len(np.unique(exact)) == 198


def test_signs_are_those_of_another_hash_and_split_ngrams_that_share_a_row():
  token = np.stack(np.meshgrid(np.arange(100), np.arange(200)), -1).reshape(1, -1, 2).astype(np.int32)
  sign = np.asarray(ngram_signs(jnp.asarray(token), (2, 1)))[0]
  assert sign.dtype == np.int32 and np.array_equal(np.unique(sign[:, 0]), np.arange(SIGN_VECTORS))
  vectors = np.asarray(sign_vectors(24))
  for at in (0, 7, 19_999):
    last = token[0, at].tolist()
    for head, n in enumerate((2, 1)):
      np.testing.assert_array_equal(vectors[sign[at, head]], signs_by_hand(last[:n], head, 24))
  row = np.asarray(ngram_rows(jnp.asarray(token), (2, 1), 1, 1024))[0, :, 0, 0]

  def pairs(x: np.ndarray) -> int:
    counts = np.unique(x, return_counts=True)[1]
    return int(np.sum(counts * (counts - 1)) // 2)

  expected = pairs(row) / SIGN_VECTORS  # of the pairs in one row, those with the same signs
  assert abs(pairs(row * SIGN_VECTORS + sign[:, 0]) - expected) < 5 * expected**0.5
  cosines = vectors @ vectors.T / 24 - np.eye(SIGN_VECTORS)
  assert abs(cosines.mean()) < 0.005 and abs(np.sqrt((cosines**2).mean()) - 24**-0.5) < 0.01


@pytest.mark.thorough
@pytest.mark.parametrize('heads', [3, 12])
def test_signs_are_in_the_sums_and_in_the_gradient_of_the_bank_by_either_route(heads):
  """Against loops over positions, heads and rows; the second route is that of lazy updates."""
  memory = NgramBag(
    dim=6, n_rows=40, row_dim=5, n_heads=heads, rows_per_head=2, ngrams=(1, 2), signs=True, output_gate=False
  )
  rng = np.random.default_rng(0)
  x_BTD, slope = (jnp.asarray(rng.standard_normal((2, 4, 6)), jnp.float32) for _ in range(2))
  bank = rng.standard_normal((40, 5)).astype(np.float32)
  last = last_tokens(jnp.asarray(rng.integers(0, 3, (2, 4)), jnp.int32), 2)  # few tokens: rows are read often
  params, row, sign = memory.init(jax.random.key(0)), memory.rows_of(last), memory.signs_of(last)
  down = np.asarray(params['down']['kernel']).reshape(heads, 5, 6)
  delta, grad = np.zeros((2, 4, 6)), np.zeros((40, 5))
  for b, t, head in np.ndindex(2, 4, heads):
    signs = signs_by_hand(np.asarray(last[b, t, : 1 + head % 2]).tolist(), head, 5)
    delta[b, t] += signs * bank[np.asarray(row[b, t, head])].mean(0) @ down[head]
    for at in np.asarray(row[b, t, head]):
      grad[at] += signs * (down[head] @ np.asarray(slope[b, t])) / 2

  def total(bank):
    return jnp.vdot(memory.apply(params, x_BTD, bank, row, sign).delta_BTD, slope)

  np.testing.assert_allclose(memory.apply(params, x_BTD, jnp.asarray(bank), row, sign).delta_BTD, delta, atol=1e-5)
  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(bank)), grad, atol=1e-5)
  tap = no_reads(row.shape, 5, jnp.float32, bag=True)
  reads = jax.grad(lambda tap: total(TappedBank(jnp.asarray(bank), tap)))(tap)
  np.testing.assert_allclose(add_reads(jnp.zeros((40, 5)), row, reads), grad, atol=1e-5)


def test_dropped_heads_say_nothing_and_the_others_more():
  memory = NgramBag(dim=6, n_rows=64, row_dim=5, n_heads=2, ngrams=(1, 2), output_gate=False)
  x_BTD, bank = jnp.ones((1, 3, 6)), init_bank(jax.random.key(1), n_rows=64, row_dim=5)
  params, row = memory.init(jax.random.key(0)), jnp.arange(6).reshape(1, 3, 2, 1)
  kept = jnp.asarray([[[0, 2], [2, 0], [0, 0]]], jnp.float32)
  delta, pull = jax.vjp(lambda bank: memory.apply(params, x_BTD, bank, row, None, kept).delta_BTD, bank)
  down = params['down']['kernel'].reshape(2, 5, 6)
  want = jnp.stack([2 * bank[1] @ down[1], 2 * bank[2] @ down[0], jnp.zeros(6)])[None]
  np.testing.assert_allclose(delta, want, atol=1e-6)
  assert np.flatnonzero(np.any(pull(jnp.ones_like(delta))[0], axis=-1)).tolist() == [1, 2]


@pytest.mark.thorough
def test_what_a_gate_picks_is_not_dropped_beside_layers_of_ngrams():
  config = tiny_config(model__sublayer='memory_bag', memory__ngram_layers='1', memory__row_dropout=0.25)
  graphdef, params = build_model(config)
  model = nnx.merge(graphdef, params)
  h_BTD = jax.random.normal(jax.random.key(0), (2, 5, config.model.dim))
  last_BTn, key = jnp.zeros((2, 5, max(config.memory.ngram_of_heads())), jnp.int32), jax.random.key(1)
  for block, drops in zip(model.layers, (False, True), strict=True):
    whole, dropped = (
      block.sublayer(SublayerInput(h_BTD, h_BTD, model.memory_bank[...], last_BTn, own_key), jnp.float32).delta_BTD
      for own_key in (None, key)
    )
    assert np.array_equal(whole, dropped) != drops


@pytest.mark.thorough
def test_rows_are_dropped_by_the_key_alone_in_each_layer_for_itself(monkeypatch):
  config, seen = tiny_config(**NGRAM, memory__row_dropout=0.25), []
  graphdef, params = build_model(config)
  model, tokens = nnx.merge(graphdef, params), random_batch(config)['input'][0]
  apply = NgramBag.apply

  def spy(self, params, x_BTD, bank_MP, row_BThr, sign_BTh, kept_BTh, **more):
    seen.append(kept_BTh)
    return apply(self, params, x_BTD, bank_MP, row_BThr, sign_BTh, kept_BTh, **more)

  monkeypatch.setattr(NgramBag, 'apply', spy)
  outs = [model(tokens, dropout_key=key).hidden_BTD for key in (None, jax.random.key(1), jax.random.key(1))]
  assert seen[:2] == [None, None] and not np.allclose(outs[0], outs[1], atol=1e-3)
  np.testing.assert_array_equal(outs[1], outs[2])
  first, second, *again = (np.asarray(kept) for kept in seen[2:])
  assert np.array_equal(again, [first, second]) and not np.array_equal(first, second)
  kept = np.stack([first, second])
  assert np.allclose(np.unique(kept), [0, 1 / 0.75]) and abs(kept.mean() - 1) < 0.15


@pytest.mark.parametrize('rows', rarely([1, 2], 2), ids=['bag', 'buckets'])
def test_model_with_ranges_and_signs_keeps_documents_apart(rows):
  own = NGRAM | {'memory__ngrams': '1,2,3', 'memory__ngram_ranges': 'own', 'memory__ngram_signs': True}
  more = {} if rows == 1 else {'model__sublayer': 'ngram_bucket', 'model__num_selected': rows, 'memory__key_dim': 4}
  config = tiny_config(**own | {'model__knowledge_num': 900 * rows, 'model__n_layers': 1} | more)
  graphdef, params = build_model(config)
  if rows > 1:  # keys start at 0: nothing would be chosen by context
    gate = params['layers'][0]['sublayer']['gate']
    gate['keys'] = jax.random.normal(jax.random.key(3), gate['keys'].shape)
  model = jax.jit(nnx.merge(graphdef, params))
  tokens = jnp.tile(random_batch(config)['input'][0][:, :5], (1, 2))
  out = model(tokens, jnp.asarray(np.repeat([[0, 1]], 5, axis=1), jnp.int32).repeat(len(tokens), axis=0))
  np.testing.assert_array_equal(out.row_LBTR[:, :, :5], out.row_LBTR[:, :, 5:])
  np.testing.assert_allclose(out.hidden_BTD[:, :5], out.hidden_BTD[:, 5:], atol=1e-4)
  assert np.any(np.abs(model(tokens).hidden_BTD[:, 5:] - out.hidden_BTD[:, 5:]) > 1e-2)
  last = [int(t) for t in (tokens[1, 6], tokens[1, 5], NO_TOKEN)]
  firsts = own_rows_by_hand(last, [1, 1, 2, 2, 3, 3] if rows == 1 else [1, 2, 3], 900, 300)
  assert out.row_LBTR[0, 1, 6].tolist() == [rows * first + r for first in firsts for r in range(rows)]


@pytest.mark.parametrize(
  ('call', 'said'),
  [
    (lambda tokens: last_tokens(tokens[0], 2), r'tokens must have the shape \(B, T\), not \(5,\)'),
    (lambda tokens: last_tokens([[1, 2]], 2), r'tokens must have the shape \(B, T\), not list'),
    (lambda tokens: last_tokens(tokens, 0), 'n=0 must be a whole number of at least 1'),
    (lambda tokens: last_tokens(tokens, 2.0), r'n=2\.0 must be a whole number'),
    (lambda tokens: last_tokens(tokens, 2, [0]), r'segments must have .*, \(3, 5\), not list'),
    (lambda tokens: cached_last_tokens(tokens[..., None], tokens, 2), r'tokens must .* \(B, S\), not \(3, 5, 1\)'),
    (lambda tokens: last_tokens(tokens, 2, tokens[:1]), r'segments must have .*, \(3, 5\), not \(1, 5\)'),
    (lambda tokens: cached_last_tokens(tokens, tokens[:, 0], 2), r'positions must .* \(B=3, T\), not \(3,\)'),
    (lambda tokens: cached_last_tokens(tokens, tokens * 0.5, 2), 'positions must be whole numbers, not float32'),
    (lambda tokens: cached_last_tokens(tokens, tokens[:1], 2), r'positions must .* \(B=3, T\), not \(1, 5\)'),
  ],
)
def test_tokens_of_other_shapes_are_refused(call, said):
  with pytest.raises(ValueError, match=said):
    call(jnp.zeros((3, 5), jnp.int32))


@pytest.mark.thorough
def test_bucket_starts_as_the_mean_of_its_rows_and_of_one_row_is_an_ngram_bag():
  more = {'memory__input': 'residual', 'memory__n_heads': 3, 'memory__ngrams': '1,2', 'memory__key_dim': 4}
  tokens = random_batch(tiny_config())['input'][0]
  for r in (1, 4):
    config = tiny_config(model__sublayer='ngram_bucket', model__num_selected=r, **more)
    graphdef, params = build_model(config)
    out = jax.jit(lambda params, graphdef=graphdef: nnx.merge(graphdef, params)(tokens))(params)
    if r == 1:
      bag_config = tiny_config(model__sublayer='ngram_bag', model__num_selected=1, **more | {'memory__key_dim': 0})
      bag = build_model(bag_config)[0]
      for layer in params['layers'].values():
        layer['sublayer'].pop('gate')
      bag_out = jax.jit(lambda params, bag=bag: nnx.merge(bag, params)(tokens))(params)
      np.testing.assert_array_equal(out.row_LBTR, bag_out.row_LBTR)
      np.testing.assert_allclose(out.hidden_BTD, bag_out.hidden_BTD, atol=1e-6)
    else:
      assert not np.any(out.score_LBTR)
      assert np.unique(np.asarray(out.row_LBTR) // 4, axis=-1).shape[-1] == 3  # a bucket for each head


def test_rows_are_taken_as_evenly_as_at_random():
  """Of 20,000 pairs of neighbouring numbers, as ids of frequent tokens are; chi-squared over 1,024 rows, both heads."""
  token = np.stack(np.meshgrid(np.arange(100), np.arange(200)), -1).reshape(1, -1, 2).astype(np.int32)
  rows = np.asarray(ngram_rows(jnp.asarray(token), (2, 2), 1, 1024))[0, :, :, 0]
  for row in rows.T:
    counts = np.bincount(row, minlength=1024)
    chi_squared = np.sum((counts - counts.mean()) ** 2 / counts.mean())
    assert abs(chi_squared - 1023) < 5 * (2 * 1023) ** 0.5
  pairs = np.bincount(
    rows[:, 0] // 32 * 32 + rows[:, 1] // 32, minlength=1024
  )  # what one head mixes up, another does not
  assert abs(np.sum((pairs - pairs.mean()) ** 2 / pairs.mean()) - 1023) < 5 * (2 * 1023) ** 0.5


def test_model_reads_the_rows_of_its_last_tokens():
  config = tiny_config(**NGRAM)
  graphdef, params = build_model(config)
  tokens = random_batch(config)['input'][0]
  segment = np.zeros_like(tokens)
  segment[:, 5:] = 1
  run = jax.jit(lambda segment: nnx.merge(graphdef, params)(tokens, segment))
  out = run(segment)
  assert 'gate' not in params['layers'][0]['sublayer']
  np.testing.assert_array_equal(out.row_LBTR[0], out.row_LBTR[1])
  last = [int(tokens[1, 6]), int(tokens[1, 5]), NO_TOKEN]  # the third lies in another segment
  by_hand = [rows_by_hand(last[:n], i, config.model.knowledge_num) for i, n in enumerate((2, 2, 3, 3, 2, 2))]
  assert out.row_LBTR[0, 1, 6].tolist() == by_hand


def test_earlier_tokens_count_through_the_bank_alone_where_attention_is_off():
  config = tiny_config(**NGRAM, memory__input='residual')
  graphdef, params = build_model(config)
  for layer in params['layers'].values():
    layer['attention']['wo']['kernel'] *= 0
  tokens = jnp.asarray(random_batch(config)['input'][0][:1])
  changed = tokens.at[0, 4].add(1)
  run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens).hidden_BTD[0])
  differs = np.abs(run(params, tokens) - run(params, changed)).max(axis=-1) > 1e-6
  assert np.flatnonzero(differs).tolist() == [4, 5, 6]  # heads look at two or three tokens
  zeroed = params | {'memory_bank': params['memory_bank'] * 0}
  differs = np.abs(run(zeroed, tokens) - run(zeroed, changed)).max(axis=-1) > 1e-6
  assert np.flatnonzero(differs).tolist() == [4]


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'bank_MP': (63, 8)}, r'=\(64, 8\), not \(63, 8\)'),
    ({'bank_MP': (64, 16)}, r'=\(64, 8\), not \(64, 16\)'),
    ({'h_BTD': (2, 32)}, r'shape \(B, T, dim=32\), not \(2, 32\)'),
    ({'h_BTD': (1, 2, 48)}, r'shape \(B, T, dim=32\), not \(1, 2, 48\)'),
  ],
)
def test_a_memory_refuses_arrays_of_other_shapes(changes, said):
  config = tiny_config(**NGRAM)
  memory = SUBLAYERS['ngram_bag'].build(config.model, config.memory, rngs=nnx.Rngs(0))
  shapes = {'h_BTD': (1, 2, config.model.dim), 'bank_MP': (64, 8)} | changes
  h_BTD, bank_MP = (jnp.zeros(shape) for shape in shapes.values())
  with pytest.raises(ValueError, match=said):
    memory(SublayerInput(h_BTD, h_BTD, bank_MP, jnp.zeros((1, 2, 3), jnp.int32)), jnp.float32)


@pytest.mark.parametrize(
  ('row_BThr', 'said'),
  [
    (None, 'needs the rows that they address: see NgramBag.rows'),
    (jnp.zeros((1, 2, 2, 2), jnp.int32), r'must have the shape .*=\(1, 2, 3, 2\), not \(1, 2, 2, 2\)'),
  ],
)
def test_rows_of_ngrams_that_are_missing_or_of_another_shape_are_refused(row_BThr, said):
  memory = NgramBag(dim=8, n_rows=64, row_dim=8, n_heads=3, rows_per_head=2)
  with pytest.raises(ValueError, match=said):
    memory.apply(memory.init(jax.random.key(0)), jnp.zeros((1, 2, 8)), jnp.zeros((64, 8)), row_BThr)


def test_a_jitted_function_may_close_over_its_tokens_and_rows():
  memory = NgramBag(dim=8, n_rows=64, row_dim=4, n_heads=2, ngrams=(1, 2), vocab_size=10)
  last_BTn, bank_MP = last_tokens(jnp.arange(8).reshape(1, 8), 2), jnp.ones((64, 4))
  row_BThr, params = memory.rows_of(last_BTn), memory.init(jax.random.key(0))
  assert jax.jit(lambda bank_MP: memory.sums_of(last_BTn, bank_MP)[1])(bank_MP).shape == (1, 8, 2, 4)
  assert jax.jit(lambda x_BTD: memory.apply(params, x_BTD, bank_MP, row_BThr).delta_BTD)(jnp.ones((1, 8, 8))).shape


@pytest.mark.parametrize('row', [16, -1])
def test_rows_outside_the_bank_are_refused(row):
  memory = NgramBag(dim=8, n_rows=16, row_dim=8, n_heads=2)
  row_BThr = jnp.full((1, 2, 2, 1), row)
  with pytest.raises(ValueError, match=f'row_BThr must hold numbers from 0 to 15, not {row}'):
    memory.apply(memory.init(jax.random.key(0)), jnp.zeros((1, 2, 8)), jnp.zeros((16, 8)), row_BThr)


@pytest.mark.parametrize('last_BTn', [jnp.zeros((1, 4, 1), jnp.int32), jnp.zeros((1, 4, 2))])
def test_too_few_last_tokens_and_fractions_are_refused(last_BTn):
  memory = NgramBag(dim=8, n_rows=64, row_dim=8, n_heads=2, ngrams=(1, 2), signs=True)
  for of_last in (memory.rows_of, memory.signs_of):
    with pytest.raises(ValueError, match='must be whole numbers, at least 2 at each position'):
      of_last(last_BTn)


@pytest.mark.thorough
def test_layers_of_both_kinds_share_the_bank():
  config = tiny_config(
    model__sublayer='memory_bag', model__n_layers=4, memory__layers='1,2,3', memory__ngram_layers='2', memory__n_heads=2
  )
  assert layer_kinds(config.model, config.memory) == ('dense', 'memory_bag', 'ngram_bag', 'memory_bag')
  assert memory_layers(config) == [1, 2, 3]
  graphdef, params = build_model(config)
  tokens = random_batch(config)['input'][0]
  out = jax.jit(nnx.merge(graphdef, params))(tokens)
  by_hand = [rows_by_hand([int(tokens[1, 6])], i, config.model.knowledge_num) for i in range(6)]
  assert out.row_LBTR[1, 1, 6].tolist() == by_hand and not np.any(out.score_LBTR[1]) and np.any(out.score_LBTR[2])
  assert ['gate' in params['layers'][i]['sublayer'] for i in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize(
  ('overrides', 'said'),
  [
    (
      ['model.sublayer=ngram_bag', 'memory.ngrams=2,x'],
      "memory.ngrams='2,x' must be numbers of tokens from 1 to 9, such as '2,3'",
    ),
    (['model.sublayer=ngram_bag', 'memory.ngrams='], "memory.ngrams='' must be numbers of tokens"),
    (['model.sublayer=ngram_bag', 'memory.ngrams=0'], "memory.ngrams='0' must be"),
    (['model.sublayer=ngram_bag', 'memory.ngrams=10'], "memory.ngrams='10' must be"),
    (['model.sublayer=ngram_bag', 'memory.ngrams=2,3'], 'no more of them than memory.n_heads=1'),
    (
      ['memory.ngram_layers=1', 'model.sublayer=moe'],
      "ngram_layers='1' does nothing in a model of moe layers: it belongs to model.sublayer 'cross_att",
    ),
    (['model.sublayer=ngram_bag', 'memory.selection_bias=True'], 'selection_bias=True does nothing in'),
    (
      ['memory.ngram_signs=True'],
      "does nothing in a model of gated_fusion layers: it belongs to model.sublayer 'ngram_b",
    ),
    (['model.sublayer=ngram_bag', 'memory.ngram_ranges=each'], "ngram_ranges='each' must be one of shared, own"),
    (
      ['model.sublayer=ngram_bag', 'memory.n_heads=2', 'memory.ngrams=1,2', 'memory.ngram_ranges=own']
      + ['model.knowledge_num=51215'],
      "knowledge_num=51215 must be at least 51216 with memory.ngram_ranges='own'",
    ),
    (['memory.ngram_layers=9'], "memory.ngram_layers='9' must be 'all', 'middle' or different layers"),
    (['memory.ngram_layers=0,1', 'memory.layers=1,2'], "memory.ngram_layers='0,1' has layer 0, which is not among"),
  ],
)
def test_settings_against_a_rule_are_refused(overrides, said):
  with pytest.raises(UserError, match=said):
    load_config('configs/base.py', [f'--config.{override}' for override in overrides])


def test_rows_count_by_the_rule_of_what_read_them():
  config = tiny_config(
    model__sublayer='memory_bag', memory__ngram_layers='1', memory__value_layers='0', memory__n_heads=2,
    memory__score_activation='relu', model__num_selected=4,
  )  # fmt: skip
  score_LBTR = np.random.default_rng(0).standard_normal((3, 2, 5, 8)).astype(np.float32)
  weight_LBTR = np.asarray(row_weights(config, jnp.asarray(score_LBTR)))
  np.testing.assert_array_equal(weight_LBTR[1], np.maximum(score_LBTR[1], 0))  # layer 0, after the rows in values
  np.testing.assert_array_equal(weight_LBTR[[0, 2]], 0.25)
