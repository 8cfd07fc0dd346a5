"""How varied generated text is, counted over tokens."""

from collections.abc import Sequence


def distinct_share(rows: Sequence[Sequence[int]], n: int) -> float | None:
  """Returns distinct-n: the number of different n-grams over the number of all, over all rows together.

  1 means that no n-gram came twice. An n-gram never spans two rows. None: there is no n-gram.

  Source: Li et al. 2016, arXiv:1510.03055, section 5.2.
  """
  grams = [gram for row in rows for gram in ngrams(row, n)]
  return len(set(grams)) / len(grams) if grams else None


def repeated_share(rows: Sequence[Sequence[int]], n: int) -> float | None:
  """Returns the share of a row's n-grams that stand earlier in the same row, averaged over the rows that have any.

  0 means that no row repeats itself. None: there is no n-gram.

  Source: Welleck et al. 2020, arXiv:1908.04319, section 3, "seq-rep-n".
  """
  shares = [1 - len(set(grams)) / len(grams) for grams in (ngrams(row, n) for row in rows) if grams]
  return sum(shares) / len(shares) if shares else None


def ngrams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
  """Returns every run of n tokens, in order."""
  return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
