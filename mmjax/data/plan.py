"""What a prepared directory is made from: the settings, the tokenizer, and the bytes of the inputs with their formats.

Where the inputs lie, and under what names, is free. The directory's name carries a hash of all that. Rows are cut when
they are loaded, so the row length and layout are not part of it.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from mmjax.config import DataConfig
from mmjax.console import Progress
from mmjax.data.embedded import build_embedded_corpus
from mmjax.data.formats import ENDINGS, ending_of
from mmjax.data.index import FORMAT, VERIFIED, counts_bytes
from mmjax.data.reader import find_files
from mmjax.data.spm_tokenizer import LEAST_VOCABULARY
from mmjax.data.tokenizer import Tokenizer, load_tokenizer
from mmjax.errors import UserError
from mmjax.files import known_sha256

MUCH_BYTES = 4 * 2**30  # of text takes seconds to hash
LONGEST_NAME_BYTES = 80  # of what a directory is called after its text


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a prepared directory is made from: the files of each split, and what its index says of them.

  `identity` is the hash of all of it. `may_cut`: whether documents are cut later, as the padded layout does.
  """

  directory: Path
  identity: str
  files: dict[str, list[Path]]
  inputs: dict[str, list[dict[str, Any]]]
  settings: dict[str, Any]
  may_cut: bool

  def made(self, index: dict[str, Any]) -> bool:
    """Whether a prepared directory with this index was made from what is planned, wherever that lay then.

    A tokenizer that is given may be the one that was trained there.
    """
    own = self.settings['tokenizer_sha256']
    if own not in (index['settings']['tokenizer_sha256'], index['tokenizer']['sha256']):
      return False
    if index['settings'] | {'tokenizer_sha256': own} != self.settings or (self.may_cut and not counts_bytes(index)):
      return False
    pairs = [(index['inputs'][split], files) for split, files in self.inputs.items()]
    return all(len(old) == len(new) and all(map(_same_input, old, new)) for old, new in pairs)


def make_plan(data: DataConfig, vocab_size: int, progress: Progress) -> Plan:
  """Finds the text and the tokenizer that the settings name, and hashes them.

  Raises:
    UserError: if something is missing or does not fit.
  """
  given = given_tokenizer(data.tokenizer, vocab_size) if data.tokenizer else None
  if not given and vocab_size <= LEAST_VOCABULARY:
    raise UserError(
      f'model.vocab_size={vocab_size} must be above {LEAST_VOCABULARY} if mmjax trains the tokenizer, which needs 4 '
      'control tokens, 256 bytes and the characters of the text; a given data.tokenizer may be smaller'
    )
  files = _find_text(data, progress)
  settings = {
    'vocab_size': given.vocab_size if given else vocab_size,
    'text_key': data.text_key if data.train_files else 'text',
    'on_bad_line': data.on_bad_line,
    'valid_fraction': 0.0 if files['valid'] else data.valid_fraction,
    'tokenizer_sha256': given.sha256 if given else '',
  }
  everything = [*files['train'], *files['valid']]
  if (size := sum(file.stat().st_size for file in everything)) > MUCH_BYTES:
    progress.say(f'looking whether these {size / 1e9:.0f} GB of text are prepared already')
  sha256 = known_sha256(everything, Path(data.prepared_dir).glob(f'*/{VERIFIED}'))
  inputs = {split: [identify(file) | {'sha256': sha256[file]} for file in found] for split, found in files.items()}
  bytes_of = {split: [(_content(file), file['sha256']) for file in found] for split, found in inputs.items()}
  hashed = json.dumps({'format': FORMAT, 'settings': settings, 'inputs': bytes_of}, sort_keys=True)
  identity = hashlib.sha256(hashed.encode()).hexdigest()
  directory = Path(data.prepared_dir) / f'{_common_name(files["train"])}-{identity[:12]}'
  return Plan(directory, identity, files, inputs, settings, data.layout == 'padded')


def _find_text(data: DataConfig, progress: Progress) -> dict[str, list[Path]]:
  """Returns the files of both splits."""
  if not data.train_files:
    if data.valid_files:
      raise UserError(f'data.valid_files={data.valid_files!r} needs data.train_files too')
    progress.say('no data.train_files are given: using the text that this Python carries (the embedded corpus)')
    return {'train': [build_embedded_corpus(Path(data.prepared_dir), progress)], 'valid': []}
  train, valid = find_files(data.train_files), find_files(data.valid_files) if data.valid_files else []
  learned = {os.path.realpath(file): file for file in train}
  for file in valid:
    if twin := learned.get(os.path.realpath(file)):
      which = f"'{file}'" if file == twin else f"'{file}' leads to the same file as '{twin}': it"
      raise UserError(f'{which} is in data.train_files and in data.valid_files; remove it from one of them')
  return {'train': train, 'valid': valid}


def given_tokenizer(path: str, vocab_size: int) -> Tokenizer:
  """Loads a tokenizer that the settings name; raises UserError if it has more pieces than the model."""
  tokenizer = load_tokenizer(path)
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f"model.vocab_size={vocab_size} does not fit the tokenizer '{path}', which has {tokenizer.vocab_size} pieces; "
      f'set --config.model.vocab_size={tokenizer.vocab_size} (prepare: --vocab_size {tokenizer.vocab_size})'
    )
  return tokenizer


def identify(file: Path) -> dict[str, Any]:
  """Returns what an index says of an input before it is read: as long as that is so, the file was not changed."""
  stat = file.stat()
  return {'path': str(file), 'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}


def _content(file: dict[str, Any]) -> str | None:
  """Returns what the name of an input says about how it is written; None of a link's target that an index may name."""
  ending = ending_of(file['path'])
  return ending and ENDINGS[ending][0]


def _same_input(old: dict[str, Any], new: dict[str, Any]) -> bool:
  """Whether two entries of an index are of one text; old ones have its path, links resolved, size and time, no hash."""
  if _content(old) != _content(new):
    return False
  if 'sha256' in old:
    return old['sha256'] == new['sha256']
  return old['path'] == os.path.realpath(new['path']) and all(old[key] == new[key] for key in ('size', 'mtime_ns'))


def _common_name(files: list[Path]) -> str:
  """Returns what the files' names begin with, as a folder name: 'train' for train-00000.jsonl.xz and its siblings."""
  stems = [file.name.split('.')[0] for file in files]
  name = re.sub(r'[^\w-]+', '-', os.path.commonprefix(stems)).rstrip('-_0123456789')
  while len(name.encode()) > LONGEST_NAME_BYTES:
    name = name[:-1]
  return name or 'text'
