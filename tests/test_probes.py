"""Probes of the memory against brute force in numpy: sets of rows, all pairs of positions, an exchanged bank."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.config.sublayers import memory_layers
from mmjax.data.loader import PADDING
from mmjax.evaluation.evaluate import evaluate, make_eval_step
from mmjax.evaluation.probes import (
  ProbePlan,
  add_norms,
  gate_norms,
  head_overlap,
  plan_probe,
  row_agreement,
  row_update_ratio,
)
from mmjax.run.placement import place
from tests.helpers import build_model, rarely, tiny_config

T, SEED = 12, 5
FORMS = {
  'faithful': {},
  'bag': {
    'model__sublayer': 'memory_bag',
    'memory__n_heads': 2,
    'memory__layers': '1',
    'memory__bank_std': 3.0,
    'memory__selection_bias': True,
  },
  'values': {
    'model__sublayer': 'dense',
    'model__num_selected': 1,
    'memory__n_heads': 2,
    'memory__ngrams': '1,2',
    'memory__value_layers': 'all',
  },
  'scale_relu': {'memory__scores': 'scale', 'memory__score_activation': 'relu'},
}


def batches_of_text(n: int, rows: int, vocab_size: int) -> list[dict[str, np.ndarray]]:
  """Random batches of few different tokens; every third row ends in padding."""
  tokens = np.random.default_rng(1).integers(4, 20, (n, rows, T + 1), np.int32)
  target = tokens[..., 1:].copy()
  target[:, ::3, T // 2 :] = PADDING
  return [{'input': x[:, :-1], 'target': y, 'segment': np.zeros_like(y)} for x, y in zip(tokens, target, strict=True)]


def numpy_weights(config, score_X: np.ndarray) -> np.ndarray:
  """Weights of one head's rows in float64."""
  if config.model.sublayer != 'memory_bag' and config.memory.scores == 'none':
    return np.ones(len(score_X))
  if config.memory.score_activation == 'relu':
    return np.maximum(score_X, 0)
  return np.exp(score_X) / np.exp(score_X).sum()


@pytest.mark.thorough
@pytest.mark.parametrize('form', rarely(FORMS, 'bag'))
def test_probes_of_an_evaluation_equal_brute_force(form):
  config = tiny_config(**FORMS[form], train__batch_size=3, model__max_seq_len=T, runtime__attention='xla')
  graphdef, params = build_model(config)
  if config.memory.selection_bias:  # so large that the first row of a head is often not the one with the best score
    gate = params['layers'][1]['sublayer']['gate']
    gate['bias'] = np.random.default_rng(2).normal(size=gate['bias'].shape).astype(np.float32)
  step = make_eval_step(graphdef, config, place(config))
  batches = batches_of_text(3, 3, config.model.vocab_size)
  result = evaluate(step, params, batches, 1, ProbePlan(2, SEED, tuple(memory_layers(config))))

  @jax.jit
  def run(params, tokens_BT):
    model = nnx.merge(graphdef, params)
    out = model(tokens_BT)
    return out, model.logits(out.hidden_BTD)

  outputs = [run(params, batch['input'])[0] for batch in batches]
  real = [batch['target'] != PADDING for batch in batches]
  heads = config.memory.n_heads
  for at, health in enumerate(result.bank):
    usage, overlaps, best = np.zeros(config.model.knowledge_num), [], []
    for out, keep in zip(outputs, real, strict=True):
      rows, scores = (np.asarray(x[at])[keep].reshape(keep.sum(), heads, -1) for x in (out.row_LBTR, out.score_LBTR))
      best.append(np.take_along_axis(rows, scores.argmax(-1)[..., None], axis=-1)[..., 0])
      for row_hr, score_hr in zip(rows, scores.astype(np.float64), strict=True):
        for row_r, score_r in zip(row_hr, score_hr, strict=True):
          usage[row_r] += numpy_weights(config, score_r)
        if heads == 2:
          overlaps.append(len(set(row_hr[0]) & set(row_hr[1])) / len(row_hr[0]))
    share = usage / usage.sum()
    kl = sum(p * np.log(p * len(share)) for p in share if p)
    assert health['kl_weighted'] == pytest.approx(kl, rel=1e-5)
    assert health['head_overlap'] == (pytest.approx(np.mean(overlaps), rel=1e-6) if heads == 2 else None)
    target = np.concatenate([batch['target'][keep] for batch, keep in zip(batches[:2], real, strict=False)])
    agreement = np.mean([pairs_that_agree(best_X, target) for best_X in np.concatenate(best[:2]).T], axis=0)
    assert [health['row_agreement'], health['row_agreement_chance']] == pytest.approx(list(agreement))
    assert (health['kl_weighted'] == pytest.approx(health['kl_to_uniform'], rel=1e-6)) == (
      form in ('faithful', 'values')
    )

  def loss(bank_MP):
    nll = []
    for batch, keep in zip(batches[:2], real, strict=False):
      logits = np.asarray(run(params | {'memory_bank': bank_MP}, batch['input'])[1], np.float64)
      log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      nll.append(-np.take_along_axis(log_probability, batch['target'][..., None], -1)[..., 0][keep])
    return np.concatenate(nll).mean()

  bank = np.asarray(params['memory_bank'])
  order = np.asarray(jax.random.permutation(jax.random.key(SEED), len(bank)))
  assert result.probes['positions'] == sum(keep.sum() for keep in real[:2])
  want = {'loss': bank, 'loss_zeroed': 0 * bank, 'loss_shuffled': bank[order]}
  assert {name: result.probes[name] for name in want} == pytest.approx({k: loss(v) for k, v in want.items()}, rel=1e-5)
  assert len(set(result.probes.values())) == 4


@pytest.mark.parametrize('replace', [False, True])
def test_overlap_of_heads_counts_common_rows(replace):
  rng = np.random.default_rng(0)
  rows = np.array([[rng.choice(9, 4, replace) for _ in range(3)] for _ in range(50)])
  want = [np.mean([np.isin(token[a], token[b]).mean() for a in range(3) for b in range(3) if a != b]) for token in rows]
  np.testing.assert_allclose(head_overlap(jnp.asarray(rows, jnp.int32)), want, rtol=1e-6)


def pairs_that_agree(best: np.ndarray, target: np.ndarray) -> tuple[float, float]:
  """The two chances, from all pairs of positions."""
  shared = [i for i in range(len(target)) if (target == target[i]).sum() > 1]
  same = [np.mean([best[j] == best[i] for j in shared if j != i and target[j] == target[i]]) for i in shared]
  chance = [best[j] == best[i] for i in shared for j in shared if j != i]
  return np.mean(same), np.mean(chance)


def test_row_agreement_equals_all_pairs():
  draw = np.random.default_rng(0)
  target = draw.zipf(1.5, 60) % 50 * 7
  best = draw.integers(0, 6, (2, 3, 60)) + 5 * (target % 2)
  found = row_agreement(best, target)
  for best_hX, agreement in zip(best, found, strict=True):
    want = np.mean([pairs_that_agree(best_X, target) for best_X in best_hX], axis=0)
    assert list(agreement.values()) == pytest.approx(list(want))
  assert (np.unique(target, return_counts=True)[1] == 1).any()  # tokens that occur once are left out


def test_row_that_stands_for_its_token_agrees_always_and_chance_is_what_it_must_be():
  target = np.repeat(np.arange(10), 7)
  [found] = row_agreement(np.stack([[target, 0 * target]]), target)
  assert found['row_agreement'] == pytest.approx(1)
  assert found['row_agreement_chance'] == pytest.approx(np.mean([6 / 69, 1]))
  nothing = {'row_agreement': None, 'row_agreement_chance': None}
  assert row_agreement(np.zeros((2, 1, 5), int), np.arange(5)) == [nothing] * 2


def test_norms_of_a_step_equal_numpy():
  draw = np.random.default_rng(0)

  def tree():
    gate = {'query': {'kernel': draw.normal(size=(4, 6))}, 'keys': draw.normal(size=(2, 3, 3))}
    memory, dense = {'sublayer': {'gate': gate}}, {'sublayer': {'gate': {'kernel': draw.normal(size=(4, 4))}}}
    return {'layers': {0: dense, 1: memory}, 'memory_bank': draw.normal(size=(9, 6))}

  params, grads, updates = tree(), tree(), tree()
  usage = np.zeros((1, 9), np.int32)
  usage[0, [2, 5]] = 3, 1
  params_32, grads_32, updates_32 = jax.tree.map(jnp.float32, (params, grads, updates))
  gate = grads['layers'][1]['sublayer']['gate']
  want = {
    'gate_grad_norm': np.sqrt((gate['query']['kernel'] ** 2).sum()),
    'key_grad_norm': np.sqrt((gate['keys'] ** 2).sum()),
  }
  grads_32['layers'][3] = {'sublayer': {'down': jnp.ones(3)}}  # n-grams address its rows
  assert gate_norms(grads_32) == {1: pytest.approx(want, rel=1e-6)}
  update, before = (np.sqrt((x['memory_bank'][[2, 5]] ** 2).sum()) for x in (updates, params))
  ratio = row_update_ratio(params_32['memory_bank'], updates_32['memory_bank'], usage)
  assert row_update_ratio(0 * params_32['memory_bank'], 1e3 * updates_32['memory_bank'], usage) == 0  # of a zero start
  assert float(ratio) == pytest.approx(update / before, rel=1e-6)


def test_update_of_a_large_bank_is_measured_on_rows_at_equal_distances(monkeypatch):
  monkeypatch.setattr('mmjax.evaluation.probes.RATIO_ROWS', 4)
  rng = np.random.default_rng(0)
  bank, update = (rng.standard_normal((10, 3)).astype(np.float32) for _ in range(2))
  usage = np.zeros((2, 10), np.int32)
  usage[0, [0, 1, 3]], usage[1, 9] = 1, 2  # of rows 0, 3, 6 and 9
  added, before = (np.linalg.norm(x[[0, 3, 9]]) for x in (update, bank))
  assert float(row_update_ratio(bank, update, usage)) == pytest.approx(added / before, rel=1e-6)


def test_norms_of_applied_steps_are_averaged_into_a_record():
  def step(applied, x):
    gates = {1: {'gate_grad_norm': x, 'key_grad_norm': 0 * x}, 3: {'gate_grad_norm': 2 * x, 'key_grad_norm': x}}
    return {'applied': np.bool_(applied), 'usage_LM': None, 'gate_norms': gates, 'row_update_ratio': x}

  record = {'kind': 'train', 'bank': [{'layer': layer, 'used_share': 1 / layer} for layer in (1, 2, 3)]}
  found = add_norms(record, [step(True, 1.0), step(False, np.nan), step(True, 2.0)])
  assert found['probes'] == {'row_update_ratio': 1.5}
  assert found['bank'] == [
    {'layer': 1, 'used_share': 1, 'gate_grad_norm': 1.5, 'key_grad_norm': 0},
    {'layer': 2, 'used_share': 1 / 2},  # without a gate
    {'layer': 3, 'used_share': 1 / 3, 'gate_grad_norm': 3.0, 'key_grad_norm': 1.5},
  ]
  assert np.isnan(add_norms(record, [step(False, 3.0)])['probes']['row_update_ratio'])


def test_models_without_a_bank_keep_the_loss_on_the_probed_positions():
  assert add_norms({'bank': []}, [{'applied': True}]) == {'bank': [], 'probes': {}}
  evaluated = {'bank': [], 'probes': {'positions': 10, 'loss': 3.0}}
  assert add_norms(evaluated, [{'applied': True}]) == evaluated


@pytest.mark.parametrize(
  ('rows', 'batch_size', 'length', 'batches'), [(1, 4, 512, 1), (40, 4, 512, 5), (41, 4, 512, 6), (10**5, 4, 512, 32)]
)
def test_at_most_half_of_the_text_and_so_many_positions_are_probed(rows, batch_size, length, batches):
  config = tiny_config(train__batch_size=batch_size, seed=3)
  split = types.SimpleNamespace(n_rows=rows, max_seq_len=length)
  assert plan_probe(config, split) == ProbePlan(batches, 3, (0, 1))
