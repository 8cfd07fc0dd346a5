"""Evaluation: the sums over a whole split against float64 numpy, whatever the batches."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.data.loader import PADDING, open_split, row_settings
from mmjax.data.prepare import prepare
from mmjax.errors import UserError
from mmjax.evaluation.evaluate import evaluate, evaluate_split, make_eval_step
from mmjax.evaluation.loss import make_loss
from mmjax.evaluation.probes import ProbePlan, bank_health, plan_probe
from mmjax.evaluation.token_loss import losses_without_one_reader
from mmjax.run.placement import place
from mmjax.training.setup import open_inputs
from tests.helpers import build_model, tiny_config

T = 12
PLAN = ProbePlan(batches=9, seed=0, layers=(0, 1))  # all of them


def rows_of_text(n_rows: int, vocab_size: int) -> dict[str, np.ndarray]:
  """Random rows; every third one ends in padding."""
  tokens = np.random.default_rng(0).integers(4, vocab_size, (n_rows, T + 1), np.int32)
  target = tokens[:, 1:].copy()
  target[::3, T // 2 :] = PADDING
  return {'input': tokens[:, :-1], 'target': target, 'segment': np.zeros((n_rows, T), np.int32)}


def batches_of(rows: dict[str, np.ndarray], size: int):
  """Cuts rows into batches of `size`, the last filled with rows of padding."""
  for start in range(0, len(rows['input']), size):
    batch = {name: values[start : start + size] for name, values in rows.items()}
    fill = ((0, size - len(batch['input'])), (0, 0))
    yield {name: np.pad(values, fill, constant_values=-(name == 'target')) for name, values in batch.items()}


def setup(sublayer: str, batch_size: int = 4):
  config = tiny_config(
    model__sublayer=sublayer, train__batch_size=batch_size, model__max_seq_len=T, runtime__attention='xla'
  )
  graphdef, params = build_model(config)
  step = make_eval_step(graphdef, config, place(config))
  return config, nnx.merge(graphdef, params), params, step


@pytest.mark.thorough
@pytest.mark.parametrize('sublayer', ['dense', 'gated_fusion'])
def test_share_that_is_shown_counts_the_batches_that_are_probed_again(sublayer, tmp_path):
  for name in ('train', 'valid'):
    (tmp_path / f'{name}.txt').write_text(f'Zwei Zeilen ({name}), und noch mehr.\n' * 200)
  config, _, params, step = setup(sublayer)
  files = {f'{name}_files': f'{tmp_path}/{name}.txt' for name in ('train', 'valid')}
  data = dataclasses.replace(config.data, **files, prepared_dir=str(tmp_path / 'prepared'))
  prepared = prepare(data, config.model.vocab_size)
  split, shares = open_split(prepared, 'valid', **row_settings(config)), []
  evaluate_split(config, step, params, split, shares.append)
  batches = -(-split.n_rows // config.train.batch_size)
  again = 0 if sublayer == 'dense' else 2 * plan_probe(config, split).batches
  assert shares == [n / (batches + again) for n in range(1, batches + again + 1)]


@pytest.mark.thorough
@pytest.mark.parametrize('value_layers', ['', 'all'])
def test_loss_without_one_reader_is_that_of_a_model_in_which_it_reads_zeros(value_layers, tmp_path):
  for name in ('train', 'valid'):
    (tmp_path / f'{name}.txt').write_text(f'Zwei Zeilen ({name}), und noch mehr.\n' * 200)
  more = {'model__sublayer': 'ngram_bag', 'memory__layers': '1', 'memory__bank_std': 3.0, 'model__max_seq_len': T}
  config = tiny_config(**more, memory__value_layers=value_layers, runtime__attention='xla')
  graphdef, params = build_model(config)
  files = {f'{name}_files': f'{tmp_path}/{name}.txt' for name in ('train', 'valid')}
  data = dataclasses.replace(config.data, **files, prepared_dir=str(tmp_path / 'prepared'))
  split = open_split(prepare(data, config.model.vocab_size), 'valid', **row_settings(config))
  shares = []
  found = losses_without_one_reader(config, graphdef, place(config), params, split, shares.append)
  probes = evaluate_split(config, make_eval_step(graphdef, config, place(config)), params, split).probes
  rows = split.rows(np.arange(plan_probe(config, split).batches * config.train.batch_size))
  kept, target = rows['target'] != PADDING, np.maximum(rows['target'], 0)
  assert kept.sum() == probes['positions'] and shares[-1] == 1
  for zeroed, loss in enumerate(found):
    model = nnx.merge(graphdef, params)
    out = model(rows['input'], bank_of_reader=lambda reader, bank: (reader != zeroed) * bank)  # noqa: B023
    log_BTV = np.asarray(jax.nn.log_softmax(model.logits(out.hidden_BTD)))
    assert loss == pytest.approx(-np.take_along_axis(log_BTV, target[..., None], 2)[kept].mean(), abs=1e-4)
  if value_layers:
    assert len(found) == 2 and abs(found[0] - found[1]) > 1e-3
  else:
    assert found == [pytest.approx(probes['loss_zeroed'], abs=1e-5)]


def test_what_an_evaluation_reads_is_told_without_what_the_layout_cuts_off(tmp_path, monkeypatch):
  monkeypatch.setattr('mmjax.training.remarks.LEAST_LONG_TOKENS', 1)
  for name, lines, words in (('train', 16, 9), ('valid', 40, 50)):
    texts = (json.dumps({'text': f'{name} {i} {"mehr " * words}'}) for i in range(lines))
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(texts))
  config = tiny_config(model__max_seq_len=T, train__batch_size=4, train__max_steps=2, data__layout='padded')
  files = {f'{name}_files': f'{tmp_path}/{name}.jsonl' for name in ('train', 'valid')}
  data = dataclasses.replace(config.data, **files, prepared_dir=str(tmp_path / 'prepared'))
  inputs = open_inputs(config, prepare(data, config.model.vocab_size))
  read = {
    split: (split.rows(np.arange(split.n_rows))['target'] != PADDING).sum() for split in (inputs.train, inputs.valid)
  }
  rows = config.train.update_rows * 2
  said = f'reads {read[inputs.valid]:,} tokens, and training only {rows * read[inputs.train] / 16:,.0f} before it'
  assert any(said in remark for remark in inputs.remarks), inputs.remarks
  assert read[inputs.valid] < inputs.valid.n_tokens / 2


def test_no_more_than_two_batches_are_under_way(monkeypatch):
  """With hundreds, eight devices of a CPU come to a stop, each waiting for the others."""
  under_way = []

  class Sum:
    def block_until_ready(self):
      done.append(self)

  def call(params, batch):
    started.append(Sum())
    under_way.append(len(started) - len(done))
    return {'nll': started[-1]}

  config, started, done = tiny_config(model__sublayer='dense'), [], []
  placement = place(config)
  monkeypatch.setattr(type(placement), 'jit', lambda *_, **__: call)
  step = make_eval_step(build_model(config)[0], config, placement)
  for batch in batches_of(rows_of_text(40, 20), 4):
    step({}, batch)
  assert under_way == [1] + [2] * 9 and done == started[:-2]


@pytest.mark.parametrize('sublayer', ['gated_fusion', 'dense'])
def test_evaluation_equals_float64_over_all_tokens(sublayer):
  config, model, params, step = setup(sublayer)
  rows = rows_of_text(10, config.model.vocab_size)
  result = evaluate(step, params, batches_of(rows, 4), 777, PLAN)

  out = jax.jit(model)(jnp.asarray(rows['input']))
  logits = np.asarray(model.logits(out.hidden_BTD), np.float64)
  log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  real = rows['target'] != PADDING
  nll_BT = -np.take_along_axis(log_probability, rows['target'][..., None], -1)[..., 0]
  nll = nll_BT[real].sum()
  assert result.tokens == real.sum() == 10 * T - 4 * (T // 2)
  assert result.loss == pytest.approx(nll / real.sum(), rel=1e-5)
  assert result.perplexity == pytest.approx(math.exp(nll / real.sum()), rel=1e-4)
  assert result.text_bytes == 777
  assert result.bits_per_byte == pytest.approx(nll / math.log(2) / 777, rel=1e-5)
  assert result.accuracy == pytest.approx((logits.argmax(-1) == rows['target'])[real].mean())
  if sublayer == 'dense':
    probed = real & (np.arange(10)[:, None] < 4 * PLAN.batches)
    assert result.bank == [] and set(result.probes) == {'positions', 'loss'}
    assert result.probes['positions'] == probed.sum()
    assert result.probes['loss'] == pytest.approx(nll_BT[probed].mean(), rel=1e-5)
    return
  for layer, health in enumerate(result.bank):
    counts = np.bincount(np.asarray(out.row_LBTR[layer])[real].ravel(), minlength=config.model.knowledge_num)
    assert {'layer': layer, **bank_health(counts)}.items() <= health.items()


@pytest.mark.thorough
def test_evaluation_does_not_depend_on_the_batch_size():
  results = []
  for size in (3, 10):
    config, _, params, step = setup('gated_fusion', size)
    rows = rows_of_text(10, config.model.vocab_size)
    results.append(evaluate(step, params, batches_of(rows, size), 1, PLAN))
  for result in results[1:]:
    assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
    assert result.tokens == results[0].tokens
    assert result.probes == pytest.approx(results[0].probes, rel=1e-6)
    for health, first in zip(result.bank, results[0].bank, strict=True):
      assert health.pop('head_overlap') is first.pop('head_overlap') is None
      assert health == pytest.approx(first, rel=1e-6)


def test_evaluation_is_traced_once(monkeypatch):
  traced = []

  def counting(*args):
    loss = make_loss(*args)
    return lambda *inputs: traced.append(1) or loss(*inputs)

  monkeypatch.setattr('mmjax.evaluation.evaluate.make_loss', counting)
  config, _, params, step = setup('gated_fusion')
  rows = rows_of_text(10, config.model.vocab_size)
  for _ in range(2):  # with the bank as it is, zeroed and shuffled
    evaluate(step, params, batches_of(rows, 4), 1, PLAN)
  assert len(traced) == 1


def test_evaluation_without_tokens_is_refused():
  config, _, params, step = setup('dense')
  empty = {name: np.full((4, T), -(name == 'target'), np.int32) for name in ('input', 'target', 'segment')}
  for batches in ([], [empty]):
    with pytest.raises(UserError, match='has 0 tokens to predict'):
      evaluate(step, params, batches, 1, PLAN)
