"""From settings to everything that the loop needs: data, mesh, compiled functions, state.

In this order, so that bad input is refused before anything is written into the work directory or compiled: settings
against those of an earlier start, devices, text, then the directory's lock, the state, the compiler.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmjax.config import Config
from mmjax.data.bank_file import read_bank
from mmjax.data.index import INDEX, data_sha256, read_index
from mmjax.data.loader import TokenSplit, check_fills_batch, cut_remark, open_split, steps_of_epochs
from mmjax.data.overlap import overlap_remark
from mmjax.data.tokenizer import Tokenizer, load_tokenizer
from mmjax.errors import UserError
from mmjax.evaluation.evaluate import EvalStep, make_eval_step
from mmjax.files import write_file
from mmjax.model.lm import BANK, Params, model_graph
from mmjax.model.sublayers import SUBLAYERS
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir, write_tokenizer
from mmjax.run.identity import bank_identity, check_bank, compare_configs, compare_models
from mmjax.run.leaves import refuse_non_finite
from mmjax.run.origin import Origin, check_origin, parse_origin, refuse_starts, settle_origin, with_bank_of
from mmjax.run.placement import Placement, is_nvidia
from mmjax.run.processes import is_main
from mmjax.run.sharding import batch_shapes, placed, replicated, shardings
from mmjax.training.step import TrainState, init_state, make_train_step

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a run reads: rows to learn from, rows held out, and the tokenizer that made them."""

  tokenizer: Tokenizer
  train: TokenSplit
  valid: TokenSplit
  data_sha256: str  # of the shards' hashes
  total_steps: int
  remarks: list[str]  # what a user should know of the text


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run computes: compiled for one mesh."""

  mesh: Mesh
  step: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]
  evaluate: EvalStep
  memory: Any  # compiled.memory_analysis() of the step


def settle_config(
  run: RunDir, config: Config, allow_config_change: bool, init_from: str = ''
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
  recorded = run.read_record().get('init_from')
  origin = parse_origin(init_from) if init_from else None
  if origin and (run.was_trained or run.config_path.exists()):
    check_origin(origin, run)
  if recorded:
    origin = Origin(Path(recorded['run']), recorded['step'])
  if not (run.config_path.exists() or any(run.steps())):  # with steps it must be there: reading it says so
    if origin:
      return settle_origin(origin, config), origin
    if config.memory.bank_init == 'file' and SUBLAYERS[config.model.sublayer].uses_bank:
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
  data, train = config.data, config.train
  rows = {'max_seq_len': config.model.max_seq_len, 'layout': data.layout, 'isolate_documents': data.isolate_documents}
  train_split, valid_split = (open_split(prepared, name, **rows) for name in ('train', 'valid'))
  batch_rows = train.update_rows
  check_fills_batch(train_split, batch_rows)
  valid_split.scored_bytes  # noqa: B018 - now, and not at the first evaluation, it is found that it cannot be known
  steps = train.max_steps or steps_of_epochs(train_split.n_rows, batch_rows, train.epochs)
  index = read_index(prepared)
  valid = index['splits']['valid']
  remarks = [
    cut_remark({'training': train_split, 'validation': valid_split}),
    overlap_remark(valid, valid.get('also_in_train')),
  ]
  tokenizer = load_tokenizer(prepared / index['tokenizer']['file'])
  return Inputs(tokenizer, train_split, valid_split, data_sha256(index), steps, list(filter(None, remarks)))


def new_state(config: Config, optimizer: Any, mesh: Mesh, params: Params | None = None) -> TrainState:
  """Returns the state before the first update, of new parameters or of those given, all where the rules put it."""
  init = partial(init_state, config, optimizer)
  places = shardings(mesh, jax.eval_shape(init))
  if params is not None:
    return jax.jit(init, out_shardings=places)(params)
  state = jax.jit(init, out_shardings=places)()
  if config.memory.bank_init == 'file' and BANK in state['params']:
    bank_MP = read_bank(Path(config.memory.bank_file), state['params'][BANK].shape)
    state['params'][BANK] = jax.device_put(bank_MP, places['params'][BANK])
  return state


def restore_state(
  config: Config, optimizer: Any, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
  """Returns the newest whole state on this mesh, and its metadata; of an import, which is step 0, the parameters.

  Raises:
    UserError: if there is NaN or infinity in it, with the leaves.
  """
  target = placed(mesh, jax.eval_shape(partial(init_state, config, optimizer)))
  if checkpoints.steps() == [0]:
    params, metadata, step = checkpoints.restore_params(target['params'], 'last')
    state = new_state(config, optimizer, mesh, params)
  else:
    state, metadata, step = checkpoints.restore(target, 'last', newer=('loss_average',))
  if 'loss_average' not in state:  # saved before there was one: it begins with the next loss
    state['loss_average'] = jax.device_put(np.float32(0), target['loss_average'].sharding)
  refuse_non_finite(state, f'step {step} in {checkpoints.directory} cannot be trained on; begin again elsewhere')
  return state, metadata


def record_run(run: RunDir, config: Config, inputs: Inputs, step: int, origin: Mapping[str, Any] | None = None) -> None:
  """Writes what the run is made of into its directory: settings, tokenizer, what data and weights are, this start."""
  if not is_main():
    return
  identity = {'data_sha256': inputs.data_sha256, 'tokenizer_sha256': inputs.tokenizer.sha256}
  if origin:
    identity |= origin['bank']
  elif not Checkpoints(run.path, read_only=True).ever_saved:
    identity |= bank_identity(config)
  facts = {'prepared_dir': str(inputs.train.directory.absolute()), 'remarks': inputs.remarks}
  run.record_start(identity, step, origin, **facts)  # first: it refuses other data, before anything is replaced
  write_tokenizer(run.path / inputs.tokenizer.path.name, inputs.tokenizer)
  write_file(run.path / 'data.json', (inputs.train.directory / INDEX).read_bytes())
  run.write_config(config)


def compile_program(
  config: Config,
  inputs: Inputs,
  placement: Placement,
  optimizer: Any,
  state: TrainState,
  on_micro_batch: Callable | None = None,
) -> Program:
  """Compiles the train step for the shapes of this run; `on_micro_batch` is for `make_gradient`.

  Raises:
    UserError: if the device has too little memory, with the settings to change.
  """
  settings = {'total_steps': inputs.total_steps, 'on_micro_batch': on_micro_batch}
  compiled = compile_step(config, placement, optimizer, state, **settings)
  evaluate = make_eval_step(model_graph(config), config, placement)
  return Program(placement.mesh, compiled, evaluate, compiled.memory_analysis())


def compile_step(
  config: Config,
  placement: Placement,
  optimizer: Any,
  state: TrainState,
  *,
  total_steps: int,
  on_micro_batch: Callable | None = None,
  options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
  """Compiles the train step for the devices; it takes over the state, or what has its shapes and places.

  `options` are the compiler's, beside those of the placement.

  Raises:
    UserError: if the device has too little memory, with the settings to change.
  """
  mesh = placement.mesh
  settings = {'total_steps': total_steps, 'on_micro_batch': on_micro_batch, 'mesh': mesh}
  step = make_train_step(config, model_graph(config), optimizer, attention=placement.attention, **settings)
  places = {'donate_argnums': 0, 'out_shardings': (shardings(mesh, state), replicated(mesh))}
  with explain_out_of_memory(config):
    return placement.compile(step, state, batch_shapes(mesh, config), options=options, **places)


class explain_out_of_memory:  # noqa: N801 - used as a `with` statement
  """Turns the runtime's out-of-memory error into one sentence with the settings to change."""

  def __init__(self, config: Config, memory: Any = None):
    self.config = config
    self.memory = memory

  def __enter__(self) -> None:
    return None

  def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
    if not (isinstance(error, MemoryError) or (error is not None and 'RESOURCE_EXHAUSTED' in str(error))):
      return
    need = '' if self.memory is None else f' The step needs {describe_memory(self.memory)}.'
    train, rows = self.config.train, self.config.train.update_rows
    fit = ''
    if is_nvidia(jax.default_backend()):
      fit = ' `python -m mmjax.tools.fit` with the same --config and --gpu finds the largest micro-batch that fits.'
    raise UserError(
      f'Out of memory.{need} Lower train.batch_size={train.batch_size} and raise '
      f'train.accumulation_steps={train.accumulation_steps}, keeping their product {rows} and so the update, or set '
      f"runtime.remat='block' (now {self.config.runtime.remat!r}): a run goes on with either. A new run may also lower "
      f'model.max_seq_len={self.config.model.max_seq_len}.{fit}'
    ) from error


def describe_memory(memory: Any) -> str:
  """Says what the compiler's memory analysis found, in GiB."""
  return (
    f'{memory.temp_size_in_bytes / GIB:.2f} GiB for activations and gradients beside '
    f'{memory.argument_size_in_bytes / GIB:.2f} GiB of state and batch'
  )
