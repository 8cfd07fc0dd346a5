"""Pure functions on arrays; they know no config.

An array's name ends in its axes, a letter each: `rows_BTRP` is (B, T, R, P). A digit is an axis of that size.
Names, einsums and docstrings in all of mmjax use these letters, and each has one meaning:

  B  sequences of a batch           D  dim of a model's vectors      M  rows of the bank = C * C
  T  tokens of a sequence           F  hidden dim of an MLP          P  dim of a row
  t  tokens of a chunk of T         V  vocabulary                    C  sub-keys of a codebook
  n  tokens of an n-gram            L  readers of the bank           p  dim of a sub-key = Q / 2
  S  positions of keys              E  experts                       h  heads of a memory
  N  heads of queries               e  experts of a token            k  codebooks = 2 h
  K  heads of keys and values       Z  pairs of B and K              r  rows that a head reads
  G  heads of queries for one of K  U  rows that an update reads     R  rows that a token reads = h * r
  H  dim of a head                  a  angles of a head = H / 2      c  pairs that may be among the r best
  X  other axes, taken together     A  micro-batches of an update   Q  dim of a query of a memory
  W  dim of an encoder's vectors
"""
