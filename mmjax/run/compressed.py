"""Runs whose bank `convert compress` packed: compressed.json says so. They are read in every way, and never trained.

Its `bits` are those of a value of the bank; `run` and `step` say which checkpoint it was made from.
"""

from functools import partial
from typing import Any

import jax

from mmjax.choices import BANK_BITS
from mmjax.config import Config
from mmjax.errors import UserError
from mmjax.files import read_json, write_json
from mmjax.kernels.packed_bank import pack_bank
from mmjax.model.params import BANK, Params, abstract_params
from mmjax.run.checkpoint import Checkpoints, checkpoint_name
from mmjax.run.directory import RunDir
from mmjax.run.leaves import warn_non_finite

FILE = 'compressed.json'


def compressed_from(run: RunDir) -> dict[str, Any] | None:
  """Returns what compressed.json says; None for a run whose bank is as training left it.

  Raises:
    UserError: if the file is damaged.
  """
  if not (run.path / FILE).exists():
    return None
  found = read_json(run.path / FILE, sealed=True)
  if found.get('bits') not in BANK_BITS:
    raise UserError(
      f'{run.path / FILE} says bits={found.get("bits")!r}, must be one of {", ".join(map(str, BANK_BITS))}'
    )
  return found


def write_compressed_from(run: RunDir, bits: int, source: RunDir, step: int) -> None:
  """Writes compressed.json."""
  write_json(run.path / FILE, {'bits': bits, 'run': str(source.path.absolute()), 'step': step}, sealed=True)


def refuse_compressed(run: RunDir, what: str) -> None:
  """Raises UserError if a run's bank is packed, and so it cannot be `what`."""
  if found := compressed_from(run):
    raise UserError(
      f'{run.path} cannot be {what}: its bank has {found["bits"]} bits a value; use the run it was made from, '
      f'{found["run"]}'
    )


def compressed_remark(run: RunDir) -> str:
  """Returns a sentence about a packed bank; '' for a run whose bank is as training left it."""
  if not (found := compressed_from(run)):
    return ''
  return (
    f'The bank has {found["bits"]} bits a value. It was compressed from step {found["step"]} of {found["run"]}; '
    'what was logged in training, and the bytes and FLOPs under "Parameters", are of the bank before that.'
  )


def read_params(run: RunDir, config: Config, which: str | int) -> tuple[Params, dict[str, Any], int]:
  """Reads and verifies the parameters of a run, the bank packed where it is, and says what of them is not finite.

  Args:
    run: opened or being written; nothing in it is changed.
    config: its settings.
    which: 'best', 'last' or the number of a step.

  Returns:
    the parameters, the checkpoint's metadata and its step.

  Raises:
    UserError: if there is no such checkpoint, or it is not of such a model.
    StorageError: if no whole checkpoint is left, or not the one that was asked for.
  """
  shapes = abstract_params(config)
  if found := compressed_from(run):
    shapes[BANK] = jax.eval_shape(partial(pack_bank, bits=found['bits']), shapes[BANK])
  checkpoints = Checkpoints(run.path, read_only=True)
  params, metadata, step = checkpoints.restore_params(shapes, checkpoint_name(which))
  warn_non_finite(params, f'step {step} of {run.path}')
  return params, metadata, step
