"""How often training read the n-grams of another text: exact counts of tokens that it did not hold out.

An n-gram is a token that is to be predicted with the n - 1 tokens before it in the stream of its split, whatever rows
and documents these lie in. It is one int64: its tokens are the digits of a number to the base of the vocabulary. The
stream of training is read in chunks, and each is sorted and searched for the n-grams that are asked for: 55 M tokens
take seconds, and no table of all n-grams exists.
"""

import numpy as np

from mmjax.data.loader import TokenSplit, row_order
from mmjax.errors import UserError

CHUNK = 2**22  # tokens that are sorted at once: 32 MiB
MOST = 2**63


def ngram_keys(split: TokenSplit, n: int, start: int, stop: int) -> np.ndarray:
  """Returns the n-gram that ends at each position of a split's stream, int64 (stop - start,).

  The stream begins as if EOS stood before it.

  Raises:
    UserError: if n is not at least 1, or so large that the n-grams of this vocabulary are no int64.
  """
  most = max(k for k in range(1, 64) if split.vocab_size**k <= MOST)
  if not 1 <= n <= most:
    raise UserError(f'n-grams of n={n} tokens: n must be from 1 to {most} with a vocabulary of {split.vocab_size}')
  before = np.full(max(n - 1 - start, 0), split.eos_id)
  tokens = np.concatenate([before, split.stream(max(start - n + 1, 0), stop)]).astype(np.int64)
  keys = np.zeros(stop - start, np.int64)
  for at in range(n):
    keys = keys * split.vocab_size + tokens[at : at + len(keys)]
  return keys


def times_read(split: TokenSplit, *, global_batch_rows: int, seed: int, steps: int) -> np.ndarray:
  """Returns how often each row was read after `steps` batches of `train_batches`, int64 (rows,)."""
  order, read = row_order(split.n_rows, seed), steps * global_batch_rows
  passes = read // split.n_rows  # each has every row once
  rest = np.fromiter((order[i] for i in range(passes * split.n_rows, read)), np.int64)
  return passes + np.bincount(rest, minlength=split.n_rows)


def count_ngrams(
  split: TokenSplit, row_times: np.ndarray, n: int, wanted_X: np.ndarray, *, contexts: bool = False
) -> np.ndarray:
  """Counts how often n-grams were read as the n - 1 tokens before a target and the target.

  Args:
    split: what training read.
    row_times: int64 (rows,), how often it read each row, from `times_read`.
    n: tokens of an n-gram.
    wanted_X: int64 n-grams, as `ngram_keys` makes them with the same vocabulary.
    contexts: count the n - 1 tokens before a target instead, whatever it is; wanted_X are such, keys // vocabulary.

  Returns:
    int64 (X,).
  """
  own_keys, place_X = np.unique(wanted_X, return_inverse=True)
  counts = np.zeros(len(own_keys), np.int64)
  starts, stops = split.spans()
  for start in range(0, split.n_tokens, CHUNK):
    stop = min(start + CHUNK, split.n_tokens)
    position_t = np.arange(start, stop)
    row_t = np.searchsorted(starts, position_t, 'right') - 1
    times_t = row_times[row_t] * (position_t < stops[row_t])  # not what padded rows cut off
    key_t = ngram_keys(split, n, start, stop) // (split.vocab_size if contexts else 1)
    for times in np.unique(times_t[times_t > 0]):
      sorted_t = np.sort(key_t[times_t == times])
      counts += times * (np.searchsorted(sorted_t, own_keys, 'right') - np.searchsorted(sorted_t, own_keys))
  return counts[place_X]
