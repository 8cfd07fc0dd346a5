"""The training loop: step, report, evaluate, save, until done or stopped.

On the way to the gradient it stands between train.py, which calls `fit`, and learner.py, which compiles the update.
Settings and text come from setup.py, the first state from begin.py, and recorder.py writes what comes of a step.

The device is never waited for except where numbers are needed: whether an update was finite is looked at one step
later, the rest at the intervals of the config. Everything that decides what is computed is in the state and the
step number, so a resumed run goes on bit for bit (on a CPU).
"""

from contextlib import closing
from pathlib import Path

from mmjax.config import Config
from mmjax.console import Progress
from mmjax.data.loader import train_batches
from mmjax.environment import own_jax_settings
from mmjax.errors import StoppedError
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir
from mmjax.run.log import MetricsLog
from mmjax.run.nvidia import describe_devices
from mmjax.run.placement import place, use_compilation_cache
from mmjax.run.processes import is_main, joined
from mmjax.run.sharding import put_batch
from mmjax.run.signals import StopSignals
from mmjax.run.text import training_data
from mmjax.training.background import read_start, with_background
from mmjax.training.begin import before_compiling, begin
from mmjax.training.learner import Learner
from mmjax.training.optimizer import check_parameters
from mmjax.training.out_of_memory import describe_memory, explain_out_of_memory
from mmjax.training.profile import StepProfiler
from mmjax.training.recorder import Recorder
from mmjax.training.setup import open_inputs, settle_config
from mmjax.training.state import TrainState
from mmjax.training.teach import rows_taught
from mmjax.training.window import Window


@own_jax_settings()
def fit(config: Config, workdir: Path, *, allow_config_change: bool = False, init_from: str | None = None) -> None:
  """Trains a model in `workdir`, or goes on with the one that is there.

  Args:
    config: the run's settings.
    workdir: run directory, created if it does not exist.
    allow_config_change: resume although settings of the schedule differ.
    init_from: RUN[@best|last|STEP], a run whose weights and tokenizer a new run starts from.

  Raises:
    UserError: if the input or the directory is not usable, or the device has too little memory.
    DivergedError: after train.max_skipped_updates skipped updates in a row.
    StorageError: after three failed saves in a row, or if no whole checkpoint is left.
    StoppedError: if a signal ended the run; its state is saved.
  """
  with joined(config):
    use_compilation_cache(config)
    run = RunDir(workdir)
    config, origin = settle_config(run, config, allow_config_change, init_from)  # origin: the run of init_from
    remark = check_parameters(config)
    placement = place(config)  # refuses what does not fit the devices, before anything is written
    if is_main():
      print(*filter(None, (describe_devices(placement.mesh.devices.ravel()), remark)), sep='\n', flush=True)
    first = read_start(run, config, origin, placement.mesh)
    inputs = open_inputs(config, training_data(run, config, origin.tokenizer if first.read_from else ''))
    with (
      run,
      StopSignals() as stop,
      closing(Progress(quiet=not is_main())) as progress,
      closing(MetricsLog(run.path)) as log,
    ):
      learner = Learner(config, placement, inputs.total_steps)
      first = with_background(first, learner, origin, progress)  # which rows origin read, if rows are to be taught
      checkpoints = Checkpoints(run.path, keep_start=bool(config.memory.teach_rows))
      recorder = Recorder(learner, run, inputs, checkpoints, log, progress)
      train(recorder, begin(recorder, first), stop)


def train(recorder: Recorder, state: TrainState, stop: StopSignals) -> None:
  """Runs from the state's step to the end.

  Raises:
    UserError, DivergedError, StorageError, StoppedError: while it trains, as `fit` says.
  """
  learner, run, inputs, say = recorder.learner, recorder.run, recorder.inputs, recorder.progress.say
  config, start, total = learner.config, int(state['step']), inputs.total_steps
  if start >= total:
    say(f'{run.path} is finished: all {total} steps are done')
    return
  watch = before_compiling(recorder, start)  # of micro-batches, where updates are slow
  settings, update = config.train, learner.compile(state, watch)
  needs = update.memory_analysis()
  say(f'Attention: {learner.placement.attention}. The step needs {describe_memory(needs)}.')
  rows = {'global_batch_rows': settings.update_rows, 'seed': config.seed, 'start_step': start}
  profile = StepProfiler(run.path / 'profile', settings.profile_steps if is_main() else 0, update, say)
  recorder.window = Window()
  unchecked = None  # the last update: it is looked at while the next one runs
  with closing(train_batches(inputs.train, **rows)) as batches, closing(profile):
    for step, batch in zip(range(start + 1, total + 1), batches, strict=False):
      with explain_out_of_memory(config, needs):
        device_batch = put_batch(learner.placement.mesh, batch, settings.accumulation_steps)
        profile.before_step(state)
        state, metrics = update(state, device_batch)
        profile.after_step(state)
        if unchecked is not None:
          recorder.check(*unchecked, state)
      unchecked = (step, batch, metrics)
      recorder.window.add(metrics)
      stopping = step < total and stop.requested(step)
      evaluates = step == total or step % settings.eval_interval == 0  # also before a stop: it may be the best
      saves = evaluates or stopping or step % settings.checkpoint_interval == 0
      if saves:
        profile.stop(state)
      if saves or step % settings.log_interval == 0:
        recorder.report(step)
      if saves:
        recorder.check(*unchecked, state)
        unchecked = None
        loss = recorder.evaluate(step, state, metrics).loss if evaluates else None
        stopping = stopping or (step < total and stop.requested(step))  # while it evaluated
        recorder.save(step, state, loss, final=stopping or step == total)
        stopping = stopping or (step < total and stop.requested(step) and not recorder.failed_saves)  # while it saved
      if stopping:
        raise StoppedError(f'Stopped at step {step} of {total}; the same command goes on from there.')
  say(f'Done: {total} steps, {recorder.describe_end(loss)}')
  if config.memory.teach_rows:
    params, state = state['params'], None  # what it held is needed no more, and its memory is
    say(rows_taught(recorder.checkpoints, learner.shapes['params'], params))
