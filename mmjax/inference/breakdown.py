"""The held-out loss of runs, broken down: by how often training read a token's n-gram, by script, and by file.

So one sees what a model knows. A memory that learns n-grams by heart gains where they were frequent, and one that
helps in general gains also where they were never read. What training read follows from the seed and the step of a
checkpoint, so the counts are exact. Runs that read the same share them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmjax.choices import CHECKPOINT, NGRAMS
from mmjax.config import Config, override_config
from mmjax.console import share_shown
from mmjax.data.index import split_sha256
from mmjax.data.loader import PADDING, TokenSplit, eval_batches, open_split, row_settings
from mmjax.data.ngrams import count_ngrams, ngram_keys, times_read
from mmjax.environment import own_jax_settings
from mmjax.errors import UserError
from mmjax.evaluation.evaluate import with_changed_bank
from mmjax.evaluation.token_loss import make_token_loss
from mmjax.inference.api import LanguageModel, checkpoint_to_read, load_run
from mmjax.inference.count_mix import mixed_loss, read_shares
from mmjax.inference.measure import WHERE, as_trained, open_text, text_remarks
from mmjax.model.params import BANK, model_graph
from mmjax.run.checkpoint import Checkpoints, checkpoint_name
from mmjax.run.directory import RunDir, open_run
from mmjax.run.orbax_io import MANIFEST, read_manifest
from mmjax.run.text import find_run_data

COUNTS = {'never': 0, '1 to 10': 1, '11 to 100': 11, 'more than 100': 101}  # group -> the least count in it
SCRIPTS = ('mainly Chinese', 'other')
CHINESE_SHARE = 0.3  # of the characters of a document, from which on it is mainly Chinese


class Grouping(NamedTuple):
  """Targets put into groups: their names, and the number of each target's group, int (X,)."""

  names: tuple[str, ...]
  group_X: np.ndarray


class Losses(NamedTuple):
  """What a run's model loses on each target.

  Attributes:
    run, step, tokens_read: its directory, its checkpoint, and the tokens that training had read by then.
    held_out: the text that is evaluated: models that have the same can be compared target by target.
    loss_X: float64 in nats, by what was changed: 'loss'; with a bank, 'loss_zeroed'; mixed with counts,
      'loss_with_counts'.
    groupings: of the targets.
    document_X: int, the document of each.
    remarks: on the text.
  """

  run: str
  step: int
  tokens_read: int
  held_out: tuple
  loss_X: dict[str, np.ndarray]
  groupings: dict[str, Grouping]
  document_X: np.ndarray
  remarks: list[str]


def break_down(
  runs: Sequence[str | Path],
  checkpoint: str | int = CHECKPOINT,
  ngrams: Sequence[int] = NGRAMS,
  valid_files: Sequence[str] = (),
  overrides: Sequence[str] = (),
  counts: int = 0,
  **placement: Any,
) -> Iterator[dict[str, Any]]:
  """Breaks down the loss of runs, one after the other.

  Args:
    runs: run directories; each is compared with the first of them that is evaluated on the same text and has the same
      groups: by counts, only if both read the same rows.
    checkpoint: 'best', 'last', or the number of a step.
    ngrams: sizes of the n-grams whose counts make groups.
    valid_files: paths or globs of other text, each a group of its own; by default the validation set of each run.
    overrides: '--config.section.field=value' flags that say where text is now.
    counts: tokens of the longest n-gram of those whose counts a model is mixed with (count_mix.py); 0: it is not.
    placement: dtype, attention and without_taught, as `load` takes them.

  Yields:
    For each run: run, checkpoint, tokens_read, against (the first run on the same text, or None), remarks (on the text)
    and groups: for each grouping a list of groups with group, tokens, loss and, of a memory model, loss_zeroed, in nats
    a token, the bank being zero, and loss_with_counts; where an earlier run has the same groups also against (that
    run), difference, standard_error, and both of loss_with_counts. The error is that of a mean whose independent parts
    are the held-out documents.

  Raises:
    UserError: if a run has no checkpoint, or its training or held-out text cannot be found.
  """
  first, shared = {}, {}
  for path in runs:  # what one of them lacks is refused before another is evaluated
    run = open_run(path)
    which = checkpoint_to_read(run, run.read_config(), checkpoint, placement.get('without_taught', False))
    if isinstance(step := checkpoint_name(which), int):
      Checkpoints(run.path, read_only=True).choose(step)
  for path in runs:
    losses = _losses(path, checkpoint, ngrams, valid_files, overrides, counts, shared, placement)
    yield _summary(losses, first)


@own_jax_settings()
def _losses(
  path: str | Path,
  checkpoint: str | int,
  ngrams: Sequence[int],
  valid_files: Sequence[str],
  overrides: Sequence[str],
  counts: int,
  shared: dict[tuple, Any],
  placement: dict[str, Any],
) -> Losses:
  """Evaluates one run; what depends on the text and not on the model is kept in `shared`."""
  run = open_run(path)
  config = override_config(run.read_config(), overrides, WHERE)
  lm = load_run(run, config, checkpoint, **placement)
  texts = [open_text(config, run, files) for files in valid_files or ['']]
  held_out = tuple(_what_is_read(text) for text in texts)

  def once(key: tuple, make: Callable[[], Any]) -> Any:
    if (*key, held_out) not in shared:
      shared[*key, held_out] = make()
    return shared[*key, held_out]

  groupings = {'all': once(('all',), lambda: _all(texts)), 'script': once(('script',), lambda: _by_script(texts))}
  if valid_files:
    sizes = [len(text_positions(text)) for text in texts]
    groupings['file'] = once(('file',), lambda: Grouping(tuple(valid_files), np.repeat(np.arange(len(texts)), sizes)))
  train = _training_split(run, config) if ngrams or counts else None
  rows = config.train.update_rows * lm.step
  read = (run.read_record()['identity'].get('data_sha256'), config.seed, rows, config.model.max_seq_len)
  if train:
    often = {'global_batch_rows': config.train.update_rows, 'seed': config.seed, 'steps': lm.step}
    times = once(('times', *read), lambda: times_read(train, **often))
  if counts:
    shares = once(('counts', *read), lambda: read_shares(lambda k: _target_keys(texts, k), train, times, counts))
  for n in ngrams:
    groupings[f'{n}-gram read'] = once((n, *read), lambda n=n: _by_count(texts, train, times, n))
  loss_X = _loss_of_banks(lm, config, texts)
  document_X = once(('document',), lambda: _documents(texts))
  if counts:
    loss_X['loss_with_counts'] = mixed_loss(loss_X['loss'], shares, document_X)
  tokens = read_manifest(run.checkpoints_path / str(lm.step) / MANIFEST, lm.step)['metadata']['tokens']
  remarks = [
    f'{path}{files and ", "}{files}: {remark}'
    for files, text in zip(valid_files or [''], texts, strict=True)
    for remark in text_remarks(text, config, run, files)
  ]
  return Losses(str(path), lm.step, tokens, held_out, loss_X, groupings, document_X, remarks)


def _what_is_read(text: TokenSplit) -> tuple:
  """Returns what tells the tokens of a text and its rows from those of others, wherever they lie."""
  tokenizer = text.index['tokenizer']['sha256']
  return split_sha256(text.index, text.split), tokenizer, text.max_seq_len, text.layout


def _training_split(run: RunDir, config: Config) -> TokenSplit:
  place = find_run_data(run, config)
  if not place:
    raise UserError(
      f'the training text of {run.path} cannot be found, so nobody knows which n-grams it read; give '
      '--config.data.prepared_dir=DIR, or --ngrams none without --with_counts'
    )
  return open_split(place, 'train', **row_settings(config))


def text_positions(text: TokenSplit) -> np.ndarray:
  """Returns where the targets of all rows are in a split's stream, int64 (X,), in the order of evaluation."""
  starts, stops = text.spans()
  place_XT = starts[:, None] + np.arange(text.max_seq_len)
  return place_XT[place_XT < stops[:, None]]


def _by_count(texts: Sequence[TokenSplit], train: TokenSplit, times: np.ndarray, n: int) -> Grouping:
  count_X = count_ngrams(train, times, n, _target_keys(texts, n))
  return Grouping(tuple(COUNTS), np.digitize(count_X, list(COUNTS.values())) - 1)


def _target_keys(texts: Sequence[TokenSplit], n: int) -> np.ndarray:
  return np.concatenate([ngram_keys(text, n, 0, text.n_tokens)[text_positions(text)] for text in texts])


def _all(texts: Sequence[TokenSplit]) -> Grouping:
  return Grouping(('all',), np.zeros(sum(len(text_positions(text)) for text in texts), int))


def _by_script(texts: Sequence[TokenSplit]) -> Grouping:
  parts = []
  for text in texts:
    start = text.document_start
    documents = [text.tokenizer.decode(text.stream(a, b - 1).tolist()) for a, b in zip(start, start[1:], strict=False)]
    group_X = np.array([0 if _is_chinese(document) else 1 for document in documents])
    parts.append(group_X[_document_of(text)])
  return Grouping(SCRIPTS, np.concatenate(parts))


def _is_chinese(document: str) -> bool:
  return sum('\u4e00' <= char <= '\u9fff' for char in document) > CHINESE_SHARE * len(document)


def _document_of(text: TokenSplit) -> np.ndarray:
  return np.searchsorted(text.document_start, text_positions(text), 'right') - 1


def _documents(texts: Sequence[TokenSplit]) -> np.ndarray:
  """Numbers the documents of all texts, for each target."""
  first = np.cumsum([0, *(text.n_documents for text in texts)])
  return np.concatenate([base + _document_of(text) for base, text in zip(first, texts, strict=False)])


def _loss_of_banks(lm: LanguageModel, config: Config, texts: Sequence[TokenSplit]) -> dict[str, np.ndarray]:
  """Returns what `Losses.loss_X` holds."""
  config, placement = as_trained(lm, config)
  token_loss = placement.jit(make_token_loss(config, model_graph(config), placement.attention))
  banks = {'loss': lm.params}
  if BANK in lm.params:
    banks['loss_zeroed'] = with_changed_bank(lm.params, 'loss_zeroed')
  parts = {name: [] for name in banks}
  for text in texts:
    with share_shown('evaluating') as show:
      for batch in eval_batches(text, config.train.batch_size, show):
        rows = {name: batch[name] for name in ('input', 'target', 'segment')}
        for name, params in banks.items():
          parts[name].append((token_loss(params, rows), batch['target'] != PADDING))
  return {
    name: np.concatenate([np.asarray(nll_BT, np.float64)[kept_BT] for nll_BT, kept_BT in part])
    for name, part in parts.items()
  }


def _summary(losses: Losses, first: dict[tuple, Losses]) -> dict[str, Any]:
  """Returns what `break_down` says of a run; `first` holds the first run with each text and groups, and is added to."""
  groups = {}
  for name, grouping in losses.groupings.items():
    same = losses.held_out, name, hashlib.sha256(grouping.group_X.tobytes()).digest()
    groups[name] = _groups(grouping, losses, first.setdefault(same, losses))
  return {
    'run': losses.run,
    'checkpoint': losses.step,
    'tokens_read': losses.tokens_read,
    'against': groups['all'][0].get('against'),
    'remarks': losses.remarks,
    'groups': groups,
  }


def _groups(grouping: Grouping, losses: Losses, first: Losses) -> list[dict[str, Any]]:
  found = []
  for number, group in enumerate(grouping.names):
    inside_X = grouping.group_X == number
    tokens = int(inside_X.sum())
    entry = {'group': group, 'tokens': tokens}
    entry |= {key: float(x[inside_X].mean()) if tokens else None for key, x in losses.loss_X.items()}
    if first is not losses and tokens:
      entry['against'] = first.run
      for ending in ('', '_with_counts') if 'loss_with_counts' in losses.loss_X else ('',):
        change_X = (losses.loss_X[f'loss{ending}'] - first.loss_X[f'loss{ending}'])[inside_X]
        entry[f'difference{ending}'] = float(change_X.mean())
        entry[f'standard_error{ending}'] = clustered_error(change_X, losses.document_X[inside_X])
    found.append(entry)
  return found


def clustered_error(value_X: np.ndarray, cluster_X: np.ndarray) -> float | None:
  """Returns the standard error of a mean of floats that depend on each other within a cluster; None of one cluster.

  That is the ratio estimator's: sqrt(n / (n - 1) * sum_c (sum_{x in c} (value_x - mean))^2) / X for n clusters, which
  int `cluster_X` tells apart.
  """
  _, cluster_X = np.unique(cluster_X, return_inverse=True)
  sums = np.bincount(cluster_X, value_X - value_X.mean())
  n = len(sums)
  return float(np.sqrt(n / (n - 1) * np.sum(np.square(sums))) / len(value_X)) if n > 1 else None
