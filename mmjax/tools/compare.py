"""Compares runs:   python -m mmjax.tools.compare out/g0-s0 out/g0-s1 out/g5-s0 [--out out/compare]

Also takes folders of runs, as mmjax.tools.sweep makes them. Writes compare.md with one table and its plots, and
compare.json with the numbers, and prints the table. Runs that differ only in their seed are one row. Losses of runs on
other data or tokenizers say nothing about each other: such runs are refused, or with --allow_other_data marked. Exit
codes: 0 done, 2 user error, 4 storage.
"""

import argparse
import datetime
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmjax import __version__
from mmjax.config import user_path
from mmjax.console import table_console
from mmjax.errors import UserError, run_command
from mmjax.files import write_file, write_json
from mmjax.tools.compare_plots import write_plots
from mmjax.tools.compare_runs import (
  Difference,
  Row,
  changed,
  difference,
  find_runs,
  make_rows,
  other_origin,
  read_run,
  summary,
)
from mmjax.tools.memory_tables import probe_difference
from mmjax.tools.report_parts import number, table

Summary = dict[str, Any]

# Heading -> cell. {} in a heading is the name of the first row.
RESULT: dict[str, Callable[[Summary], str]] = {
  'model': lambda s: s['name'] + ''.join(f' [{mark}]' for mark in s['marks']),
  'runs': lambda s: str(len(s['seeds'])),
  'validation loss, nats a token': lambda s: number(s['loss']),
  'difference to {}': lambda s: _difference(s['difference']),
  'taken': lambda s: _taken(s['difference']),
  'bits per byte': lambda s: number(s['bits_per_byte']),
}
COST: dict[str, Callable[[Summary], str]] = {
  'tokens seen': lambda s: number(s['tokens'] and round(s['tokens'])),
  'MFLOPs a token': lambda s: number(s['flops_per_token'] / 1e6, 2),
  'parameters': lambda s: number(s['parameters']),
  'without the bank': lambda s: number(s['parameters_without_bank']),
  'tokens/s': lambda s: number(s['tokens_per_second'], 0),
  'peak memory, GB': lambda s: number(s['peak_bytes'] and s['peak_bytes'] / 1e9, 2),
}
BANK: dict[str, Callable[[Summary], str]] = {
  'rows used': lambda s: _by_layer(s['bank'], 'used_share', '.1%'),
  'effective rows': lambda s: _by_layer(s['bank'], 'effective_rows', ',.0f'),
  'hottest row': lambda s: _by_layer(s['bank'], 'hottest_share', '.2%'),
  'bank zeroed': lambda s: probe_difference(s['probes'], 'loss_zeroed'),
  'bank zeroed, over {}': lambda s: _signed(s['zeroed_over_first']),
  'rows shuffled': lambda s: probe_difference(s['probes'], 'loss_shuffled'),
}


def main() -> None:
  """Reads flags, compares, and says where the result is."""
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.tools.compare', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('runs', nargs='+', help='run directories, or folders of them; the first is what others are to')
  parser.add_argument('--out', default='out/compare', help='folder to write into (default: out/compare)')
  parser.add_argument('--allow_other_data', action='store_true', help='mark runs on other data, do not refuse them')
  arguments = parser.parse_args()
  path = compare(arguments.runs, arguments.out, arguments.allow_other_data)
  print(f'Written: {path}')


def compare(paths: Sequence[str | Path], out: str | Path, allow_other_data: bool = False) -> Path:
  """Compares runs and writes compare.md, compare.json and the plots.

  Args:
    paths: run directories or folders of them.
    out: folder for the result, made if it does not exist.
    allow_other_data: keep runs on other data than the first's, marked and without a difference.

  Returns:
    The path of compare.md.

  Raises:
    UserError: if a path is no run, or a run learned from or was evaluated on other text.
    StorageError: if the result cannot be written.
  """
  runs = [read_run(path) for path in find_runs(paths)]
  others = {run.path: other_origin(runs[0], run) for run in runs}
  for path, what in others.items():
    if what and not allow_other_data:
      raise UserError(
        f'{path} and {runs[0].path} are on other data: {what}; their losses cannot be compared '
        '(--allow_other_data marks such runs)'
      )
  rows = make_rows(runs)
  found = [_summary(rows[0], row, others) for row in rows]
  folder = user_path(out)
  folder.mkdir(parents=True, exist_ok=True)
  plots = write_plots(rows, folder, ['other data' in s['marks'] for s in found])
  write_json(folder / 'compare.json', {'rows': found})
  write_file(folder / 'compare.md', _document(paths, out, allow_other_data, rows, found, plots))
  print_tables(found)
  return folder / 'compare.md'


def _summary(first: Row, row: Row, others: dict[Path, str]) -> Summary:
  """Returns the numbers of a row with what must be said about them, its marks."""
  marks = []
  if any(others[run.path] for run in row.runs):
    marks.append('other data')
  unfinished = [run for run in row.runs if not run.state.finished]
  for run in unfinished:
    diverged = (run.path / 'diverged').is_dir()
    how_far = f'{run.state.step:,} of {run.state.total:,} updates' if run.state.total else 'not begun'
    marks.append(f'seed {run.config.seed} {"diverged, " if diverged else "not finished, "}{how_far}')
  comparable = row is not first and first.finished and row.finished and 'other data' not in marks
  found = difference(first, row) if comparable else None
  numbers, probes = summary(row), summary(first)['probes'] if comparable else {}
  zeroed, whole = numbers['probes'].get('loss_zeroed'), probes.get('loss')
  known = zeroed is not None and whole is not None and numbers['probes']['positions'] == probes['positions']
  return numbers | {
    'difference': found and found._asdict(),
    'zeroed_over_first': zeroed - whole if known else None,
    'changed': changed(first, row),
    'marks': marks,
  }


def _document(
  paths: Sequence, out: str | Path, allow_other_data: bool, rows: Sequence[Row], found: list[Summary], plots: dict
) -> str:
  time = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  columns = {**RESULT, **COST} | (BANK if any(s['bank'] for s in found) else {})
  header = [name.format(found[0]['name']) for name in columns]
  flags = ['--out', str(out), *(['--allow_other_data'] if allow_other_data else [])]
  command = shlex.join(['python', '-m', 'mmjax.tools.compare', *map(str, paths), *flags])
  text = f'# Comparison\n\nWritten {time} by mmjax {__version__}: `{command}`\n\n'
  text += table(header, [[cell(s) for cell in columns.values()] for s in found])
  text += '\n' + ''.join(f'- {note}\n' for note in notes(found))
  text += ''.join(f'\n![{caption}]({name})\n\n{caption}\n' for name, caption in plots.items())
  text += '\n## Settings that differ from those of the first row\n\n'
  different = [(s['name'], ', '.join(f'{name}={value!r}' for name, value in s['changed'].items())) for s in found[1:]]
  text += table(('model', 'settings'), different) if different else 'There is one row.\n'
  text += '\n## Runs\n\n'
  where = [(s['name'], ', '.join(map(str, s['seeds'])), ', '.join(s['runs']), ', '.join(s['devices'])) for s in found]
  text += table(('model', 'seeds counted', 'directories', 'on'), where)
  origin = rows[0].runs[0].origin
  return text + '\n' + table(('of the data', ''), [(name, f'`{value}`') for name, value in origin.items()])


def notes(found: Sequence[Summary]) -> list[str]:
  """Returns what a reader of the table must know, a sentence each."""
  said = [
    'Loss is that of the last evaluation of each run, the mean over runs that differ only in their seed. ± is one '
    'standard error of the difference: paired, over the differences of runs with the same seed, which saw the same '
    'batches in the same order; or Welch, from the variances of both rows. One seed gives none.'
  ]
  if len({s['tokens'] for s in found}) > 1:
    said.append('The rows saw different numbers of tokens: their differences are not at equal tokens.')
  if len({device for s in found for device in s['devices']}) > 1:
    said.append('The runs were made on different machines: tokens/s and memory do not compare.')
  if any('other data' in s['marks'] for s in found):
    said.append('Rows marked "other data" have no difference: their losses are those of other text or other tokens.')
  if any(s['marks'] for s in found):
    said.append('A run that is not finished counts only in a row where none is; such a row has no difference.')
  skipped = [f'{s["name"]}: {s["skipped_updates"]}' for s in found if s['skipped_updates']]
  if skipped:
    said.append(f'Updates skipped, as not finite or as loss spikes: {", ".join(skipped)}.')
  if any(s['bank'] for s in found):
    said.append(
      'Rows used, effective rows (exp of the entropy of their use) and the hottest row\'s share of all reads: at the '
      'last evaluation, over the whole validation set, by layer. Bank zeroed, rows shuffled: how much that raises the '
      'loss, nats a token, on the positions that are probed; "over" another row: how far it is then above that.'
    )  # fmt: skip
  return said


def print_tables(found: Sequence[Summary]) -> None:
  """Prints the table, in two halves that fit a terminal."""
  console = table_console()
  for columns in (RESULT, {'model': lambda s: s['name']} | COST | (BANK if any(s['bank'] for s in found) else {})):
    shown = Table()
    for name in columns:
      shown.add_column(name.format(found[0]['name']), justify='left' if name in ('model', 'taken') else 'right')
    for s in found:
      shown.add_row(*(cell(s).replace('[', '\\[') for cell in columns.values()))
    console.print(shown)


def _difference(found: dict[str, Any] | None) -> str:
  if found is None:
    return '-'
  error = found['standard_error']
  return f'{found["mean"]:+.4f}' + ('' if error is None else f' ± {error:.4f}')


def _taken(found: dict[str, Any] | None) -> str:
  if found is None:
    return '-'
  d = Difference(**found)
  if d.kind == 'paired':
    return f'paired, {d.n} seeds' if d.n > 1 else 'paired, 1 seed: no standard error'
  text = f'Welch, {d.n} and {d.n_first} runs'
  return text if d.standard_error is not None else f'unpaired, {d.n} and {d.n_first} runs: no standard error'


def _signed(value: float | None) -> str:
  return '-' if value is None else f'{value:+.4f}'


def _by_layer(bank: Sequence[dict[str, Any]], name: str, spec: str) -> str:
  known = [(health['layer'], health[name]) for health in bank if health[name] is not None]
  return ', '.join(f'{layer}: {value:{spec}}' for layer, value in known) or '-'


if __name__ == '__main__':
  run_command(main)
