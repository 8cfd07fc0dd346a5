"""What a start does before its first update: it comes to a state, records itself, and says what is to be known."""

from mmjax.errors import UserError
from mmjax.evaluation.evaluate import evaluation_batches
from mmjax.run.checkpoint import NO_TRAINING, START_STEP, TOKENIZER_SHA256
from mmjax.run.processes import is_main
from mmjax.training.background import Start
from mmjax.training.first_state import new_state, restore_state
from mmjax.training.out_of_memory import explain_out_of_memory
from mmjax.training.progress import MicroBatchWatch, has_slow_updates
from mmjax.training.recorder import Recorder
from mmjax.training.setup import record_run
from mmjax.training.state import TrainState


def begin(recorder: Recorder, first: Start) -> TrainState:
  """Returns the state to go on from, the newest saved, that of `first`, or a new one; and records this start.

  Raises:
    UserError: if the weights were imported with another tokenizer, or as `record_run` says.
  """
  learner, run, inputs, checkpoints = recorder.learner, recorder.run, recorder.inputs, recorder.checkpoints
  counters = first.read_from or {}
  with explain_out_of_memory(learner.config):
    if run.ever_saved:
      state, counters = restore_state(learner, checkpoints)
      recorder.tokens, recorder.seconds = counters['tokens'], counters['seconds']
    else:
      state = new_state(learner, first.params, first.reads)
  if counters.get(TOKENIZER_SHA256, inputs.tokenizer.sha256) != inputs.tokenizer.sha256:
    raise UserError(
      f'the imported weights belong to the tokenizer with the sha256 {counters[TOKENIZER_SHA256][:12]}..., and the '
      f'text was prepared with {inputs.tokenizer.sha256[:12]}...; give theirs: --config.data.tokenizer=FILE'
    )
  start = int(state['step'])
  record_run(run, learner.config, inputs, start, first.read_from)
  if run.ever_saved:
    is_lost = start and is_main() and not run.metrics_path.exists()
    lost = f'. {run.metrics_path.name} is gone, and with it what was measured until then' if is_lost else ''
    recorder.progress.say(f'Resuming {run.path} at step {start} of {inputs.total_steps}{lost}')
  if read_from := first.read_from:  # saved at once, so that the other run is not read again
    checkpoints.save(START_STEP, state, NO_TRAINING)
    recorder.progress.say(f'Starting from {read_from["run"]}, step {read_from["step"]} ({read_from["checkpoint"]})')
  recorder.log.truncate_after(start if run.ever_saved else -1)
  return state


def before_compiling(recorder: Recorder, step: int) -> MicroBatchWatch | None:
  """Says what is to be known before the first update; returns what reports its micro-batches where they are slow."""
  learner, inputs, progress = recorder.learner, recorder.inputs, recorder.progress
  for remark in inputs.remarks:
    progress.say(remark)
  progress.update('compiling')
  config = learner.config
  if not has_slow_updates(config, learner.placement):
    return None
  evaluation = inputs.valid.read_tokens, evaluation_batches(config, inputs.valid)
  return MicroBatchWatch(config.train, config.model.max_seq_len, evaluation, step, inputs.total_steps, progress)
