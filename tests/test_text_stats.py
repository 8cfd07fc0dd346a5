"""Variety of generated text, against counting by hand and by brute force."""

import numpy as np
import pytest

from mmjax.inference.measure import distinct_share, repeated_share


def test_shares_of_a_small_example():
  rows = [[1, 2, 1, 2, 1], [1, 2]]
  assert distinct_share(rows, 1) == pytest.approx(2 / 7)
  assert distinct_share(rows, 2) == pytest.approx(2 / 5)  # (1,2) and (2,1); none spans two rows
  assert repeated_share(rows, 2) == pytest.approx((2 / 4 + 0) / 2)


def test_rows_without_ngrams_do_not_count():
  assert distinct_share([], 1) is None
  assert distinct_share([[1], []], 2) is None
  assert repeated_share([[1, 2, 3]], 4) is None
  assert repeated_share([[1, 2, 3], [7, 7, 7, 7, 7, 7]], 4) == pytest.approx(2 / 3)


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_shares_equal_brute_force(n):
  rng = np.random.default_rng(n)
  rows = [rng.integers(0, 4, rng.integers(0, 30)).tolist() for _ in range(20)]
  everything, earlier = [], []
  for row in rows:
    own = [str(row[i : i + n]) for i in range(len(row)) if i + n <= len(row)]
    everything += own
    if own:
      earlier.append(np.mean([own[i] in own[:i] for i in range(len(own))]))
  assert distinct_share(rows, n) == pytest.approx(len(set(everything)) / len(everything))
  assert repeated_share(rows, n) == pytest.approx(np.mean(earlier))
