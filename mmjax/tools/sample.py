"""Continues text:   python -m mmjax.tools.sample --workdir out/quickstart [--prompt 'The list of'] [--temperature 0.7]

Shows the continuation while it is made; --prompt may be repeated. Without it, it asks for prompts, one a line, until
end of input or Ctrl-C; Ctrl-C while text is made ends that text. Prompts get seeds of their own: the second --seed + 1,
and so on; of several --prompt each is printed before its continuation. A line that is refused leaves an empty line in
the output of a pipe, and the exit code is then 2. A continuation may have several lines; eval.py --prompts FILE writes
many of them as JSON. Exit codes: 0 done, 2 user error, 4 storage.
"""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmjax.console import command_parser, prepare_terminal, printable
from mmjax.errors import UserError, interrupt_ends_at_once, run_command
from mmjax.inference.settings import (
  Sampling,
  add_model_flags,
  add_sampling_flags,
  model_from_flags,
  sampling_from_flags,
)

if TYPE_CHECKING:
  from mmjax.inference.api import LanguageModel


def main() -> None:
  """Reads flags, loads the model, and continues one prompt or many."""
  parser = command_parser('sample', __doc__)
  parser.add_argument('--workdir', required=True, help='run directory, as train.py makes it')
  parser.add_argument('--prompt', action='append', help='text to continue; may be repeated; without it you are asked')
  add_model_flags(parser)
  add_sampling_flags(parser)
  arguments = parser.parse_args()
  sampling = sampling_from_flags(arguments)

  with interrupt_ends_at_once():
    from mmjax.inference.api import load  # only now: --help and bad flags need not wait for JAX

  prepare_terminal()
  lm = load(arguments.workdir, **model_from_flags(arguments))
  asked = arguments.prompt is None
  piped = asked and not sys.stdin.isatty()
  refused = 0
  for number, prompt in enumerate(ask_prompts() if asked else arguments.prompt):
    # Another seed for each, or the same prompt would always get the same answer.
    settings = dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32)
    if len(arguments.prompt or ()) > 1:
      print(f'{prompt!r}:')
    try:
      write_continuation(lm, prompt, settings)
    except UserError as error:
      which = f'prompt {number + 1}: ' if piped or len(arguments.prompt or ()) > 1 else ''
      if not asked:
        raise UserError(f'{which}{error}') from None
      print(f'{which}{error}', file=sys.stderr)
      if piped:
        print()  # its place in the output
        refused += 1
    except KeyboardInterrupt:
      if not asked:
        raise
      print()
  if refused:
    raise UserError(f'prompts refused: {refused} of {number + 1}')


def write_continuation(lm: 'LanguageModel', prompt: str, sampling: Sampling) -> None:
  """Writes the continuation of a prompt to stdout piece by piece, and a newline, before any warning of it."""
  empty = True
  with warnings.catch_warnings(record=True) as said:
    for piece in lm.stream(prompt, **dataclasses.asdict(sampling)):
      empty = False
      print(printable(piece), end='', flush=True)
  print()
  if empty:
    print('The model wrote no text here: it ended the document at once', file=sys.stderr)
  for warning in said:
    warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def ask_prompts() -> Iterator[str]:
  """Yields lines of stdin until it ends or Ctrl-C is pressed; asks for them where somebody sits in front of it."""
  if hasattr(sys.stdin, 'reconfigure'):
    # Bytes that are no text are refused with a sentence, later; only \n ends a line, and \r before it.
    sys.stdin.reconfigure(errors='surrogateescape', newline='\n')
  asks = sys.stdin.isatty()
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    while True:
      yield input('Prompt: ' if asks else '').removesuffix('\r')
  if asks:
    print()


if __name__ == '__main__':
  run_command(main)
