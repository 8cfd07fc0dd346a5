"""Leads against tokens: fits of exact numbers, their ranges by hand, names of models, what compare writes of them."""

import itertools
import json
import math

import numpy as np
import pytest

from mmjax.config import Config
from mmjax.errors import UserError
from mmjax.report.compare import compare
from mmjax.report.compare_plots import curve, difference_lines
from mmjax.report.found import FoundRun
from mmjax.report.lead import FORMS, Point, _equal_time, at, find_lead, fit, fit_line
from mmjax.report.lead_tables import draw_lead, lead_blocks
from mmjax.report.rows import make_rows, summary
from tests.test_compare import DENSE, make_run

LENGTHS = {'3e6': 3_000_064, '12e6': 12_000_000, '48e6': 48_000_000}  # the first not quite, as whole updates are


def points_of(lead_of) -> list[dict]:
  return [{'tokens': t, 'lead': lead_of(t), 'seeds': {0: lead_of(t)}} for t in (3e6, 12e6, 48e6)]


@pytest.mark.parametrize(
  ('form', 'lead_of', 'a', 'b'),
  [
    ('power', lambda t: 30 * t**-0.25, 30, 0.25),
    ('log', lambda t: 2.5 - 0.12 * math.log(t), 2.5, -0.12),
  ],
)
def test_exact_numbers_give_their_parameters_back(form, lead_of, a, b):
  found = fit(FORMS[form], points_of(lead_of))
  assert (found['a'], found['b']) == pytest.approx((a, b))
  assert found['b_range'] == pytest.approx([b, b]) and found['residual'] == pytest.approx(0, abs=1e-9)
  for tokens in (1e8, 1e9):
    assert found['at'][f'{tokens:g}']['lead'] == pytest.approx(lead_of(tokens))
  other = fit(FORMS['log' if form == 'power' else 'power'], points_of(lead_of))
  assert other['residual'] > 1e-3 and other['b_range'][0] < other['b'] < other['b_range'][1]


def test_ranges_are_over_points_left_out_and_over_seeds():
  points = [{'tokens': t, 'lead': x, 'seeds': {0: x}} for t, x in ((1e6, 0.4), (4e6, 0.3), (16e6, 0.1))]
  slopes = [math.log(b / a) / -math.log(ratio) for a, b, ratio in ((0.4, 0.3, 4), (0.4, 0.1, 16), (0.3, 0.1, 4))]
  assert fit(FORMS['power'], points)['b_range'] == pytest.approx([min(slopes), max(slopes)])
  two = [points[0], points[2] | {'seeds': {0: 0.05, 1: 0.2}}]
  ends = [math.log(0.4 / x) / math.log(16) for x in (0.2, 0.05)]
  assert fit(FORMS['power'], two)['b_range'] == pytest.approx(ends)
  assert fit(FORMS['power'], points[:2])['b_range'] is None
  lost = [points[0], points[1], points[2] | {'seeds': {0: 0.25, 1: -0.05}}]  # the second seed's has no logarithm
  found = fit(FORMS['power'], lost)
  assert found['refits_without'] == [1, 5] and found['b_range'] is None and found['at']['1e+08']['range'] is None
  assert fit(FORMS['log'], lost)['b_range'] is not None


@pytest.mark.parametrize('form', FORMS)
def test_ranges_over_seeds_are_those_of_all_choices_however_many(form):
  draw = np.random.default_rng(0)
  points = [{'tokens': t, 'seeds': dict(enumerate(0.2 + 0.1 * draw.random(3)))} for t in (1e6, 2e6, 7e6, 3e9)]
  points = [point | {'lead': np.mean(list(point['seeds'].values()))} for point in points]
  tokens = np.array([point['tokens'] for point in points])
  chosen = [np.array(leads) for leads in itertools.product(*(point['seeds'].values() for point in points))]
  lines = [fit_line(FORMS[form], tokens, leads) for leads in chosen]
  lead = np.array([point['lead'] for point in points])
  lines += [fit_line(FORMS[form], np.delete(tokens, i), np.delete(lead, i)) for i in range(4)]
  found = fit(FORMS[form], points)
  slopes = [FORMS[form].parameters(*line)[1] for line in lines]
  assert found['refits_without'] == [0, 3**4 + 4] and found['b_range'] == pytest.approx([min(slopes), max(slopes)])
  for far, prediction in found['at'].items():
    ends = [at(FORMS[form], line, float(far)) for line in lines]
    assert prediction['range'] == pytest.approx([min(ends), max(ends)])
  many = [{'tokens': 1e6 * 2**i, 'lead': 0.2, 'seeds': dict.fromkeys(range(9), 0.2) | {9: 0.1}} for i in range(12)]
  assert fit(FORMS[form], many)['refits_without'] == [0, 10**12 + 12]


def test_a_lead_that_is_lost_has_no_power_law():
  points = points_of(lambda t: 0.1 - t / 4e7)
  assert fit(FORMS['power'], points) is None and fit(FORMS['log'], points)['b'] < 0


@pytest.fixture
def runs(tmp_path):
  """g0 and g42 at three lengths, g42 at half the speed; at 12 M two seeds; a model of another rate at one length."""

  def make(name: str, tokens: int, loss: float, **more):
    # make_run's updates have 2 x 4 rows of 16 tokens.
    steps = tokens // 128
    return make_run(tmp_path / name, (loss + 1, loss), done=steps, **{'train__max_steps': steps} | more)

  found = []
  for length, loss in (('3e6', 5.0), ('12e6', 4.5), ('48e6', 4.1)):
    tokens = LENGTHS[length]
    found.append(make(f'g0-{length}-s0', tokens, loss, **DENSE))
    found.append(make(f'g42-{length}-s0', tokens, loss - 30 * tokens**-0.3, rate=250.0))
  found.append(make('g0-12e6-s1', LENGTHS['12e6'], 4.51, seed=1, **DENSE))
  found.append(make('g42-12e6-s1', LENGTHS['12e6'], 4.29, seed=1, rate=250.0))
  found.append(make('g42-lr1-3e6-s0', LENGTHS['3e6'], 5.3, train__learning_rate=1.0))
  return found


def test_leads_of_a_sweep_are_found_by_names(runs):
  found = find_lead([FoundRun(path) for path in runs])
  assert found['baseline'] == 'g0' and list(found['models']) == ['g42']
  model = found['models']['g42']
  assert [point['tokens'] for point in model['points']] == list(LENGTHS.values())
  leads = [30 * tokens**-0.3 for tokens in LENGTHS.values()]
  middle = [leads[1], 4.51 - 4.29]
  assert [p['lead'] for p in model['points']] == pytest.approx([leads[0], np.mean(middle), leads[2]])
  assert model['points'][1]['standard_error'] == pytest.approx(np.std(middle, ddof=1) / 2**0.5)
  assert model['fits']['power']['b_range'][0] < 0.3 < model['fits']['power']['b_range'][1]
  # At half the speed, it has read half of the tokens: between its points, as the logarithm of time.
  losses = [point['loss'] for point in model['points']]
  assert [entry['loss'] for entry in model['equal_time']] == [
    None, *(pytest.approx(np.mean(pair), abs=1e-4) for pair in (losses[:2], losses[1:]))
  ]  # fmt: skip


def test_a_lead_is_the_difference_that_the_table_says(tmp_path):
  losses = {'g0-s0': 4.0, 'g0-s1': 4.2, 'g42-s1': 3.9, 'g42-s2': 3.5}  # a single seed in common, of two each

  def make(name: str, loss: float, steps: int, **more) -> str:
    more |= {'seed': int(name[-1]), 'train__max_steps': steps} | (DENSE if name.startswith('g0') else {})
    return make_run(tmp_path / f'{name[:-3]}-{steps * 128}-{name[-2:]}', (loss + 1, loss), done=steps, **more)

  paths = [make(name, loss, steps) for steps in (1000, 4000) for name, loss in losses.items()]
  for others in (paths, [path for path in paths if not str(path).endswith('s2')]):
    runs = [FoundRun(path) for path in others]
    rows = make_rows([run for run in runs if run.total == 1000])
    told = summary(rows[0], rows[1])['difference']
    lead = find_lead(runs)['models']['g42']['points'][0]
    assert (lead['lead'], lead['standard_error']) == (pytest.approx(-told['mean']), told['standard_error'])
    assert told['kind'] == ('Welch' if others is paths else 'paired')


def test_the_plot_shows_the_difference_that_the_table_says(tmp_path):
  def make(name: str, loss: float, done: int = 1000, **more) -> str:
    more |= {'seed': int(name[-1]), 'train__max_steps': 1000} | (DENSE if name.startswith('g0') else {})
    return make_run(tmp_path / name, (loss + 1, loss), done=done, **more)

  paths = [make('g0-s0', 4.0), make('g0-s1', 4.2), make('g42-s0', 3.9)]
  paths.append(make('g42-s2', 3.0, done=500))  # still runs
  rows = make_rows([FoundRun(path) for path in paths])
  curves = [[curve(run, 'eval') for run in row.runs] for row in rows]
  [line] = difference_lines(curves, rows, [{}, {}], {}, [False, False])
  told = summary(*rows)['difference']
  assert told['kind'] == 'paired' and line.y[-1] == pytest.approx(told['mean']) == pytest.approx(-0.1)


def test_fits_go_as_far_as_the_points_and_padding_is_no_token(tmp_path, monkeypatch):
  paths = []
  for steps in (7812, 78125 * 300):
    for name, loss in (('g0', 5.0), ('g42', 4.8)):
      flags = {'train__max_steps': steps, 'data__layout': 'padded'} | (DENSE if name == 'g0' else {})
      path = make_run(tmp_path / f'{name}-{128 * steps}', (6.0, loss), done=steps, **flags)
      records = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
      shrunk = [r | {'tokens': r['tokens'] // 2} if r['kind'] == 'train' else r for r in records]
      (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in shrunk))
      paths.append(path)
  found = find_lead([FoundRun(path) for path in paths])
  assert [point['tokens'] for point in found['models']['g42']['points']] == [64 * 7812, 64 * 78125 * 300]
  drawn = []
  monkeypatch.setattr('mmjax.report.lead_tables.draw', lambda path, panel, legend: drawn.extend(panel.lines))
  caption = draw_lead(found, tmp_path / 'lead.png', [{'color': 'k'}])
  assert all((np.diff(line.x) > 0).all() for line in drawn) and caption.endswith('as far as 1.5 G.')
  assert not any('beyond the last' in block for block in lead_blocks(found) if isinstance(block, str))


def test_loss_at_equal_time_is_between_runs_in_the_order_of_their_times():
  config, longer = Config(), Point(4e6, {0: 4.0}, Config(), 5.0)  # which ran on a faster machine
  model = {1: Point(1e6, {0: 4.9}, config, 20.0), 2: longer}
  [found] = _equal_time({1: Point(1e6, {0: 5.0}, config, 10.0)}, model)
  assert found['loss'] == pytest.approx(4.45)


def test_only_the_tokens_that_a_run_read_are_cut_from_its_name(tmp_path):
  names = {'g0-3e6': 3, 'g0-12e6': 12, 'g57-4M-3e6': 3, 'g57-4M-12000000-s0': 12, 'g52-1M-3M': 3, 'g52-1M-12M_s1': 12}
  names |= {'g60-2900k': 3, 'g60-12.3M': 12}  # as whole updates may come out
  names |= {'g61-3e+06': 3, 'g61-1.2e+07-s0': 12}  # as Python's :g writes them
  paths = [
    make_run(tmp_path / name, (5.0, 4.0), done=steps, seed=int(name[-1] == '1'), train__max_steps=steps)
    for name, steps in ((name, 7812 * millions) for name, millions in names.items())
  ]
  found = find_lead([FoundRun(path) for path in paths])
  assert found['baseline'] == 'g0' and sorted(found['models']) == ['g52-1M', 'g57-4M', 'g60', 'g61']


def test_models_may_be_named_by_patterns(runs):
  found = find_lead([FoundRun(path) for path in runs], 'dense=g0-*,rows=g42-[0-9]*')
  assert found['baseline'] == 'dense' and list(found['models']) == ['rows']
  everything = [FoundRun(path) for path in runs]
  for patterns, said in (
    ('dense=g1-*', 'no run fits it$'),
    ('g0-*', 'must be NAME=PATTERN, such as g0=g0-'),
    (
      'dense=g0-*,rows=g42-*',
      'are of one model by --models, and have the same tokens and the same seed; leave one of them out',
    ),
    ('dense=g0-*,dense=g42-*', 'dense is named twice'),
    (
      'dense=g0-*,rows=g42-lr*',
      'no model was trained on two numbers of tokens that dense was too, which was on [0-9.e+]+, ',
    ),
  ):
    with pytest.raises(UserError, match=said):
      find_lead(everything, patterns)


def test_compare_says_what_the_fits_say(runs, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('mmjax.report.compare.write_plots', lambda *_: {})  # drawn in test_compare.py
  compare([path for path in runs if 'lr1' not in path.name], tmp_path / 'out')
  said = (tmp_path / 'out' / 'compare.md').read_text()
  assert '| model | 3 M | 12 M | 48 M | 12 M over 3 M | 48 M over 12 M |' in said
  assert (
    'at most 3 points, which leaves 1 to contradict a form' in said
    and '1 G is a factor of 20.8 beyond the last' in said
  )
  assert 'Fits of the lead' in capsys.readouterr().out
  assert '![Lead over g0 against tokens' in said and (tmp_path / 'out' / 'lead.png').stat().st_size > 10_000
  lead = json.loads((tmp_path / 'out' / 'compare.json').read_text())['lead']
  assert f'{lead["models"]["g42"]["fits"]["power"]["at"]["1e+09"]["lead"]:+.3f} [' in said
  compare(runs[:1], tmp_path / 'one')
  assert json.loads((tmp_path / 'one' / 'compare.json').read_text())['lead'] is None
