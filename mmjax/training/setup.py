"""What a run reads and writes before its first step: settings of earlier starts, text, and the record of this start.

Bad input is refused before anything is written into the work directory or compiled: settings against those of an
earlier start first, then devices, text, the directory's lock, the state, the compiler.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from mmjax.config import Config, TrainConfig, check_learning
from mmjax.config.parameters import first_rule, parameter_table
from mmjax.config.sublayers import SUBLAYERS, layer_kinds, uses_bank
from mmjax.console import Progress
from mmjax.data.bank_file import read_bank
from mmjax.data.index import INDEX, data_sha256, read_index
from mmjax.data.loader import (
  TokenSplit,
  check_fills_batch,
  cut_remark,
  eval_batches,
  open_split,
  row_settings,
  steps_of_epochs,
)
from mmjax.data.overlap import overlap_remark
from mmjax.data.tokenizer import Tokenizer
from mmjax.errors import UserError
from mmjax.files import write_file
from mmjax.model.params import BANK, Params
from mmjax.run.compressed import refuse_compressed
from mmjax.run.directory import RunDir, write_tokenizer
from mmjax.run.identity import bank_identity, check_bank, compare_configs, compare_models, settings_changed
from mmjax.run.origin import Origin, check_origin, load_origin, parse_origin, refuse_starts, settle_origin, with_bank_of
from mmjax.run.processes import is_main
from mmjax.run.sharding import make_mesh
from mmjax.run.text import evaluation_data
from mmjax.training.learner import Learner
from mmjax.training.teach import RowCounts, count_reads, first_reads, rows_left

# Passes over the text from which on dropping rows helped, see docs/lasting_experiments.md: of n-grams of several
# tokens, and of single tokens, with which it did harm at 3 passes. From the latter on any model may learn a text by
# heart.
PASSES_OF_PAIRS = 2
PASSES_OF_TOKENS = 5
LONG_EVALUATION = 2  # times the tokens of the updates before it: then it takes two thirds of their time
LEAST_LONG_TOKENS = 100_000  # less text never takes long


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a run reads: rows to learn from, rows held out, and the tokenizer that made them."""

  tokenizer: Tokenizer
  train: TokenSplit
  valid: TokenSplit
  data_sha256: str  # of the shards' hashes
  total_steps: int
  remarks: list[str]  # what a user should know of the text and of the schedule


class Start(NamedTuple):
  """What a run starts from: parameters of another run, what that has counted, and which it was; or nothing."""

  params: Params | None = None
  reads: RowCounts | None = None
  read_from: dict[str, Any] | None = None


def settle_config(
  run: RunDir, config: Config, allow_config_change: bool, init_from: str | None = None
) -> tuple[Config, Origin | None]:
  """Compares the settings with those of an earlier start in the directory; looks only, writes nothing.

  An imported model that was never trained binds the architecture alone: data, batches and schedule are free.

  Returns:
    The settings to train with, and the other run whose weights a run that has none of its own yet starts from.

  Raises:
    UserError: if the directory holds a run with other settings or cannot hold one, or the bank or the other run that a
      new run starts from does not fit.
  """
  run.check_usable()
  refuse_compressed(run, 'trained')
  recorded = run.read_record().get('init_from')
  origin = None if init_from is None else parse_origin(init_from)
  if config.memory.teach_rows and not (origin or recorded):
    raise UserError(
      f'memory.teach_rows={config.memory.teach_rows} needs --init_from RUN: rows are taught to a model that has learned'
    )
  if origin and (run.was_trained or run.config_path.exists()):
    check_origin(origin, run)
  if recorded:
    origin = Origin(Path(recorded['run']), recorded['step'])
  if not (run.config_path.exists() or any(run.steps())):  # with steps it must be there: reading it says so
    check_learning(config)
    if origin:
      return settle_origin(origin, config), origin
    if config.memory.bank_init == 'file' and uses_bank(config.model, config.memory):
      read_bank(Path(config.memory.bank_file), (config.model.knowledge_num, config.model.knowledge_dim))
    return config, None
  old, given = run.read_config(to_train=run.was_trained), config
  if recorded:
    config = with_bank_of(old, config)
  if run.was_trained:
    compare_configs(old, config, allow_config_change)
    check_bank(run, given)
  else:
    compare_models(old, config, str(run.path))
    refuse_starts(run, old, given)
  return config, origin


def open_inputs(config: Config, prepared: Path) -> Inputs:
  """Opens both splits of a prepared directory.

  Raises:
    UserError: if the shards are not what they must be, or give less than one batch.
  """
  train = config.train
  train_split, valid_split = (open_split(prepared, name, **row_settings(config)) for name in ('train', 'valid'))
  batch_rows = train.update_rows
  check_fills_batch(train_split, batch_rows)
  valid_split.scored_bytes  # noqa: B018 - now, and not at the first evaluation, it is found that it cannot be known
  steps = train.max_steps or steps_of_epochs(train_split.n_rows, batch_rows, train.epochs)
  index = read_index(prepared)
  valid = index['splits']['valid']
  remarks = [
    cut_remark({'training': train_split, 'validation': valid_split}),
    overlap_remark(valid, valid.get('also_in_train'), config.data.layout),
    warmup_remark(train, steps),
    evaluation_remark(train, steps, valid_split.read_tokens, train_split.read_tokens / train_split.n_rows),
    passes_remark(config, steps * batch_rows / train_split.n_rows),
  ]
  return Inputs(train_split.tokenizer, train_split, valid_split, data_sha256(index), steps, list(filter(None, remarks)))


def warmup_remark(train: TrainConfig, steps: int) -> str:
  """Says of a run of so many updates that it ends in its warm-up; '' of others."""
  if train.warmup_steps < steps:
    return ''
  return (
    f'The learning rate only rises: train.warmup_steps={train.warmup_steps} is not less than the {steps} updates of '
    'the run'
  )


def evaluation_remark(train: TrainConfig, steps: int, valid_tokens: int, row_tokens: float) -> str:
  """Says of held-out text that evaluations of it take much of the run, of so many updates; '' of less text."""
  between = round(min(train.eval_interval, steps) * train.update_rows * row_tokens)
  if valid_tokens < max(LONG_EVALUATION * between, LEAST_LONG_TOKENS):
    return ''
  rarer = ', or evaluate less often (train.eval_interval)' if train.eval_interval < steps else ''
  return (
    f'Each evaluation reads {valid_tokens:,} tokens, and training only {between:,} before it: hold out less text '
    f'(data.valid_fraction, or a smaller data.valid_files){rarer}'
  )


def passes_remark(config: Config, passes: float) -> str:
  """Says of a text that it is read so often that it is learned by heart, by n-gram rows soonest; '' of others."""
  model, memory = config.model, config.memory
  table = parameter_table(config)
  if memory.teach_rows or not all(any(first_rule(table, name, 'lr').rates) for name in (BANK, 'embedding')):
    return ''  # the rows do not learn, or only they do, which is what they are taught for
  said = f'The run reads its text {passes:.1f} times'
  drops = memory.row_dropout or not any(SUBLAYERS[kind].reads_ngrams for kind in layer_kinds(model, memory))
  if not drops and passes >= (PASSES_OF_PAIRS if max(memory.ngram_of_heads()) > 1 else PASSES_OF_TOKENS):
    learned = 'rows that n-grams address learn such text by heart; memory.row_dropout=0.5 helped in tests'
    return f'{said}, and {learned} (docs/lasting_experiments.md)'
  if passes >= PASSES_OF_TOKENS:
    return f'{said}: its validation loss may rise before the end; the checkpoint with the lowest is kept'
  return ''


def read_start(run: RunDir, config: Config, origin: Origin | None, mesh: Mesh) -> Start:
  """Reads what another run gives to one that has saved nothing of its own yet."""
  if not origin or run.ever_saved:
    return Start()
  return Start(*load_origin(origin, config, mesh))


def with_background(start: Start, learner: Learner, origin: Origin | None, progress: Progress) -> Start:
  """Returns a start with counts of the rows that are usual, if rows are to be taught.

  They are those of the other run's training. If that has not counted, or if every update of it read so many that fewer
  than memory.teach_rows others are left, its validation text is read in batches of the new run, and the counts that
  leave more rows hold.

  Raises:
    UserError: if no counts leave a row that can be taught.
  """
  taught = learner.config.memory.teach_rows
  if not (start.read_from and taught):
    return start
  other, reads = RunDir(origin.path), start.reads
  counted = bool(reads.get('updates'))
  left = rows_left(reads) if counted else 0
  if left < taught:
    why = f'only {left} of its rows were not read by every update' if counted else 'its training has not counted'
    try:
      of_text = count_background(learner, start.params, other, progress, why)
    except UserError as error:
      if not left:
        raise
      progress.say(f'{error}; the counts of its training are used')
    else:
      if (left_by_text := rows_left(of_text)) > left:
        reads, left = of_text, left_by_text
  if not left:
    raise UserError(
      f'memory.teach_rows={taught}: there is no row to teach, since every batch of the validation text of {other.path} '
      'reads the whole bank; a smaller train.batch_size or a larger bank leaves some'
    )
  progress.say(
    f'Rows that can be taught: {left:,} of {len(reads["count_M"]):,}; every batch that was counted read the others'
  )
  return start._replace(reads=reads)


def count_background(learner: Learner, params: Params, other: RunDir, progress: Progress, why: str) -> RowCounts:
  """Counts which rows a run's own validation text reads, in batches of the run that is to be taught.

  Args:
    learner: of the run that is to be taught.
    params: with which the text is read.
    other: the run that they come from.
    progress: where to say so.
    why: what the counts of the other run's training lack.

  Raises:
    UserError: if the text is not to be found.
  """
  config, old = learner.config, other.read_config()
  if not other.was_trained:
    raise UserError(
      f'memory.teach_rows needs to know which rows are usual, and {other.path} is an import without text of its own; '
      'train it on such text first'
    )
  try:
    prepared = evaluation_data(other, old)
  except UserError as error:
    raise UserError(
      f'memory.teach_rows needs to know which rows are usual in {other.path}, but {why}, and its validation text is '
      f'not found: put it back to {old.data.prepared_dir!r} ({error})'
    ) from error
  split = open_split(prepared, 'valid', **row_settings(old) | {'max_seq_len': config.model.max_seq_len})
  progress.say(f'Counting which rows the validation text of {other.path} reads: {why}')
  step, reads = learner.eval_step, first_reads(old)
  for batch in eval_batches(split, config.train.batch_size):
    reads = count_reads(reads, step(params, batch)['usage_LM'])
  return reads


def record_run(run: RunDir, config: Config, inputs: Inputs, step: int, origin: Mapping[str, Any] | None = None) -> None:
  """Writes what the run is made of into its directory: settings, tokenizer, what data and weights are, this start.

  Raises:
    UserError: if the run has made more updates than the settings give, or was started with other data.
  """
  if step > inputs.total_steps:
    raise UserError(
      f'{run.path} has made {step} updates, more than the {inputs.total_steps} that train.max_steps or train.epochs '
      f'give; let it make at least {step}'
    )
  if not is_main():
    return
  identity = {'data_sha256': inputs.data_sha256, 'tokenizer_sha256': inputs.tokenizer.sha256}
  if origin:
    identity |= origin['bank']
  elif not run.ever_saved:
    identity |= bank_identity(config)
  facts = {
    'prepared_dir': str(inputs.train.directory.absolute()),
    'remarks': inputs.remarks,
    'device_count': make_mesh(config).size,  # those that it uses
  }
  if run.was_trained and run.config_path.exists():  # settings of the schedule, which a start may change
    facts['changed'] = settings_changed(run.read_config(), config)[1]
  run.record_start(identity, step, origin, **facts)  # first: it refuses other data, before anything is replaced
  write_tokenizer(run.path / inputs.tokenizer.path.name, inputs.tokenizer)
  write_file(run.path / 'data.json', (inputs.train.directory / INDEX).read_bytes())
  run.write_config(config)
