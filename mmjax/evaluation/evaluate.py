"""Evaluation on held-out rows: loss, perplexity, bits per byte, accuracy, and whether the memory works.

One compiled function of fixed shape serves every batch, in the training loop and in eval.py alike. It sums over
tokens, so that every token weighs the same whatever row it is in; padding weighs nothing.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.config import Config
from mmjax.data.loader import PADDING, TokenSplit, eval_batches
from mmjax.errors import UserError
from mmjax.evaluation.loss import make_loss
from mmjax.evaluation.probes import ProbePlan, bank_health, make_read_probe, plan_probe, row_agreement
from mmjax.model.params import BANK, Params
from mmjax.run.placement import Placement
from mmjax.run.sharding import put_batch, replicated

Batch = dict[str, np.ndarray]
EvalStep = Callable[[Params, Batch], dict[str, Array]]
INTERVENTIONS = {  # of the bank, packed or not, and a seed
  'loss_zeroed': lambda bank, _: jax.tree.map(jnp.zeros_like, bank),
  'loss_shuffled': lambda bank, seed: jax.tree.map(
    lambda x: x[jax.random.permutation(jax.random.key(seed), len(x))], bank
  ),
}


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """What an evaluation found.

  Attributes:
    loss: negative log-likelihood of a token, in nats; the mean over all tokens, ends of documents among them.
    perplexity: exp(loss).
    bits_per_byte: all nats over log(2) and over the UTF-8 bytes of the text; comparable between tokenizers.
    accuracy: share of tokens that were the most likely one.
    tokens: tokens predicted.
    text_bytes: UTF-8 bytes of the documents that they stand for, before a tokenizer changes anything.
    bank: for each of `memory_layers` its number, or 'values', `bank_health`, kl_weighted, head_overlap, row_agreement
      and row_agreement_chance (see mmjax.evaluation.probes); empty for a model without a bank.
    probes: positions probed and the loss on them; with a bank also loss_zeroed and loss_shuffled.
  """

  loss: float
  perplexity: float
  bits_per_byte: float
  accuracy: float
  tokens: int
  text_bytes: int
  bank: list[dict[str, Any]]
  probes: dict[str, float]

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON can hold them."""
    return dataclasses.asdict(self)


def make_eval_step(graphdef: nnx.GraphDef, config: Config, placement: Placement) -> EvalStep:
  """Compiles (at its first call) the evaluation of one batch.

  Args:
    graphdef: of the model.
    config: gives the compute dtype and whether documents are isolated.
    placement: how it runs, and where; the rows of its mesh must divide the batch.

  Returns:
    A function of params and a batch (`input`, `target`, `segment`, int32 (rows, T)) that returns the sums nll (nats)
    and correct, both float32, tokens (int32) and, for a memory model, usage_LM (int32, reads of each row) and what
    `make_read_probe` finds. It waits until the batch before the last is done: were hundreds under way, several devices
    of a CPU would wait for one another for ever.
  """
  loss = make_loss(config, graphdef, placement.attention, make_read_probe(config))

  def sums(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
    rows = jax.tree.map(lambda x: x[0], batch)  # the axis of accumulation, of which there is one
    _, parts = loss(params, rows, jnp.float32(1), None)
    found = {'nll': parts.pop('loss'), 'correct': parts.pop('accuracy'), 'tokens': jnp.sum(rows['target'] != PADDING)}
    return found | {name: x for name, x in parts.items() if name != 'aux_loss'}

  compiled = placement.jit(sums, out_shardings=replicated(placement.mesh))
  under_way: collections.deque[Array] = collections.deque(maxlen=2)

  def step(params: Params, batch: Batch) -> dict[str, Array]:
    if len(under_way) == under_way.maxlen:
      jax.block_until_ready(under_way[0])
    found = compiled(params, put_batch(placement.mesh, batch, 1))
    under_way.append(found['nll'])
    return found

  return step


def evaluate_split(
  config: Config,
  eval_step: EvalStep,
  params: Params,
  split: TokenSplit,
  show: Callable[[float], None] = lambda share: None,
) -> EvalResult:
  """Evaluates on all rows of a split; `show` is told the share of the work that is done, after each batch.

  Raises:
    UserError: if there is no token to predict.
  """
  done, total = itertools.count(1), evaluation_batches(config, split)

  def shown_step(params: Params, batch: Batch) -> dict[str, Array]:
    found = eval_step(params, batch)
    show(next(done) / total)
    return found

  batches = eval_batches(split, config.train.batch_size)
  return evaluate(shown_step, params, batches, split.scored_bytes, plan_probe(config, split))


def evaluation_batches(config: Config, split: TokenSplit) -> int:
  """Returns how many batches an evaluation computes: those of the split, and those that are probed again."""
  plan = plan_probe(config, split)
  again = len(INTERVENTIONS) * plan.batches if plan.layers else 0
  return -(-split.n_rows // config.train.batch_size) + again


def evaluate(
  eval_step: EvalStep, params: Params, batches: Iterable[Batch], text_bytes: int, plan: ProbePlan
) -> EvalResult:
  """Evaluates on all batches.

  Args:
    eval_step: from `make_eval_step`.
    params: of the model.
    batches: of equal shape; `target` is int32 (rows, T).
    text_bytes: UTF-8 bytes of the text that their targets stand for, `TokenSplit.scored_bytes` where they are all rows.
    plan: which batches are probed.

  Raises:
    UserError: if there is no token to predict.
  """
  sums, reads, probed = [], {}, []
  for batch in batches:
    found = eval_step(params, batch)
    if 'usage_LM' in found:
      reads = {name: found.pop(name) + reads.get(name, 0) for name in ('usage_LM', 'weight_LM')}
      best_LhBT = found.pop('best_LhBT')
      if len(probed) < plan.batches:
        probed.append((batch, best_LhBT))
    sums.append(found)
  sums = jax.device_get(sums)  # one transfer for all
  nll, correct, tokens = (float(_total(sums, name)) for name in ('nll', 'correct', 'tokens'))
  if not tokens or not text_bytes:
    said = f'the validation text has {tokens:.0f} tokens to predict in {text_bytes} bytes'
    raise UserError(f'{said} and must have at least one; give data.valid_files with text in them')
  return EvalResult(
    loss=nll / tokens,
    perplexity=math.exp(min(nll / tokens, 700.0)),  # e^710 is no float64 any more
    bits_per_byte=nll / math.log(2) / text_bytes,
    accuracy=correct / tokens,
    tokens=int(tokens),
    text_bytes=text_bytes,
    bank=_bank(plan.layers, reads, sums, probed) if reads else [],
    probes=_probes(eval_step, params, sums[: plan.batches], probed, plan.seed),
  )


def _total(sums: Sequence[dict[str, np.ndarray]], name: str) -> np.float64 | np.ndarray:
  """Sums in float64: thousands of float32 sums would lose the last digits."""
  return sum(np.float64(s[name]) for s in sums)


def _bank(layers: Sequence[int | str], reads: dict[str, Array], sums: list, probed: list) -> list[dict[str, Any]]:
  """Returns what EvalResult.bank holds."""
  overlap_L = [None] * len(layers)
  if 'overlap_L' in sums[0]:
    overlap_L = (_total(sums, 'overlap_L') / _total(sums, 'tokens')).tolist()
  best_LhX = np.concatenate([np.reshape(best, (*best.shape[:2], -1)) for _, best in probed], axis=-1)
  target_X = np.concatenate([np.ravel(batch['target']) for batch, _ in probed])
  predicted_X = best_LhX[0, 0] != PADDING
  agreement_L = row_agreement(best_LhX[..., predicted_X], target_X[predicted_X])
  usage_LM, weight_LM = (np.asarray(reads[name]) for name in ('usage_LM', 'weight_LM'))
  each = zip(layers, usage_LM, weight_LM, overlap_L, agreement_L, strict=True)
  return [
    {
      'layer': layer,
      **bank_health(usage_M),
      'kl_weighted': bank_health(weight_M)['kl_to_uniform'],
      'head_overlap': overlap,
      **agreement,
    }
    for layer, usage_M, weight_M, overlap, agreement in each
  ]


def _probes(eval_step: EvalStep, params: Params, sums: list, probed: list, seed: int) -> dict[str, float | None]:
  """Returns what EvalResult.probes holds, from the sums of the probed batches and, of a memory model, these."""
  nll, positions = (_total(sums, name) for name in ('nll', 'tokens'))
  found = {'positions': int(positions), 'loss': float(nll / positions) if positions else None}
  for name in INTERVENTIONS if probed else ():  # one after the other: each needs the room of a bank
    changed = with_changed_bank(params, name, seed)
    nlls = jax.device_get([eval_step(changed, batch)['nll'] for batch, _ in probed])
    found[name] = float(sum(map(np.float64, nlls))) / found['positions']
  return found


def with_changed_bank(params: Params, name: str, seed: int = 0) -> Params:
  """Returns parameters with the bank, float32 or packed, changed: `name` is of INTERVENTIONS, `seed` shuffles rows."""
  bank = params[BANK]
  places = jax.tree.map(lambda x: x.sharding, bank)  # they must not change, or what reads it is compiled again
  return params | {BANK: jax.jit(INTERVENTIONS[name], static_argnums=1, out_shardings=places)(bank, seed)}
