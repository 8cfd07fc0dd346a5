"""The sections of a report: each a pure function from what a run directory holds to Markdown."""

import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.config import Config, flatten, load_config, overrides_of, own_config
from mmjax.console import printable
from mmjax.model.cost import flops_per_token
from mmjax.model.lm import abstract_params, count_params
from mmjax.tools.memory_tables import memory_tables, update_ratio_sentence
from mmjax.training.progress import format_seconds

LAST_LINES = 10  # of the training log, over which the final training loss is averaged


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Returns a Markdown table; cells may hold any text."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(_cell(cell) for cell in line) + ' |' for line in lines) + '\n'


def number(value: float | None, digits: int = 4) -> str:
  """Writes a number of a table: 12,345 or 2.0417; '-' for what is not there or was not finite."""
  if value is None:
    return '-'
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:,.{digits}f}'


def result(config: Config, records: Sequence[dict], index: Mapping | None) -> str:
  """How far the run came and its last and best numbers on held-out text."""
  train, valid = _of_kind(records, 'train'), _of_kind(records, 'eval')
  if not train:
    return 'Nothing was reported yet.\n'
  tokens, planned = train[-1]['tokens'], config.train.max_steps
  rows = [('optimizer updates', number(train[-1]['step']) + (f' of {planned:,}' if planned else ''))]
  rows.append(('training tokens seen', number(tokens)))
  if index is not None:
    passes = number(tokens / index['splits']['train']['tokens'], 2)
    rows.append(('passes over the training text', passes if planned else f'{passes} of {config.train.epochs}'))
  losses = [r['loss'] for r in train[-LAST_LINES:] if r['loss'] is not None]
  if losses:
    rows.append((f'training loss, mean of the last {len(losses)} reports', number(statistics.fmean(losses))))
  finite = [r for r in valid if r['loss'] is not None]
  if finite:
    best, last = min(finite, key=lambda r: r['loss']), finite[-1]
    for title, r in (('best and last', last),) if best is last else (('best', best), ('last', last)):
      rows.append((f'{title} validation loss (update {r["step"]:,})', number(r['loss'])))
      rows.append((f'{title} validation perplexity, exp(loss)', number(r['perplexity'], 2)))
      rows.append((f'{title} validation bits per byte', number(r['bits_per_byte'])))
      rows.append((f'{title} validation accuracy', f'{r["accuracy"]:.2%}'))
  return table(('', ''), rows)


def data(index: Mapping | None, identity: Mapping[str, str], starts: Sequence[Mapping]) -> str:
  """The text, counted, with its hashes and what was said of it at the last start; earlier versions said nothing."""
  text = ''.join(f'{remark}.\n\n' for start in starts[-1:] if 'remarks' in start for remark in start['remarks'])
  if index is not None:
    rows = [
      (
        split,
        number(e['documents']),
        number(e['tokens']),
        number(e['text_bytes']),
        number(e['text_bytes'] / e['tokens'], 2),
      )
      for split, e in index['splits'].items()
    ]
    text += table(('split', 'documents', 'tokens', 'UTF-8 bytes', 'bytes a token'), rows) + '\n'
    files = [(file['path'], number(file['size']), split) for split, files in index['inputs'].items() for file in files]
    text += table(('file', 'bytes', 'read for'), files) + '\n'
    shards = [(s['file'], f'`{s["sha256"]}`') for e in index['splits'].values() for s in e['shards']]
    text += table(('token shard', 'sha256'), shards) + '\n'
  hashes = [(name, f'`{value}`') for name, value in identity.items()]
  return text + (table(('of all shards, the tokenizer, the bank file', 'sha256'), hashes) if hashes else '')


def parameters(config: Config) -> str:
  """Counts, with and without the bank, and the cost of a token."""
  total, without_bank = count_params(abstract_params(config))
  rows = [('parameters', number(total)), ('of these not in the bank', number(without_bank))]
  if total != without_bank:
    rows.append(('of these in the bank', number(total - without_bank)))
  rows.append(('bytes of parameters and optimizer state, float32', number(3 * 4 * total)))
  for name, flops in flops_per_token(config).items():
    rows.append((f'FLOPs a token, forward and backward: {name.replace("_", " ")}', number(int(flops))))
  return table(('', ''), rows)


def settings(config: Config) -> str:
  """Every setting; those that are not at their default are marked with it."""
  default = flatten(load_config(str(own_config('base.py'))).to_dict())
  rows = [
    (name, f'`{value!r}`', '' if value == default[name] else f'`{default[name]!r}`')
    for name, value in flatten(config.to_dict()).items()
  ]
  return table(('setting', 'value', 'default, where it differs'), rows)


def origin(init_from: Mapping | None) -> str:
  """Whose weights the run started from, and whose those; '' for one that started from its seed."""
  text, found = '', init_from
  while found:
    text += f'{"which" if text else "The run"} started from the weights of `{found["run"]}` at update '
    text += f'{number(found["step"])}, after {number(found["tokens"])} tokens (parameters sha256 '
    text += f'`{found["params_sha256"]}`)'
    found = found['init_from']
    text += ', ' if found else '.\n\n'
  return text


def training(records: Sequence[dict], starts: Sequence[Mapping]) -> str:
  """When the run was started and resumed, its evaluations, and updates that were skipped."""
  text = table(
    ('started (UTC)', 'at update', 'on'),
    [(s['time'], number(s['step']), f'{s["device_count"]} x {s["device"]} ({s["host"]})') for s in starts],
  )
  valid = _of_kind(records, 'eval')
  if valid:
    columns = ('loss', 'perplexity', 'bits_per_byte', 'accuracy')
    shown = valid if len(valid) <= 20 else valid[:: -(-len(valid) // 20)] + valid[-1:]
    rows = [(number(r['step']), *(number(r[c]) for c in columns)) for r in shown]
    text += '\n' + table(('update', 'validation loss', 'perplexity', 'bits per byte', 'accuracy'), rows)
  skipped = _of_kind(records, 'skipped')
  text += f'\nUpdates skipped, as not finite or as loss spikes: {len(skipped)}'
  text += f' (updates {", ".join(str(r["step"]) for r in skipped[:20])}).\n' if skipped else '.\n'
  return text


def bank_health(records: Sequence[dict]) -> str:
  """What the last evaluation found out about the memory; '' for a model without a bank."""
  valid = [r for r in _of_kind(records, 'eval') if r['bank']]
  if not valid:
    return ''
  bank, probes = valid[-1]['bank'], valid[-1].get('probes', {})
  text = f'On the validation set, update {valid[-1]["step"]:,}; mmjax/evaluation/probes.py defines each number.\n'
  for title, header, rows in memory_tables(bank, probes):
    text += f'\n{title}:\n\n' + table(header, rows)
  sentence = update_ratio_sentence(probes)
  text += f'\n{sentence}\n' if sentence else ''
  return text


def evaluation(found: Mapping | None, workdir: str | Path) -> str:
  """What eval.py measured."""
  if found is None:
    return f'Not done yet: `python eval.py --workdir {shlex.quote(str(workdir))}`\n'
  rows = [
    ('checkpoint (update)', number(found['checkpoint'])),
    ('text', found['valid_files'] or 'the validation set of the run'),
    ('tokens', number(found['tokens'])),
    ('UTF-8 bytes', number(found['text_bytes'])),
    ('loss, nats per token', number(found['loss'])),
    ('perplexity, exp(loss)', number(found['perplexity'], 2)),
    ('bits per byte', number(found['bits_per_byte'])),
    ('accuracy', f'{found["accuracy"]:.2%}'),
  ]
  if 'dtype' in found:  # eval.json of an earlier version does not say
    rows.append(('computed with', f'{found["attention"]} attention in {found["dtype"]}'))
  said = ''.join(f'\n{remark}.\n' for remark in found['remarks']) if 'remarks' in found else ''
  return table(('', ''), rows) + said


def samples(found: Mapping | None, origin: str) -> str:
  """Prompts with their continuations, and how much these repeat themselves."""
  if found is None:
    return f'{origin}\n'
  settings_text = ', '.join(f'{name} {value}' for name, value in found['sampling'].items())
  text = f'{origin} Sampling: {settings_text}.\n'
  for sample in found['samples']:
    end = 'ended by itself' if sample['ended'] else 'stopped at the limit'
    text += f'\nPrompt:\n\n{_fenced(sample["prompt"])}\nContinuation, {sample["tokens"]} tokens, {end}:\n\n'
    text += _fenced(sample['continuation'])
  rows = [(f'distinct-{n}: different {n}-grams over all', number(found[f'distinct_{n}'])) for n in (1, 2, 3)]
  rows.append(('4-grams that stand earlier in the same continuation', number(found['repeated_4grams'])))
  return text + '\n' + table(('over the tokens of the continuations', ''), rows)


def speed(records: Sequence[dict]) -> str:
  """Time, tokens per second and memory."""
  train = _of_kind(records, 'train')
  if not train:
    return ''
  rates = [r['tokens_per_second'] for r in train]
  rows = [
    ('time spent training', format_seconds(train[-1]['seconds'])),
    ('tokens per second, median (padding not counted)', number(statistics.median(rates), 0)),
    ('tokens per second, slowest and fastest report', f'{min(rates):,.0f} and {max(rates):,.0f}'),
  ]
  used = [r['mfu'] for r in train if r['mfu'] is not None]
  rows.append(('share of the peak FLOP/s of the device, median', f'{statistics.median(used):.1%}' if used else '-'))
  peak = max(train, key=lambda r: r['peak_bytes'] or 0)
  rows.append((f'peak memory of the {peak["peak_bytes_of"]}, bytes', number(peak['peak_bytes'])))
  return table(('', ''), rows)


def environment(starts: Sequence[Mapping]) -> str:
  """Devices and library versions of the last start."""
  if not starts:
    return ''
  last = starts[-1]
  rows = [
    ('host', last['host']),
    ('platform', last['platform']),
    ('devices', f'{last["device_count"]} x {last["device"]}'),
  ]
  return table(('', ''), rows + list(last['versions'].items()))


def commands(config: Config, workdir: str | Path, init_from: Mapping | None = None) -> str:
  """Commands that make this run again from a checkout: its config file, what was overridden, whose weights it had."""
  file = own_config('base.py')
  file = file.with_name(f'{config.experiment}.py') if file.with_name(f'{config.experiment}.py').is_file() else file
  flags = [shlex.quote(f'--config.{name}={value}') for name, value in overrides_of(config, str(file)).items()]
  directory = shlex.quote(str(workdir))
  if init_from:
    flags.append('--init_from ' + shlex.quote(f'{init_from["run"]}@{init_from["step"]}'))
  train = ' \\\n  '.join([f'python train.py --config configs/{file.name}', *flags, f'--workdir {directory}'])
  return _fenced(f'{train}\npython eval.py --workdir {directory}\npython -m mmjax.tools.sample --workdir {directory}')


def images(captions: Mapping[str, str]) -> str:
  """Plots with their captions."""
  return ''.join(f'\n![{text}](plots/{name})\n\n{text}\n' for name, text in captions.items())


def _of_kind(records: Sequence[dict], kind: str) -> list[dict]:
  return [r for r in records if r['kind'] == kind]


def _cell(value: Any) -> str:
  return printable(str(value)).replace('|', '\\|').replace('\n', ' ')


def _fenced(text: str) -> str:
  """Returns a code block that no run of backticks in the text can end."""
  longest = max((len(run) for run in re.findall('`+', text)), default=0)
  fence = '`' * max(3, longest + 1)
  return f'{fence}text\n{printable(text)}\n{fence}\n'
