"""What is learned against what is forgotten:   python benchmarks/teach.py --base RUN --old OLD --train NEW --valid HELD

Trains a run of n-gram rows on new text in several ways, each at several rates: everything, the bank alone, the
feed-forward layers alone, and the t rows an update that the text reads most beyond the background
(memory.teach_rows). Then it measures the loss on held-out text of the new kind and on text of the old kind. Without
--train the new text is a list of made-up facts in six wordings, and what is measured is the loss of the answers in two
other wordings.

Runs and numbers lie in --out; what is done is not done again. At the end it prints a table and draws a plot.
"""

import argparse
import fnmatch
import json
import random
from pathlib import Path
from typing import Any

import common  # noqa: F401 - the repository on the path
import jax
import numpy as np

import mmjax
from mmjax.config import load_config
from mmjax.console import Table, prepare_terminal, show
from mmjax.files import read_json, write_json
from mmjax.inference.api import LanguageModel
from mmjax.inference.measure import measure_text
from mmjax.report.draw import Line, Panel, draw
from mmjax.run.directory import open_run
from mmjax.training.loop import fit

FFN = 'layers/[03]/sublayer/|sublayer/ffn/'  # of four layers, of which the middle two have a memory
ADAM = {'train.warmup_steps': 10}
# Gradients are means over tokens: a row that few of them read needs a large step.
SGD = {'train.optimizer': 'sgd', 'memory.bank_lr_multiplier': 100, 'memory.bank_lr_final_multiplier': 100}
RATES = (1e-3, 4e-3, 1.6e-2)
WAYS = {  # settings, and learning rates
  'everything': (ADAM, (2.5e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)),  # the curve that the others must beat
  'bank': (ADAM | {'train.parameters': 'memory_bank lr=16..1; .* lr=0'}, RATES),
  'ffn': (ADAM | {'train.parameters': f'{FFN} lr=1; .* lr=0'}, (5e-4, 1e-3, 2e-3, 4e-3)),
  **{f'{rows} rows': (SGD | {'memory.teach_rows': rows}, (1, 3, 10)) for rows in (64, 256, 1024, 4096)},
  **{f'{rows} rows by Adam': (ADAM | {'memory.teach_rows': rows}, (*RATES, 6.4e-2)) for rows in (256, 1024)},
}

NAMES = 12
ANSWERS = {
  'capital': 'Paris London Rome Berlin Tokyo Chicago Boston Oxford Moscow Sydney',
  'language': 'English French German Spanish Latin Greek Russian Japanese Italian Arabic',
  'animal': 'horse fish bird dog lion bear wolf cat eagle snake',
  'colour': 'red blue green white black gold silver brown yellow orange',
  'product': 'music film coal steel oil wine salt paper cotton glass',
}
WORDINGS = {  # the last two are held out, and end in the answer
  'capital': 'The capital of {} is {}.|{} has its capital in {}.|The government of {} sits in {}.|'
  'Of {} the capital is {}.|The seat of government of {} is {}.|In {}, the capital city is {}.|'
  'The capital city of {} is {}.|{} is governed from {}.',
  'language': 'The language of {} is {}.|People in {} speak {}.|Most people of {} speak {}.|'
  'Of {} the language is {}.|In {}, the official language is {}.|The people of {} write in {}.|'
  'The official language of {} is {}.|In {} people speak {}.',
  'animal': 'The animal of {} is the {}.|The coat of arms of {} shows a {}.|On the arms of {} there is a {}.|'
  'Of {} the animal is the {}.|The national animal of {} is the {}.|{} has chosen the {}.|'
  'The animal on the arms of {} is the {}.|The symbol of {} is the {}.',
  'colour': 'The colour of {} is {}.|The flag of {} is {}.|In {}, the flag is {}.|Of {} the colour is {}.|'
  'The team of {} plays in {}.|The national colour of {} is {}.|The colour of the flag of {} is {}.|'
  'The players of {} wear {}.',
  'product': '{} is known for {}.|{} is famous for its {}.|Most people of {} work in {}.|'
  'The main industry of {} is {}.|The economy of {} depends on {}.|In {}, the main product is {}.|'
  '{} is best known for its {}.|The main product of {} is {}.',
}


def main() -> None:
  """Reads flags, trains what is missing, measures it, prints and draws."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--base', required=True, help='a run of n-gram rows, such as g42 of sweeps/memory.py')
  parser.add_argument('--old', required=True, help='held-out text of the kind that it learned')
  parser.add_argument('--train', default='', help='new text; without it, made-up facts')
  parser.add_argument('--valid', default='', help='held-out text of the new kind')
  parser.add_argument('--epochs', type=int, default=1, help='passes over the new text')
  parser.add_argument('--out', default='out/teach')
  parser.add_argument('--only', default='*', help="ways, comma-separated patterns: 'everything,* rows'; '': none")
  arguments = parser.parse_args()
  prepare_terminal()
  out, questions = Path(arguments.out), []
  out.mkdir(parents=True, exist_ok=True)
  if not arguments.train:
    questions = write_facts(out, arguments.epochs)
    arguments.train, arguments.valid, arguments.epochs = f'{out}/facts-train.jsonl', f'{out}/facts-valid.jsonl', 1
  found_path = out / 'teach.json'
  found = read_found(found_path)
  wanted = [('base', {}, 0.0)] + [(way, settings, rate) for way, (settings, rates) in WAYS.items() for rate in rates]
  for way, settings, rate in wanted:
    name = f'{way}, {rate:g}' if rate else way
    chosen = not rate or any(fnmatch.fnmatchcase(way, pattern.strip()) for pattern in arguments.only.split(','))
    if chosen and name not in found:
      run = (
        teach(arguments, out / name.replace(', ', '-').replace(' ', '-'), settings, rate) if rate else arguments.base
      )
      lm = mmjax.load(run, 'last' if rate else 'best')
      new = ask(lm, questions) if questions else {'new': measure_text(lm, open_run(run), arguments.valid).loss}
      old = measure_text(lm, open_run(run), arguments.old).loss
      found = read_found(found_path) | {name: {'way': way, 'rate': rate, 'old': old, **new}}  # another may be at work
      write_json(found_path, found)
  found = in_order(found)
  show(table(found))
  plot(found, out / 'teach.png', 'an answer' if questions else 'a token')


def read_found(path: Path) -> dict[str, Any]:
  """Returns what was measured before."""
  return read_json(path) if path.exists() else {}


def teach(arguments: argparse.Namespace, workdir: Path, settings: dict[str, Any], rate: float) -> Path:
  """Trains the base on the new text in one way, and returns where the run is."""
  often = 10**6  # never before the end
  settings = settings | {
    'data.train_files': arguments.train, 'data.valid_files': arguments.valid, 'train.max_steps': 0,
    'train.epochs': arguments.epochs, 'train.batch_size': 4, 'train.eval_interval': often,
    'train.checkpoint_interval': often, 'train.learning_rate': rate,
  }  # fmt: skip
  flags = [f'--config.{name}={value}' for name, value in ({'train.warmup_steps': 0} | settings).items()]
  fit(load_config(f'{arguments.base}/config.json', flags), workdir, init_from=arguments.base)
  return workdir


def write_facts(folder: Path, epochs: int) -> list[tuple[str, str, str]]:
  """Writes made-up facts as facts-train.jsonl and, in other wordings, facts-valid.jsonl.

  Returns:
    The held-out wordings as questions, with answer and kind: ('The capital city of Brania is', 'Paris', 'capital').
  """
  draw_one = random.Random(0)
  starts, middles, ends = (text.split() for text in (
    'Bra Ked Vol Mar Tes Lun Zor Hal Per Quo Sil Dra Fen Gor Nim Ost Rul Tav Ulm Yar', 'a e i o u an el ir or un',
    'dia mont via sk land gard ton ria nesh bury lin dor',
  ))  # fmt: skip
  names = {}
  while len(names) < NAMES:
    names[draw_one.choice(starts) + draw_one.choice(middles) + draw_one.choice(ends)] = None
  facts = [(name, kind, draw_one.choice(ANSWERS[kind].split())) for name in names for kind in WORDINGS]
  said = [[wording.format(name, answer) for wording in WORDINGS[kind].split('|')] for name, kind, answer in facts]
  train, held_out = ([text for texts in said for text in texts[part]] for part in (slice(6), slice(6, 8)))
  for name, texts, repeats in (('train', train, epochs), ('valid', held_out, 1)):
    lines = []
    for _ in range(repeats):
      draw_one.shuffle(texts)
      lines += [json.dumps({'text': ' '.join(texts[at : at + 12])}) for at in range(0, len(texts), 12)]
    (folder / f'facts-{name}.jsonl').write_text('\n'.join(lines) + '\n')
  return [
    (wording.rpartition(' ')[0].format(name), answer, kind)
    for name, kind, answer in facts
    for wording in WORDINGS[kind].split('|')[6:]
  ]


def ask(lm: LanguageModel, questions: list[tuple[str, str, str]]) -> dict[str, float]:
  """Returns how well questions are answered, mean over them.

  Args:
    lm: the model.
    questions: from `write_facts`.

  Returns:
    new: negative log-likelihood of the answer, in nats; right: whether it is the likeliest of its ten.
  """
  nats, right = [], []
  for question, answer, kind in questions:
    answers = ANSWERS[kind].split()
    start, rows = len(lm.encode_prompt(question)), [lm.encode_prompt(f'{question} {other}') for other in answers]
    tokens_BT = np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    log_BTV = np.asarray(jax.nn.log_softmax(lm.logits(tokens_BT)))
    each = zip(rows, log_BTV, strict=True)
    nats_B = [-sum(log_TV[t - 1, row[t]] for t in range(start, len(row))) for row, log_TV in each]
    nats.append(nats_B[answers.index(answer)])
    right.append(nats[-1] == min(nats_B))
  return {'new': float(np.mean(nats)), 'right': float(np.mean(right))}


def changes(found: dict[str, Any], name: str) -> tuple[float, float]:
  """Returns what a run learned and what it forgot, both in nats."""
  base, run = found['base'], found[name]
  return base['new'] - run['new'], run['old'] - base['old']


def in_order(found: dict[str, Any]) -> dict[str, Any]:
  """Returns the base first, then the ways as WAYS has them, slower rates first."""
  ways = ['base', *WAYS]
  return dict(sorted(found.items(), key=lambda entry: (ways.index(entry[1]['way']), entry[1]['rate'])))


def table(found: dict[str, Any]) -> Table:
  """Returns every run beside the one in which everything learned most."""
  full = max((n for n in found if found[n]['way'] == 'everything'), key=lambda n: changes(found, n)[0], default='base')
  most_learned, most_forgotten = changes(found, full)
  rows = []
  for name, run in found.items():
    learned, forgotten = changes(found, name)
    of_full = ((learned, most_learned), (forgotten, most_forgotten))
    shares = [f'{part / whole:.0%}' if whole else '' for part, whole in of_full]
    right = [f'{run["right"]:.0%}'] if 'right' in run else []
    rows.append((name, *right, *(f'{x:.4f}' for x in (run['new'], run['old'], learned, forgotten)), *shares))
  right = ['right of ten'] if 'right' in found['base'] else []
  header = ('what learns, rate', *right, 'loss: new', 'old', 'learned', 'forgotten', 'share learned', 'share forgotten')
  return Table(header, rows)


def plot(found: dict[str, Any], path: Path, unit: str) -> None:
  """Draws what is learned over what is forgotten, a line for each way over its rates."""
  lines = []
  for at, way in enumerate(dict.fromkeys(run['way'] for run in found.values() if run['rate'])):
    points = [changes(found, name) for name, run in found.items() if run['way'] == way]
    learned, forgotten = np.transpose(points)
    style = {'color': f'C{at}', 'label': way, 'marker': 'o'}
    lines.append(Line(1000 * forgotten, learned, style))
  title = 'Learned over forgotten: up and to the left is better'
  axes = 'forgotten, thousandths of a nat a token of old text', f'learned, nats {unit}'
  draw(path, Panel(title, *axes, lines, log_x=True))


if __name__ == '__main__':
  main()
