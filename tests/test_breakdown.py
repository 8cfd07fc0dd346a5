"""Breaking down the loss of runs: against sums in plain Python over logits and dictionaries of n-grams."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from scipy.special import log_softmax

import mmjax
from mmjax.console import Progress
from mmjax.data.loader import PADDING, open_split, row_settings, train_batches
from mmjax.data.prepare import prepare
from mmjax.errors import UserError
from mmjax.inference.breakdown import Grouping, Losses, _summary, _training_split, break_down, clustered_error
from mmjax.inference.measure import open_text
from mmjax.run.directory import RunDir, open_run
from mmjax.run.orbax_io import MANIFEST, read_manifest
from mmjax.tools import breakdown as command


def group_of(count: int) -> str:
  return 'never' if not count else '1 to 10' if count <= 10 else '11 to 100' if count <= 100 else 'more than 100'


@pytest.mark.thorough
def test_losses_of_groups_are_those_of_plain_python(tiny_run, tmp_path, monkeypatch, capsys):
  files = f'{tmp_path}/breakdown.json', f'{tmp_path}/breakdown.md'
  flags = ['--checkpoint', 'last', '--json', files[0], '--markdown', files[1], '--ngrams', '2', '--with_counts', '2']
  tokens = read_manifest(tiny_run / 'checkpoints' / '6' / MANIFEST, 6)['metadata']['tokens']
  padded = {'metadata': {'tokens': tokens - 5}}  # as if five positions were no tokens
  monkeypatch.setattr('mmjax.inference.breakdown.read_manifest', lambda *_: padded)
  monkeypatch.setattr('sys.argv', ['breakdown', str(tiny_run), *flags])
  command.main()
  found = json.loads((tmp_path / 'breakdown.json').read_text())['runs'][0]

  lm, run = mmjax.load(tiny_run, 'last'), open_run(tiny_run)
  config = lm.config
  pairs = Counter()
  batches = train_batches(_training_split(run, config), global_batch_rows=config.train.update_rows, seed=config.seed)
  for _ in range(lm.step):
    batch = next(batches)
    pairs.update(zip(batch['input'].flat, batch['target'].flat, strict=True))
  batches.close()
  text = open_text(config, run)
  rows = text.rows(np.arange(text.n_rows))
  nll_BT = -np.take_along_axis(
    log_softmax(lm.logits(rows['input']), axis=-1), np.maximum(rows['target'], 0)[..., None], -1
  )[..., 0]
  losses = {'all': []}
  for nll, pair in zip(nll_BT.flat, zip(rows['input'].flat, rows['target'].flat, strict=True), strict=True):
    if pair[1] != PADDING:
      losses.setdefault(group_of(pairs[pair]), []).append(float(nll))
      losses['all'].append(float(nll))
  assert (
    len(losses) > 3
    and found['tokens_read'] + 5 == tokens == sum(times for pair, times in pairs.items() if pair[1] != PADDING)
    and found['against'] is None
  )
  for group in (*found['groups']['all'], *found['groups']['2-gram read']):
    own = losses.get(group['group'], [])
    assert group['tokens'] == len(own)
    assert group['loss'] == (pytest.approx(np.mean(own), rel=1e-5) if own else None)
  evals = [json.loads(line) for line in (tiny_run / 'metrics.jsonl').read_text().splitlines() if '"eval"' in line]
  assert found['groups']['all'][0]['loss'] == pytest.approx(evals[-1]['loss'], rel=1e-5)
  zeroed = lm.with_bank(np.zeros_like(lm.params['memory_bank'])).logits(rows['input'])
  kept = rows['target'] != PADDING
  expected = -np.take_along_axis(log_softmax(zeroed, axis=-1)[kept], rows['target'][kept][:, None], -1).mean()
  assert found['groups']['all'][0]['loss_zeroed'] == pytest.approx(expected, rel=1e-5)
  assert f'| run, bank zeroed | 763, step 6 | {expected:.4f} |' in (tmp_path / 'breakdown.md').read_text()
  mixed = found['groups']['all'][0]['loss_with_counts']  # of a model that has hardly learned
  assert mixed < found['groups']['all'][0]['loss'] - 0.5
  assert f'| run, with counts | 763, step 6 | {mixed:.4f} |' in (tmp_path / 'breakdown.md').read_text()
  assert 'Loss by 2-gram read' in capsys.readouterr().out


@pytest.mark.thorough
def test_runs_that_read_the_same_are_compared_and_share_the_counts(tiny_run, tmp_path, monkeypatch):
  shutil.copytree(tiny_run, tmp_path / 'twin')
  (tmp_path / 'other.txt').write_text('the bank reads the memory\n\nand writes it again')
  (tmp_path / 'chinese.txt').write_text('白日依山尽，黄河入海流。' * 3)
  counted = []
  count = 'mmjax.inference.breakdown.count_ngrams'
  monkeypatch.setattr(count, lambda split, times, n, keys: counted.append(n) or np.zeros(len(keys), int))
  texts = [f'{tmp_path}/other.txt', f'{tmp_path}/chinese.txt']
  first, second = break_down([tiny_run, tmp_path / 'twin'], 'last', [2], texts)
  (third,) = break_down([tiny_run], 'last', [], texts)
  (alone,) = break_down([tiny_run], 'last', [], counts=2)
  assert alone['groups']['all'][0]['loss_with_counts'] < alone['groups']['all'][0]['loss']
  assert counted == [2] and third['against'] is None
  assert first['against'] is None and second['against'] == str(tiny_run)
  by_file, by_script = second['groups']['file'], second['groups']['script']
  assert [group['group'] for group in by_file] == texts
  assert [group['tokens'] for group in by_file] == [group['tokens'] for group in by_script][::-1]
  assert [group['difference'] for group in by_file] == [0, 0]


@pytest.mark.thorough
@pytest.mark.parametrize('held_out', ['the same', 'other'])
def test_held_out_text_is_known_by_its_tokens_wherever_they_lie(tiny_run, tmp_path, monkeypatch, held_out):
  lines = (tiny_run.parent / 'text.jsonl').read_text().splitlines()
  for name, part in {'a': lines[:90], 'b': lines[90:180], 'the same': lines[180:], 'other': lines[179:]}.items():
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(part))

  def prepared(train, valid):
    files = {'train_files': f'{tmp_path}/{train}.jsonl', 'valid_files': f'{tmp_path}/{valid}.jsonl'}
    config = RunDir(tiny_run).read_config()
    own = {'tokenizer': str(tiny_run / 'tokenizer.model'), 'prepared_dir': f'{tmp_path}/{train}', 'valid_fraction': 0.0}
    place = prepare(dataclasses.replace(config.data, **files, **own), config.model.vocab_size, Progress(quiet=True))
    return open_split(place, 'valid', **row_settings(config))

  texts = iter([prepared('a', 'the same'), prepared('b', held_out)])
  monkeypatch.setattr('mmjax.inference.breakdown.open_text', lambda *_: next(texts))
  twin = shutil.copytree(tiny_run, tmp_path / 'twin')
  first, second = break_down([tiny_run, twin], 'last', [])
  assert first['against'] is None and second['against'] == (str(tiny_run) if held_out == 'the same' else None)
  assert second['groups']['all'][0].get('difference') == (0 if held_out == 'the same' else None)


def test_files_and_runs_of_one_name_are_told_apart():
  group = {'tokens': 1, 'loss': 2.0}
  groups = {'all': [group | {'group': 'all'}], 'file': [group | {'group': f'{name}/x.jsonl'} for name in 'ab']}
  run = {'checkpoint': 1, 'tokens_read': 9, 'against': None, 'groups': groups}
  whole, by_file = command.tables([run | {'run': f'out/{name}/run'} for name in 'ab'])
  assert [row[0] for row in whole.rows] == ['a/run', 'b/run']
  assert by_file.header == ['run', 'read', 'a/x.jsonl', 'b/x.jsonl']


def test_runs_on_other_text_are_named():
  first = {'run': 'a', 'against': None}
  assert command.other_text([first, {'run': 'b', 'against': 'a'}]) == ''
  said = command.other_text([first, {'run': 'b', 'against': None}, {'run': 'c', 'against': 'b'}])
  assert said.startswith('Evaluated on other tokens than a, or on rows of another length: b, c.')


def test_text_that_the_run_was_trained_on_is_said(tiny_run, tmp_path, monkeypatch, capsys):
  shutil.copy(tiny_run.parent / 'text.jsonl', tmp_path / 'known.jsonl')
  flags = ['--ngrams', 'none', '--valid_files', f'{tmp_path}/known.jsonl']
  monkeypatch.setattr('sys.argv', ['breakdown', str(tiny_run), *flags])
  command.main()
  assert ' '.join(capsys.readouterr().out.split()).count('are training documents too: the loss on them says what') == 1


def test_error_of_clusters_is_that_of_the_mean_where_each_value_is_one():
  values = np.random.default_rng(0).normal(size=20)
  assert clustered_error(values, np.arange(20)) == pytest.approx(np.std(values, ddof=1) / 20**0.5)
  assert clustered_error(np.repeat(values, 3), np.repeat(np.arange(20), 3)) == pytest.approx(
    np.std(values, ddof=1) / 20**0.5
  )
  assert clustered_error(values, np.zeros(20, int)) is None


def test_step_that_a_later_run_lacks_is_refused_before_one_is_evaluated(tiny_run, tmp_path, monkeypatch, capsys):
  shutil.copytree(tiny_run, tmp_path / 'b')
  shutil.rmtree(tmp_path / 'b' / 'checkpoints' / '3')
  monkeypatch.setattr('sys.argv', ['breakdown', str(tiny_run), str(tmp_path / 'b'), '--checkpoint', '3'])
  with pytest.raises(UserError, match=r'no checkpoint 3 in .*b/checkpoints; there are \[6\]'):
    command.main()
  assert 'nats a token' not in capsys.readouterr().out


def test_rows_that_a_later_run_did_not_teach_are_refused_before_one_is_evaluated(tiny_run, tmp_path, monkeypatch):
  taught = shutil.copytree(tiny_run, tmp_path / 'taught')
  settings = json.loads((taught / 'config.json').read_text())
  del settings['sha256']
  settings['memory']['teach_rows'] = 2
  (taught / 'config.json').write_text(json.dumps(settings))
  shutil.copytree(taught / 'checkpoints' / '3', taught / 'checkpoints' / '0')
  monkeypatch.setattr('mmjax.inference.breakdown._losses', lambda *_: pytest.fail('evaluated'))
  monkeypatch.setattr('sys.argv', ['breakdown', str(taught), str(tiny_run), '--without'])
  with pytest.raises(UserError, match='taught no rows: its memory.teach_rows is 0, so there is none to leave out'):
    command.main()


@pytest.mark.thorough
def test_runs_of_a_folder_without_a_checkpoint_are_left_out(tiny_run, tmp_path, monkeypatch, capsys):
  shutil.copytree(tiny_run, tmp_path / 'runs' / 'a')
  (tmp_path / 'runs' / 'b').mkdir()
  for name in ('config.json', 'run.json'):
    shutil.copy(tiny_run / name, tmp_path / 'runs' / 'b')
  monkeypatch.setattr('sys.argv', ['breakdown', str(tmp_path / 'runs'), '--ngrams', 'none'])
  command.main()
  out = capsys.readouterr().out
  assert 'runs/b has no checkpoint and is left out' in out and out.count('nats a token') == 1
  shutil.copytree(tmp_path / 'runs' / 'b', tmp_path / 'later' / 'a')
  monkeypatch.setattr('sys.argv', ['breakdown', str(tmp_path / 'later'), '--ngrams', 'none'])
  with pytest.raises(UserError, match='later/a has no checkpoint, and others are compared with the first'):
    command.main()
  monkeypatch.setattr('sys.argv', ['breakdown', str(tmp_path / 'runs' / 'b'), '--ngrams', 'none'])
  with pytest.raises(UserError, match='runs/b is not a run directory: it has .*no checkpoints'):
    command.main()


def test_difference_is_also_that_of_losses_with_counts():
  def losses(run, values):
    loss_X = {'loss': np.array([3.0, 3.0, 3.0, 3.0]), 'loss_with_counts': np.array(values)}
    return Losses(run, 2, 8, (), loss_X, {'all': Grouping(('all',), np.zeros(4, int))}, np.array([0, 0, 1, 1]), [])

  first = {}
  _summary(losses('a', [1.0, 1.0, 2.0, 2.0]), first)
  [group] = _summary(losses('b', [0.5, 0.5, 1.0, 1.0]), first)['groups']['all']
  assert group['difference'] == 0 and group['difference_with_counts'] == -0.75
  assert group['standard_error_with_counts'] == pytest.approx(0.25)  # of the means -0.5 and -1 of two documents


def test_less_than_no_counts_are_refused(monkeypatch):
  monkeypatch.setattr('sys.argv', ['breakdown', 'anything', '--with_counts', '-1'])
  with pytest.raises(UserError, match='--with_counts -1 must be a number of tokens'):
    command.main()


@pytest.mark.parametrize('sizes', ['0', '2,', 'x', '-1'])
def test_sizes_of_ngrams_are_checked(sizes):
  with pytest.raises(UserError, match='must be numbers above 0'):
    command.ngram_sizes(sizes)
  assert command.ngram_sizes('2,3') == [2, 3] and command.ngram_sizes('none') == []


def test_runs_of_two_seeds_are_compared_in_groups_that_hold_the_same_tokens():
  def losses(run, loss_X, count_X):
    groupings = {'all': Grouping(('all',), np.zeros(4, int)), '2-gram read': Grouping(('never', 'more'), count_X)}
    return Losses(run, 1, 9, ('text',), {'loss': loss_X}, groupings, np.array([0, 0, 1, 1]), [])

  first = losses('a', np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 1]))
  second = losses('b', np.array([1.0, 1.0, 2.0, 4.0]), np.array([0, 1, 1, 1]))
  third = second._replace(run='c', loss_X={'loss': np.array([1.0, 0.0, 2.0, 4.0])})
  seen = {}
  assert _summary(first, seen)['against'] is None
  found, again = (_summary(run, seen)['groups'] for run in (second, third))
  assert found['all'][0]['difference'] == -0.5 and found['all'][0]['against'] == 'a'
  assert not any('difference' in group for group in found['2-gram read'])
  assert [group['difference'] for group in again['2-gram read']] == [0, -1 / 3]  # of the first with its tokens
  assert again['2-gram read'][0]['against'] == 'b' and again['all'][0]['against'] == 'a'
