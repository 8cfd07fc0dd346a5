"""Comparing runs: hand-made run directories, numbers computed by numpy and scipy from what was put into them."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mmjax.errors import UserError
from mmjax.files import read_json, write_json
from mmjax.model.cost import flops_per_token
from mmjax.report import compare as compare_module
from mmjax.report.compare import compare
from mmjax.report.compare_plots import curve, difference_lines, differences, write_plots
from mmjax.report.found import ENDED, FoundRun
from mmjax.report.rows import find_runs, make_rows
from mmjax.run.directory import RunDir
from tests.helpers import tiny_config

IDENTITY = {'data_sha256': 'd' * 64, 'tokenizer_sha256': 't' * 64}
DENSE = {'model__sublayer': 'dense'}
STEPS = 10


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
  """Drawing takes longer than everything else; one test does it."""
  monkeypatch.setattr(compare_module, 'write_plots', lambda rows, folder, other_data: {})


def make_run(path: Path, losses, *, seed=0, done=STEPS, identity=IDENTITY, valid_tokens=1000, rate=500.0, **changes):
  """Writes a run directory that evaluated half-way and at its end, of 10 updates, with the given losses."""
  config = tiny_config(**{'seed': seed, 'train__max_steps': STEPS, 'train__log_interval': 5} | changes)
  (path / 'checkpoints' / str(done)).mkdir(parents=True)
  RunDir(path).write_config(config)
  starts = [{'device_count': 1, 'device': 'abacus', 'host': 'here'}]
  (path / 'run.json').write_text(json.dumps({'identity': identity, 'starts': starts}))
  layers = [] if config.model.sublayer == 'dense' else [0, 1]
  bank = [
    {'layer': i, 'used_share': 0.25 + seed / 10 + i / 4, 'effective_rows': 9.0, 'hottest_share': 0.5} for i in layers
  ]
  records = []
  last = config.train.max_steps
  for step, loss in zip((last // 2, last), losses, strict=False):
    train = {'kind': 'train', 'step': step, 'tokens': 128 * step, 'seconds': step / 2.0, 'loss': loss and loss + 1}
    records.append(train | {'tokens_per_second': rate, 'peak_bytes': 10**9 * (seed + 1), 'bank': bank})
    found = {'loss': loss, 'bits_per_byte': loss and loss / 3, 'accuracy': 0.5, 'tokens': valid_tokens}
    probes = {'positions': 640, 'loss': 5.0 if bank else 5.1}
    probes |= {'loss_zeroed': 5.25 + seed / 10, 'loss_shuffled': 5.5} if bank else {}
    records.append({'kind': 'eval', 'step': step, **found, 'text_bytes': 3000, 'bank': bank, 'probes': probes})
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def rows_of(paths, out, **flags):
  """Compares and returns the rows of compare.json by name."""
  compare(paths, out, **flags)
  return {row['name']: row for row in json.loads((out / 'compare.json').read_text())['rows']}


def test_paired_difference_and_error_are_those_of_scipy(tmp_path):
  first, second = [5.5, 5.62, 5.41], [5.43, 5.58, 5.30]
  paths = [make_run(tmp_path / f'g0-s{i}', (6, x), seed=i, **DENSE) for i, x in enumerate(first)]
  paths += [make_run(tmp_path / f'g5-s{i}', (6, x), seed=i, rate=100 * (i + 1.0)) for i, x in enumerate(second)]
  rows = rows_of(paths, tmp_path / 'out')
  assert list(rows) == ['g0', 'g5']
  found, row = rows['g5']['difference'], rows['g5']
  test = stats.ttest_rel(second, first)
  assert found['mean'] == pytest.approx(np.mean(second) - np.mean(first))
  assert found['mean'] / found['standard_error'] == pytest.approx(test.statistic)
  assert (found['kind'], found['n']) == ('paired', 3)
  assert rows['g0']['difference'] is None
  assert row['loss'] == pytest.approx(np.mean(second)) and row['loss_deviation'] == pytest.approx(
    np.std(second, ddof=1)
  )
  assert row['bits_per_byte'] == pytest.approx(np.mean(second) / 3)
  assert (row['tokens'], row['tokens_per_second'], row['peak_bytes']) == (1280, 200, 3e9)
  assert row['probes']['loss_zeroed'] == pytest.approx(5.35)
  assert row['zeroed_over_first'] == pytest.approx(5.35 - 5.1) and rows['g0']['zeroed_over_first'] is None
  text = (tmp_path / 'out' / 'compare.md').read_text()
  assert '| bank zeroed | bank zeroed, over g0 | rows exchanged |' in text and 'Bank zeroed, rows exchanged: ' in text
  assert '| +0.3500 | +0.2500 | +0.5000 |' in text
  assert [h['used_share'] for h in row['bank']] == pytest.approx([0.35, 0.6])  # seeds 0.25, 0.35, 0.45 and a quarter


def test_without_common_seeds_the_error_is_welchs(tmp_path):
  first, second = [5.5, 5.62, 5.41], [5.43, 5.30]
  paths = [make_run(tmp_path / f'a{i}', (6, x), seed=i, **DENSE) for i, x in enumerate(first)]
  paths += [make_run(tmp_path / f'b{i}', (6, x), seed=i) for i, x in zip((7, 8), second, strict=True)]
  found = rows_of(paths, tmp_path / 'out')['b']['difference']
  test = stats.ttest_ind(second, first, equal_var=False)
  assert found['mean'] / found['standard_error'] == pytest.approx(test.statistic)
  assert (found['kind'], found['n'], found['n_first']) == ('Welch', 2, 3)


def test_same_seed_with_other_batches_is_not_paired(tmp_path):
  paths = [make_run(tmp_path / f'a-s{i}', (6, 5 + i), seed=i) for i in range(2)]
  paths += [make_run(tmp_path / f'b-s{i}', (6, 5.1 + i), seed=i, train__batch_size=2) for i in range(2)]
  assert rows_of(paths, tmp_path / 'out')['b']['difference']['kind'] == 'Welch'


def test_finished_run_whose_last_loss_is_not_finite_has_none(tmp_path, capsys):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5)), make_run(tmp_path / 'b-s0', (5.1, None), **DENSE)]
  rows = rows_of(paths, tmp_path / 'out')
  assert rows['b']['loss'] is rows['b']['difference'] is None and rows['b']['marks'] == ['seed 0 last loss not finite']
  assert 'A run that is not finished' not in capsys.readouterr().out


def test_what_limits_a_comparison_stands_on_the_terminal(tmp_path, capsys):
  paths = [make_run(tmp_path / 'a-s0', (6,), **DENSE), make_run(tmp_path / 'b-s0', (6, 5.4))]
  rows_of(paths, tmp_path / 'out')
  said = ' '.join(capsys.readouterr().out.split())
  assert 'different numbers of tokens' in said and 'Bank zeroed, rows exchanged' not in said
  assert 'not finished' not in said


def test_models_that_were_better_before_their_end_are_said(tmp_path, capsys):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5), **DENSE), make_run(tmp_path / 'b-s0', (5.3, 5.6))]
  rows = rows_of(paths, tmp_path / 'out')
  assert (rows['a']['lowest_loss'], rows['b']['lowest_loss']) == (5.5, 5.3)
  said, text = ' '.join(capsys.readouterr().out.split()), (tmp_path / 'out' / 'compare.md').read_text()
  for each in (said, text):
    assert 'lowest on the way' in each and 'some models were better before' in each
  paths = [make_run(tmp_path / 'c-s0', (5.595, 5.6)), make_run(tmp_path / 'c-s1', (3, None), seed=1)]
  assert rows_of(paths, tmp_path / 'other')['c']['lowest_loss'] == 5.595
  assert 'better before' not in capsys.readouterr().out


def test_validation_text_that_is_training_text_is_said(tmp_path, capsys):
  path = make_run(tmp_path / 'a-s0', (6, 5.5))
  valid = {'documents': 10, 'tokens': 1000, 'also_in_train': {'documents': 9, 'tokens': 880}}
  (path / 'data.json').write_text(json.dumps({'splits': {'valid': valid}}))
  rows_of([path], tmp_path / 'out')
  for said in (' '.join(capsys.readouterr().out.split()), (tmp_path / 'out' / 'compare.md').read_text()):
    assert '9 of 10 validation documents (880 of 1,000 tokens, 88.0%) are training documents too' in said
  other = make_run(tmp_path / 'b-s0', (6, 5.5), identity=IDENTITY | {'data_sha256': 'e' * 64})
  rows_of([other, path], tmp_path / 'both', allow_other_data=True)
  assert 'a-s0: 9 of 10 validation documents' in ' '.join(capsys.readouterr().out.split())


def test_longer_rows_are_said_to_lower_a_loss(tmp_path, capsys):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5)), make_run(tmp_path / 'b-s0', (6, 5.4), model__max_seq_len=32)]
  rows_of(paths, tmp_path / 'out')
  assert 'model.max_seq_len differs' in ' '.join(capsys.readouterr().out.split())
  rows_of(paths[:1] + [make_run(tmp_path / 'c-s0', (6, 5.4), **DENSE)], tmp_path / 'other')
  assert 'model.max_seq_len differs' not in ' '.join(capsys.readouterr().out.split())


def test_run_that_saw_no_tokens_did_not_see_other_numbers_of_them(tmp_path, capsys):
  paths = [make_run(tmp_path / 'a-s0', (6,), **DENSE), make_run(tmp_path / 'b-s0', (), done=0)]
  rows_of(paths, tmp_path / 'out')
  said = ' '.join(capsys.readouterr().out.split())
  assert 'different numbers of tokens' not in said and 'A run that is not finished' in said


def test_one_seed_has_no_standard_error_and_says_so(tmp_path, capsys):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5), **DENSE), make_run(tmp_path / 'b-s0', (6, 5.4))]
  paths.append(make_run(tmp_path / 'b-s1', (6, 5.7), seed=1))
  rows = rows_of(paths, tmp_path / 'out')
  assert rows['b']['difference'] == {
    'mean': pytest.approx(-0.1), 'standard_error': None, 'kind': 'paired', 'n': 1, 'n_first': 1
  }  # fmt: skip
  said = (tmp_path / 'out' / 'compare.md').read_text()
  assert '| b | 2 | 5.5500 | -0.1000 | paired, 1 seed: no standard error |' in said
  assert 'paired, 1 seed: no standard error' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'identity': IDENTITY | {'data_sha256': 'e' * 64}}, 'data_sha256 dddddddddddd and eeeeeeeeeeee'),
    (
      {'identity': IDENTITY | {'tokenizer_sha256': 'u' * 64}},
      'tokenizer_sha256 t+ and u+; .*; where only the tokenizer differs, bits per byte compare',
    ),
    ({'valid_tokens': 999}, 'validation_tokens 1,000 and 999'),
  ],
)
def test_runs_on_other_data_are_refused_or_marked(tmp_path, change, said):
  paths = [make_run(tmp_path / 'a', (6, 5.5)), make_run(tmp_path / 'b', (6, 5.4), **change)]
  with pytest.raises(UserError, match=f'were trained or evaluated on text that differs: {said}'):
    compare(paths, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  rows = rows_of(paths, tmp_path / 'out', allow_other_data=True)
  assert rows['b']['marks'] == ['other data'] and rows['b']['difference'] is None
  assert '--allow_other_data' in (tmp_path / 'out' / 'compare.md').read_text()
  assert '| b [other data] | 1 | 5.4000 | - | - |' in (tmp_path / 'out' / 'compare.md').read_text()
  assert 'A run that is not finished' not in (tmp_path / 'out' / 'compare.md').read_text()
  why = 'have no difference: their runs were trained or evaluated on other text, or on other tokens of it'
  assert why in (tmp_path / 'out' / 'compare.md').read_text()  # data_sha256 is also of what was only trained on


def test_runs_of_one_name_are_told_apart_by_the_shortest_end_of_their_paths(tmp_path, monkeypatch):
  paths = [make_run(tmp_path / name, (6, 5.5), **DENSE, train__learning_rate=rate) for name, rate in
           (('A/x/run', 1e-3), ('B/x/run', 2e-3), ('B/other', 3e-3), ('C/run', 4e-3))]  # fmt: skip
  assert list(rows_of(paths, tmp_path / 'out')) == ['A/x/run', 'B/x/run', 'other', 'C/run']
  monkeypatch.chdir(tmp_path / 'C' / 'run')
  assert list(rows_of(['.', '../../B/other'], tmp_path / 'out')) == ['run', 'other']
  seeds = [make_run(tmp_path / name / 'run', (6, 5.5), **DENSE, seed=s) for s, name in enumerate(('s0', 's1'))]
  assert list(rows_of([*seeds, paths[0]], tmp_path / 'out')) == ['s0/run, s1/run', 'x/run']


def test_number_at_the_end_of_a_single_runs_name_is_no_seed(tmp_path):
  paths = [
    make_run(tmp_path / name, (6, 5), model__dim=16 * i) for i, name in enumerate(('exp_1_4_0', 'g10', 'g1-s0'), 1)
  ]
  assert list(rows_of(paths, tmp_path / 'out')) == ['exp_1_4_0', 'g10', 'g1']


def test_seed_that_was_not_evaluated_yet_belongs_to_its_row(tmp_path):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5)), make_run(tmp_path / 'a-s1', (), seed=1, done=2)]
  [row] = rows_of(paths, tmp_path / 'out').values()
  assert (row['name'], row['seeds'], row['marks']) == ('a', [0], ['seed 1 not finished, 2 of 10 updates'])


def test_numbers_that_were_not_finite_are_left_out(tmp_path):
  path = make_run(tmp_path / 'a', (6, 5.5))
  text = (path / 'metrics.jsonl').read_text().replace('"loss_zeroed": 5.25', '"loss_zeroed": null')
  (path / 'metrics.jsonl').write_text(text.replace('"hottest_share": 0.5', '"hottest_share": null'))
  rows_of([path], tmp_path / 'out')
  assert '| - | - | - | +0.5000 |' in (tmp_path / 'out' / 'compare.md').read_text()


def test_unfinished_and_diverged_runs_are_marked_and_do_not_count(tmp_path):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5)), make_run(tmp_path / 'a-s1', (9,), seed=1, done=5)]
  paths.append(make_run(tmp_path / 'b-s0', (7, None), done=5, **DENSE))
  skipped = {'kind': 'skipped', 'step': 11, 'in_a_row': FoundRun(paths[-1]).config.train.max_skipped_updates}
  with open(tmp_path / 'b-s0' / 'metrics.jsonl', 'a') as log:
    log.write(json.dumps(skipped) + '\n')
  rows = rows_of(paths, tmp_path / 'out')
  assert (rows['a']['loss'], rows['a']['seeds']) == (5.5, [0])
  assert rows['a']['marks'] == ['seed 1 not finished, 5 of 10 updates']
  assert rows['b']['marks'] == ['seed 0 diverged, 5 of 10 updates']
  assert (rows['b']['loss'], rows['b']['difference']) == (7, None)


def test_run_that_went_on_after_it_diverged_is_not_finished(tmp_path):
  path = make_run(tmp_path / 'a', (7,), done=5)
  (path / 'diverged').mkdir()  # what is kept of the steps that were made again
  with open(path / 'metrics.jsonl', 'a') as log:
    log.write(json.dumps({'kind': 'skipped', 'step': 6, 'in_a_row': 1}) + '\n')  # one alone is no divergence
  assert rows_of([path], tmp_path / 'out')['a']['marks'] == ['seed 0 not finished, 5 of 10 updates']


def test_finished_run_whose_log_lacks_the_last_evaluation_has_no_loss(tmp_path):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5)), make_run(tmp_path / 'a-s1', (9, 5.7), seed=1)]
  log = tmp_path / 'a-s1' / 'metrics.jsonl'
  log.write_text(log.read_text().rstrip('\n'))
  assert rows_of(paths, tmp_path / 'out')['a']['loss'] == pytest.approx(5.6)  # an editor took the line's end alone
  log.write_text(log.read_text().rpartition('\n')[0] + '\n')
  row = rows_of(paths, tmp_path / 'out')['a']
  assert (row['loss'], row['marks']) == (5.5, ['seed 1 last evaluation missing from its log'])


def test_run_that_ends_while_it_is_compared_counts_as_not_finished(tmp_path):
  run = FoundRun(make_run(tmp_path / 'a', (6, 5.5), done=5))
  assert run.records[-1]['step'] == STEPS
  (tmp_path / 'a' / 'checkpoints' / str(STEPS)).mkdir()
  assert not run.finished and run.last_eval['loss'] == 5.5


@pytest.mark.parametrize('left', ['empty folder', 'nothing'])
def test_run_without_its_checkpoints_counts_by_its_log(tmp_path, left):
  paths = [make_run(tmp_path / 'a-s0', (6, 5.5)), make_run(tmp_path / 'b-s0', (6,), **DENSE)]
  for path in paths:
    (path / 'checkpoints' / str(STEPS)).rmdir()
    if left == 'nothing':
      (path / 'checkpoints').rmdir()
    else:
      (path / 'newest_checkpoint').write_text(f'{STEPS}')
  rows = rows_of(paths, tmp_path / 'out')
  assert (rows['a']['loss'], rows['a']['marks']) == (5.5, [])
  assert rows['b']['marks'] == ['seed 0 not finished, 5 of 10 updates']
  (paths[0] / 'newest_checkpoint').write_text('5')  # it was killed before the last save
  assert rows_of(paths, tmp_path / 'out')['a']['marks'] == ['seed 0 not finished, 10 of 10 updates']


@pytest.mark.parametrize('old_is_first', [True, False])
def test_setting_that_mmjax_no_longer_has_is_among_the_differences(tmp_path, old_is_first):
  old, new = make_run(tmp_path / 'old', (6, 5.5)), make_run(tmp_path / 'new', (6, 5.6))
  settings = read_json(old / 'config.json')
  settings['memory']['balance_loss_weight'] = 0.1
  write_json(old / 'config.json', settings)
  rows = rows_of([old, new] if old_is_first else [new, old], tmp_path / 'out')
  assert rows['new' if old_is_first else 'old']['changed'] == {
    'memory.balance_loss_weight': 0.0 if old_is_first else 0.1
  }


def test_damaged_record_of_a_sweep_is_refused_by_name(tmp_path):
  make_run(tmp_path / 'a-s0', (6, 5.5))
  for text in ('{}', '{"runs": ["a-s0"]}', '{"runs": {"a-s0": {}}}'):
    (tmp_path / 'sweep.json').write_text(text)
    with pytest.raises(UserError, match=r'sweep\.json is not what a sweep wrote'):
      find_runs([tmp_path])


def test_runs_are_rows_by_settings_and_not_by_where_they_wrote(tmp_path):
  first = make_run(tmp_path / 'x', (6, 5.5), seed=3, data__prepared_dir='here', train__eval_interval=5)
  second = make_run(tmp_path / 'y', (6, 5.6), seed=4, data__prepared_dir='there', runtime__remat='block')
  third = make_run(tmp_path / 'z', (6, 5.6), seed=4, memory__ffn_dim=8)
  rows = rows_of([first, second, third], tmp_path / 'out')
  assert {name: row['seeds'] for name, row in rows.items()} == {'x, y': [3, 4], 'z': [4]}
  assert rows['z']['changed'] == {'memory.ffn_dim': 8}
  twin = make_run(tmp_path / 'twin', (6, 5.6), seed=4)
  with pytest.raises(UserError, match='y and .*twin have the same settings and the same seed'):
    compare([first, second, twin], tmp_path / 'out')
  record = json.loads((twin / 'run.json').read_text())
  record['starts'].append(record['starts'][0] | {'changed': ['train.learning_rate 0.1 -> 0.01']})
  (twin / 'run.json').write_text(json.dumps(record))  # went on with another schedule
  rows = rows_of([first, second, twin], tmp_path / 'out')
  assert rows['twin']['changed'] == {'changed on the way': ['train.learning_rate 0.1 -> 0.01']}


def test_settings_that_do_nothing_in_a_row_are_not_among_its_differences(tmp_path):
  first = make_run(tmp_path / 'a', (6, 5.5), memory__ffn_dim=8, memory__query_key_norm='l2', train__beta1=0.5)
  rows = rows_of([first, make_run(tmp_path / 'b', (6, 5.6), **DENSE)], tmp_path / 'out')
  assert set(rows['b']['changed']) == {'model.sublayer', 'train.beta1'}


def test_folder_stands_for_its_runs_in_the_order_of_its_sweep(tmp_path):
  for name in ('g10-s0', 'g2-s0', 'g1-s0'):
    make_run(tmp_path / name, (6, 5.5))
  assert [run.path.name for run in find_runs([tmp_path])] == ['g1-s0', 'g2-s0', 'g10-s0']
  (tmp_path / 'sweep.json').write_text(json.dumps({'runs': dict.fromkeys(('g10-s0', 'g1-s0'), dict.fromkeys(ENDED))}))
  assert [run.path.name for run in find_runs([tmp_path, tmp_path / 'g2-s0'])] == ['g10-s0', 'g1-s0', 'g2-s0']
  with pytest.raises(UserError, match='neither a run directory'):
    find_runs([tmp_path / 'g1-s0' / 'checkpoints'])


def test_curves_count_flops_of_whole_rows_and_differences_are_at_equal_tokens(tmp_path):
  dense = FoundRun(make_run(tmp_path / 'a', (7, 5), **DENSE))
  half = FoundRun(make_run(tmp_path / 'b', (6, 4), train__batch_size=2))
  found = curve(half, 'eval')
  cost = flops_per_token(half.config)['total']
  np.testing.assert_allclose(found.x['flops'], np.array([5, 10]) * 2 * 2 * 16 * cost)  # updates, A, B, T
  np.testing.assert_array_equal(found.x['seconds'], [2.5, 5])
  found.x['tokens'][:] = [640, 960]  # halfway between the evaluations of the first: its loss there is 6
  x, difference = differences([curve(dense, 'eval')], [found])
  np.testing.assert_allclose((x, difference[0]), ([640, 960], [6 - 7, 4 - 6]))
  assert len(make_rows([dense, half])) == 2


def test_plots_are_drawn_also_for_runs_that_only_began(tmp_path):
  runs = [make_run(tmp_path / 'a', (6,), done=5), make_run(tmp_path / 'b', (), done=0, **DENSE)]
  captions = write_plots(make_rows([FoundRun(run) for run in runs]), tmp_path, [False, False])
  assert list(captions) == ['loss_tokens.png', 'loss_flops.png', 'loss_seconds.png', 'difference.png']
  for name in captions:
    data = (tmp_path / name).read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n' and struct.unpack('>I', data[16:20])[0] > 1000


def test_difference_of_other_data_and_of_other_batches_is_not_drawn_as_one(tmp_path):
  first = [make_run(tmp_path / f'a-s{i}', (6, 5 + i), seed=i) for i in range(2)]
  other = [make_run(tmp_path / f'b-s{i}', (6, 4), seed=i, identity=IDENTITY | {'data_sha256': 'x'}) for i in range(2)]
  batch = [make_run(tmp_path / f'c-s{i}', (6, 5.1 + i), seed=i, train__batch_size=2) for i in range(2)]
  rows = make_rows([FoundRun(path) for path in (*first, *other, *batch)])
  curves = [[curve(run, 'eval') for run in row.runs] for row in rows]
  [line] = difference_lines(curves, rows, [{'color': 'k'}] * 3, {}, [False, True, False])
  np.testing.assert_allclose(line.y[-1], 0.1)
  assert line.error is None  # no band of an error: the seeds of other batches are no pairs
