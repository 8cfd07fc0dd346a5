"""A bank in a file: one float32 tensor `memory_bank` (M, P) in safetensors, its sha256 beside it, and its texts.

bank.safetensors          the rows
bank.safetensors.sha256   checked when it is there
bank.jsonl                {"row": r, "text": ...} for each row, in order: what a row was before training
bank.safetensors.work/    what a build has made of them so far; gone when it ends
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mmjax.errors import UserError
from mmjax.files import check_sha256, write_file

STAGED_TEXTS = 'texts.jsonl'  # in the stages of a build


def read_bank(path: Path, shape: tuple[int, int]) -> np.ndarray:
  """Reads the rows that a bank starts from.

  Args:
    path: a safetensors file with `memory_bank`.
    shape: (M, P) that the model needs.

  Returns:
    float32 (M, P).

  Raises:
    UserError: if the file is missing, damaged, or of another shape.
  """
  from mmjax.model.params import BANK  # here: to say where texts lie takes no JAX

  if not path.is_file():
    raise UserError(f"no memory.bank_file '{path}'; python -m mmjax.tools.bank build makes one")
  check_sha256(path)
  try:
    with safe_open(path, 'numpy') as file:
      dtype = file.get_slice(BANK).get_dtype()
      if dtype != 'F32':
        raise UserError(f"'{path}' holds a bank of {dtype}; it must be F32")
      bank_MP = file.get_tensor(BANK)
  except (SafetensorError, OSError) as error:
    raise UserError(f"'{path}' is not a bank: {error}") from None
  if bank_MP.shape != tuple(shape):
    raise UserError(
      f"'{path}' holds a bank of {bank_MP.shape}, but model.knowledge_num and knowledge_dim need {tuple(shape)}"
    )
  if not np.isfinite(bank_MP).all():
    wrong = int((~np.isfinite(bank_MP)).sum())
    raise UserError(f"'{path}' must hold finite values, but {wrong:,} of {bank_MP.size:,} are NaN or infinite")
  return bank_MP


def texts_path(bank: Path) -> Path:
  """Returns where the texts of a bank file lie."""
  return bank.with_suffix('.jsonl')


def stages_path(bank: Path) -> Path:
  """Returns where a build of a bank file keeps what it has made so far."""
  return bank.with_name(f'{bank.name}.work')


def write_texts(path: Path, texts: Iterable[str]) -> None:
  """Writes the text of every row, in order."""
  lines = (json.dumps({'row': row, 'text': text}, ensure_ascii=False) for row, text in enumerate(texts))
  write_file(path, '\n'.join(lines).encode('utf-8', 'replace') + b'\n')


def read_texts(texts: Path) -> dict[int, str]:
  """Returns the text that each row of a bank file was made from.

  Raises:
    UserError: if the .jsonl is damaged.
  """
  try:
    lines = [json.loads(line) for line in texts.read_bytes().splitlines()]
    return {line['row']: line['text'] for line in lines}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"'{texts}' does not hold the texts of a bank: {error}") from None
