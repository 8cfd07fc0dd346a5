"""The training loop: step, report, evaluate, save, until done or stopped.

On the way from the command to the gradient it stands between train.py, which calls `fit`, and learner.py, which
compiles the update that `Trainer.train` makes again and again. What is there before the first step comes from setup.py.

The device is never waited for except where numbers are needed: whether an update was finite is looked at one step
later, the rest at the intervals of the config. Everything that decides what is computed is in the state and the
step number, so a resumed run goes on bit for bit (on a CPU).
"""

import dataclasses
from contextlib import closing
from pathlib import Path

import jax
import numpy as np

from mmjax.config import Config
from mmjax.console import Progress
from mmjax.data.loader import train_batches
from mmjax.environment import own_jax_settings
from mmjax.errors import DivergedError, StoppedError, StorageError
from mmjax.evaluation.evaluate import EvalResult, EvalStep, evaluate_split
from mmjax.evaluation.probes import add_norms
from mmjax.run.checkpoint import START_STEP, Checkpoints
from mmjax.run.directory import RunDir
from mmjax.run.leaves import non_finite
from mmjax.run.log import MetricsLog
from mmjax.run.nvidia import describe_devices
from mmjax.run.placement import place, use_compilation_cache
from mmjax.run.processes import is_main, joined
from mmjax.run.sharding import put_batch
from mmjax.run.signals import StopSignals
from mmjax.run.text import training_data
from mmjax.training.learner import Learner
from mmjax.training.optimizer import check_parameters
from mmjax.training.out_of_memory import describe_memory, explain_out_of_memory
from mmjax.training.profile import StepProfiler
from mmjax.training.progress import MicroBatchWatch, has_slow_updates, show_step
from mmjax.training.setup import Inputs, Start, open_inputs, read_start, record_run, settle_config, with_background
from mmjax.training.step import TrainState
from mmjax.training.window import Window, describe_skipped, dump_divergence

MAX_FAILED_SAVES = 3


@own_jax_settings()
def fit(config: Config, workdir: Path, *, allow_config_change: bool = False, init_from: str | None = None) -> None:
  """Trains a model in `workdir`, or goes on with the one that is there.

  Args:
    config: the run's settings.
    workdir: run directory, created if it does not exist.
    allow_config_change: resume although settings of the schedule differ.
    init_from: RUN[@best|last|STEP], a run whose weights and tokenizer a new run starts from.

  Raises:
    UserError: if the input or the directory is not usable.
    DivergedError: after train.max_skipped_updates skipped updates in a row.
    StorageError: after three failed saves in a row, or if no whole checkpoint is left.
    StoppedError: if a signal ended the run; its state is saved.
  """
  with joined(config):
    use_compilation_cache(config)
    run = RunDir(workdir)
    config, origin = settle_config(run, config, allow_config_change, init_from)
    remark = check_parameters(config)
    placement = place(config)  # refuses what does not fit the devices, before anything is written
    if is_main():
      print(*filter(None, (describe_devices(jax.devices()), remark)), sep='\n', flush=True)
    source = read_start(run, config, origin, placement.mesh)
    inputs = open_inputs(config, training_data(run, config, origin.tokenizer if source.read_from else ''))
    with (
      run,
      StopSignals() as stop,
      closing(Progress(quiet=not is_main())) as progress,
      closing(MetricsLog(run.path)) as log,
    ):
      learner = Learner(config, placement, inputs.total_steps)
      source = with_background(source, learner, origin, progress)
      checkpoints = Checkpoints(run.path, keep_start=bool(config.memory.teach_rows))
      trainer = Trainer(learner, run, inputs, checkpoints, log, progress)
      trainer.train(trainer.begin(source), stop)


@dataclasses.dataclass
class Trainer:
  """The loop and what it keeps between steps: counters over all starts of the run, a window of metrics."""

  learner: Learner
  run: RunDir
  inputs: Inputs
  checkpoints: Checkpoints
  log: MetricsLog
  progress: Progress
  tokens: int = 0
  seconds: float = 0.0
  failed_saves: int = 0
  window: Window = dataclasses.field(init=False)  # its clock runs from when it is made

  def begin(self, source: Start) -> TrainState:
    """Returns the state to go on from: the newest saved, a new one, or one of another run's parameters and counts."""
    config, say = self.learner.config, self.progress.say
    with explain_out_of_memory(config):
      if self.checkpoints.ever_saved:
        state, counters = self.learner.restore_state(self.checkpoints)
        self.tokens, self.seconds = counters['tokens'], counters['seconds']
      else:
        state = self.learner.new_state(source.params, source.reads)
    start = int(state['step'])
    record_run(self.run, config, self.inputs, start, source.read_from)
    if self.checkpoints.ever_saved:
      say(f'Resuming {self.run.path} at step {start} of {self.inputs.total_steps}')
    if read_from := source.read_from:  # saved at once, so that the other run is not read again
      self.checkpoints.save(START_STEP, state, {'tokens': 0, 'seconds': 0.0})
      say(f'Starting from {read_from["run"]}, step {read_from["step"]} ({read_from["checkpoint"]})')
    self.log.truncate_after(start if self.checkpoints.ever_saved else -1)
    return state

  def compile(self, state: TrainState) -> jax.stages.Compiled:
    """Returns the update, and says what is to be known before the first."""
    learner, config, say = self.learner, self.learner.config, self.progress.say
    for remark in self.inputs.remarks:
      say(remark)
    start, total = int(state['step']), self.inputs.total_steps
    watch = MicroBatchWatch(config.train, config.model.max_seq_len, start, total, self.progress)
    self.progress.update('compiling')
    compiled = learner.compile(state, watch if has_slow_updates(config, learner.placement) else None)
    say(f'Attention: {learner.placement.attention}. The step needs {describe_memory(compiled.memory_analysis())}.')
    return compiled

  def train(self, state: TrainState, stop: StopSignals) -> None:
    """Runs from the state's step to the end."""
    config, start, total = self.learner.config, int(state['step']), self.inputs.total_steps
    if start >= total:
      self.progress.say(f'{self.run.path} is finished: all {total} steps are done')
      return
    train, update, eval_step = config.train, self.compile(state), self.learner.eval_step()
    memory = update.memory_analysis()
    rows = {'global_batch_rows': train.update_rows, 'seed': config.seed, 'start_step': start}
    traced = train.profile_steps if is_main() else 0
    profile = StepProfiler(self.run.path / 'profile', traced, update, self.progress.say)
    self.window, unchecked = Window(), None
    with closing(train_batches(self.inputs.train, **rows)) as batches, closing(profile):
      for step, batch in zip(range(start + 1, total + 1), batches, strict=False):
        with explain_out_of_memory(config, memory):
          device_batch = put_batch(self.learner.placement.mesh, batch, train.accumulation_steps)
          profile.before_step(state)
          state, metrics = update(state, device_batch)
          profile.after_step(state)
          if unchecked is not None:
            self.check(*unchecked, state)
        unchecked = (step, batch, metrics)
        self.window.add(metrics)
        stopping = step < total and stop.requested(step)
        evaluates = step == total or step % train.eval_interval == 0  # also before a stop: it may be the best
        saves = evaluates or stopping or step % train.checkpoint_interval == 0
        if saves or step % train.log_interval == 0:
          self.report(step)
        if saves:
          self.check(*unchecked, state)
          unchecked = None
          loss = self.evaluate(eval_step, step, state, metrics).loss if evaluates else None
          self.save(step, state, loss, final=stopping or step == total)
        if stopping:
          raise StoppedError(f'Stopped at step {step} of {total}; the same command goes on from there.')
    self.progress.say(f'Done: {total} steps, {self.tokens:,} tokens, {self.seconds / 60:.1f} minutes of training')

  def check(self, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array], state: TrainState) -> None:
    """Logs an update that was skipped; raises DivergedError after train.max_skipped_updates in a row."""
    if bool(metrics['applied']):
      return
    line, said = describe_skipped(step, batch, metrics)
    self.log.write(line)
    self.progress.say(said)
    train = self.learner.config.train
    if line['in_a_row'] >= train.max_skipped_updates:
      raise dump_divergence(self.run.path / 'diverged', train, step, batch, metrics, state)

  def report(self, step: int) -> None:
    """Writes one line of metrics over the steps since the last one."""
    line = {'step': step} | self.window.report(self.learner.config, self.learner.placement.mesh)
    self.tokens += line['tokens']
    self.seconds += line['seconds']
    line |= {'tokens': self.tokens, 'seconds': self.seconds}
    self.log.write(line)
    show_step(self.progress, self.inputs.total_steps, line)
    self.window = Window()

  def evaluate(self, eval_step: EvalStep, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> EvalResult:
    """Evaluates on the whole validation set; `metrics` are those of the step before, with norms float32 (X,)."""
    config = self.learner.config
    with self.window.pause(), explain_out_of_memory(config):
      result = evaluate_split(config, eval_step, state['params'], self.inputs.valid)
    self.log.write(add_norms({'kind': 'eval', 'step': step, **result.to_dict()}, [metrics]))
    self.progress.say(
      f'Step {step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, '
      f'{result.bits_per_byte:.4f} bits per byte, accuracy {result.accuracy:.2%}'
    )
    return result

  def save(self, step: int, state: TrainState, metric: float | None, final: bool) -> None:
    """Saves; a failure is survived until the third in a row, or the last save of the run.

    Raises:
      DivergedError: if there is NaN or infinity in the state, whatever put it there; the steps saved before stay.
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
