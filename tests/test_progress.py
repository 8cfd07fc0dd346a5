"""Progress: plain lines where there is no terminal, a bar where there is one, and never the end of a run."""

import errno
import io
import os

import numpy as np
import pytest

from mmjax.config import load_config
from mmjax.training import progress
from mmjax.training.progress import MicroBatchWatch, Progress, describe_times, format_seconds


def metrics(step: int) -> dict:
  return {'step': step, 'loss': 2.5, 'learning_rate': 2e-4, 'tokens_per_second': 1234.5}


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


class Gone(io.StringIO):
  """A terminal that was closed; a pipe without a reader is no different but for the number."""

  def write(self, text: str) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_plain_lines_say_where_the_run_is_and_how_long_it_takes(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  stream = io.StringIO()
  shown = Progress(100, stream=stream)
  shown.update(metrics(10))
  now[0] += 20
  shown.update(metrics(20))  # 10 steps in 20 s, 80 to go
  shown.message('[bold]saved[/bold]')
  shown.close()
  first, second, message = stream.getvalue().splitlines()
  assert first.startswith('step 10/100  loss 2.5000  lr 2.00e-04  1,234 tokens/s') and 'left' not in first
  assert second.endswith('2 min 40 s left')
  assert message == '[bold]saved[/bold]'


def test_slow_updates_are_timed_and_shown_within(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  train, stream = load_config('configs/exp_1_4_2.py').train, io.StringIO()
  shown = Progress(8, stream=stream)
  watch = MicroBatchWatch(train, 512, 0, 8, shown)
  for index in [*range(8), 0]:
    now[0] += 32 if index else 20
    watch(np.int32(index), np.float32(8.8 / 8))
  lines = stream.getvalue().splitlines()
  assert lines[0] == 'update 1/8  micro-batch 1/8  loss about 8.800  '
  assert lines[1] == (
    'Timed on this machine: a micro-batch of 64 x 512 tokens takes 32.0 s, so an update of 8 takes 4 min 16 s, and the '
    '8 updates to come 34 min 08 s, evaluations aside.'
  )
  # 300 s at 0.5 s a row: 75 updates of 8 rows.
  assert lines[2].endswith(
    '--workdir out/short --config.train.batch_size=8 --config.train.accumulation_steps=1 --config.train.max_steps=75'
  )
  assert [line[:27] for line in lines[4:]] == [f'update 1/8  micro-batch {n}/8' for n in range(3, 9)]
  assert lines[4].endswith('loss about 8.800  33 min 04 s left')


def test_short_runs_are_timed_without_advice():
  train = load_config('configs/exp_1_4_2.py').train
  assert describe_times(train, 512, 8, 1.0).endswith(
    'an update of 8 takes 8 s, and the 8 updates to come 1 min 04 s, evaluations aside.'
  )


def test_terminal_shows_a_bar_and_messages_as_they_are():
  stream = Terminal()
  shown = Progress(100, stream=stream)
  shown.update(metrics(60))
  shown.message('[bold]saved[/bold]')
  shown.close()
  shown.close()
  assert '[bold]saved[/bold]' in stream.getvalue() and '60/100' in stream.getvalue()


@pytest.mark.parametrize('terminal', [False, True])
def test_reader_that_went_away_does_not_end_the_run(terminal):
  stream = Terminal() if terminal else io.StringIO()
  shown = Progress(10, stream=stream)
  stream.write = Gone().write
  shown.within(0.5, 'micro-batch 1/2')
  shown.update(metrics(1))
  shown.message('x')
  shown.close()


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0.4, '0 s'), (59.6, '1 min 00 s'), (3600, '1 h 00 min'), (90061, '25 h 01 min')]
)
def test_durations_are_readable(seconds, text):
  assert format_seconds(seconds) == text
