"""Pure functions on arrays; they know no config.

An array's name ends in its axes, one letter each: `rows_BTRP` is (B, T, R, P). A digit is that size. All of mmjax uses
these letters, in names, einsums and docstrings, and each means one thing:

B  sequences of a batch           D  model dim                    M  rows of the bank = C * C
T  tokens of a sequence           F  hidden dim of an MLP         P  dim of a row
S  key positions                  V  vocabulary                   C  sub-keys of a codebook
t  tokens of a chunk of T         L  layers                       p  dim of a sub-key
N  query heads                    E  experts                      h  heads of a memory
K  kv heads                       e  experts of a token           k  codebooks = 2 h
G  query heads of a kv head       U  rows that an update reads,   r  rows that a head reads
H  head dim                          each once                    R  rows that a token reads = h * r
a  angles of a head = H / 2       n  tokens of an n-gram          c  pairs that may be among the r best
Q  dim of an encoder's vectors    Z  pairs of sequence and kv head
X  any axes, taken together or not known
"""
