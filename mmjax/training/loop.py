"""The training loop: step, report, evaluate, save, until done or stopped.

The device is never waited for except where numbers are needed: whether an update was finite is looked at one step
later, the rest at the intervals of the config. Everything that decides what is computed is in the state and the
step number, so a resumed run goes on bit for bit (on a CPU).
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmjax.config import Config
from mmjax.console import Progress
from mmjax.data.loader import eval_batches, train_batches
from mmjax.environment import own_jax_settings
from mmjax.errors import DivergedError, StoppedError, StorageError
from mmjax.evaluation.evaluate import EvalResult, evaluate
from mmjax.evaluation.probes import add_norms, bank_health, plan_probe
from mmjax.files import named_leaves, write_json
from mmjax.model.cost import device_peak_flops, flops_per_token
from mmjax.model.lm import memory_layers
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir
from mmjax.run.leaves import non_finite
from mmjax.run.log import MetricsLog, peak_memory
from mmjax.run.nvidia import describe_devices
from mmjax.run.origin import load_origin
from mmjax.run.placement import Placement, place, slow_scatter_warning, use_compilation_cache
from mmjax.run.processes import is_main, joined
from mmjax.run.sharding import put_batch
from mmjax.run.signals import StopSignals
from mmjax.run.text import training_data
from mmjax.training.optimizer import check_parameters, make_optimizer
from mmjax.training.profile import StepProfiler
from mmjax.training.progress import MicroBatchWatch, show_step
from mmjax.training.setup import (
  Inputs,
  Program,
  compile_program,
  describe_memory,
  explain_out_of_memory,
  new_state,
  open_inputs,
  record_run,
  restore_state,
  settle_config,
)
from mmjax.training.step import TrainState

MAX_FAILED_SAVES = 3
SLOW_UPDATE_FLOPS = 1e12  # 3 to 30 s on a CPU


@own_jax_settings()
def fit(config: Config, workdir: Path, *, allow_config_change: bool = False, init_from: str = '') -> None:
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
    _fit(config, workdir, allow_config_change, init_from)


def _fit(config: Config, workdir: Path, allow_config_change: bool, init_from: str) -> None:
  use_compilation_cache(config)
  run = RunDir(workdir)
  workdir = run.path
  config, origin = settle_config(run, config, allow_config_change, init_from)
  check_parameters(config)
  placement = place(config)  # or it is refused, before anything is written
  mesh = placement.mesh
  if is_main():
    print(describe_devices(jax.devices()), flush=True)
  params = read_from = None
  if origin and not Checkpoints(workdir, read_only=True).ever_saved:
    params, read_from = load_origin(origin, config, mesh)
  inputs = open_inputs(config, training_data(run, config, origin.tokenizer if read_from else ''))
  total = inputs.total_steps
  with (
    run,
    StopSignals() as stop,
    closing(Progress(quiet=not is_main())) as progress,
    closing(MetricsLog(workdir)) as log,
  ):
    checkpoints = Checkpoints(workdir)
    optimizer = make_optimizer(config, total)
    with explain_out_of_memory(config):
      if checkpoints.ever_saved:
        state, counters = restore_state(config, optimizer, mesh, checkpoints)
        progress.say(f'Resuming {workdir} at step {int(state["step"])} of {total}')
      else:
        state, counters = new_state(config, optimizer, mesh, params), {'tokens': 0, 'seconds': 0.0}
    start = int(state['step'])
    record_run(run, config, inputs, start, read_from)
    if read_from:
      checkpoints.save(0, state, counters)  # and not from the other run again, if this one is stopped before it saves
      progress.say(f'Starting from {read_from["run"]}, step {read_from["step"]} ({origin.checkpoint})')
    log.truncate_after(start if checkpoints.ever_saved else -1)
    if start >= total:
      progress.say(f'{workdir} is finished: all {total} steps are done')
      return
    for remark in inputs.remarks:
      progress.say(remark)
    warning = slow_scatter_warning(placement.platform, metadata.version('jaxlib'))
    if warning:
      progress.say(warning)
    watch = MicroBatchWatch(config.train, config.model.max_seq_len, start, total, progress)
    told = watch if has_slow_updates(config, placement) else None
    progress.update('compiling')
    program = compile_program(config, inputs, placement, optimizer, state, told)
    progress.say(f'Attention: {placement.attention}. The step needs {describe_memory(program.memory)}.')
    Trainer(config, run, inputs, program, checkpoints, log, progress, counters).train(state, stop)


def has_slow_updates(config: Config, placement: Placement) -> bool:
  """Tells whether an update takes many seconds: on a CPU, so that the host can be told of its micro-batches cheaply."""
  tokens = config.train.update_rows * config.model.max_seq_len
  on_cpu = placement.mesh.size == 1 and placement.platform == 'cpu'
  return on_cpu and flops_per_token(config)['total'] * tokens > SLOW_UPDATE_FLOPS


class Trainer:
  """The loop and what it keeps between steps: a window of metrics, counters, the step not yet looked at."""

  def __init__(
    self,
    config: Config,
    run: RunDir,
    inputs: Inputs,
    program: Program,
    checkpoints: Checkpoints,
    log: MetricsLog,
    progress: Progress,
    counters: dict[str, Any],
  ):
    self.config, self.run, self.inputs, self.program = config, run, inputs, program
    self.checkpoints, self.log, self.progress = checkpoints, log, progress
    self.tokens, self.seconds = counters['tokens'], counters['seconds']
    self.memory_layers = memory_layers(config)
    self.window = Window()
    self.failed_saves = 0
    self.flops_per_token = flops_per_token(config)['total']
    peak = device_peak_flops(jax.devices()[0].device_kind, config.train.dtype)
    self.peak_flops = peak and peak * program.mesh.size

  def train(self, state: TrainState, stop: StopSignals) -> None:
    """Runs from the state's step to the end."""
    train, start, total = self.config.train, int(state['step']), self.inputs.total_steps
    rows = train.update_rows
    unchecked = None
    batches = train_batches(self.inputs.train, global_batch_rows=rows, seed=self.config.seed, start_step=start)
    traced = train.profile_steps if is_main() else 0
    profile = StepProfiler(self.run.path / 'profile', traced, self.program.step, self.progress.say)
    with closing(batches), closing(profile):
      for step, batch in zip(range(start + 1, total + 1), batches, strict=False):
        with explain_out_of_memory(self.config, self.program.memory):
          device_batch = put_batch(self.program.mesh, batch, train.accumulation_steps)
          profile.before_step(state)
          state, metrics = self.program.step(state, device_batch)
          profile.after_step(state)
          if unchecked is not None:
            self.check(*unchecked, state)
        unchecked = (step, batch, metrics)
        self.window.add(metrics)
        stopping = step < total and stop.requested(step)
        evaluates = step == total or (step % train.eval_interval == 0 and not stopping)
        saves = evaluates or stopping or step % train.checkpoint_interval == 0
        if saves or step % train.log_interval == 0:
          self.report(step)
        if saves:
          self.check(*unchecked, state)
          unchecked = None
          metric = self.evaluate(step, state, metrics).loss if evaluates else None
          self.save(step, state, metric, final=stopping or step == total)
        if stopping:
          raise StoppedError(f'Stopped at step {step} of {total}; the same command goes on from there.')
    self.progress.say(f'Done: {total} steps, {self.tokens:,} tokens, {self.seconds / 60:.1f} minutes of training')

  def check(self, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array], state: TrainState) -> None:
    """Logs an update that was skipped; ends the run after too many in a row."""
    if bool(metrics['applied']):
      return
    skipped, loss, average = int(metrics['skipped']), float(metrics['loss']), float(metrics['loss_average'])
    reason = 'spike' if metrics['finite'] else 'not finite'
    self.log.write(
      {
        'kind': 'skipped',
        'step': step,
        'reason': reason,
        'loss': loss,
        'loss_average': average,
        'grad_norm': float(metrics['grad_norm']),
        'in_a_row': skipped,
        'row_ids': batch['row_id'].tolist(),
      }
    )
    what = f'loss {loss:.4f} after an average of {average:.4f}' if reason == 'spike' else 'update not finite'
    self.progress.say(f'Step {step}: {what}; update skipped ({skipped} in a row)')
    if skipped >= self.config.train.max_skipped_updates:
      folder = write_divergence_dump(self.run, step, batch, metrics, state)
      raise DivergedError(
        f'Diverged: {skipped} updates in a row were not finite or spikes, up to step {step} '
        f'(train.max_skipped_updates); batch and norms are in {folder}. '
        'A lower train.learning_rate or a smaller train.grad_clip may help.'
      )

  def report(self, step: int) -> None:
    """Writes one line of metrics over the steps since the last one."""
    line = self.window.summary()
    rate = line['tokens'] / line['seconds']
    self.tokens += line['tokens']
    self.seconds += line['seconds']
    peak_bytes, peak_of = peak_memory()
    line |= {
      'kind': 'train',
      'step': step,
      'tokens': self.tokens,
      'seconds': self.seconds,
      'tokens_per_second': rate,
      'mfu': rate * self.flops_per_token / self.peak_flops if self.peak_flops else None,
      'peak_bytes': peak_bytes,
      'peak_bytes_of': peak_of,
      'bank': self.window.bank(self.memory_layers),
    }
    line = add_norms(line, self.window.steps)
    self.log.write(line)
    show_step(self.progress, self.inputs.total_steps, line)
    self.window = Window()

  def evaluate(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> EvalResult:
    """Evaluates on the whole validation set; `metrics` are those of the step before."""
    with self.window.pause(), explain_out_of_memory(self.config):
      split = self.inputs.valid
      batches, plan = eval_batches(split, self.config.train.batch_size), plan_probe(self.config, split)
      result = evaluate(self.program.evaluate, state['params'], batches, split.scored_bytes, plan)
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
      raise DivergedError(f'Step {step} was not saved: {broken}; the checkpoints before it are as they were.')
    try:
      with self.window.pause():
        self.checkpoints.save(step, state, {'tokens': self.tokens, 'seconds': self.seconds}, metric)
      self.failed_saves = 0
    except StorageError as error:
      self.failed_saves += 1
      self.progress.say(f'Checkpoint {step} failed ({self.failed_saves} in a row): {error}')
      if final or self.failed_saves >= MAX_FAILED_SAVES:
        raise


class Window:
  """Sums the metrics of the steps between two reports, on the device, and reads them once."""

  def __init__(self) -> None:
    self.steps: list[dict[str, jax.Array]] = []
    self.usage_LM: jax.Array | None = None
    self.paused_seconds = 0.0
    self.start = time.perf_counter()

  def add(self, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of one step without waiting for them."""
    self.steps.append({name: value for name, value in metrics.items() if name not in ('usage_LM', 'grad_norm_N')})
    if 'usage_LM' in metrics:
      self.usage_LM = metrics['usage_LM'] if self.usage_LM is None else self.usage_LM + metrics['usage_LM']

  @contextmanager
  def pause(self) -> Iterator[None]:
    """Stops the clock while something other than training runs."""
    jax.block_until_ready(self.steps)
    start = time.perf_counter()
    yield
    self.paused_seconds += time.perf_counter() - start

  def summary(self) -> dict[str, Any]:
    """Returns means over the updates that were applied, the last learning rate, sums of tokens, seconds."""
    steps = jax.device_get(self.steps)
    seconds = time.perf_counter() - self.start - self.paused_seconds
    applied = [m for m in steps if m['applied']]
    means = {
      name: float(np.mean([m[name] for m in applied])) if applied else math.nan
      for name in ('loss', 'aux_loss', 'accuracy', 'grad_norm')
    }
    tokens = int(sum(m['tokens'] for m in steps))
    return means | {'learning_rate': float(steps[-1]['learning_rate']), 'tokens': tokens, 'seconds': seconds}

  def bank(self, layers: list[int]) -> list[dict[str, Any]]:
    """Returns the health of the bank as each layer with a memory used it; empty for a model without one."""
    if self.usage_LM is None:
      return []
    usage_LM = np.asarray(self.usage_LM)
    return [{'layer': layer, **bank_health(counts_M)} for layer, counts_M in zip(layers, usage_LM, strict=True)]


def write_divergence_dump(
  run: RunDir, step: int, batch: dict[str, np.ndarray], metrics: dict[str, jax.Array], state: TrainState
) -> Path:
  """Writes the batch that broke a run and the norms of every parameter and its gradient, and returns the folder."""
  folder = run.path / 'diverged'
  leaves = named_leaves(state['params'])
  names = [name for name, _ in leaves]
  norms = [float(jax.numpy.linalg.norm(leaf)) for _, leaf in leaves]  # every process has its part of them
  if not is_main():
    return folder
  folder.mkdir(exist_ok=True)
  np.savez(folder / f'batch-{step}.npz', **batch)
  write_json(
    folder / f'step-{step}.json',
    {
      'step': step,
      'row_ids': batch['row_id'].tolist(),
      'loss': float(metrics['loss']),
      'grad_norm': float(metrics['grad_norm']),
      'loss_average': float(metrics['loss_average']),
      'parameter_norms': dict(zip(names, norms, strict=True)),
      'gradient_norms': dict(zip(names, metrics['grad_norm_N'].tolist(), strict=True)),
    },
  )
  return folder
