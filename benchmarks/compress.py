"""Measures what a smaller bank costs:   python benchmarks/compress.py --workdir RUN [--keep 0.5,0.25]

Prints a row for the bank as training left it, in 8 and in 4 bits a value: its bytes, the loss on the run's validation
text, and greedy decoding, one prompt and 16 at a time, in turns. --keep: also the loss when only that share of the rows
is kept, those that the training text reads most, and all others become 0 or their own mean.
"""

import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mmjax.choices import BANK_BITS
from mmjax.data.loader import TokenSplit, eval_batches, open_split, row_settings
from mmjax.evaluation.evaluate import make_eval_step
from mmjax.inference.api import LanguageModel, load
from mmjax.inference.memory_reads import MemoryReader
from mmjax.kernels.packed_bank import PackedBank, pack_bank
from mmjax.model.params import BANK, model_graph
from mmjax.run.directory import RunDir
from mmjax.run.placement import place_reader
from mmjax.run.text import evaluation_data

ROWS = 8  # of a text, read at a time
PROMPT_TOKENS = 16


def main() -> None:
  """Reads flags, measures, prints the tables, writes the JSON file."""
  parser = common.parser(__doc__)
  parser.add_argument('--workdir', required=True, help='run directory')
  parser.add_argument('--positions', type=int, default=0, help='of the validation text; 0: all')
  parser.add_argument('--keep', default='', help='shares of the rows, comma-separated')
  parser.add_argument('--counted', type=int, default=500_000, help='positions of the training text that count reads')
  parser.add_argument('--new_tokens', type=int, default=256)
  arguments = parser.parse_args()
  lm = load(arguments.workdir)
  bank_MP = lm.params[BANK]
  banks = {'float32': bank_MP} | {f'{bits} bits': pack_bank(bank_MP, bits) for bits in BANK_BITS}
  lms = {name: with_bank(lm, bank) for name, bank in banks.items()}
  prepared = evaluation_data(RunDir(arguments.workdir), lm.config)
  losses = measure_losses(lm, banks, open_split(prepared, 'valid', **row_settings(lm.config)), arguments.positions)
  speeds = {rows: measure_decoding(lms, rows, arguments) for rows in (1, 16)}
  rows = [
    {
      'bank': name,
      'bytes': f'{bank.nbytes:,}',
      'times smaller': f'{bank_MP.nbytes / bank.nbytes:.2f}',
      'loss, nats': f'{losses[name]:.4f}',
      'more': f'{losses[name] - losses["float32"]:+.4f}',
      **{f'tokens/s of {n}': f'{found[name]["median"]:.0f}' for n, found in speeds.items()},
    }
    for name, bank in banks.items()
  ]
  common.print_table(rows)
  kept = measure_dropped(lm, prepared, losses['float32'], arguments) if arguments.keep else []
  if kept:
    print()
    common.print_table(kept)
  found = common.environment()
  common.write_json(arguments.json, found | {'config': lm.config.to_dict(), 'banks': rows, 'kept': kept})


def with_bank(lm: LanguageModel, bank: Array | PackedBank) -> LanguageModel:
  """Returns the model with another bank, packed or not."""
  return LanguageModel(lm.config, lm.tokenizer, lm.params | {BANK: bank}, step=lm.step)


def measure_losses(lm: LanguageModel, banks: dict[str, Any], split: TokenSplit, positions: int) -> dict[str, float]:
  """Returns the loss with each bank, in nats, as evaluations of the run compute it."""
  config = lm.config
  step = make_eval_step(model_graph(config), config, place_reader(config, dtype=config.train.dtype))
  most = -(-positions // (config.train.batch_size * config.model.max_seq_len)) if positions else None
  sums = {name: [] for name in banks}
  for batch in eval_batches(split, config.train.batch_size, most=most):
    for name, bank in banks.items():
      found = step(lm.params | {BANK: bank}, batch)
      sums[name].append((found['nll'], found['tokens']))
  return {name: float(np.divide(*np.array(jax.device_get(found), np.float64).sum(0))) for name, found in sums.items()}


def measure_decoding(lms: dict[str, LanguageModel], rows: int, arguments: Any) -> dict[str, common.Statistics]:
  """Returns tokens a second with each bank, of so many prompts together."""
  size, new_tokens = lms['float32'].tokenizer.vocab_size, arguments.new_tokens
  prompts = np.random.default_rng(0).integers(4, size, (rows, PROMPT_TOKENS)).tolist()
  made = {name: [] for name in lms}
  for turn in range(arguments.repeats + 1):
    for name, lm in lms.items():
      start = time.perf_counter()
      tokens = sum(map(len, lm.generate_tokens(prompts, max_new_tokens=new_tokens, temperature=0)))
      if turn:  # the first one compiles
        made[name].append(tokens / (time.perf_counter() - start))
  return {name: common.spread(found) for name, found in made.items()}


def measure_dropped(lm: LanguageModel, prepared: Any, loss: float, arguments: Any) -> list[dict[str, str]]:
  """Returns the lines of the second table."""
  bank_MP, reader, split = lm.params[BANK], MemoryReader(lm), open_split(prepared, 'train', **row_settings(lm.config))
  reads_M = np.zeros(len(bank_MP), np.int64)
  for batch in eval_batches(split, ROWS, most=-(-arguments.counted // (ROWS * split.max_seq_len))):
    reads_M += np.bincount(reader.read_batch(split, batch)[0].ravel(), minlength=len(bank_MP))
  order_M = np.argsort(-reads_M, kind='stable')
  banks = {}
  for share in map(float, arguments.keep.split(',')):
    dropped_X = order_M[int(share * len(order_M)) :]
    banks |= {(share, 'zero'): bank_MP.at[dropped_X].set(0)}
    banks |= {(share, 'mean'): bank_MP.at[dropped_X].set(jnp.mean(bank_MP[dropped_X], axis=0))}
  losses = measure_losses(lm, banks, open_split(prepared, 'valid', **row_settings(lm.config)), arguments.positions)
  return [
    {
      'rows kept': f'{share:.0%}',
      'reads that they have': f'{reads_M[order_M[: int(share * len(order_M))]].sum() / reads_M.sum():.2%}',
      'others': others,
      'loss, nats': f'{losses[share, others]:.4f}',
      'more': f'{losses[share, others] - loss:+.4f}',
    }
    for share, others in banks
  ]


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
