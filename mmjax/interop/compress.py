"""A run with a smaller bank, as a run directory of its own: evaluated, sampled, served and inspected as any other."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.tokenizer import load_tokenizer
from mmjax.errors import UserError
from mmjax.files import removed_unless_whole, write_file, write_json
from mmjax.kernels.packed_bank import pack_bank, unpack_bank
from mmjax.model.params import BANK
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.compressed import read_params, refuse_compressed, write_compressed_from
from mmjax.run.directory import RunDir, open_run, refuse_used, write_tokenizer
from mmjax.run.leaves import refuse_non_finite


def compress_run(workdir: Path, out: Path, bits: int, which: str) -> None:
  """Writes a run whose bank has 8 or 4 bits a value; all else is copied. Nothing is written before everything fits.

  Args:
    workdir: run directory.
    out: new run directory.
    bits: of a value of the bank.
    which: 'best', 'last' or the number of a step.

  Raises:
    UserError: if there is no such run, it has no bank or one that is packed already, its values are not finite, or
      `out` is in use.
  """
  refuse_used(out)
  source = open_run(workdir, needs_tokenizer=False)
  refuse_compressed(source, 'compressed again')
  config = source.read_config()
  params, metadata, step = read_params(source, config, which)
  if BANK not in params:
    raise UserError(f'{source.path} has no bank to compress: model.sublayer={config.model.sublayer!r}')
  refuse_non_finite(params, f'step {step} of {source.path} cannot be compressed')
  packed = jax.jit(pack_bank, static_argnames='bits')(params[BANK], bits=bits)

  with RunDir(out) as run, removed_unless_whole(out, 'config.json'):
    checkpoints = Checkpoints(out)
    checkpoints.save(step, {'params': params | {BANK: packed}, 'step': np.int32(step)}, metadata)
    write_compressed_from(run, bits, source, step)
    if source.tokenizer_path.exists():
      write_tokenizer(out / source.tokenizer_path.name, load_tokenizer(source.tokenizer_path))
    if source.run_path.exists():
      write_json(run.run_path, source.read_record(), sealed=True)
    for name in ('metrics.jsonl', 'data.json'):  # how the run was trained, and on what
      if (source.path / name).exists():
        write_file(out / name, (source.path / name).read_bytes())
    run.write_config(config.without_teaching())
  before, after = params[BANK].nbytes, packed.nbytes
  off = float(jnp.linalg.norm(unpack_bank(packed) - params[BANK]) / jnp.linalg.norm(params[BANK]))
  print(f'{out}: the bank of step {step} of {source.path} in {bits} bits a value')
  print(f'Bytes of the bank: {before:,} -> {after:,}, {before / after:.2f} times smaller')
  print(f'Rounding error: {off:.2%} of the length of the bank')
