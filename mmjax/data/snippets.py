"""Snippets of text as vectors, chosen and ordered to become the rows of a bank.

Snippets are windows of tokens within a document. The built-in encoder is latent semantic analysis (Deerwester et al.
1990): tf-idf counts of tokens, projected on their leading singular vectors. It needs no download, knows every language
that the tokenizer knows, and puts snippets about the same things near each other, which is all a first value needs.

The chosen rows are the leaves of a balanced tree that halves the snippets along their leading direction of variance
again and again: every leaf covers as many snippets as any other, and neighbouring leaves are alike. Rows i * C + j
with the same i share a branch, so the rows that one sub-key of a product-key gate leads to are alike.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from mmjax.data.loader import TokenSplit
from mmjax.errors import UserError

DIRECTION_SAMPLE = 2048  # snippets that a node's direction is estimated from
POWER_ITERATIONS = 8
MORE_TEXT = 'give text that does not repeat itself'


def cut_snippets(split: TokenSplit, length: int, most: int) -> np.ndarray:
  """Returns where snippets of `length` tokens begin in the split's stream: int64, at most `most`, evenly spread."""
  starts = split.document_start
  # The EOS that ends a document is no text: a document of n tokens has n - 1 to cut.
  counts = (np.diff(starts) - 1) // length
  n_snippets = int(counts.sum())
  chosen = np.arange(n_snippets) if n_snippets <= most else np.arange(most) * n_snippets // most
  document = np.searchsorted(np.cumsum(counts), chosen, side='right')
  before = np.cumsum(counts) - counts
  return starts[document] + (chosen - before[document]) * length


def read_snippets(split: TokenSplit, start_X: np.ndarray, length: int) -> np.ndarray:
  """Returns the tokens of snippets, int32 (X, length)."""
  return np.stack([split.stream(start, start + length) for start in start_X])


def snippet_texts(split: TokenSplit, start_X: np.ndarray, length: int) -> list[str]:
  """Returns the texts of snippets, which begin at int64 positions of the stream."""
  return [split.tokenizer.decode(tokens) for tokens in read_snippets(split, start_X, length)]


def latent_semantic_vectors(token_XT: np.ndarray, vocab_size: int, dim: int) -> np.ndarray:
  """Encodes snippets by latent semantic analysis.

  Args:
    token_XT: int32 tokens of X snippets.
    vocab_size: V.
    dim: P, of the vectors.

  Returns:
    float32 (X, P), each of length 1 (or 0, for a snippet of which no token says anything).

  Raises:
    UserError: if dim is not below min(X, V), or all snippets have the same tokens, as often.
  """
  n_snippets, length = token_XT.shape
  most = min(n_snippets, vocab_size) - 1
  if dim > most:
    raise UserError(
      f'model.knowledge_dim={dim} must be at most {most} with {n_snippets} snippets and model.vocab_size={vocab_size}'
    )
  row = np.repeat(np.arange(n_snippets), length)
  ones = np.ones(token_XT.size, np.float32)
  counts = scipy.sparse.csr_matrix((ones, (row, token_XT.ravel())), shape=(n_snippets, vocab_size))
  occurs_in = np.bincount(counts.indices, minlength=vocab_size)
  rarity = np.log((1 + n_snippets) / (1 + occurs_in)).astype(np.float32)
  counts.data = np.log1p(counts.data)
  weighted = counts @ scipy.sparse.diags(rarity)
  if not weighted.count_nonzero():
    raise UserError(f'every token of the {n_snippets} snippets is in all of them, so none says anything; {MORE_TEXT}')
  start = np.ones(min(weighted.shape), np.float32)  # ARPACK would draw a random one
  _, _, direction_PV = scipy.sparse.linalg.svds(weighted, k=dim, v0=start, return_singular_vectors='vh')
  return unit_rows(weighted @ direction_PV[::-1].T)  # svds returns the smallest first


def unit_rows(vector_XP: np.ndarray) -> np.ndarray:
  """Scales rows to length 1, float32; rows of zeros stay."""
  length_X1 = np.linalg.norm(vector_XP, axis=1, keepdims=True)
  return (vector_XP / np.maximum(length_X1, 1e-12)).astype(np.float32)


def reduce_dim(parts_XW: Sequence[np.ndarray], dim: int) -> np.ndarray:
  """Projects vectors, given in parts, on their P = `dim` leading principal components, float32 (X, P).

  Raises:
    UserError: if they have fewer than `dim` values.
  """
  size = parts_XW[0].shape[1]
  if dim > size:
    raise UserError(f'model.knowledge_dim={dim} must be at most {size}, what the encoder gives')
  n_vectors = sum(map(len, parts_XW))
  mean_W = sum(part.sum(axis=0, dtype=np.float64) for part in parts_XW) / n_vectors
  products_WW = sum(part.T.astype(np.float64) @ part for part in parts_XW) - n_vectors * np.outer(mean_W, mean_W)
  direction_WP = np.linalg.eigh(products_WW)[1][:, ::-1][:, :dim]
  return np.concatenate([(part - mean_W) @ direction_WP for part in parts_XW]).astype(np.float32)


def choose_rows(vector_XP: np.ndarray, n_sub_keys: int, report: Callable[[int], None]) -> np.ndarray:
  """Picks C * C snippets, one for each leaf of the balanced tree: the one nearest to the leaf's mean.

  Args:
    vector_XP: float32 vectors of X snippets.
    n_sub_keys: C.
    report: told the number of rows chosen, now and then.

  Returns:
    int64 (C * C): the snippet of row i * C + j.

  Raises:
    UserError: if there are fewer snippets than rows.
  """
  n_rows = n_sub_keys**2
  if len(vector_XP) < n_rows:
    fewer = f', or --config.model.knowledge_num={math.isqrt(len(vector_XP)) ** 2}' if len(vector_XP) else ''
    raise UserError(
      f'the text gives {len(vector_XP)} snippets, the bank needs model.knowledge_num={n_rows}; use more text, a '
      f'smaller memory.knowledge_length{fewer}'
    )
  chosen = []
  everything = np.arange(len(vector_XP))
  reference_P = leading_direction(vector_XP, np.ones(vector_XP.shape[1], np.float32))
  for branch in balanced_leaves(vector_XP, everything, n_sub_keys, reference_P):
    for leaf in balanced_leaves(vector_XP, branch, n_sub_keys, reference_P):
      vectors = vector_XP[leaf]
      chosen.append(leaf[np.argmin(((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1))])
    report(len(chosen))
  return np.array(chosen)


def balanced_leaves(
  vector_XP: np.ndarray, ids: np.ndarray, n_leaves: int, reference_P: np.ndarray
) -> Iterator[np.ndarray]:
  """Yields the ids of each leaf, in tree order; leaves differ in size by at most a few.

  Args:
    vector_XP: float32 vectors.
    ids: which of them to divide.
    n_leaves: into how many parts, at most len(ids).
    reference_P: directions point to this side, so that trees of different branches are ordered alike.
  """
  if n_leaves == 1:
    yield ids
    return
  vectors = vector_XP[ids]
  direction_P = leading_direction(vectors, reference_P)
  left_leaves = n_leaves // 2
  left = len(ids) * left_leaves // n_leaves
  order = np.argsort(vectors @ direction_P, kind='stable')
  yield from balanced_leaves(vector_XP, ids[order[:left]], left_leaves, reference_P)
  yield from balanced_leaves(vector_XP, ids[order[left:]], n_leaves - left_leaves, reference_P)


def leading_direction(vector_XP: np.ndarray, reference_P: np.ndarray) -> np.ndarray:
  """Returns the direction of the largest variance by power iteration, float (P,), on the side of `reference_P`."""
  sample = vector_XP[:: max(1, len(vector_XP) // DIRECTION_SAMPLE)]
  centred = sample - sample.mean(axis=0)
  direction_P = reference_P
  for _ in range(POWER_ITERATIONS):
    following = centred.T @ (centred @ direction_P)
    size = np.linalg.norm(following)
    if size < 1e-12:  # all alike, or nothing varies that way
      break
    direction_P = following / size
  return direction_P if direction_P @ reference_P >= 0 else -direction_P


def standardize(vector_MP: np.ndarray, std: float) -> np.ndarray:
  """Centres the rows and scales all values to one standard deviation, float32.

  Raises:
    UserError: if the rows are all alike.
  """
  centred = vector_MP - vector_MP.mean(axis=0)
  if not np.abs(vector_MP - vector_MP[0]).max() > 1e-6 * np.abs(vector_MP).max():
    raise UserError(f'all {len(vector_MP)} rows are alike; {MORE_TEXT}')
  return (centred * (std / centred.std())).astype(np.float32)
