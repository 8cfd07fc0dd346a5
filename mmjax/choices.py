"""What settings, flags and arguments of the library share, each stated once: words, numbers and rules of sizes."""

import math
from collections.abc import Sequence

ATTENTION_BACKENDS = ('xla', 'xla_blocked', 'cudnn')
QUERY_KEY_NORM = ('none', 'l2')
SCORES = ('none', 'scale')
SCORE_ACTIVATION = ('softmax', 'relu')
CHECKPOINT = 'best'  # of a run that is read, unless another is asked for: 'last', or the number of a step
ONE_ROW = 'the softmax of one score is 1, so that the gate would not learn'
NORM_EPS = 1e-5
PAST_BEST = 0.01  # nats by which a last validation loss is above the best before it is said
NGRAMS = (2, 3)  # by whose counts a loss is broken down
TOP = 5  # rows, contexts and tokens to show of a memory
EVERY_RUN = '*'  # of a sweep
EXPORT_DTYPES = ('float32', 'float16', 'bfloat16')
BANK_BITS = (8, 4)  # of a value of a bank that was made smaller


def not_square(name: str, number: int) -> str:
  """Says of rows that sub-keys address that their number must be a square, and the nearest; '' of one that is."""
  root = math.isqrt(number)
  return '' if root**2 == number else f'{name}={number} must be a square; nearest: {root**2} and {(root + 1) ** 2}'


def not_even(name: str, width: int) -> str:
  """Says of the width of a query that it must be even, and the nearest; '' of one that is."""
  return f'{name}={width} must be even: a query is two sub-keys; nearest: {width + 1}' if width % 2 else ''


def in_turns(values: Sequence[int], n: int) -> tuple[int, ...]:
  """Returns `n` values, which take turns."""
  return tuple(values[i % len(values)] for i in range(n))


def least_rows_of_ranges(ngrams: Sequence[int], rows_per_head: int, vocab_size: int) -> int:
  """Returns how many rows a bank needs so that each row of a head has a range of its own: see mmjax.memory.ngram.

  Args:
    ngrams: for each head, how many tokens address its rows.
    rows_per_head: r.
    vocab_size: V.
  """
  return rows_per_head * sum(vocab_size if n == 1 else 2 for n in ngrams)
