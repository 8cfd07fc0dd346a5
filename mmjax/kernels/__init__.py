"""Pure functions on arrays; they know no config.

An array's name ends in its axes, a letter each: `rows_BTRP` is (B, T, R, P). A digit is an axis of that size.
Names, einsums and docstrings in all of mmjax use these letters, and each has one meaning:

  B  sequences of a batch           D  width of the residual stream  M  rows of the bank
  T  tokens of a sequence           F  hidden width of an MLP        P  width of a row
  t  tokens of a chunk of T         V  tokens of the vocabulary      C  sub-keys of a codebook; C * C = M
  n  tokens of an n-gram            L  readers of the bank           Q  width of a memory's query
  S  positions of keys              E  experts                       p  width of a sub-key = Q / 2
  N  heads of queries               e  experts of a token            h  heads of a memory
  K  heads of keys and values       Z  pairs of B and K              k  codebooks = 2 * h
  G  heads of queries for one of K  U  rows that an update reads     r  rows that a head reads
  H  width of an attention head     a  angles of a head = H / 2      R  rows that a token reads = h * r
  W  width of an encoder's vectors  A  micro-batches of an update    c  pairs that may be among the r best
  X  other axes, taken together     d  devices that divide a bank    Y  rows that they exchange at once
"""

SELDOM = 'seldom'  # the named scope of a loop that mostly makes no turn
