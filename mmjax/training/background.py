"""What a run takes over from another whose weights it starts from, and which rows of its bank are usual there."""

from typing import Any, NamedTuple

from jax.sharding import Mesh

from mmjax.config import Config
from mmjax.console import Progress
from mmjax.data.loader import eval_batches, open_split, row_settings
from mmjax.errors import UserError
from mmjax.model.params import Params
from mmjax.run.directory import RunDir
from mmjax.run.origin import Origin, load_origin
from mmjax.run.text import evaluation_data
from mmjax.training.learner import Learner
from mmjax.training.teach import RowCounts, count_reads, first_reads, rows_left


class Start(NamedTuple):
  """What a run starts from: parameters of another run, what that has counted, and which it was; or nothing."""

  params: Params | None = None
  reads: RowCounts | None = None
  read_from: dict[str, Any] | None = None


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
