"""Evaluation on held-out rows: loss, perplexity, bits per byte, accuracy and how the bank is used.

One compiled function of fixed shape serves every batch, in the training loop and in eval.py alike. It sums over
tokens, so that every token weighs the same whatever row it is in; padding weighs nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from mmjax.config import Config
from mmjax.errors import UserError
from mmjax.model.lm import Params, memory_layers
from mmjax.training.backend import compiler_options
from mmjax.training.metrics import bank_health
from mmjax.training.sharding import put_batch, replicated
from mmjax.training.step import make_loss

Batch = dict[str, np.ndarray]
EvalStep = Callable[[Params, Batch], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """What an evaluation found.

  Attributes:
    loss: negative log-likelihood of a token, in nats; the mean over all tokens, ends of documents among them.
    perplexity: exp(loss).
    bits_per_byte: all nats over log(2) and over the UTF-8 bytes of the text; comparable between tokenizers.
    accuracy: share of tokens that were the most likely one.
    tokens: tokens predicted.
    text_bytes: UTF-8 bytes that they stand for; the end of a document stands for none.
    bank: for each layer with a memory its number and `bank_health`; empty for a model without a bank.
  """

  loss: float
  perplexity: float
  bits_per_byte: float
  accuracy: float
  tokens: int
  text_bytes: int
  bank: list[dict[str, Any]]

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON can hold them."""
    return dataclasses.asdict(self)


def make_eval_step(graphdef: nnx.GraphDef, config: Config, *, pad_id: int, attention: str, mesh: Mesh) -> EvalStep:
  """Compiles (at its first call) the evaluation of one batch.

  Args:
    graphdef: of the model.
    config: gives the compute dtype and whether documents are isolated.
    pad_id: targets of this value weigh nothing.
    attention: backend.
    mesh: where the batch goes; its rows must divide the batch.

  Returns:
    A function of params and a batch (`input`, `target`, `segment`, int32 (rows, T)) that returns the sums nll (nats)
    and correct, both float32, tokens (int32) and, for a memory model, usage_LM (int32, reads of each row).
  """
  loss = make_loss(config, graphdef, pad_id, attention)

  def sums(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
    rows = jax.tree.map(lambda x: x[0], batch)  # the axis of accumulation, of which there is one
    _, parts = loss(params, rows, jnp.float32(1), None)
    found = {'nll': parts['loss'], 'correct': parts['accuracy'], 'tokens': jnp.sum(rows['target'] != pad_id)}
    return found | {'usage_LM': parts['usage_LM']} if 'usage_LM' in parts else found

  options = compiler_options(config, jax.devices()[0].platform)
  compiled = jax.jit(sums, out_shardings=replicated(mesh), compiler_options=options)
  return lambda params, batch: compiled(params, put_batch(mesh, batch, 1))


def evaluate(eval_step: EvalStep, params: Params, batches: Iterable[Batch], bytes_per_token: np.ndarray) -> EvalResult:
  """Evaluates on all batches.

  Args:
    eval_step: from `make_eval_step`.
    params: of the model.
    batches: of equal shape; `target` is int32 (rows, T).
    bytes_per_token: int32[V], UTF-8 bytes of each piece, 0 for padding and other control tokens.

  Raises:
    UserError: if there is no token to predict.
  """
  sums, usage_LM, text_bytes = [], None, 0
  for batch in batches:
    found = eval_step(params, batch)
    used = found.pop('usage_LM', None)
    if used is not None:
      usage_LM = used if usage_LM is None else usage_LM + used
    sums.append(found)
    text_bytes += int(bytes_per_token[batch['target']].sum(dtype=np.int64))
  # One transfer for all, and float64 from here on: thousands of float32 sums would lose the last digits.
  sums = jax.device_get(sums)
  nll, correct, tokens = (float(sum(np.float64(s[name]) for s in sums)) for name in ('nll', 'correct', 'tokens'))
  if not tokens or not text_bytes:
    raise UserError('the validation text has no token to predict; give data.valid_files with text in them')
  health = [] if usage_LM is None else [bank_health(counts_M) for counts_M in np.asarray(usage_LM)]
  return EvalResult(
    loss=nll / tokens,
    perplexity=math.exp(min(nll / tokens, 700.0)),  # e^710 is no float64 any more
    bits_per_byte=nll / math.log(2) / text_bytes,
    accuracy=correct / tokens,
    tokens=int(tokens),
    text_bytes=text_bytes,
    bank=[{'layer': layer, **found} for layer, found in zip(memory_layers(params), health, strict=False)],
  )
