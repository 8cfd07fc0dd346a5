"""What counts of n-grams alone are worth: the loss of a model whose predictions are mixed with them.

A memory whose rows n-grams address can hold what a table of counts holds. How much of its lead does the table give a
model without a memory? The probability of a token becomes a weighted mean of the model's and of the shares of n-grams,
the token's count behind the k - 1 tokens before it over that of these tokens, both as training read them. The weights
depend on which of these contexts training read and how often, as in Jelinek and Mercer (1980), and are fitted by
expectation maximization: on one half of the held-out documents for the other half.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mmjax.console import share_shown
from mmjax.data.loader import TokenSplit
from mmjax.data.ngrams import count_ngrams

ROUNDS = 50  # of expectation maximization
PRIOR = 10.0  # targets as which the model alone counts in each bin


class Shares(NamedTuple):
  """What counts say of each target X.

  Attributes:
    share_nX: float64, for n-grams of 1 token, of 2, ...: how often training read the target behind its context, over
      how often it read the context; 0 if never.
    bin_X: int, targets whose weights are the same: by the longest context that training read, and the logarithm of how
      often.
  """

  share_nX: np.ndarray
  bin_X: np.ndarray


def read_shares(keys_of: Callable[[int], np.ndarray], train: TokenSplit, times: np.ndarray, longest: int) -> Shares:
  """Returns what counts say of targets.

  Args:
    keys_of: takes k; returns the k-grams that end in the targets, from `ngram_keys`.
    train: what training read.
    times: int64 (rows,), how often it read each row.
    longest: tokens of the longest n-gram.

  Raises:
    UserError: if n-grams of so many tokens are no int64; before anything is counted.
  """
  keys_of(longest)
  shares, bin_X = [], 0
  with share_shown('counting n-grams') as show:
    for k in range(1, longest + 1):
      key_X = keys_of(k)
      context_X = count_ngrams(train, times, k, key_X // train.vocab_size, contexts=True)
      shares.append(count_ngrams(train, times, k, key_X) / np.maximum(context_X, 1))
      bin_X = np.where(context_X, 64 * k + np.log2(np.maximum(context_X, 1)).astype(int), bin_X)
      show(k / longest)
  return Shares(np.stack(shares), bin_X)


def mixed_loss(nll_X: np.ndarray, shares: Shares, document_X: np.ndarray) -> np.ndarray:
  """Returns the loss on each target, float64 (X,) in nats, of a model mixed with counts.

  Args:
    nll_X: float64, the model's, in nats.
    shares: of the counts.
    document_X: int, the document of each target. The weights for even ones are fitted on odd ones, and the other way
      round; those for one half of a single document on its other half.
  """
  one = not np.any(document_X != document_X[0])
  half_X = np.arange(len(nll_X)) * 2 // len(nll_X) if one else document_X % 2
  part_nX = np.concatenate([np.exp(-nll_X)[None], shares.share_nX])
  bins, bin_X = np.unique(shares.bin_X, return_inverse=True)
  mixed_X = np.empty_like(nll_X)
  for half in (0, 1):
    fitted = half_X != half
    weights = _fit(part_nX[:, fitted], bin_X[fitted], len(bins))
    mixed_X[~fitted] = -np.log(np.sum(weights[:, bin_X[~fitted]] * part_nX[:, ~fitted], axis=0))
  return mixed_X


def _fit(part_nX: np.ndarray, bin_X: np.ndarray, n_bins: int) -> np.ndarray:
  """Returns the weights of the parts in each bin, float64 (n, bins), under which the targets are most probable."""
  prior = np.zeros((len(part_nX), 1))
  prior[0] = PRIOR
  weights = np.full((len(part_nX), n_bins), 1 / len(part_nX))
  for _ in range(ROUNDS):
    joint_nX = weights[:, bin_X] * part_nX
    sums = [np.bincount(bin_X, of_part_X, n_bins) for of_part_X in joint_nX / joint_nX.sum(axis=0)]
    weights = np.stack(sums) + prior
    weights /= weights.sum(axis=0)
  return weights
