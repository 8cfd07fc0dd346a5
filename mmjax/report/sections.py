"""The sections of a report, each a pure function of a run: tables and Markdown, which eval.py prints in part too."""

import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.config import Config, default_settings, flatten, overrides_of, own_config
from mmjax.console import Table, facts, format_seconds, number, printable
from mmjax.data.loader import count_rows
from mmjax.report.found import FoundRun, where
from mmjax.report.numbers import HELD_OUT, QUALITY, cost_table, costs, memory_tables, names, written

LAST_LINES = 10  # of the training log, over whose updates the final training loss is averaged
MOST_EVALUATIONS = 20  # in the table of them
MOST_FILES = 20  # of a split
Blocks = list[Table | str]


def result(run: FoundRun) -> Blocks:
  """How far the run came and its last and best numbers on held-out text."""
  train, config = run.of_kind('train'), run.config.train
  if not train:
    return ['Nothing was reported yet.']
  tokens, planned = train[-1]['tokens'], config.max_steps
  rows = [('optimizer updates', number(train[-1]['step']) + (f' of {planned:,}' if planned else ''))]
  rows.append(('training tokens seen', number(tokens)))
  if run.index is not None:
    in_a_pass = count_rows(run.index['splits']['train'], run.config.model.max_seq_len, run.config.data.layout)
    passes = number(train[-1]['step'] * config.update_rows / in_a_pass, ',.2f')
    rows.append(('passes over the training rows', passes if planned else f'{passes} of {config.epochs}'))
  if last := updates_of(train, [r['step'] for r in run.of_kind('skipped')])[-LAST_LINES:]:
    loss = statistics.fmean(*zip(*last, strict=True))
    rows.append((f'training loss, mean of {number(sum(updates for _, updates in last))} updates', number(loss)))
  if not run.finite_evals:
    return [facts(rows)]
  best, last = min(run.finite_evals, key=lambda r: r['loss']), run.finite_evals[-1]
  shown = {'best and last': last} if best is last else {'best': best, 'last': last}
  header = ['on the validation set', *(f'{name} (update {r["step"]:,})' for name, r in shown.items())]
  columns = [names(QUALITY), *(written(r, QUALITY) for r in shown.values())]
  return [facts(rows), Table(header, list(zip(*columns, strict=True)))]


def updates_of(train: Sequence[Mapping[str, Any]], skipped: Sequence[int]) -> list[tuple[float, int]]:
  """Returns the loss of each report that has one, and of how many updates it is the mean: without `skipped` ones."""
  found, before = [], 0
  for report in train:
    updates = report['step'] - before - sum(before < step <= report['step'] for step in skipped)
    found += [(report['loss'], updates)] if report['loss'] is not None else []
    before = report['step']
  return found


def data(run: FoundRun) -> Blocks:
  """The text, counted, with its hashes and what was said of it at the last start; earlier versions said nothing."""
  found: Blocks = [f'{remark}.' for start in run.history['starts'][-1:] for remark in start.get('remarks', ())]
  if run.index is not None:
    splits, counts = run.index['splits'], ('documents', 'tokens', 'text_bytes')
    counted = [
      (split, *(number(e[name]) for name in counts), f'{e["text_bytes"] / e["tokens"]:.2f}')
      for split, e in splits.items()
    ]
    found.append(Table(('split', 'documents', 'tokens', 'UTF-8 bytes', 'bytes a token'), counted))
    inputs = run.index['inputs'].items()
    files = [(file['path'], number(file['size']), split) for split, files in inputs for file in files[:MOST_FILES]]
    found.append(Table(('file', 'bytes', 'read for'), files))
    if left := sum(len(files[MOST_FILES:]) for _, files in inputs):
      found.append(f'Files that are listed in data.json alone: {left:,}.')
    shards = [(s['file'], f'`{s["sha256"]}`') for e in splits.values() for s in e['shards']]
    found.append(Table(('token shard', 'sha256'), shards))
  hashes = [(name, f'`{value}`') for name, value in run.history['identity'].items()]
  return [*found, Table(('of all shards, the tokenizer, the bank file', 'sha256'), hashes)]


def parameters(run: FoundRun) -> Blocks:
  """Counts, with and without the bank, and the cost of a token."""
  return [cost_table({run.config.experiment: costs(run.config)})]


def settings(run: FoundRun) -> Blocks:
  """Every setting; those that are not at their default are marked with it."""
  default = default_settings()
  rows = [
    (name, f'`{value!r}`', '' if value == default[name] else f'`{default[name]!r}`')
    for name, value in flatten(run.config.to_dict()).items()
  ]
  rows += [(name, f'`{value!r}`', 'mmjax no longer has it') for name, value in run.gone.items()]
  return [Table(('setting', 'value', 'default, where it differs'), rows)]


def origin(init_from: Mapping | None) -> str:
  """Whose weights the run started from, and whose those; '' for one that started from its seed."""
  if not init_from:
    return ''
  text, found = 'The run', init_from
  while found:
    text += f' started from the weights of `{found["run"]}` at update {number(found["step"])}, after '
    text += f'{number(found["tokens"])} tokens (parameters sha256 `{found["params_sha256"]}`)'
    found = found['init_from']
    text += ', which' if found else '.'
  return text


def training(run: FoundRun) -> Blocks:
  """When the run was started and resumed, its evaluations, and updates that were skipped."""
  starts = [(s['time'], number(s['step']), where(s), '; '.join(s.get('changed', ()))) for s in run.history['starts']]
  evals, skipped = run.of_kind('eval'), [r['step'] for r in run.of_kind('skipped')]
  every = -(-len(evals) // MOST_EVALUATIONS) or 1
  shown = evals[::-every][::-1]  # the last one among them
  said = f'Updates skipped, as not finite or as loss spikes: {len(skipped)}'
  return [
    origin(run.history.get('init_from')),
    Table(('started (UTC)', 'at update', 'on', 'settings changed'), starts),
    Table(['evaluated after update', *names(QUALITY)], [[number(r['step']), *written(r, QUALITY)] for r in shown]),
    said + (f' (updates {", ".join(map(str, skipped[:20]))}).' if skipped else '.'),
  ]


def last_bank_health(run: FoundRun) -> Blocks:
  """What the last evaluation found out about the memory, and how far updates moved its rows: the median, since the
  last ones, at a learning rate of almost 0, move them least. Nothing for a model without a bank.
  """
  evals = [r for r in run.of_kind('eval') if r['bank']]
  if not evals:
    return []
  said = f'On the validation set, update {evals[-1]["step"]:,}; mmjax/evaluation/probes.py defines each number.'
  found: Blocks = [said, *memory_tables(evals[-1]['bank'], evals[-1].get('probes', {}))]
  moves = [r.get('probes', {}).get('row_update_ratio') for r in run.of_kind('train')]
  if moves := [move for move in moves if move is not None]:
    median = f'{statistics.median(moves):.1e} of their norm: the median of {len(moves):,} reports'
    found.append(f'An update of the training moved the rows that it read by {median}.')
  return found


def evaluation(found: Mapping[str, Any]) -> Blocks:
  """What eval.py measured."""
  rows = [('checkpoint (update)', evaluated(found))]
  rows.append(('text', found['valid_files'] or 'the validation set of the run'))
  rows += zip(names(HELD_OUT), written(found, HELD_OUT), strict=True)
  if 'dtype' in found:  # eval.json of an earlier version does not say
    rows.append(('computed with', f'{found["attention"]} attention in {found["dtype"]}'))
  return [facts(rows), *(f'{remark}.' for remark in found.get('remarks', ()))]


def evaluated(found: Mapping[str, Any]) -> str:
  """Says which model eval.py measured; eval.json of an earlier version does not say whether rows were taken out."""
  return number(found['checkpoint']) + (', without the rows that the run taught' if found.get('without_taught') else '')


def samples(found: Mapping[str, Any], where_from: str) -> Blocks:
  """Prompts with their continuations, and how much these repeat themselves."""
  settings_text = ', '.join(f'{name} {value}' for name, value in found['sampling'].items())
  blocks: Blocks = [f'{where_from} Sampling: {settings_text}.']
  for sample in found['samples']:
    end = 'ended by itself' if sample['ended'] else 'stopped at the limit'
    blocks += ['Prompt:', fenced(sample['prompt']), f'Continuation, {sample["tokens"]} tokens, {end}:']
    blocks.append(fenced(sample['continuation']))
  return [*blocks, variety(found)]


def variety(found: Mapping[str, Any]) -> Table:
  """How varied continuations are."""
  rows = [(f'distinct-{n}: different {n}-grams over all', number(found[f'distinct_{n}'])) for n in (1, 2, 3)]
  rows.append(('4-grams that stand earlier in the same continuation', number(found['repeated_4grams'])))
  return Table(('over the tokens of the continuations', ''), rows)


def speed(run: FoundRun) -> Blocks:
  """Time, tokens per second and memory."""
  train = run.of_kind('train')
  if not train:
    return []
  rates, used = ([r[name] for r in train if r[name] is not None] for name in ('tokens_per_second', 'mfu'))
  peak = max(train, key=lambda r: r['peak_bytes'] or 0)
  rows = [
    ('time spent training', format_seconds(train[-1]['seconds'])),
    ('tokens per second, median (padding not counted)', number(statistics.median(rates), ',.0f')),
    ('tokens per second, slowest and fastest report', f'{min(rates):,.0f} and {max(rates):,.0f}'),
    ('share of the peak FLOP/s of the device, median', number(statistics.median(used) if used else None, '.1%')),
    (f'peak memory of the {peak["peak_bytes_of"]}, bytes', number(peak['peak_bytes'])),
  ]
  return [facts(rows)]


def environment(run: FoundRun) -> Blocks:
  """Devices and library versions of the last start, and those of earlier ones where they were others."""
  if not (starts := run.history['starts']):
    return []

  def facts_of(start: dict[str, Any]) -> dict[str, str]:
    place = {'host': start['host'], 'platform': start['platform'], 'devices': where(start).rpartition(' (')[0]}
    return place | start['versions']

  every = [facts_of(start) for start in starts]
  rows = []
  for name, value in every[-1].items():
    others = dict.fromkeys(found[name] for found in every if found.get(name, value) != value)
    rows.append((name, f'{value} (before: {", ".join(others)})' if others else value))
  return [facts(rows)]


def not_repeated(run: FoundRun) -> str:
  """Says of a run whose settings a later start changed that one command does not make it again; '' of others."""
  changed = '; '.join(run.changed)
  said = 'The settings below are those of its last start, so from the first update on they make another run.'
  return f'A later start of this run changed settings ({changed}). {said}' if changed else ''


def commands(
  config: Config, workdir: str | Path, init_from: Mapping | None = None, compressed: Mapping | None = None
) -> str:
  """Commands that make this run again from a checkout: its config file, what was overridden, whose weights it had, and
  what `compressed_from` says.
  """
  base = own_config('base.py')
  named = base.with_name(f'{config.experiment}.py')
  file = named if named.is_file() else base
  flags = [shlex.quote(f'--config.{name}={value}') for name, value in overrides_of(config, str(file)).items()]
  directory = shlex.quote(str(workdir))
  if init_from:
    flags.append('--init_from ' + shlex.quote(f'{init_from["run"]}@{init_from["step"]}'))
  trained = shlex.quote(compressed['run']) if compressed else directory
  train = ' \\\n  '.join([f'python train.py --config configs/{file.name}', *flags, f'--workdir {trained}'])
  if compressed:
    train += f'\npython -m mmjax.tools.convert compress --workdir {trained} --checkpoint {compressed["step"]} '
    train += f'--bits {compressed["bits"]} --out {directory}'
  return fenced(f'{train}\npython eval.py --workdir {directory}\npython -m mmjax.tools.sample --workdir {directory}')


def images(captions: Mapping[str, str]) -> Sequence[str]:
  """Plots with their captions."""
  return [f'![{text}](plots/{name})\n\n{text}' for name, text in captions.items()]


def fenced(text: str) -> str:
  """Returns a code block that no run of backticks in the text can end."""
  longest = max((len(run) for run in re.findall('`+', text)), default=0)
  fence = '`' * max(3, longest + 1)
  return f'{fence}text\n{printable(text)}\n{fence}'
