"""n-grams that training read, counted: against a dictionary of tuples over the batches that training was given."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import ngrams
from mmjax.data.loader import PADDING, TokenSplit, train_batches
from mmjax.data.ngrams import count_ngrams, ngram_keys, times_read
from mmjax.errors import UserError

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
  start, expected, stream = split.spans()[0], Counter(), [EOS] * (n - 1) + stream_of(split)
  batches = train_batches(split, global_batch_rows=rows, seed=5)
  for _ in range(steps):
    batch = next(batches)
    for row_id, target_T in zip(batch['row_id'], batch['target'], strict=True):
      for at in np.flatnonzero(target_T != PADDING):
        end = start[row_id] + at + n
        assert stream[end - 1] == target_T[at]
        expected[tuple(stream[end - n : end])] += 1
  batches.close()
  times = times_read(split, global_batch_rows=rows, seed=5, steps=steps)
  assert times.sum() == rows * steps and len(set(times.tolist())) > 1
  asked = [EOS] * (n - 1) + stream_of(held_out)
  grams = [tuple(asked[i : i + n]) for i in range(held_out.n_tokens)]
  found = count_ngrams(split, times, n, ngram_keys(held_out, n, 0, held_out.n_tokens))
  assert found.tolist() == [expected[gram] for gram in grams]
  assert n < 3 or 0 in found


def test_ngrams_that_are_no_int64_are_refused():
  split = make_split([9, 4], 'packed')
  assert ngram_keys(split, 22, 0, 1).dtype == np.int64
  for n in (23, 10**30):  # and at once: V^n has too many digits to be computed
    with pytest.raises(UserError, match=f'n-grams of n={n} tokens: n must be from 1 to 22 with a vocabulary of 7'):
      ngram_keys(split, n, 0, 1)
