"""The console: tables; progress as plain lines, as a bar on a terminal, and never the end of a run."""

import errno
import io
import math
import os

import numpy as np
import pytest

from mmjax import console
from mmjax.config import load_config
from mmjax.console import Progress, Table, format_seconds, markdown, number, share_shown, show
from mmjax.training.progress import MicroBatchWatch, describe_times, show_evaluation, show_step
from mmjax.training.remarks import evaluation_remark, passes_remark, warmup_remark


def metrics(step: int) -> dict:
  return {'step': step, 'loss': 2.5, 'learning_rate': 2e-4, 'tokens_per_second': 1234.5}


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


class Gone(io.StringIO):
  """A terminal that was closed; a pipe without a reader is no different but for the number."""

  def write(self, text: str) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
  return now


def test_plain_lines_say_where_the_run_is_and_how_long_it_takes(clock):
  stream = io.StringIO()
  progress = Progress(stream)
  progress.update('compiling')
  clock[0] += 60
  show_step(progress, 100, metrics(10))
  clock[0] += 20
  show_step(progress, 100, metrics(20))  # 10 steps in 20 s, 80 to go
  progress.say('[bold]saved[/bold]')
  progress.close()
  first, second, message = stream.getvalue().splitlines()
  assert first == 'step 10/100  loss 2.5000  lr 2.00e-04  1,234 tokens/s'
  assert second.endswith('tokens/s  2 min 40 s left')
  assert message == '[bold]saved[/bold]'


def test_a_window_without_an_applied_update_has_no_loss(clock):
  stream = io.StringIO()
  show_step(Progress(stream), 100, metrics(10) | {'loss': math.nan})
  assert stream.getvalue().startswith('step 10/100  no update applied  lr 2.00e-04')


def test_stages_are_told_now_and_then_and_each_has_its_own_time(clock):
  stream = io.StringIO()
  progress = Progress(stream)
  for done in range(0, 50, 10):
    progress.update('reading', done, 100, f'{done} rows')
    clock[0] += 10
  progress.update('writing', 0, 100)
  assert stream.getvalue().splitlines() == [
    'reading: 20%  20 rows  1 min 20 s left', 'reading: 40%  40 rows  1 min 00 s left'
  ]  # fmt: skip
  clock[0] += 20
  progress.update('writing', 50, 100)
  assert stream.getvalue().splitlines()[-1] == 'writing: 50%  20 s left'


def test_slow_updates_are_timed_and_shown_within(clock):
  train, stream = load_config('configs/exp_1_4_2.py').train, io.StringIO()
  watch = MicroBatchWatch(train, 512, (196_000, 6), 0, 8, Progress(stream))
  for index in [*range(8), 0]:
    clock[0] += 32 if index else 20
    watch(np.int32(index), np.float32(8.8 / 8))
  lines = stream.getvalue().splitlines()
  assert lines[0] == 'update 1/8  micro-batch 1/8  loss about 8.800'
  assert lines[1] == (
    'Timed on this machine: a micro-batch of 64 x 512 tokens takes 32.0 s, so an update of 8 takes 4 min 16 s, and the '
    '8 updates left take 34 min 08 s. Each evaluation of 196,000 tokens takes about 1 min 04 s more.'
  )
  # 300 s at 0.5 s a row: 75 updates of 8 rows.
  assert lines[2].endswith(
    '--workdir out/short --config.train.batch_size=8 --config.train.accumulation_steps=1 --config.train.max_steps=75'
  )
  assert [line[:27] for line in lines[4:]] == [
    *(f'update 1/8  micro-batch {n}/8' for n in range(2, 9)), 'update 2/8  micro-batch 1/8'
  ]  # fmt: skip
  assert lines[4].endswith('loss about 8.800  33 min 36 s left')


def test_short_runs_are_timed_without_advice():
  train = load_config('configs/exp_1_4_2.py').train
  assert describe_times(train, 512, (327_000, 10), 8, 1.0).endswith(
    'an update of 8 takes 8 s, and the 8 updates left take 1 min 04 s. Each evaluation of 327,000 tokens takes about '
    '3 s more.'
  )


def test_advice_and_runs_that_never_leave_their_warm_up():
  train = load_config('configs/ngram_rows_1m.py').train
  advice = '--config.train.max_steps=75 --config.train.warmup_steps=7\n'
  assert advice in describe_times(train, 512, (64, 1), 10_000, 0.5 * train.batch_size)
  assert warmup_remark(train, 301) == ''
  assert warmup_remark(train, 300).endswith('train.warmup_steps=300 is not less than the 300 updates of the run')


def test_long_evaluations_are_said():
  train = load_config('configs/quickstart.py').train
  rows = 500 * train.update_rows
  assert train.eval_interval == 500 and evaluation_remark(train, 10_000, 2 * 250 * rows - 1, 250.0) == ''
  assert evaluation_remark(train, 10_000, 2 * 250 * rows, 250.0).startswith(
    f'Each evaluation reads {500 * rows:,} tokens, and training only {250 * rows:,} before it: hold out less text'
  )
  assert f'training only {3 * train.update_rows * 250:,} before' in evaluation_remark(train, 3, 100_000, 250.0)
  assert evaluation_remark(train, 3, 99_999, 250.0) == ''
  assert 'train.eval_interval' not in evaluation_remark(train, 500, 10**9, 250.0)  # there is only the last one
  assert 'train.eval_interval' in evaluation_remark(train, 501, 10**9, 250.0)


@pytest.mark.parametrize(
  ('settings', 'passes', 'said'),
  [
    ({'ngrams': '1'}, 4.9, ''),
    ({'ngrams': '1'}, 6.6, 'memory.row_dropout=0.5'),
    ({'ngrams': '1,2'}, 1.0, ''),
    ({'ngrams': '1,2'}, 2.7, 'memory.row_dropout=0.5'),
    ({'ngrams': '1,2', 'row_dropout': 0.1}, 4.0, ''),
    ({'ngrams': '1,2', 'row_dropout': 0.1}, 9.0, 'may rise'),
    ({'ngrams': '1,2', 'bank_lr_multiplier': 0, 'bank_lr_final_multiplier': 0}, 9.0, ''),
    ({'ngrams': '1,2', 'teach_rows': 9}, 9.0, ''),
  ],
)
def test_text_that_would_be_learned_by_heart_is_said(settings, passes, said):
  flags = [f'--config.memory.{name}={value}' for name, value in settings.items()]
  found = passes_remark(load_config('configs/quickstart_ngram_rows.py', flags), passes)
  assert (said in found and f'{passes} times' in found) if said else found == ''


def test_text_that_any_model_reads_often_is_said():
  assert passes_remark(load_config('configs/exp_1_4_0.py'), 4.9) == ''
  assert 'reads its text 5.0 times: its validation loss may rise' in passes_remark(
    load_config('configs/exp_1_4_2.py'), 5
  )


def test_evaluations_are_shown_within_the_time_of_the_training(clock):
  stream = io.StringIO()
  progress = Progress(stream)
  show_step(progress, 100, metrics(10))
  clock[0] += 20
  show_step(progress, 100, metrics(20))
  for share in (0.25, 0.5, 0.75):
    clock[0] += 10
    show_evaluation(progress, 20, 100, share)
  *_, shown = stream.getvalue().splitlines()
  assert len(stream.getvalue().splitlines()) == 3 and shown == 'step 20/100  evaluating: 50%  5 min 20 s left'


def test_share_of_what_takes_long_is_shown_on_stderr(clock, capsys):
  with share_shown('evaluating') as show:
    show(0.25)
    clock[0] += 20
    show(0.5)
  assert capsys.readouterr() == ('', 'evaluating: 50%  40 s left\n')


def test_terminal_shows_a_bar_and_messages_as_they_are():
  stream = Terminal()
  progress = Progress(stream)
  progress.update('compiling')
  show_step(progress, 100, metrics(60))
  progress.say('[bold]saved[/bold]')
  progress.close()
  progress.close()
  shown = stream.getvalue()
  assert all(said in shown for said in ('[bold]saved[/bold]', 'step 60/100', 'compiling', '━'))


@pytest.mark.parametrize('terminal', [False, True])
def test_reader_that_went_away_does_not_end_the_run(terminal):
  stream = Terminal() if terminal else io.StringIO()
  progress = Progress(stream)
  stream.write = Gone().write
  progress.update('compiling')
  progress.update('reading', 1, 2, every=0)
  show_step(progress, 10, metrics(1))
  progress.say('x')
  progress.close()


def test_quiet_progress_says_nothing(capsys):
  progress = Progress(quiet=True)
  progress.update('reading', 1, 2, every=0)
  progress.say('x')
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0.4, '0 s'), (59.6, '1 min 00 s'), (3600, '1 h 00 min'), (90061, '25 h 01 min')]
)
def test_durations_are_readable(seconds, text):
  assert format_seconds(seconds) == text


def test_a_table_is_the_same_on_the_terminal_and_in_markdown(capsys):
  table = Table(('name', 'loss'), [('a|b\x1b[2J', number(2.5)), ('[bold]c[/bold]', number(None))], 'Losses')
  show(table, '', Table(('x',), []))
  shown = capsys.readouterr().out
  assert all(said in shown for said in ('Losses', 'name', 'a|b\\x1b[2J', '[bold]c[/bold]', ' 2.5000 │', '      - │'))
  assert markdown('Text.', table, '') == (
    'Text.\n\nLosses:\n\n| name | loss |\n| --- | --- |\n| a\\|b\\x1b[2J | 2.5000 |\n| [bold]c[/bold] | - |\n'
  )


@pytest.mark.parametrize(
  ('value', 'spec', 'text'),
  [
    (None, '', '-'),
    (12345, '', '12,345'),
    (2.04166, '', '2.0417'),
    (0.5, '.1%', '50.0%'),
    (1e9, ',.0f', '1,000,000,000'),
  ],
)
def test_numbers_of_tables_are_readable(value, spec, text):
  assert number(value, spec) == text
