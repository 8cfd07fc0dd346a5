"""Builds a bank from text: python -m mmjax.tools.bank build --files 'text/*.jsonl.xz' --out out/bank.safetensors

Prepares the text (or finds it prepared), cuts it into snippets, encodes them, chooses model.knowledge_num diverse
ones and writes them, scaled to memory.bank_std, with their texts beside them. A second start goes on after the last
finished stage, and after the last part of an encoder's work. Use it with memory.bank_init='file', as
configs/exp_1_4_3.py does.
"""

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmjax.choices import not_square
from mmjax.config import Config, expand_home, load_config, own_config, user_path
from mmjax.config.paths import check_output
from mmjax.console import command_parser
from mmjax.data.bank_file import STAGED_TEXTS, stages_path, texts_path
from mmjax.errors import UserError, interrupt_ends_at_once, run_command

USED_SETTINGS = ('memory.knowledge_length', 'memory.bank_std')  # that decide what a file holds
SNIPPETS_A_ROW = 8  # snippets considered for each row by default; bounds memory, whatever the text's size
SENTENCE_TRANSFORMERS = 'sentence-transformers:'


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
  if out.exists() and texts_are_of_build(out):  # which was stopped when only this was left to do
    shutil.rmtree(stages_path(out), ignore_errors=True)
  check_flags(config, out, encoder, snippets_a_row)
  embed = None if encoder == 'lsa' else load_encoder(encoder)
  with interrupt_ends_at_once():  # only now: --help and bad flags need not wait for JAX
    from mmjax.tools.bank_stages import make_bank

  make_bank(config, out, encoder, embed, snippets_a_row)


def check_flags(config: Config, out: Path, encoder: str, snippets_a_row: int) -> None:
  """Raises UserError or StorageError for a flag or a size that no bank can be built with."""
  if out.suffix.lower() != '.safetensors':
    raise UserError(f"--out '{out}' must end in .safetensors")
  if out.exists():
    raise UserError(f"--out '{out}' already exists; remove it or choose another name")
  if (texts := texts_path(out)).exists() and not texts_are_of_build(out):
    raise UserError(f"--out '{out}' would replace '{texts}' with its rows' texts; remove it or choose another name")
  if out.parent.is_dir():
    check_output('--out', str(out))
  if encoder != 'lsa' and not encoder.startswith(SENTENCE_TRANSFORMERS):
    raise UserError(f'--encoder {encoder!r} must be lsa or {SENTENCE_TRANSFORMERS}DIR')
  if snippets_a_row < 1:
    raise UserError(f'--snippets_a_row {snippets_a_row} must be at least 1')
  if said := not_square('model.knowledge_num', config.model.knowledge_num):
    raise UserError(said)


def texts_are_of_build(out: Path) -> bool:
  """Whether the texts beside a bank file are those of a build of it that was stopped, in its last step."""
  texts = texts_path(out)
  staged = stages_path(out).glob(f'*/{STAGED_TEXTS}')
  return texts.is_file() and any(filecmp.cmp(texts, file, shallow=False) for file in staged)


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


if __name__ == '__main__':
  run_command(main)
