"""What eval.py finds out about a trained model: numbers on held-out text, and continuations of prompts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmjax.config import Config
from mmjax.console import share_shown
from mmjax.data.index import read_index
from mmjax.data.loader import TokenSplit, cut_remark, open_split, row_settings
from mmjax.data.overlap import overlap_remark, shared_documents
from mmjax.data.prepare import prepare
from mmjax.data.reader import read_text
from mmjax.environment import own_jax_settings
from mmjax.errors import UserError
from mmjax.evaluation.evaluate import EvalResult, evaluate_split, make_eval_step
from mmjax.evaluation.probes import LAYER_NORMS
from mmjax.evaluation.token_loss import losses_without_one_reader
from mmjax.inference.api import LanguageModel
from mmjax.inference.settings import Sampling
from mmjax.model.params import model_graph
from mmjax.run.checkpoint import START_STEP
from mmjax.run.directory import RunDir
from mmjax.run.log import read_metrics
from mmjax.run.placement import Placement, place_reader
from mmjax.run.text import evaluation_data, find_run_data, place_for_shards

# Settings of a run that may be others when it is looked at: where its text is now, or how other text is to be read.
WHERE = tuple(
  f'data.{name}' for name in ('train_files', 'valid_files', 'prepared_dir', 'text_key', 'on_bad_line', 'workers')
)
BEGINNING_TOKENS = 12  # of a held-out document, to be continued
SHOWN_CHARS = 2000  # of a prompt, on the terminal and in reports


def read_prompts(path: str | Path) -> list[str]:
  """Returns the prompts in a UTF-8 text file, one a line; empty lines are left out.

  Raises:
    UserError: if there is no such file, it is not UTF-8, or it has no prompt.
  """
  text = read_text(path, 'prompts file')
  prompts = [line.removesuffix('\r') for line in text.split('\n') if line.strip()]  # a line may hold U+2028 or \f
  if not prompts:
    raise UserError(f"prompts file '{path}' has no prompt; write one per line")
  return prompts


def beginnings(split: TokenSplit, most: int = 3) -> list[str]:
  """Returns how the first of a split's documents, one in its middle, ... begin: at most so many prompts."""
  numbers = sorted({i * split.n_documents // most for i in range(most)})
  spans = [(split.document_start[i], split.document_start[i + 1] - 1) for i in numbers]  # without EOS
  texts = [split.tokenizer.decode(split.stream(a, min(b, a + BEGINNING_TOKENS)).tolist()) for a, b in spans]
  return [text.rstrip('\ufffd') for text in texts if text.strip('\ufffd \t\r\n')]  # it may end within a character


def measure_run(lm: LanguageModel, run: RunDir, split: TokenSplit, valid_files: str = '') -> dict[str, Any]:
  """Returns what eval.json says of a model, but for its continuations.

  Args:
    lm: the model.
    run: the directory that it comes from.
    split: what `open_text` opened of `valid_files`.
    valid_files: comma-separated paths or globs; '': the validation set of the run.

  Returns:
    checkpoint, without_taught (whether that is before a run that teaches rows taught any), valid_files, attention and
    dtype; what EvalResult holds, with the norms that training logged at this step (None where it logged none) and, of
    each reader of the bank, where there are several, `loss_zeroed`, that of the probed positions when it alone reads
    zeros; remarks: what of the text is cut off, or was learned.
  """
  config, placement = as_trained(lm, lm.config)
  found = _with_training_norms(measure_split(lm, split).to_dict(), run, lm.step)
  if len(found['bank']) > 1:
    with own_jax_settings(), share_shown('evaluating without one reader of the bank') as show:
      nats = losses_without_one_reader(config, model_graph(config), placement, lm.params, split, show)
    found['bank'] = [health | {'loss_zeroed': loss} for health, loss in zip(found['bank'], nats, strict=True)]
  return {
    'checkpoint': lm.step,
    'without_taught': lm.step == START_STEP and lm.config.memory.teach_rows > 0,
    'valid_files': valid_files,
    'attention': placement.attention,
    'dtype': placement.dtype.name,
    **found,
    'remarks': text_remarks(split, lm.config, run, valid_files),
  }


def measure_text(lm: LanguageModel, run: RunDir, valid_files: str = '') -> EvalResult:
  """Evaluates on the run's validation set or on other files; for the arguments and errors see `open_text`."""
  return measure_split(lm, open_text(lm.config, run, valid_files))


@own_jax_settings()
def measure_split(lm: LanguageModel, split: TokenSplit) -> EvalResult:
  """Evaluates on a whole split, as the training loop does but on one device.

  The run's dtype and attention are used, unless the model was loaded with others.
  """
  config, placement = as_trained(lm, lm.config)
  step = make_eval_step(model_graph(config), config, placement)
  with share_shown('evaluating') as show:
    return evaluate_split(config, step, lm.params, split, show)


def open_text(config: Config, run: RunDir, files: str = '') -> TokenSplit:
  """Opens the run's validation set, or other files cut into rows with the run's tokenizer.

  Args:
    config: of the run.
    run: its directory.
    files: comma-separated paths or globs; '': the validation set of the run.

  Raises:
    UserError: if the text cannot be read, or is not the text that the run was trained with.
  """
  if not files:
    return open_split(evaluation_data(run, config), 'valid', **row_settings(config))
  own = {'tokenizer': str(run.tokenizer_path), 'prepared_dir': place_for_shards(run, config)}
  other = dataclasses.replace(config.data, train_files=files, valid_files='', valid_fraction=0.0, **own)
  prepared = prepare(other, config.model.vocab_size)
  return open_split(prepared, 'train', **row_settings(config))  # the name of the only split there is


def as_trained(lm: LanguageModel, config: Config) -> tuple[Config, Placement]:
  """Returns how a model is evaluated: in the dtype that training has by its config, unless it was loaded with another.

  Returns:
    The config with that dtype, and where and how it is computed.
  """
  placement = place_reader(config, dtype=lm.dtype or config.train.dtype, attention=lm.attention)
  return config.with_settings({'train.dtype': placement.dtype.name}), placement


def text_remarks(split: TokenSplit, config: Config, run: RunDir, files: str = '') -> list[str]:
  """Says what of a text that `open_text` opened limits what a loss on it means: cut documents, training text."""
  entry, training = split.index['splits'][split.split], find_run_data(run, config)
  shared = None
  if files and training:
    shared = shared_documents(split.directory, entry, training, read_index(training))
  elif not files and 'also_in_train' in entry:
    shared = entry['also_in_train']
  return list(filter(None, [cut_remark({'validation': split}), overlap_remark(entry, shared, split.layout)]))


def _with_training_norms(numbers: dict[str, Any], run: RunDir, step: int) -> dict[str, Any]:
  """Adds the norms that the loop logged with its own evaluation at a step; only training knows gradients."""
  records = read_metrics(run.metrics_path)
  logged = [record for record in records if record['kind'] == 'eval' and record['step'] == step]
  norms = logged[-1] if logged else {'bank': [], 'probes': {}}
  by_layer = {health['layer']: health for health in norms['bank']}
  for health in numbers['bank']:
    health |= {name: by_layer.get(health['layer'], {}).get(name) for name in LAYER_NORMS}
  if numbers['probes']:
    numbers['probes']['row_update_ratio'] = norms.get('probes', {}).get('row_update_ratio')
  return numbers


def continue_prompts(lm: LanguageModel, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
  """Continues prompts and measures how varied the continuations are.

  Returns:
    sampling: the settings. samples: prompt (of a long one the end), continuation, tokens (EOS not counted) and
      ended (by EOS) of each.
    distinct_1, distinct_2, distinct_3: different n-grams over all n-grams of the continuations together.
    repeated_4grams: share of 4-grams that stand earlier in the same continuation, mean over continuations.
    All are counted over tokens, without prompts and EOS; null where there is no such n-gram.
  """
  settings = dataclasses.asdict(sampling)
  rows = lm.generate_tokens([lm.encode_prompt(prompt) for prompt in prompts], **settings)
  samples, texts = [], []
  for prompt, row in zip(prompts, rows, strict=True):
    ended = row[-1] == lm.tokenizer.eos_id
    texts.append(row[:-1] if ended else row)
    shown = prompt if len(prompt) <= SHOWN_CHARS else f'...{prompt[-SHOWN_CHARS:]}'
    continuation = lm.tokenizer.decode(texts[-1])
    samples.append({'prompt': shown, 'continuation': continuation, 'tokens': len(texts[-1]), 'ended': ended})
  return {
    'sampling': settings,
    'samples': samples,
    **{f'distinct_{n}': distinct_share(texts, n) for n in (1, 2, 3)},
    'repeated_4grams': repeated_share(texts, 4),
  }


def distinct_share(rows: Sequence[Sequence[int]], n: int) -> float | None:
  """Returns distinct-n, different n-grams over all n-grams of all rows: 1 where none came twice, None without any.

  Source: Li et al. 2016, arXiv:1510.03055, section 5.2.
  """
  grams = [gram for row in rows for gram in _ngrams(row, n)]
  return len(set(grams)) / len(grams) if grams else None


def repeated_share(rows: Sequence[Sequence[int]], n: int) -> float | None:
  """Returns the share of a row's n-grams that stand earlier in the row, mean over rows with any; None without any.

  Source: Welleck et al. 2020, arXiv:1908.04319, section 3, "seq-rep-n".
  """
  shares = [1 - len(set(grams)) / len(grams) for row in rows if (grams := _ngrams(row, n))]
  return sum(shares) / len(shares) if shares else None


def _ngrams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
  return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
