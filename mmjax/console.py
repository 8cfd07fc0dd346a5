"""What commands show: messages, progress and tables.

A table (title, header, rows) is described once: `show` prints it on the terminal, `markdown` writes it. `Progress` is a
bar with the time left on a terminal, and a plain line now and then elsewhere. Nothing that a model writes may move the
cursor, change colours or reorder lines.
"""

import argparse
import contextlib
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from rich import progress as rich_progress
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

# Bidirectional controls can make text read differently from what it is; the separators break lines.
REORDERING = set('\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')
NUMERIC = re.compile(r'[-+±\d.,%eE\s]*')
LINE_SECONDS = 15  # between plain lines of progress
PIPE_WIDTH = 160  # of tables that go to a file or a pipe


def command_parser(tool: str, doc: str | None) -> argparse.ArgumentParser:
  """Returns a parser for the flags of `python -m mmjax.tools.<tool>`; its help is the docstring of that file."""
  prog = f'python -m mmjax.tools.{tool}'
  return argparse.ArgumentParser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def prepare_terminal() -> None:
  """Makes a command's output plain: characters that the encoding lacks are escaped, warnings are one sentence."""
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
  warnings.showwarning = lambda message, *_, **__: print(f'Note: {message}', file=sys.stderr, flush=True)


def printable(text: str) -> str:
  r"""Returns text with every control character but newline and tab written as an escape, such as \x1b."""
  return ''.join(char.encode('unicode_escape').decode() if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
  return char in REORDERING or (unicodedata.category(char) in ('Cc', 'Cs') and char not in '\n\t')


def number(value: float | None, spec: str = '', error: float | None = None) -> str:
  """Writes a number of a table: 12,345 or 2.0417, or by `spec`, with ± its standard error, where that is known.

  What is not there or was not finite is '-'.
  """
  if value is None:
    return '-'
  written = format(value, spec or (',' if isinstance(value, int) else ',.4f'))
  return written if error is None else f'{written} ± {error:.4f}'


def rounded_tokens(tokens: float) -> str:
  """Writes 2,998,272 tokens as 3 M: two digits and a unit."""
  if tokens < 999.5:
    return f'{tokens:.0f}'
  tokens = float(f'{tokens:.2g}')
  scale, unit = (1e9, 'G') if tokens >= 1e9 else (1e6, 'M') if tokens >= 1e6 else (1e3, 'k')
  return f'{tokens / scale:g} {unit}'


def format_seconds(seconds: float) -> str:
  """Returns '2 h 05 min', '5 min 10 s' or '12 s'."""
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 1:
    return f'{rest} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {rest:02d} s'


class Table(NamedTuple):
  """A table. A cell may be anything that str() turns into text; a header of empty names is not printed."""

  header: Sequence[str]
  rows: Sequence[Sequence[Any]]
  title: str = ''


def facts(rows: Sequence[tuple[str, Any]]) -> Table:
  """Returns a table of names and values, without a header."""
  return Table(('', ''), rows)


def markdown(*blocks: Table | str) -> str:
  """Writes tables and paragraphs as Markdown, an empty line between them; '' and tables without rows are left out."""
  return '\n'.join(_markdown(block) for block in blocks if (block.rows if isinstance(block, Table) else block))


def _markdown(block: Table | str) -> str:
  if isinstance(block, str):
    return f'{block.rstrip()}\n'
  lines = [block.header, ['---'] * len(block.header), *block.rows]
  cells = [[printable(str(cell)).replace('|', '\\|').replace('\n', ' ') for cell in line] for line in lines]
  title = f'{block.title}:\n\n' if block.title else ''
  return title + ''.join('| ' + ' | '.join(line) + ' |\n' for line in cells)


class _Console(Console):
  """Leaves a reader that goes away to `run_command`: rich would end the process as if it had failed."""

  def on_broken_pipe(self) -> None:
    raise BrokenPipeError


def table_console() -> Console:
  """Returns a console for tables; where its output goes to a file or a pipe, one that is wide enough for them."""
  return _Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def show(*blocks: Table | Text | str) -> None:
  """Prints tables and text on the terminal; '' and tables without rows are left out."""
  console = table_console()
  for block in blocks:
    if block.rows if isinstance(block, Table) else block:
      console.print(_rich_table(block) if isinstance(block, Table) else block, markup=False)


def _rich_table(table: Table) -> RichTable:
  """Numbers stand to the right. They are not broken into lines, nor is a cell that has lines of its own."""
  shown = RichTable(title=table.title or None, show_header=any(table.header))
  for at, name in enumerate(table.header):
    texts = [str(row[at]) for row in table.rows]
    numeric = all(NUMERIC.fullmatch(text) for text in texts)
    whole = numeric or any('\n' in text for text in texts)
    least = max((cell_len(line) for text in texts for line in text.split('\n')), default=0) if whole else None
    shown.add_column(Text(name), justify='right' if numeric else 'left', min_width=least, overflow='fold')
  for row in table.rows:
    shown.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
  return shown


@contextlib.contextmanager
def share_shown(stage: str) -> Iterator[Callable[[float], None]]:
  """Gives a function that shows on stderr which share, 0 to 1, of something is done."""
  with contextlib.closing(Progress(sys.stderr)) as progress:
    yield lambda share: progress.update(stage, share, 1)


class Progress:
  """Shows messages, and how far something is that takes long. A display that breaks never ends what it shows."""

  def __init__(self, stream: TextIO | None = None, *, quiet: bool = False):
    """Shows nothing yet.

    Args:
      stream: where to show it; None: stdout.
      quiet: never show anything.
    """
    self._stream, self._quiet = stream or sys.stdout, quiet
    self._console = _Console(file=self._stream, highlight=False, emoji=False, soft_wrap=True)
    self.has_bar = self._stream.isatty() and not self._console.is_dumb_terminal
    self._bar: rich_progress.Progress | None = None
    self._stage, self._first = '', (0.0, 0.0)  # how much of the stage was done when it was first heard of, and when
    self._last_line = time.monotonic()

  def say(self, message: str) -> None:
    """Shows a line that stays, above the bar."""
    if self._quiet:
      return
    with contextlib.suppress(OSError):  # the terminal or the reader of the pipe is gone, or the disk is full
      if self.has_bar:
        self._console.print(message, markup=False)
      else:
        print(message, file=self._stream, flush=True)

  def update(
    self,
    stage: str,
    done: float | None = None,
    total: float | None = None,
    note: str = '',
    *,
    shown: str = '',
    every: float | None = None,
  ) -> None:
    """Shows how much of a stage is done. Its first update begins to count the time.

    Args:
      stage: what is being done; another name begins another stage.
      done: of `total`; None: not known, which only a bar shows.
      total: of the stage.
      note: a short extra, such as a speed.
      shown: stands for the stage and how much is done; by default both, in percent.
      every: seconds between plain lines; None: LINE_SECONDS.
    """
    if self._quiet:
      return
    now = time.monotonic()
    if stage != self._stage:
      self.close()
      self._stage, self._first = stage, (done or 0.0, now)
    left = ''
    if total and done is not None and done > self._first[0]:
      seconds = (now - self._first[1]) / (done - self._first[0])
      left = f'{format_seconds((total - done) * seconds)} left'
    shown = shown or (f'{stage}: {done / max(total, 1):.0%}' if total is not None and done is not None else stage)
    note = '  '.join(filter(None, (note, left)))
    if self.has_bar:
      self._move_bar(done, total, shown, note)
    elif done is not None and now - self._last_line >= (LINE_SECONDS if every is None else every):
      self._last_line = now
      self.say(f'{shown}  {note}'.rstrip())

  def _move_bar(self, done: float | None, total: float | None, shown: str, note: str) -> None:
    with contextlib.suppress(OSError):
      if self._bar is None:
        columns = (
          rich_progress.TextColumn('{task.description}', markup=False),
          rich_progress.BarColumn(bar_width=None),
          rich_progress.TextColumn('{task.fields[note]}', markup=False),
        )
        self._bar = rich_progress.Progress(*columns, console=self._console, expand=True, transient=True)
        self._bar.add_task(shown, total=None, note=note)
        self._bar.start()
      self._bar.update(self._bar.task_ids[0], completed=done or 0, total=total, description=shown, note=note)

  def close(self) -> None:
    """Takes the bar away."""
    if self._bar is not None:
      with contextlib.suppress(OSError):
        self._bar.stop()
      self._bar = None
    self._stage = ''
