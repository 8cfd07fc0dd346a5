"""Breaks down the held-out loss of runs:   python -m mmjax.tools.breakdown out/g0-s0 out/g42-s0 [--ngrams 2,3]

Groups the tokens of the validation set by how often training, up to the checkpoint, read the n-gram that ends in them
(never, 1 to 10, 11 to 100, more), by the script of their document (mainly Chinese or other), and with --valid_files
A,B by the file. A run with a memory is also evaluated with its bank zeroed. --with_counts 4 also shows the loss of each
model when its predictions are mixed with counts of the n-grams of up to 4 tokens that training read: does a memory know
more than such a table? Each run is compared with the first in the list that was evaluated on the same text and, by
n-gram, read the same in training. Also takes folders of runs, as mmjax.tools.sweep makes them. Prints the tables, and
writes them to --markdown FILE and the numbers to --json FILE. --config.data.prepared_dir=DIR says where the text is
now, if it was moved. Exit codes: 0 done, 2 user error, 4 storage.
"""

from collections.abc import Sequence
from typing import Any

from mmjax.choices import NGRAMS
from mmjax.config import check_output, user_path
from mmjax.console import Table, command_parser, markdown, number, prepare_terminal, rounded_tokens, show
from mmjax.errors import UserError, interrupt_ends_at_once, run_command
from mmjax.files import first_three, write_file, write_json
from mmjax.inference.settings import add_model_flags, model_from_flags

NOTE = (
  'A cell is the mean loss of a group of tokens, in nats. After it stands how much higher that is than the loss of the '
  'first run with the same tokens in the group, ± one standard error over held-out documents, which says nothing of '
  'other seeds. Runs that read other text by then, as another seed does, have other tokens in the groups of counts. An '
  'n-gram is the token and those before it. Its count is exact, over the tokens that training had read by the '
  'checkpoint, those before the beginning of a row among them; a run that started from another counts its own alone.'
)
NOTE_ON_COUNTS = (
  '"With counts": the model\'s probability of a token is mixed with how often training read the token behind those '
  'before it. The weights depend on how often it read these, and are fitted on one half of the held-out documents for '
  'the other half.'
)


def main() -> None:
  """Reads flags, evaluates, prints, writes."""
  parser = command_parser('breakdown', __doc__)
  parser.add_argument('runs', nargs='+', help='run directories, or folders of them; the baseline first')
  sizes = ','.join(map(str, NGRAMS))
  said = f"sizes of n-grams, comma-separated, or 'none' (default: {sizes})"
  parser.add_argument('--ngrams', default=sizes, help=said)
  said = 'tokens of the longest n-grams whose counts are mixed with the model (default: 0, not mixed)'
  parser.add_argument('--with_counts', metavar='N', type=int, default=0, help=said)
  parser.add_argument('--valid_files', default='', help='other text: comma-separated paths or globs, each a group')
  parser.add_argument('--json', help='file to write the numbers to')
  parser.add_argument('--markdown', help='file to write the tables to')
  add_model_flags(parser)
  arguments, overrides = parser.parse_known_args()
  sizes = ngram_sizes(arguments.ngrams)
  if (counts := arguments.with_counts) < 0:
    raise UserError(f'--with_counts {counts} must be a number of tokens, such as 4, or 0')
  check_output('--json', arguments.json)
  check_output('--markdown', arguments.markdown)

  with interrupt_ends_at_once():
    from mmjax.data.reader import split_names  # only now: --help and bad flags need not wait for JAX
    from mmjax.inference.breakdown import break_down
    from mmjax.report.rows import find_runs

  prepare_terminal()
  runs, named = [], {user_path(run) for run in arguments.runs}
  for run in find_runs(arguments.runs):
    if run.dir.ever_saved or run.path in named:
      runs.append(run.path)
    elif not runs:
      raise UserError(f'{run.path} has no checkpoint, and others are compared with the first; name the runs instead')
    else:
      print(f'{run.path} has no checkpoint and is left out')
  files = split_names(arguments.valid_files)
  found = []
  chosen = {'ngrams': sizes, 'valid_files': files, 'overrides': overrides, 'counts': counts}
  for run in break_down(runs, **chosen, **model_from_flags(arguments)):
    found.append(run)
    print(f'{run["run"]}: {number(run["groups"]["all"][0]["loss"])} nats a token', flush=True)
    if arguments.json is not None:  # after each, so that what stops it takes no more than one
      write_json(user_path(arguments.json), {'runs': found})
  shown = tables(found)
  remarks = [remark for run in found for remark in run['remarks']]
  said = list(filter(None, (*remarks, other_text(found), NOTE, counts and NOTE_ON_COUNTS)))
  try:
    if arguments.markdown is not None:
      write_file(user_path(arguments.markdown), markdown(*shown, *said))
  finally:
    show(*shown, *said)
  if written := ' and '.join(filter(None, (arguments.json, arguments.markdown))):
    print(f'Written: {written}')


def ngram_sizes(text: str) -> list[int]:
  """Reads --ngrams.

  Raises:
    UserError: if it is no list of numbers above 0.
  """
  sizes = [] if text == 'none' else [size.strip() for size in text.split(',')]
  if not all(size.isascii() and size.isdigit() and int(size) for size in sizes):
    raise UserError(f"--ngrams {text} must be numbers above 0, comma-separated, such as 2,3, or 'none'")
  return [int(size) for size in sizes]


def other_text(found: Sequence[dict[str, Any]]) -> str:
  """Names the runs whose losses do not compare with the first's, being of other tokens; '' of none."""
  others = [run['run'] for run in found[1:] if run['against'] != found[0]['run']]
  if not others:
    return ''
  names = first_three(others, 'runs')
  return (
    f'Evaluated on other tokens than {found[0]["run"]}, or on rows of another length: {names}. '
    'Losses in nats a token do not compare across them.'
  )


def tables(found: Sequence[dict[str, Any]]) -> list[Table]:
  """Returns a table for each grouping; its rows are the runs, as they are and with their bank zeroed."""
  from mmjax.report.rows import distinct_ends

  groups = {name: [group['group'] for group in groups] for name, groups in found[0]['groups'].items()}
  if 'file' in groups:
    ends = distinct_ends(groups['file'])
    groups['file'] = [ends[name] for name in groups['file']]
  names = distinct_ends([run['run'] for run in found])
  return [_table(grouping, header, found, names) for grouping, header in groups.items()]


def _table(grouping: str, header: list[str], found: Sequence[dict[str, Any]], names: dict[str, str]) -> Table:
  rows = []
  for run in found:
    groups, read = run['groups'][grouping], f'{rounded_tokens(run["tokens_read"])}, step {run["checkpoint"]:,}'
    name, tokens = names[run['run']], [group['tokens'] for group in groups]
    if len(groups) > 1 and not any('difference' in group for group in groups):  # the others have those of the first
      rows.append(['share of the tokens', read, *(f'{part / sum(tokens):.1%}' for part in tokens)])
    rows.append([name, read, *(number(group['loss']) + _difference(group) for group in groups)])
    if 'loss_zeroed' in groups[0]:
      rows.append([f'{name}, bank zeroed', read, *(number(group['loss_zeroed']) for group in groups)])
    if 'loss_with_counts' in groups[0]:
      mixed = [number(group['loss_with_counts']) + _difference(group, '_with_counts') for group in groups]
      rows.append([f'{name}, with counts', read, *mixed])
  return Table(['run', 'read', *header], rows, f'Loss by {grouping}' if grouping != 'all' else 'Loss')


def _difference(group: dict[str, Any], of: str = '') -> str:
  if f'difference{of}' not in group:
    return ''
  return f' {number(group[f"difference{of}"], "+.4f", group[f"standard_error{of}"])}'


if __name__ == '__main__':
  run_command(main)
