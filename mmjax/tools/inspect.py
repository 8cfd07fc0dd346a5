"""Shows what a memory does:   python -m mmjax.tools.inspect --workdir RUN --text 'The capital of' [--row 1234]

--text or --text_file: for each token and layer the rows that it took, with what there is of these: their scores, their
weights where scores or a gate weigh them, the n-gram that addresses them. Layers and rows are numbered from 0.
--row N: the contexts of a corpus that take this row most, and the tokens that its value makes more and less likely. The
latter is measured: the probability of every next token in the model as it is, minus that in the model with this row, in
this layer alone, replaced by the mean of all rows, and the mean of that over these contexts. So it includes the fusion,
all later layers and the output layer. The layer 'values' stands for all layers that read rows into the values
of attention. Where the bank was built from text, the text that the row started from is shown.
--taught: the rows that the run taught to the model that it started from, and how often the new text and the usual text
read them.
All are written to --json FILE too, the text with all rows. --config.data.prepared_dir=DIR says where the run's own
text is now, if it was moved. Exit codes: 0 done, 2 user error, 4 storage.
"""

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from mmjax.choices import TOP
from mmjax.config import check_output, override_config, user_path
from mmjax.config.sublayers import layer_name
from mmjax.config.wording import quote
from mmjax.console import Table, command_parser, number, prepare_terminal, printable, show, table_console
from mmjax.data.reader import read_text
from mmjax.errors import UserError, interrupt_ends_at_once, run_command
from mmjax.inference.settings import add_model_flags, model_from_flags

if TYPE_CHECKING:
  from mmjax.inference.api import LanguageModel
  from mmjax.run.directory import RunDir

POSITIONS = 262144  # of the corpus
EFFECT = (
  'the probability of a next token with the row as it is, and its change, in percentage points, from that with the '
  'mean of all rows of the bank in its place in this layer: means over contexts that take the row'
)


def main() -> None:
  """Reads flags, looks, prints, writes JSON."""
  parser = command_parser('inspect', __doc__)
  parser.add_argument('--workdir', required=True, help='run directory, as train.py makes it')
  parser.add_argument('--text', help='text to read')
  parser.add_argument('--text_file', help='UTF-8 file with the text to read')
  parser.add_argument('--row', type=int, help='a row of the bank to look up in a corpus')
  parser.add_argument('--taught', action='store_true', help='list the rows that the run taught (memory.teach_rows)')
  parser.add_argument('--layer', type=_layer, help="one layer, or 'values' (default: all)")
  parser.add_argument(
    '--top', type=int, default=TOP, help=f'rows of a token, contexts and tokens to show (default: {TOP})'
  )
  parser.add_argument(
    '--corpus',
    default='',
    help="comma-separated files or globs, of which all is tokenized once (default: the run's validation text)",
  )
  parser.add_argument(
    '--positions', type=int, default=POSITIONS, help=f'of the corpus to read; 0: all (default: the first {POSITIONS:,})'
  )
  parser.add_argument('--json', help='file to write what was found to')
  add_model_flags(parser)
  arguments, overrides = parser.parse_known_args()
  text = text_of(arguments)

  with interrupt_ends_at_once():
    from mmjax.files import write_json
    from mmjax.inference.api import load_run  # only now: --help and bad flags need not wait for JAX
    from mmjax.inference.measure import WHERE
    from mmjax.run.directory import open_run

  prepare_terminal()
  run = open_run(arguments.workdir)
  config = override_config(run.read_config(), overrides, (*WHERE, 'memory.bank_file'))
  lm = load_run(run, config, **model_from_flags(arguments))
  found = look(lm, run, text, arguments)
  try:
    if arguments.json is not None:
      write_json(user_path(arguments.json), found)
  finally:
    print_found(found, arguments.top)
  if arguments.json is not None:
    print(f'Written: {arguments.json}')


def _layer(text: str) -> int | str:
  return int(text) if text.isdecimal() else text


def text_of(arguments: argparse.Namespace) -> str | None:
  """Returns the text to read, if there is one.

  Raises:
    UserError: if there is nothing to do, two texts, or a file that cannot be read.
  """
  for name, least in (('top', 1), ('positions', 0), ('row', 0)):
    value = getattr(arguments, name)
    if value is not None and value < least:
      raise UserError(f'--{name} {value} must be at least {least}')
  check_output('--json', arguments.json)
  if arguments.taught and arguments.without_taught:
    raise UserError('--taught lists the rows that --without takes out; give one of them')
  if arguments.text is not None and arguments.text_file is not None:
    raise UserError(f'give --text {quote(arguments.text)} or --text_file {quote(arguments.text_file)}, not both')
  if arguments.text_file is None:
    if arguments.text is None and arguments.row is None and not arguments.taught:
      raise UserError('nothing to look at: give --text, --text_file, --row or --taught')
    return arguments.text
  return read_text(arguments.text_file, '--text_file')


def look(lm: 'LanguageModel', run: 'RunDir', text: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
  """Returns what --json writes.

  Returns:
    checkpoint; `text`: `tokens`, see `MemoryReader.read_text`, and `most_taken`; `row`: see `MemoryReader.read_row`,
    with `snippet` and `effect_is`; `taught`: see `taught_rows`. None for what was not asked. `remark`: what is to be
    said of the snippets, and of text that was cut.

  Raises:
    UserError: if the model, the layer, the row or the text is not there.
  """
  from mmjax.inference.measure import open_text
  from mmjax.inference.memory_reads import MOST_TOKENS, MemoryReader
  from mmjax.inference.taught import taught_rows
  from mmjax.run.identity import bank_texts

  reader = MemoryReader(lm)
  reader.chosen_layers(arguments.layer)
  if arguments.row is not None:
    reader.check_row(arguments.row)
  snippets, remark = bank_texts(run, lm.config)
  taught = taught_rows(lm, run) if arguments.taught else None
  found = {'checkpoint': lm.step, 'text': None, 'row': None, 'taught': taught, 'remark': remark}
  if text is not None:
    tokens = reader.read_text(text, layer=arguments.layer)
    if len(tokens) == MOST_TOKENS:
      found['remark'] = f'{remark} Of the text the first {MOST_TOKENS:,} tokens were looked at.'.strip()
    found['text'] = {'tokens': tokens, 'most_taken': most_taken(tokens, arguments.top, snippets)}
  if arguments.row is not None:
    split = open_text(lm.config, run, arguments.corpus)
    row = reader.read_row(arguments.row, split, layer=arguments.layer, top=arguments.top, positions=arguments.positions)
    found['row'] = row | {'snippet': snippets.get(arguments.row), 'effect_is': EFFECT}
  return found


def most_taken(tokens: list[dict[str, Any]], top: int, snippets: dict[int, str]) -> list[dict[str, Any]]:
  """Returns for each layer the rows that a text took most, by the sum of absolute weights or else by tokens.

  Returns:
    `layer`, `row`, `tokens` that took it, `weight` (sum over them, None where nothing weighs rows) and `snippet`.
  """
  found = []
  for at, layer in enumerate([entry['layer'] for entry in tokens[0]['layers']]):
    taken, weight = Counter(), Counter()
    for token in tokens:
      reads = token['layers'][at]['rows']
      taken.update({read['row'] for read in reads})
      for read in reads:
        weight[read['row']] += 0.0 if read['weight'] is None else abs(read['weight'])
    weighs = tokens[0]['layers'][at]['rows'][0]['weight'] is not None
    for row in sorted(taken, key=lambda row: (-weight[row], -taken[row], row))[:top]:
      found.append(
        {
          'layer': layer,
          'row': row,
          'tokens': taken[row],
          'weight': weight[row] if weighs else None,
          'snippet': snippets.get(row),
        }
      )
  return found


def print_found(found: dict[str, Any], top: int) -> None:
  """Prints what `look` found as tables."""
  show(plain(found['remark']))
  if found['text'] is not None:
    tokens = found['text']['tokens']
    show(*tokens_tables(tokens, top, table_console().width), most_taken_table(found['text']['most_taken'], len(tokens)))
  if found['taught'] is not None:
    show(taught_table(found['taught'], top) if found['taught'] else '0 rows were taught at this checkpoint')
  row = found['row']
  if row is None:
    return
  show(Text(f'Row {row["row"]} over {row["positions"]:,} positions of the corpus', 'bold'))
  if row['snippet'] is not None:
    show(Text('It started from the text: ') + Text(plain(row['snippet']), 'italic'))
  ranges = [_range_said(layer['range']) for layer in row['layers']]
  together = len(set(ranges)) == 1
  show(ranges[0] if together else '')
  for layer, said in zip(row['layers'], ranges, strict=True):
    name, share = layer_name(layer['layer']).capitalize(), layer['taken'] / row['positions']
    show(f'\n{name}: taken at {layer["taken"]:,} ({share:.3%})')
    show('' if together else said)
    if layer['effect'] is not None:
      change = f'{layer["effect"]["next_token_gain"]:+.4f} nats'
      gain = f'The log-probability of the token that really follows changes by {change}.'
      show(contexts_table(layer['contexts'], layer['strength_is']), effect_table(layer['effect']), gain)
  if any(layer['effect'] is not None for layer in row['layers']):
    show(f'\nThe tables show {row["effect_is"]}.')


def _range_said(of_row: dict[str, Any] | None) -> str:
  if of_row is None:
    return ''
  token = of_row['token']
  how = 'finds it by a hash of the last tokens' if token is None else f'reads it at the token «{plain(token)}»'
  return f'It lies in the range of head {of_row["head"]}, which {how}.'


# What is shown of a read beside its row, where it has it.
READ_CELLS = {'score': '{:5.1f}'.format, 'weight': '{:.2f}'.format, 'ngram': lambda ngram: visible(ngram)}


def tokens_tables(tokens: list[dict[str, Any]], top: int, width: int) -> list[Table]:
  """One line for each token and one of its rows, one column for each layer, as many side by side as fit `width`."""
  layers = [entry['layer'] for entry in tokens[0]['layers']]
  cells = [[_reads_cell(entry['rows'][:top]) for entry in token['layers']] for token in tokens]
  names = [visible(token['token']) for token in tokens]
  cell_width = max(cell_len(line) for row in cells for cell in row for line in cell.split('\n'))
  beside = max(1, (width - 4 - min(16, max(map(cell_len, names)))) // (cell_width + 3))
  reads = [layer['rows'][0] for layer in tokens[0]['layers']]
  shown = [name for name in READ_CELLS if any(read[name] is not None for read in reads)]
  title = 'Rows that each token took: ' + ', '.join(['row', *shown])
  tables = []
  for first in range(0, len(layers), beside):
    header = ['token', *(layer_name(layer) for layer in layers[first : first + beside])]
    rows = [[name, *row[first : first + beside]] for name, row in zip(names, cells, strict=True)]
    tables.append(Table(header, rows, title))
  return tables


def _reads_cell(reads: list[dict[str, Any]]) -> str:
  cells = [
    [f'{read["row"]:>5}', *(write(read[n]) for n, write in READ_CELLS.items() if read[n] is not None)] for read in reads
  ]
  return '\n'.join(map(' '.join, cells))


def most_taken_table(rows: list[dict[str, Any]], n_tokens: int) -> Table:
  """The rows that a text took most."""
  columns = {
    'layer': ('layer', str),
    'row': ('row', str),
    'tokens': (f'of {n_tokens} tokens', str),
    'weight': ('sum of weights', lambda weight: number(weight, '.2f')),
    'snippet': ('text that the row started from', lambda text: plain(text or '')),
  }
  shown = {name: column for name, column in columns.items() if any(row[name] is not None for row in rows)}
  header = [heading for heading, _ in shown.values()]
  cells = [[write(row[name]) for name, (_, write) in shown.items()] for row in rows]
  return Table(header, cells, 'Rows that this text took most')


def taught_table(rows: list[dict[str, Any]], top: int) -> Table:
  """The rows that were taught, those that moved farthest."""
  header = ('row', 'moved by', 'length before', 'updates on the new text that read it', 'on the usual text')
  cells = [
    (str(r['row']), f'{r["moved"]:.3f}', f'{r["length_before"]:.3f}', f'{r["new"]:.1%}', f'{r["usual"]:.1%}')
    for r in rows[:top]
  ]
  return Table(header, cells, f'{len(rows):,} rows were taught; these moved farthest')


def contexts_table(contexts: list[dict[str, Any]], strength_is: str) -> Table:
  """Snippets of text with the token that took the row in quotes."""
  headings = [strength_is, 'contexts that take it most'] if strength_is else ['contexts that take it']
  rows = []
  for context in contexts:
    token = Text(f'«{plain(context["token"])}»', 'bold reverse')
    text = Text(plain(context['before'])) + token + Text(plain(context['after']))
    rows.append([f'{context["strength"]:.3f}', text] if strength_is else [text])
  return Table([*headings[:-1], f'{headings[-1]}; the token that took it is in «»'], rows)


def effect_table(effect: dict[str, Any]) -> Table:
  """The tokens that gain and lose most, side by side."""

  def cells(token: dict[str, Any]) -> list[str]:
    change = token['probability'] - token['probability_without']
    return [visible(token['token']), f'{token["probability"]:.2%}', f'{100 * change:+.2g}']

  rows = [cells(up) + cells(down) for up, down in zip(effect['up'], effect['down'], strict=True)]
  header = [name for direction in ('more', 'less') for name in (f'{direction} likely', 'probability', 'change')]
  return Table(header, rows, f'Next tokens whose probability it changes most, mean over {effect["contexts"]} contexts')


def plain(text: str) -> str:
  """Returns text on one line that moves no cursor."""
  return printable(text).replace('\n', '\\n').replace('\t', '\\t')


def visible(token: str) -> str:
  """Returns a token as `plain`, with its spaces marked."""
  return plain(token).replace(' ', '␣')


if __name__ == '__main__':
  run_command(main)
