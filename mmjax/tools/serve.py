"""Shows a run on a page:   python -m mmjax.tools.serve --workdir RUN [--workdir RUN2]

The page answers on 127.0.0.1, in a browser on this machine. It colours a text by how surprising each token was, shows
the rows of the memory that each one read, what a row is read for and does, what changes when rows are switched off,
the bank as a map, health over training, and continuations. --workdir twice holds two runs side by side.
--save FILE --text '...' writes the page for a text as one file that opens anywhere, and serves nothing.
Needs `pip install 'mmjax[serve]'`. Exit codes: 0 done, 2 user error, 4 storage.
"""

import argparse

from mmjax.config import check_output, user_path
from mmjax.console import command_parser, prepare_terminal
from mmjax.errors import UserError, interrupt_ends_at_once, run_command
from mmjax.inference.settings import add_model_flags, model_from_flags


def main() -> None:
  """Reads flags; serves until Ctrl-C, or writes a file."""
  parser = command_parser('serve', __doc__)
  parser.add_argument('--workdir', required=True, action='append', help='run directory; give it twice to compare two')
  parser.add_argument('--port', type=int, default=8517, help='0: any that is free (default: %(default)s)')
  parser.add_argument(
    '--host', default='127.0.0.1', help='address to listen on (default: %(default)s, this machine alone)'
  )
  parser.add_argument('--save', help='file to write the page to, for --text')
  parser.add_argument('--text', help='text to read, with --save')
  add_model_flags(parser)
  arguments = parser.parse_args()
  check(arguments)

  with interrupt_ends_at_once():
    from mmjax.inference.api import load  # only now: --help and bad flags need not wait for JAX
    from mmjax.run.directory import open_run
    from mmjax.serve.view import RunView

  prepare_terminal()
  views = []
  for workdir in arguments.workdir:
    lm = load(workdir, **model_from_flags(arguments))
    views.append(RunView(lm, open_run(workdir)))
  if arguments.save:
    from mmjax.files import write_file
    from mmjax.serve.saving import saved_page

    write_file(user_path(arguments.save), saved_page(views, arguments.text).encode())
    print(f'Written: {arguments.save}')
    return
  from mmjax.serve.web import serve

  serve(views, arguments.host, arguments.port)


def check(arguments: argparse.Namespace) -> None:
  """Raises UserError if flags do not fit each other, or the extra is not installed."""
  if len(arguments.workdir) > 2:
    raise UserError(f'--workdir was given {len(arguments.workdir)} times; at most two runs stand side by side')
  if not 0 <= arguments.port < 2**16:
    raise UserError(f'--port {arguments.port} must be from 0 to {2**16 - 1}')
  if not arguments.host:
    raise UserError('--host is empty and must not be; perhaps it came from a variable that is not set')
  if bool(arguments.save) != (arguments.text is not None):
    given, missing = ('--save', '--text TEXT') if arguments.save else ('--text', '--save FILE')
    raise UserError(f'{given} needs {missing}: a saved page shows one text')
  check_output('--save', arguments.save)
  try:
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as error:
    raise UserError(f"the page needs {error.name}: pip install 'mmjax[serve]'") from None


if __name__ == '__main__':
  run_command(main)
