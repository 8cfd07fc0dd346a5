"""One sentence where a device has too little memory for an update, with the settings to change."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from mmjax.config import Config
from mmjax.errors import UserError
from mmjax.run.placement import is_nvidia

GIB = 1 << 30


@contextlib.contextmanager
def explain_out_of_memory(config: Config, memory: Any = None) -> Iterator[None]:
  """Turns the runtime's out-of-memory error into one sentence with the settings to change.

  Raises:
    UserError: instead of that error.
  """
  try:
    yield
  except Exception as error:
    if not (isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)):
      raise
    need = '' if memory is None else f' The step needs {describe_memory(memory)}.'
    fit = ' `python -m mmjax.tools.fit` with the same --config and --gpu finds the largest micro-batch that fits.'
    train = config.train
    raise UserError(
      f'Out of memory.{need} Lower train.batch_size={train.batch_size} and raise '
      f'train.accumulation_steps={train.accumulation_steps}, so that their product stays {train.update_rows}, or set '
      f"runtime.remat='block' (now {config.runtime.remat!r}); a run can go on with either. A new run may "
      f'also lower model.max_seq_len={config.model.max_seq_len}.{fit if is_nvidia(jax.default_backend()) else ""}'
    ) from error


def describe_memory(memory: Any) -> str:
  """Says what the compiler's memory analysis found, in GiB."""
  return (
    f'{memory.temp_size_in_bytes / GIB:.2f} GiB for activations and gradients, and '
    f'{memory.argument_size_in_bytes / GIB:.2f} GiB of state and batch'
  )
