"""What a run leaves of itself while it trains: lines of metrics, evaluations, checkpoints, and why it broke off."""

import dataclasses
from functools import partial

import jax
import numpy as np

from mmjax.choices import PAST_BEST
from mmjax.console import Progress, format_seconds
from mmjax.errors import DivergedError, StorageError
from mmjax.evaluation.evaluate import EvalResult, evaluate_split
from mmjax.evaluation.probes import add_norms
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir
from mmjax.run.leaves import non_finite
from mmjax.run.log import MetricsLog
from mmjax.training.learner import Learner
from mmjax.training.out_of_memory import explain_out_of_memory
from mmjax.training.progress import show_evaluation, show_step
from mmjax.training.setup import Inputs
from mmjax.training.state import TrainState
from mmjax.training.window import Window, describe_skipped, write_divergence

MAX_FAILED_SAVES = 3


@dataclasses.dataclass
class Recorder:
  """Where the loop writes and says what comes of its steps, with counters over all starts of the run."""

  learner: Learner
  run: RunDir
  inputs: Inputs
  checkpoints: Checkpoints
  log: MetricsLog
  progress: Progress
  tokens: int = 0
  seconds: float = 0.0
  failed_saves: int = 0
  window: Window = dataclasses.field(init=False)  # of metrics; its clock runs from when it is made

  def check(self, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array], state: TrainState) -> None:
    """Logs an update that was skipped; raises DivergedError after train.max_skipped_updates in a row."""
    if bool(metrics['applied']):
      return
    line, said = describe_skipped(step, batch, metrics)
    self.log.write(line)
    self.progress.say(said)
    train = self.learner.config.train
    if line['in_a_row'] >= train.max_skipped_updates:
      folder = self.run.path / 'diverged'
      write_divergence(folder, step, batch, metrics, state)
      raise DivergedError(
        f'Diverged: {line["in_a_row"]} updates in a row were not finite or spikes, up to step {step} '
        f'(train.max_skipped_updates={train.max_skipped_updates}); batch and norms are in {folder}. A '
        f'train.learning_rate below {train.learning_rate:g} or a {"smaller " if train.grad_clip else ""}'
        f'train.grad_clip{"" if train.grad_clip else " above 0"} (now {train.grad_clip:g}) may help.'
      )

  def report(self, step: int) -> None:
    """Writes one line of metrics over the steps since the last one."""
    line = {'step': step} | self.window.report(self.learner.config, self.learner.placement.mesh)
    self.tokens += line['tokens']
    self.seconds += line['seconds']
    line |= {'tokens': self.tokens, 'seconds': self.seconds}
    self.log.write(line)
    show_step(self.progress, self.inputs.total_steps, line)
    self.window = Window()

  def evaluate(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> EvalResult:
    """Evaluates on the whole validation set; `metrics` are those of the step before, with norms float32 (X,)."""
    config = self.learner.config
    show = partial(show_evaluation, self.progress, step, self.inputs.total_steps)
    with self.window.pause(), explain_out_of_memory(config):
      result = evaluate_split(config, self.learner.eval_step, state['params'], self.inputs.valid, show)
    self.log.write(add_norms({'kind': 'eval', 'step': step, **result.to_dict()}, [metrics]))
    self.progress.say(
      f'Step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, '
      f'{result.bits_per_byte:.4f} bits per byte, accuracy {result.accuracy:.2%}'
    )
    return result

  def describe_end(self, loss: float) -> str:
    """Says what the run came to, and where its validation loss was clearly lower than the last one."""
    said = f'{self.tokens:,} tokens, {format_seconds(self.seconds)} of training'
    if (best := self.checkpoints.best) and loss - best[0] > PAST_BEST:
      said += (
        f'\nThe validation loss was {best[0]:.4f} at step {best[1]} and is {loss:.4f} now: eval.py and mmjax.load take '
        f'the checkpoint of step {best[1]}, unless they are told to take the last'
      )
    return said

  def save(self, step: int, state: TrainState, metric: float | None, final: bool) -> None:
    """Saves; a failure is survived until the third in a row, or the last save of the run.

    Raises:
      DivergedError: if there is NaN or infinity in the state, whatever put it there; the steps saved before stay.
      StorageError: if a failure is not survived.
    """
    if broken := non_finite(state):
      raise DivergedError(f'Step {step} was not saved: {broken}; earlier checkpoints are unchanged.')
    try:
      with self.window.pause():
        self.checkpoints.save(step, state, {'tokens': self.tokens, 'seconds': self.seconds}, metric)
      self.failed_saves = 0
    except StorageError as error:
      self.failed_saves += 1
      self.progress.say(f'Checkpoint {step} failed ({self.failed_saves} in a row): {error}')
      if final or self.failed_saves >= MAX_FAILED_SAVES:
        raise
