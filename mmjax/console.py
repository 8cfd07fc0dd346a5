"""What commands print: nothing that a model writes may move the cursor, change colours or reorder lines."""

import sys
import unicodedata
import warnings

from rich.console import Console

# Bidirectional controls can make text read differently from what it is; the separators break lines.
REORDERING = set('\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


def printable(text: str) -> str:
  r"""Returns text with every control character but newline and tab written as an escape, such as \x1b."""
  return ''.join(_escape(char) if _is_control(char) else char for char in text)


def prepare_terminal() -> None:
  """Makes a command's output plain: characters that the encoding lacks are escaped, warnings are one sentence."""
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')
  warnings.showwarning = lambda message, *_, **__: print(f'Note: {message}', file=sys.stderr, flush=True)


def table_console() -> Console:
  """Returns a console for tables; where its output goes to a file or a pipe, one that is wide enough for them."""
  return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _is_control(char: str) -> bool:
  return char in REORDERING or (unicodedata.category(char) in ('Cc', 'Cs') and char not in '\n\t')


def _escape(char: str) -> str:
  return char.encode('unicode_escape').decode()
