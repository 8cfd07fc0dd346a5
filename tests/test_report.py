"""The report: whole for every kind of run, faithful to the files it is made from, and safe against what they hold."""

import errno
import json
import os
import shlex
import struct
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mmjax.config import load_config
from mmjax.console import Table, markdown
from mmjax.errors import StorageError, UserError
from mmjax.files import write_json
from mmjax.model.cost import count_params
from mmjax.report import sections
from mmjax.report.draw import Line, Panel, draw
from mmjax.report.found import FoundRun
from mmjax.report.plots import write_plots
from mmjax.report.write import write_report
from mmjax.run.directory import RunDir
from tests.helpers import build_model, tiny_config


def train_line(step: int, layers: int = 2, **changes: object) -> dict:
  bank = [
    {'layer': i, 'used_share': 0.1, 'kl_to_uniform': 2.0, 'effective_rows': 50.0 * step, 'hottest_share': 0.01}
    for i in range(layers)
  ]
  line = {
    'kind': 'train', 'step': step, 'tokens': 1000 * step, 'seconds': 2.0 * step, 'loss': 5.0 - 0.1 * step,
    'learning_rate': 1e-3, 'grad_norm': 0.5, 'tokens_per_second': 500.0 + step, 'mfu': None, 'peak_bytes': 10**9,
    'peak_bytes_of': 'process', 'bank': bank,
  }  # fmt: skip
  return line | changes


def eval_line(step: int, loss: float | None, layers: int = 2) -> dict:
  numbers = {'loss': loss, 'perplexity': 7.5, 'bits_per_byte': 1.25, 'accuracy': 0.5, 'tokens': 10, 'text_bytes': 30}
  return {'kind': 'eval', 'step': step, **numbers, 'bank': train_line(step, layers)['bank']}


def probed(line: dict, heads: int = 2, ratio: float | None = 0.02) -> dict:
  """A line with what mmjax.evaluation.probes adds."""
  bank = [health | {'gate_grad_norm': 0.5, 'key_grad_norm': 0.0} for health in line['bank']]
  probes = {'row_update_ratio': ratio}
  if line['kind'] == 'eval':
    overlap = 0.1 if heads > 1 else None
    measured = {'kl_weighted': 2.5, 'head_overlap': overlap, 'row_agreement': 0.375, 'row_agreement_chance': 0.0625}
    bank = [health | measured for health in bank]
    probes |= {'positions': 1234, 'loss': 3.0, 'loss_zeroed': 3.25, 'loss_shuffled': None}
  return line | {'bank': bank, 'probes': probes}


def make_run(path: Path, records: list[dict], **overrides: object) -> Path:
  path.mkdir()
  RunDir(path).write_config(tiny_config(**overrides))
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def cells(text: str) -> dict[str, str]:
  """First and second cell of every row of every table."""
  rows = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('|')]
  return {row[0].strip(): row[1].strip() for row in rows}


def test_report_says_whose_weights_a_run_started_from():
  first = {'run': '/runs/a', 'step': 500, 'tokens': 4096000, 'params_sha256': 'abc', 'init_from': None}
  second = {'run': '/runs/b c', 'step': 7, 'tokens': 9, 'params_sha256': 'def', 'init_from': first}
  assert sections.origin(None) == ''
  text = sections.origin(second)
  assert 'from the weights of `/runs/b c` at update 7, after 9 tokens (parameters sha256 `def`)' in text
  assert text.endswith(
    'which started from the weights of `/runs/a` at update 500, after 4,096,000 tokens (parameters sha256 `abc`).'
  )
  shown = sections.commands(tiny_config(), 'out/x', second)
  assert "--init_from '/runs/b c@7' " in shown


def png_size(path: Path) -> tuple[int, int]:
  data = path.read_bytes()
  assert data[:8] == b'\x89PNG\r\n\x1a\n'
  return struct.unpack('>II', data[16:24])


@pytest.mark.thorough
def test_report_of_a_finished_run_has_every_part(run):
  path = write_report(run)
  text = path.read_text()
  titles = [line.removeprefix('## ') for line in text.splitlines() if line.startswith('## ')]
  assert titles == [
    'Result', 'Data', 'Parameters', 'Settings', 'Training', 'Bank health', 'Evaluation', 'Samples',
    'Speed and memory', 'Machine and versions', 'Commands to repeat it', 'Notes of a person',
  ]  # fmt: skip
  for name in text.split('](plots/')[1:]:
    width, height = png_size(run / 'plots' / name.partition(')')[0])
    assert width > 800 and height > 400
  config = RunDir(run).read_config()
  total, without_bank = count_params(build_model(config)[1])
  found = cells(text)
  assert found['parameters'] == f'{total:,}'
  assert found['parameters not in the bank'] == f'{without_bank:,}'
  assert found['optimizer updates'] == '6 of 6'
  index, run_json = (json.loads((run / name).read_text()) for name in ('data.json', 'run.json'))
  assert found['train-00000.bin'] == f'`{index["splits"]["train"]["shards"][0]["sha256"]}`'
  assert found['data_sha256'] == f'`{run_json["identity"]["data_sha256"]}`'
  assert found['jax'] == run_json['starts'][0]['versions']['jax']
  assert 'Best checkpoint so far, step' in text  # samples without an eval.json
  assert 'Not done yet: `python eval.py' in text


def test_best_and_last_evaluation_are_told_apart(tmp_path):
  records = [train_line(4), eval_line(2, 3.5), eval_line(3, None), eval_line(4, 4.25)]
  text = write_report(make_run(tmp_path / 'run', records)).read_text()
  assert '| on the validation set | best (update 2) | last (update 4) |' in text
  assert '| loss, nats a token | 3.5000 | 4.2500 |' in text
  assert cells(text)['training loss, mean of 4 updates'] == '4.6000'


@pytest.mark.thorough
def test_training_loss_weighs_every_update_alike(tmp_path):
  records = [train_line(step, loss=loss) for step, loss in ((10, 9.0), (20, 3.0), (30, None), (31, 5.0))]
  records += [train_line(31 + 2 * n, loss=2.0) for n in range(1, 9)]  # the first of the eleven with a loss is left out
  found = cells(write_report(make_run(tmp_path / 'run', records)).read_text())
  assert found['training loss, mean of 27 updates'] == f'{(10 * 3 + 5 + 16 * 2) / 27:.4f}'
  skipped = [{'kind': 'skipped', 'step': step, 'row_ids': []} for step in (10, 11, 20, 40)]
  found = cells(write_report(make_run(tmp_path / 'skipped', [*records, *skipped])).read_text())
  assert found['training loss, mean of 24 updates'] == f'{(8 * 3 + 5 + 15 * 2) / 24:.4f}'


@pytest.mark.thorough
def test_commands_of_a_run_whose_schedule_was_changed_say_so(tmp_path):
  start = {'time': '', 'step': 0, 'device_count': 1, 'device': 'cpu', 'host': '', 'platform': '', 'versions': {}}
  run = make_run(tmp_path / 'run', [train_line(4)])
  for changes, times in (([], 0), (['train.max_steps 5 -> 10'], 1)):
    write_json(run / 'run.json', {'identity': {}, 'starts': [start, start | {'changed': changes}]})
    commands = write_report(run).read_text().partition('## Commands to repeat it')[2]
    assert commands.count('A later start of this run changed settings (train.max_steps 5 -> 10).') == times


@pytest.mark.thorough
def test_versions_of_earlier_starts_are_told(tmp_path):
  place = {'time': '', 'step': 0, 'device_count': 1, 'device': 'cpu', 'host': 'here', 'platform': ''}
  versions = ({'jax': '1'}, {'jax': '2', 'flax': '1'}, {'jax': '1'}, {'jax': '3', 'flax': '1'})
  run = make_run(tmp_path / 'run', [train_line(4)])
  write_json(run / 'run.json', {'identity': {}, 'starts': [place | {'versions': found} for found in versions]})
  found = cells(write_report(run).read_text())
  assert [found[name] for name in ('host', 'jax', 'flax')] == ['here', '3 (before: 1, 2)', '1']


@pytest.mark.thorough
def test_stopped_run_without_checkpoint_says_what_is_missing(tmp_path):
  text = write_report(make_run(tmp_path / 'run', [train_line(1), train_line(2)])).read_text()
  assert 'None: ' in text.partition('## Samples')[2]
  assert cells(text)['optimizer updates'] == '2 of 10'


def test_run_that_reported_nothing_has_a_report(tmp_path):
  text = write_report(make_run(tmp_path / 'run', [])).read_text()
  assert 'Nothing was reported yet' in text
  assert not (tmp_path / 'run' / 'plots').exists()


@pytest.mark.thorough
@pytest.mark.parametrize(('layout', 'passes'), [('packed', '3.20'), ('padded', '1.60')])
def test_passes_are_over_rows_of_which_padding_is_a_part(tmp_path, layout, passes):
  run = make_run(tmp_path / 'run', [train_line(4)], data__layout=layout)  # 4 updates of 2 x 4 rows of 16 tokens
  split = {'documents': 20, 'tokens': 160, 'text_bytes': 300, 'shards': []}
  write_json(run / 'data.json', {'splits': {'train': split}, 'inputs': {}})
  assert cells(write_report(run).read_text())['passes over the training rows'] == passes


def test_dense_run_has_no_bank(tmp_path):
  records = [train_line(2, layers=0), eval_line(2, 3.0, layers=0)]
  run = make_run(tmp_path / 'run', records, model__sublayer='dense')
  text = write_report(run).read_text()
  assert '## Bank health' not in text
  assert not list((run / 'plots').glob('bank_*'))


def test_probes_of_the_memory_are_shown(tmp_path):
  trained = [probed(train_line(step), ratio=ratio) for step, ratio in enumerate((0.02, 0.01, None, 1e-9), 1)]
  run = make_run(tmp_path / 'run', [*trained, probed(eval_line(2, 3.0), ratio=1e-10)])
  text = write_report(run).read_text().partition('## Bank health')[2].partition('## Evaluation')[0]
  assert '| 1 | 10.0% | 2.000 | 2.500 | 100 | 1.00% | 10.0% |' in text
  assert '| 1 | 37.50% | 6.25% | 5.00e-01 | 0.00e+00 |' in text
  assert 'on the first 1,234 positions' in text and '| all rows zero | 3.2500 | +0.2500 |' in text
  assert '| rows exchanged | - | - |' in text
  assert 'moved the rows that it read by 1.0e-02 of their norm: the median of 3 reports.' in text
  drawn = {'changed', 'row_agreement', 'kl_weighted', 'head_overlap', 'gate_grad_norm', 'key_grad_norm'}
  for name in drawn | {'row_update_ratio'}:
    assert f'](plots/bank_{name}.png)' in text


@pytest.mark.thorough
def test_skipped_updates_and_lost_numbers_are_shown(tmp_path):
  skipped = {'kind': 'skipped', 'step': 3, 'row_ids': [1]}
  records = [train_line(2, loss=None, grad_norm=None), train_line(4, loss=None, grad_norm=None), skipped]
  text = write_report(make_run(tmp_path / 'run', records)).read_text()
  assert 'loss spikes: 1 (updates 3).' in text
  assert 'training loss' not in cells(text)


def test_files_beyond_a_few_are_counted(tiny_run, monkeypatch):
  run = FoundRun(tiny_run)
  files = [{'path': f'{i}.jsonl', 'size': 5} for i in range(1023)]
  monkeypatch.setattr(run, 'index', run.index | {'inputs': {'train': files, 'valid': [{'path': 'held', 'size': 1}]}})
  text = markdown(*sections.data(run))
  assert '19.jsonl' in text and '20.jsonl' not in text and 'held' in text and 'data.json alone: 1,003.' in text


def test_table_of_evaluations_has_the_last_and_none_twice(tmp_path):
  run = FoundRun(make_run(tmp_path / 'run', [eval_line(step, 3.0) for step in range(1, 22)]))
  table = sections.training(run)[2]
  assert [row[0] for row in table.rows] == [str(step) for step in range(1, 22, 2)]


@pytest.mark.thorough
def test_title_names_the_directory_where_it_is_not_that_of_the_experiment(tmp_path):
  for name, title in (('second try', '# one: second try\n'), ('one', '# one\n')):
    assert write_report(make_run(tmp_path / name, [], experiment='one')).read_text().startswith(title)


@pytest.mark.thorough
def test_notes_of_a_person_are_never_overwritten(tmp_path):
  run = make_run(tmp_path / 'run', [train_line(1)])
  assert '- Hypothesis:' in write_report(run).read_text()
  (run / 'notes.md').write_text('The hypothesis was mine.')
  assert 'The hypothesis was mine.' in write_report(run).read_text()
  assert (run / 'notes.md').read_text() == 'The hypothesis was mine.'


@pytest.mark.parametrize('experiment', ['quickstart', 'no such file'])
def test_the_command_makes_the_same_config(experiment):
  overrides = [f'--config.experiment={experiment}', "--config.data.train_files=it's; a $HOME/*.jsonl"]
  config = load_config('configs/quickstart.py', [*overrides, '--config.train.learning_rate=0.00123'])
  lines = sections.commands(config, 'out/a run').splitlines()
  words = shlex.split('\n'.join(lines[1:-1]).replace('\\\n', ''))
  command = words[: words.index('eval.py') - 1]
  assert command[:2] == ['python', 'train.py'] and command[-2:] == ['--workdir', 'out/a run']
  assert load_config(command[3], command[4:-2]) == config


def test_evaluation_says_whether_taught_rows_are_in():
  numbers = {name: None for name in ('loss', 'perplexity', 'bits_per_byte', 'accuracy', 'tokens', 'text_bytes')}
  found = numbers | {'checkpoint': 4000, 'valid_files': ''}  # of an earlier version
  assert cells(markdown(*sections.evaluation(found)))['checkpoint (update)'] == '4,000'
  text = markdown(*sections.evaluation(found | {'checkpoint': 0, 'without_taught': True}))
  assert cells(text)['checkpoint (update)'] == '0, without the rows that the run taught'


def test_text_cannot_break_out_of_its_place():
  sample = {'prompt': 'a```\n# b', 'continuation': '````\n\x1b[2J', 'tokens': 3, 'ended': True}
  found = {'sampling': {'seed': 0}, 'samples': [sample], 'distinct_1': 1.0, 'distinct_2': None, 'distinct_3': None}
  text = markdown(*sections.samples(found | {'repeated_4grams': None}, 'Here.'))
  assert '````text\na```\n# b\n````\n' in text
  assert '`````text\n````\n\\x1b[2J\n`````\n' in text
  assert markdown(Table(('a',), [('x|y\nz',)])).splitlines()[-1] == '| x\\|y z |'


@pytest.mark.thorough
def test_plots_are_drawn_for_one_line_and_for_thousands(tmp_path):
  one = write_plots([train_line(1)], tmp_path / 'one')
  many = write_plots([train_line(i) for i in range(1, 2000)] + [eval_line(5, 3.0)], tmp_path / 'many')
  assert set(one) == set(many) == {path.name for path in (tmp_path / 'many').iterdir()}
  assert len(one) == 8
  one_head = [probed(train_line(1)), probed(eval_line(1, 3.0), heads=1)]
  assert set(write_plots(one_head, tmp_path / 'heads')) - set(one) == {
    f'bank_{name}.png'
    for name in ('changed', 'row_agreement', 'kl_weighted', 'gate_grad_norm', 'key_grad_norm', 'row_update_ratio')
  }


def test_plot_that_the_disk_has_no_room_for_is_named_and_not_begun(tmp_path, monkeypatch):
  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(StorageError, match=r"loss\.png' cannot be written: No space left on device \("):
    draw(tmp_path / 'loss.png', Panel('loss', 'x', 'y', [Line([1, 2], [3, 4], {'color': 'k'})]))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('scale', ['log', 'zero'])
def test_line_at_zero_is_drawn_above_the_axis(tmp_path, scale):
  height, rows = drawn_rows(tmp_path / 'plot.png', [0.0, 0.0, 0.0], scale)
  assert rows.size and rows[0] > 0.8 * height


@pytest.mark.parametrize('scale', ['log', 'zero', 'auto'])
def test_line_that_hardly_varies_is_drawn_so(tmp_path, scale):
  height, rows = drawn_rows(tmp_path / 'plot.png', [3.0, 3.001, 3.0], scale)
  assert rows[-1] - rows[0] < 0.1 * height
  height, rows = drawn_rows(tmp_path / 'plot.png', [1.0, 10.0, 1.0], scale)
  assert rows[-1] - rows[0] > 0.6 * height


def drawn_rows(path: Path, values: list[float], scale: str) -> tuple[int, np.ndarray]:
  """Draws a red line; returns the height of the picture and in which of its rows, from the top, the line stands."""
  draw(path, Panel('title', 'x', 'y', [Line([1, 2, 3], values, {'color': '#ff0000'})], scale))
  red_HW = (matplotlib.image.imread(path)[:, :, :3] == (1, 0, 0)).all(axis=-1)
  return len(red_HW), np.flatnonzero(red_HW.any(axis=1))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='is not a run directory: config.json is missing'):
    write_report(tmp_path)
  assert list(tmp_path.iterdir()) == []
