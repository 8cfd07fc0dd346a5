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
    share_KX: float64, for n-grams of 1 to K tokens, how often training read the target behind its context, over how
      often it read the context; 0 if never.
    bin_X: int, targets whose weights are the same: by the longest context that training read, and the logarithm of how
      often.
  """

  share_KX: np.ndarray
  bin_X: np.ndarray


def read_shares(keys_of: Callable[[int], np.ndarray], train: TokenSplit, times: np.ndarray, K: int) -> Shares:
  """Returns what counts say of targets.

  Args:
    keys_of: takes k; returns the k-grams that end in the targets, from `ngram_keys`.
    train: what training read.
    times: int64 (rows,), how often it read each row.
    K: tokens of the longest n-gram.

  Raises:
    UserError: if n-grams of so many tokens are no int64; before anything is counted.
  """
  keys_of(K)
  shares, bin_X = [], 0
  with share_shown('counting n-grams') as show:
    for k in range(1, K + 1):
      key_X = keys_of(k)
      context_X = count_ngrams(train, times, k, key_X // train.vocab_size, contexts=True)
      shares.append(count_ngrams(train, times, k, key_X) / np.maximum(context_X, 1))
      bin_X = np.where(context_X, 64 * k + np.log2(np.maximum(context_X, 1)).astype(int), bin_X)
      show(k / K)
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
  part_KX = np.concatenate([np.exp(-nll_X)[None], shares.share_KX])
  bins, bin_X = np.unique(shares.bin_X, return_inverse=True)
  mixed_X = np.empty_like(nll_X)
  for half in (0, 1):
    fitted = half_X != half
    weight_KB = _fit(part_KX[:, fitted], bin_X[fitted], len(bins))
    mixed_X[~fitted] = -np.log(np.sum(weight_KB[:, bin_X[~fitted]] * part_KX[:, ~fitted], axis=0))
  return mixed_X


def _fit(part_KX: np.ndarray, bin_X: np.ndarray, n_bins: int) -> np.ndarray:
  """Returns the weights of the parts in each bin, (K, bins), under which the targets are most probable."""
  prior_K1 = np.zeros((len(part_KX), 1))
  prior_K1[0] = PRIOR
  weight_KB = np.full((len(part_KX), n_bins), 1 / len(part_KX))
  for _ in range(ROUNDS):
    joint_KX = weight_KB[:, bin_X] * part_KX
    sums = [np.bincount(bin_X, of_part_X, n_bins) for of_part_X in joint_KX / joint_KX.sum(axis=0)]
    weight_KB = np.stack(sums) + prior_K1
    weight_KB /= weight_KB.sum(axis=0)
  return weight_KB
