"""Builds a bank from text: python -m mmjax.tools.bank build --files 'text/*.jsonl.xz' --out out/bank.safetensors

Prepares the text (or finds it prepared), cuts it into snippets, encodes them, chooses model.knowledge_num diverse
ones and writes them, scaled to memory.bank_std, with their texts beside them. A second start goes on after the last
finished stage, and after the last part of an encoder's work. Use it with memory.bank_init='file', as
configs/exp_1_4_3.py does.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.choices import not_square
from mmjax.config import Config, expand_home, load_config, own_config, user_path
from mmjax.console import Progress, command_parser
from mmjax.data.bank_file import texts_path, write_texts
from mmjax.data.loader import TokenSplit, open_split
from mmjax.data.prepare import prepare
from mmjax.data.snippets import (
  choose_rows,
  cut_snippets,
  latent_semantic_vectors,
  read_snippets,
  reduce_dim,
  snippet_texts,
  standardize,
  unit_rows,
)
from mmjax.errors import UserError, run_command
from mmjax.files import check_room, storage_errors
from mmjax.interop.files import write_tensors
from mmjax.model.params import BANK

USED_SETTINGS = ('memory.knowledge_length', 'memory.bank_std')  # that decide what a file holds
SNIPPETS_A_ROW = 8  # snippets considered for each row by default; bounds memory, whatever the text's size
SENTENCE_TRANSFORMERS = 'sentence-transformers:'
SNIPPETS_A_PART = 2048  # of an encoder's work, saved one after the other


def main() -> None:
  """Reads flags and builds."""
  parser = command_parser('bank', __doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  build = commands.add_parser('build', help='make a bank file from text')
  said = 'comma-separated paths or globs of text; data.valid_fraction of it is held out, as when training (0: none)'
  build.add_argument('--files', required=True, help=said)
  build.add_argument('--out', required=True, help='the .safetensors file to write')
  build.add_argument(
    '--encoder', default='lsa', help=f'lsa (built in), or {SENTENCE_TRANSFORMERS}DIR, a model in that directory'
  )
  build.add_argument(
    '--snippets_a_row',
    type=int,
    default=SNIPPETS_A_ROW,
    help='to choose each row from (default: %(default)s); fewer are faster',
  )
  build.add_argument('--config', default=str(own_config('exp_1_4_3.py')), help='config file that sizes come from')
  arguments, overrides = parser.parse_known_args()
  if given := [override for override in overrides if override.startswith('--config.data.train_files=')]:
    raise UserError(f'{given[0]} cannot be given here: the text is what --files names')
  overrides = ['--config.data.valid_files=', *overrides, f'--config.data.train_files={arguments.files}']
  config = load_config(arguments.config, overrides, used=USED_SETTINGS)
  build_bank(config, user_path(arguments.out), arguments.encoder, arguments.snippets_a_row)


def build_bank(config: Config, out: Path, encoder: str, snippets_a_row: int = SNIPPETS_A_ROW) -> None:
  """Builds `out`, `out`.sha256 and a .jsonl of the rows' texts.

  Args:
    config: data.train_files and the sizes of model and memory.
    out: file to write.
    encoder: 'lsa' or 'sentence-transformers:DIR'.
    snippets_a_row: of the text's snippets, that many for each row are encoded, evenly spread.

  Raises:
    UserError: if a flag or a size breaks its rule, the text gives too few snippets, or the encoder is not to be had.
    StorageError: if the disk is too full.
  """
  check_flags(config, out, encoder, snippets_a_row)
  embed = None if encoder == 'lsa' else load_encoder(encoder)
  model, length = config.model, config.memory.knowledge_length
  progress = Progress(sys.stderr)
  prepared = prepare(config.data, model.vocab_size)
  split = open_split(prepared, 'train', max_seq_len=length, layout='packed', isolate_documents=False)
  start_X = cut_snippets(split, length, snippets_a_row * model.knowledge_num)
  check_room(out, 8 * (len(start_X) + model.knowledge_num) * model.knowledge_dim)
  if len(start_X) < model.knowledge_num:
    choose_rows(np.empty((len(start_X), 1)), model.n_sub_keys, lambda done: None)
  stages = Stages(out, [prepared.name, encoder, length, snippets_a_row, model.knowledge_num, model.knowledge_dim])
  progress.say(f'{len(start_X):,} snippets of {length} tokens; encoding with {encoder}')
  vector_XP = encode(stages, progress, split, start_X, config, embed)
  progress.say(f'choosing {model.knowledge_num:,} rows')

  def report(done: int) -> None:
    progress.update('choosing rows', done, model.knowledge_num, f'{done:,} rows')

  row_M = stages.run('rows', lambda: choose_rows(vector_XP, model.n_sub_keys, report))
  progress.close()
  bank_MP = standardize(vector_XP[row_M], config.memory.bank_std)
  texts = snippet_texts(split, start_X[row_M], length)
  write_texts(texts_path(out), texts)
  write_tensors(out, {BANK: bank_MP})
  stages.remove()
  progress.say(f'{out}: {bank_MP.shape[0]:,} rows of {bank_MP.shape[1]}, their texts in {texts_path(out)}')
  if (different := len(set(texts))) < len(texts):
    progress.say(f'The text repeats itself: {different:,} of the rows differ from each other')


def check_flags(config: Config, out: Path, encoder: str, snippets_a_row: int) -> None:
  """Raises UserError for a flag or a size that no bank can be built with."""
  if out.suffix.lower() != '.safetensors':
    raise UserError(f"--out '{out}' must end in .safetensors")
  if out.exists():
    raise UserError(f"--out '{out}' already exists; remove it or choose another name")
  if (texts := texts_path(out)).exists():  # yours, or of a build that was stopped at its last step
    raise UserError(f"--out '{out}' would replace '{texts}' with its rows' texts; remove it or choose another name")
  if encoder != 'lsa' and not encoder.startswith(SENTENCE_TRANSFORMERS):
    raise UserError(f'--encoder {encoder!r} must be lsa or {SENTENCE_TRANSFORMERS}DIR')
  if snippets_a_row < 1:
    raise UserError(f'--snippets_a_row {snippets_a_row} must be at least 1')
  if said := not_square('model.knowledge_num', config.model.knowledge_num):
    raise UserError(said)


def encode(
  stages: 'Stages',
  progress: Progress,
  split: TokenSplit,
  start_X: np.ndarray,
  config: Config,
  embed: Callable[[list[str]], np.ndarray] | None,
) -> np.ndarray:
  """Returns float32 (X, P), one vector for each snippet that begins at start_X; `embed` is None for the built-in."""
  length, dim = config.memory.knowledge_length, config.model.knowledge_dim

  def semantic() -> np.ndarray:
    return latent_semantic_vectors(read_snippets(split, start_X, length), config.model.vocab_size, dim)

  if embed is None:
    return stages.run('vectors', semantic)
  parts = []
  for start in range(0, len(start_X), SNIPPETS_A_PART):
    part_X = start_X[start : start + SNIPPETS_A_PART]
    parts.append(stages.run(f'embedded-{start}', lambda part_X=part_X: embed(snippet_texts(split, part_X, length))))
    done = start + len(part_X)
    progress.update('encoding', done, len(start_X), f'{done:,} snippets')
  return stages.run('vectors', lambda: unit_rows(reduce_dim(parts, dim)))


def load_encoder(encoder: str) -> Callable[[list[str]], np.ndarray]:
  """Returns a function from texts to float32 vectors (X, width): the model in the directory that `encoder` names.

  Raises:
    UserError: if sentence-transformers is not installed, or the directory holds no such model.
  """
  try:
    from sentence_transformers import SentenceTransformer
  except ImportError:
    raise UserError(f"--encoder {encoder} needs: pip install 'mmjax[encoder]'") from None
  directory = expand_home(encoder.removeprefix(SENTENCE_TRANSFORMERS))
  if not Path(directory).is_dir():
    raise UserError(f"--encoder: no model directory '{directory}'; models are read from disk, never downloaded")
  try:
    model = SentenceTransformer(directory, local_files_only=True)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"--encoder: '{directory}' is not a sentence-transformers model: {error}") from None
  return lambda texts: np.asarray(model.encode(texts, show_progress_bar=False), np.float32)


class Stages:
  """Keeps the arrays of finished stages in `<out>.work/`, so that a build that was stopped goes on after them."""

  def __init__(self, out: Path, made_from: list[Any]):
    """`made_from` names all that decides the arrays; those made from something else are not used."""
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    self.directory = out.with_name(f'{out.name}.work') / key

  def run(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array of a stage, made now or kept from before."""
    path = self.directory / f'{name}.npy'
    if not path.exists():
      array, temporary = make(), path.with_suffix('.tmp.npy')
      with storage_errors(path):
        self.directory.mkdir(parents=True, exist_ok=True)
        np.save(temporary, array)
        os.replace(temporary, path)
    return np.load(path, mmap_mode='r', allow_pickle=False)

  def remove(self) -> None:
    """Removes the kept arrays."""
    shutil.rmtree(self.directory.parent, ignore_errors=True)


if __name__ == '__main__':
  run_command(main)
