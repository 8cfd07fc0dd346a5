"""n-grams that training read, counted: against a dictionary of tuples over the batches that training was given."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
from scipy.special import softmax

from mmjax.data import ngrams
from mmjax.data.loader import PADDING, TokenSplit, train_batches
from mmjax.data.ngrams import count_ngrams, ngram_keys, times_read
from mmjax.errors import UserError
from mmjax.inference.count_mix import PRIOR, Shares, mixed_loss, read_shares

EOS, V, T = 3, 7, 5


def make_split(lengths, layout, seed=0, name='train') -> TokenSplit:
  """Returns a split of random documents in two shards, with no files below it."""
  generator = np.random.default_rng(seed)
  documents = [np.append(generator.integers(4, V, n - 1), EOS).astype(np.uint16) for n in lengths]
  parts = [documents[: len(documents) // 2], documents[len(documents) // 2 :]]
  shards = [(np.concatenate(part), np.cumsum([0, *map(len, part)])) for part in parts]
  tokens = sum(lengths)
  entry = {'tokens': tokens, 'documents': len(lengths), 'text_bytes': tokens, 'shards': []}
  index = {'splits': {name: entry}, 'tokenizer': {'pad_id': 0, 'bos_id': 2, 'eos_id': EOS}, 'vocab_size': V}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('mmjax.data.loader.open_shards', lambda *_: shards)
    return TokenSplit(Path(), index | {'dtype': 'uint16'}, name, T, layout, isolate_documents=False)


def stream_of(split) -> list[int]:
  return split.stream(0, split.n_tokens).tolist()


@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('layout', ['packed', 'padded'])
def test_counts_are_those_of_a_dictionary_over_the_batches_of_training(layout, n, monkeypatch):
  monkeypatch.setattr(ngrams, 'CHUNK', 16)  # of 93 tokens
  split, held_out = make_split([9, 4, 12, 7, 21, 3, 30, 7], layout), make_split([9, 11], layout, 1)
  rows, steps = 2, 3 if layout == 'padded' else 11  # some rows are not read, or some twice
  start, expected, before, stream = split.spans()[0], Counter(), Counter(), [EOS] * (n - 1) + stream_of(split)
  batches = train_batches(split, global_batch_rows=rows, seed=5)
  for _ in range(steps):
    batch = next(batches)
    for row_id, target_T in zip(batch['row_id'], batch['target'], strict=True):
      for at in np.flatnonzero(target_T != PADDING):
        end = start[row_id] + at + n
        assert stream[end - 1] == target_T[at]
        expected[tuple(stream[end - n : end])] += 1
        before[tuple(stream[end - n : end - 1])] += 1
  batches.close()
  times = times_read(split, global_batch_rows=rows, seed=5, steps=steps)
  assert times.sum() == rows * steps and len(set(times.tolist())) > 1
  asked = [EOS] * (n - 1) + stream_of(held_out)
  grams = [tuple(asked[i : i + n]) for i in range(held_out.n_tokens)]
  found = count_ngrams(split, times, n, ngram_keys(held_out, n, 0, held_out.n_tokens))
  assert found.tolist() == [expected[gram] for gram in grams]
  assert n < 3 or 0 in found
  shares, deepest = read_shares(lambda k: ngram_keys(held_out, k, 0, held_out.n_tokens), split, times, n)
  assert shares[-1].tolist() == [expected[g] / max(before[g[:-1]], 1) for g in grams]
  seen = [before[gram[:-1]] for gram in grams]
  assert all(64 * n + int(np.log2(times)) == at for times, at in zip(seen, deepest, strict=True) if times)
  assert all(at < 64 * n for times, at in zip(seen, deepest, strict=True) if not times)


def test_model_is_mixed_with_counts_by_the_weights_that_fit_the_other_half_best():
  rng = np.random.default_rng(0)
  nll_X, share_nX, bin_X = rng.uniform(0.5, 3, 600), rng.uniform(0, 1, (2, 600)) ** 2, rng.integers(0, 2, 600) * 70
  share_nX[:, rng.uniform(size=600) < 0.3] = 0  # never read
  document_X = np.arange(600) // 60
  found_X = mixed_loss(nll_X, Shares(share_nX, bin_X), document_X)
  parts_nX = np.concatenate([np.exp(-nll_X)[None], share_nX])
  for parity in (0, 1):
    for number in (0, 70):
      fitted, used = (((document_X % 2 == p) & (bin_X == number)) for p in (1 - parity, parity))

      def cost(logits, part_nX=parts_nX[:, fitted]):
        weights = softmax(logits)
        return -np.log(weights @ part_nX).sum() - PRIOR * np.log(weights[0])

      best = softmax(scipy.optimize.minimize(cost, np.zeros(3), tol=1e-10).x)
      np.testing.assert_allclose(found_X[used], -np.log(best @ parts_nX[:, used]), rtol=2e-3)
  alone_X = mixed_loss(nll_X, Shares(share_nX, bin_X), np.zeros(600, int))  # then its halves are those of two
  np.testing.assert_array_equal(alone_X, mixed_loss(nll_X, Shares(share_nX, bin_X), np.arange(600) // 300))


def test_ngrams_that_are_no_int64_are_refused():
  split = make_split([9, 4], 'packed')
  assert ngram_keys(split, 22, 0, 1).dtype == np.int64
  for n in (23, 10**30):  # and at once: V^n has too many digits to be computed
    with pytest.raises(UserError, match=f'n-grams of n={n} tokens: n must be from 1 to 22 with a vocabulary of 7'):
      ngram_keys(split, n, 0, 1)
