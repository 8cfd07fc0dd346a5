"""Compares runs: one table of rows of runs, its notes and plots, as compare.md, and its numbers as compare.json."""

import itertools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmjax import __version__
from mmjax.choices import PAST_BEST
from mmjax.config import user_path
from mmjax.console import Table, markdown, number, show
from mmjax.errors import UserError
from mmjax.files import storage_errors, utc_now, write_file, write_json
from mmjax.report.compare_plots import row_styles, write_plots
from mmjax.report.lead import find_lead
from mmjax.report.lead_tables import draw_lead, lead_blocks
from mmjax.report.numbers import READS, probe_difference
from mmjax.report.rows import NO_LOSS, find_runs, make_rows, other_origin, overlaps, summary
from mmjax.run.compressed import refuse_compressed

Summary = dict[str, Any]
Columns = dict[str, Callable[[Summary], str]]

# Heading -> cell. {} in a heading is the name of the first row.
RESULT: Columns = {
  'model': lambda s: s['name'] + ''.join(f' [{mark}]' for mark in s['marks']),
  'runs': lambda s: str(len(s['seeds'])),
  'validation loss, nats a token': lambda s: number(s['loss']),
  'difference to {}': lambda s: _difference(s['difference']),
  'taken': lambda s: _taken(s['difference']),
  'bits per byte': lambda s: number(s['bits_per_byte']),
}
LOWEST: Columns = {'lowest on the way': lambda s: number(s['lowest_loss'])}
COST: Columns = {
  'tokens seen': lambda s: number(s['tokens'] and round(s['tokens'])),
  'MFLOPs a token': lambda s: number(s['flops_per_token'] / 1e6, ',.2f'),
  'parameters': lambda s: number(s['parameters']),
  'without the bank': lambda s: number(s['parameters_without_bank']),
  'tokens/s': lambda s: number(s['tokens_per_second'], ',.0f'),
  'peak memory, GB': lambda s: number(s['peak_bytes'] and s['peak_bytes'] / 1e9, ',.2f'),
}
BANK_COLUMNS: Columns = {
  'rows used': lambda s: _by_layer(s['bank'], 'used_share'),
  'effective rows': lambda s: _by_layer(s['bank'], 'effective_rows'),
  'hottest row': lambda s: _by_layer(s['bank'], 'hottest_share'),
  'bank zeroed': lambda s: probe_difference(s['probes'], 'loss_zeroed'),
  'bank zeroed, over {}': lambda s: number(s['zeroed_over_first'], '+.4f'),
  'rows exchanged': lambda s: probe_difference(s['probes'], 'loss_shuffled'),
}
# A note -> whether it belongs to these rows.
Notes = dict[str, Callable[[Sequence[Summary]], bool]]
EXPLANATIONS: Notes = {
  'Loss is that of the last evaluation of each run, the mean over runs that differ only in their seed. ± is one '
  'standard error of the difference: paired, over the differences of runs with the same seed, which saw the same '
  'batches in the same order; or Welch, from the variances of both models. One seed gives none; '
  '`python -m mmjax.tools.breakdown` gives one over documents.': bool,
  "Rows used, effective rows (exp of the entropy of their use) and the hottest row's share of all reads: at the last "
  'evaluation, over the whole validation set, by layer. Bank zeroed, rows exchanged: how much that raises the loss, '
  'nats a token, on the positions that are probed; "over" another: how far it then is above it.': lambda found: any(
    s['bank'] for s in found
  ),
}
LIMITS: Notes = {  # also on the terminal
  'The models saw different numbers of tokens, so their differences are not at equal tokens.': lambda found: (
    len({s['tokens'] for s in found} - {None}) > 1
  ),
  'The runs were made on different machines or numbers of devices: tokens/s and memory do not compare.': lambda found: (
    len({device for s in found for device in s['devices']}) > 1
  ),
  'model.max_seq_len differs: a model that sees more text before a token can have a lower loss for that alone.': (
    lambda found: any('model.max_seq_len' in s['changed'] for s in found)
  ),
  'Models marked "other data" have no difference: their runs were trained or evaluated on other text, or on other '
  'tokens of it.': lambda found: any('other data' in s['marks'] for s in found),
  'Losses are those of last evaluations, and some models were better before, which can happen when the text is read '
  'too often: see "lowest on the way". eval.py, breakdown and mmjax.load take their best checkpoints.': (
    lambda found: any(map(_is_past_best, found))
  ),
  'A run that is not finished counts only for a model of which none is; such a model has no difference.': (
    lambda found: any(mark != 'other data' and not mark.endswith(NO_LOSS) for s in found for mark in s['marks'])
  ),
}


def compare(paths: Sequence[str | Path], out: str | Path, allow_other_data: bool = False, models: str = '') -> Path:
  """Compares runs, prints the table and writes compare.md, compare.json and the plots.

  Args:
    paths: run directories or folders of them.
    out: folder for the result, made if it does not exist.
    allow_other_data: keep runs on other data than the first's, marked and without a difference.
    models: which runs are of one model, trained on more and more tokens: see `mmjax.report.lead.find_lead`.

  Returns:
    The path of compare.md.

  Raises:
    UserError: if a path is no run, or one with a packed bank, or a run learned from or was evaluated on other text.
    StorageError: if the result cannot be written.
  """
  runs = find_runs(paths)
  for run in runs:
    refuse_compressed(run.dir, 'compared')  # its log is of the bank before
    if (what := other_origin(runs[0], run)) and not allow_other_data:
      unit = '; where only the tokenizer differs, bits per byte compare' if 'tokenizer_sha256' in what else ''
      raise UserError(
        f'{runs[0].path} and {run.path} were trained or evaluated on text that differs: {what}; their losses cannot be '
        f'compared (--allow_other_data shows and marks such runs{unit})'
      )
  rows = make_rows(runs)
  found = [summary(rows[0], row) for row in rows]
  lead = find_lead([run for run in runs if not other_origin(runs[0], run)], models)
  folder = user_path(out)
  with storage_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
  plots = write_plots(rows, folder, ['other data' in s['marks'] for s in found])
  lasting = lead_blocks(lead) if lead else []
  remarks = [*overlaps(runs), *_notes(LIMITS, found)]
  if lead:
    plots['lead.png'] = draw_lead(lead, folder / 'lead.png', row_styles(len(lead['models']) + 1)[1:])
  write_json(folder / 'compare.json', {'rows': found, 'lead': lead})
  flags = ['--out', str(out), *(['--allow_other_data'] if allow_other_data else [])]
  flags += ['--models', models] if models else []
  command = shlex.join(['python', '-m', 'mmjax.tools.compare', *map(str, paths), *flags])
  write_file(folder / 'compare.md', _document(command, runs[0].origin, found, lasting, remarks, plots))
  for columns in _columns(found):  # parts that fit a terminal
    show(_table({'model': lambda s: s['name']} | columns, found))
  show(*lasting, *remarks)
  return folder / 'compare.md'


def _notes(notes: Notes, found: Sequence[Summary]) -> list[str]:
  return [note for note, belongs in notes.items() if belongs(found)]


def _is_past_best(s: Summary) -> bool:
  return None not in (s['loss'], s['lowest_loss']) and s['loss'] - s['lowest_loss'] > PAST_BEST


def _columns(found: Sequence[Summary]) -> list[Columns]:
  result = RESULT | (LOWEST if any(map(_is_past_best, found)) else {})
  return [result, COST, BANK_COLUMNS] if any(s['bank'] for s in found) else [result, COST]


def _table(columns: Columns, found: Sequence[Summary]) -> Table:
  header = [name.format(found[0]['name']) for name in columns]
  return Table(header, [[cell(s) for cell in columns.values()] for s in found])


def _document(
  command: str,
  origin: dict[str, Any],
  found: list[Summary],
  lasting: Sequence[Table | str],
  remarks: Sequence[str],
  plots: dict[str, str],
) -> str:
  time = utc_now()
  notes = [*_notes(EXPLANATIONS, found), *remarks]
  if skipped := [f'{s["name"]}: {s["skipped_updates"]}' for s in found if s['skipped_updates']]:
    notes.append(f'Updates skipped, as not finite or as loss spikes: {", ".join(skipped)}.')
  different = [(s['name'], ', '.join(f'{name}={value!r}' for name, value in s['changed'].items())) for s in found[1:]]
  where = [(s['name'], ', '.join(map(str, s['seeds'])), ', '.join(s['runs']), ', '.join(s['devices'])) for s in found]
  return markdown(
    '# Comparison',
    f'Written {time} by mmjax {__version__}: `{command}`',
    _table(dict(itertools.chain(*(columns.items() for columns in _columns(found)))), found),
    '\n'.join(f'- {note}' for note in notes),
    *lasting,
    *(f'![{caption}]({name})\n\n{caption}' for name, caption in plots.items()),
    '## Settings that differ from those of the first row',
    Table(('model', 'settings'), different) if different else 'There is one row.',
    '## Runs',
    Table(('model', 'seeds counted', 'directories', 'on'), where),
    Table(('of the data', ''), [(name, f'`{value}`') for name, value in origin.items()]),
  )


def _difference(found: dict[str, Any] | None) -> str:
  return '-' if found is None else number(found['mean'], '+.4f', found['standard_error'])


def _taken(found: dict[str, Any] | None) -> str:
  if found is None:
    return '-'
  if found['kind'] == 'paired':
    said = 'paired, 1 seed' if found['n'] == 1 else f'paired, {found["n"]} seeds'
  else:
    kind = 'unpaired' if found['standard_error'] is None else 'Welch'
    said = f'{kind}, {found["n"]} and {found["n_first"]} runs'
  return said if found['standard_error'] is not None else f'{said}: no standard error'


def _by_layer(bank: Sequence[dict[str, Any]], name: str) -> str:
  spec = READS[name][1]
  return ', '.join(f'{h["layer"]}: {h[name]:{spec}}' for h in bank if h[name] is not None) or '-'
