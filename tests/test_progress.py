"""Progress: plain lines where there is no terminal, a bar where there is one, and never the end of a run."""

import io

import pytest

from mmjax.training import progress
from mmjax.training.progress import Progress, format_seconds


def metrics(step: int) -> dict:
  return {'step': step, 'loss': 2.5, 'learning_rate': 2e-4, 'tokens_per_second': 1234.5}


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


class BrokenPipe(io.StringIO):
  def write(self, text: str) -> int:
    raise BrokenPipeError


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


def test_terminal_shows_a_bar_and_messages_as_they_are():
  stream = Terminal()
  shown = Progress(100, stream=stream)
  shown.update(metrics(60))
  shown.message('[bold]saved[/bold]')
  shown.close()
  shown.close()
  assert '[bold]saved[/bold]' in stream.getvalue() and '60/100' in stream.getvalue()


def test_reader_that_went_away_does_not_end_the_run():
  shown = Progress(10, stream=BrokenPipe())
  shown.update(metrics(1))
  shown.message('x')
  shown.close()


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0.4, '0 s'), (59.6, '1 min 00 s'), (3600, '1 h 00 min'), (90061, '25 h 01 min')]
)
def test_durations_are_readable(seconds, text):
  assert format_seconds(seconds) == text
