"""Turns text files into a prepared directory: a tokenizer, token shards and an index; or finds the one made before.

What decides its content, and so which one it is, is in mmjax.data.plan; its layout is described in mmjax.data.index.
"""

import contextlib
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

import mmjax
from mmjax.config import DataConfig
from mmjax.console import Progress
from mmjax.data.blocks import TEXT_DOCUMENT_BYTES
from mmjax.data.formats import expected_token_bytes
from mmjax.data.index import FORMAT, INDEX, VERIFIED, described_files, find_prepared, verify, write_index
from mmjax.data.overlap import shared_documents
from mmjax.data.plan import Plan, given_tokenizer, identify, make_plan
from mmjax.data.reader import BLANK_FILE, Meter, Tally, read_documents
from mmjax.data.shards import ShardBuilder
from mmjax.data.spm_tokenizer import sample_text, train_tokenizer
from mmjax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file_name
from mmjax.data.worker import is_held_out, token_dtype
from mmjax.environment import count_cores
from mmjax.errors import UserError
from mmjax.files import check_room, first_three, locked_directory, note_sha256, write_file

SAMPLE_BYTES = 12 * 2**20  # of training text that a tokenizer is trained on
MOST_WORKERS = 16  # that data.workers=0 starts: one reading process feeds no more, and memory stays within bounds


def prepare(data: DataConfig, vocab_size: int, progress: Progress | None = None) -> Path:
  """Prepares text for training, or finds what an earlier call prepared from the same text and settings.

  Args:
    data: where the text is and how to read it; without train_files the embedded corpus is built and used.
    vocab_size: V of the model; a tokenizer that is trained gets as many pieces, a given one has at most so many.
    progress: where to report; by default stderr.

  Returns:
    The prepared directory: `data.prepared_dir`/<name>-<hash>; or, where no files are given and it is one itself, made
    elsewhere and brought here, `data.prepared_dir`.

  Raises:
    UserError: for bad input; nothing is left behind then.
    StorageError: if there is no room or a file cannot be written; the next call goes on after the last whole shard.
  """
  progress = progress or Progress(sys.stderr)
  try:
    if (Path(data.prepared_dir) / INDEX).is_file() and not (data.train_files or data.valid_files):
      directory, index = Path(data.prepared_dir), _check_brought(data, vocab_size)
      progress.say(f'using prepared data in {directory}: {_summary(index)}')
      if data.valid_fraction != (made_with := index['settings']['valid_fraction']):
        other = 'data.valid_files' if 'valid' in index['splits'] else 'nothing held out'
        how = f'data.valid_fraction={made_with:g}' if made_with else other
        progress.say(f'data.valid_fraction={data.valid_fraction:g} is not used: this text was prepared with {how}')
    else:
      plan = make_plan(data, vocab_size, progress)
      directory = find_prepared(data.prepared_dir, plan.made) or plan.directory
      with locked_directory(directory, lambda: progress.say(f'another process prepares {directory}: waiting for it')):
        if (directory / INDEX).is_file():
          index = verify(directory)
          _remove_others(directory, index)  # if a kill came between writing the index and this
          progress.say(f'found prepared data in {directory}: {_summary(index)}')
        else:
          index = _build(plan, data, progress)
        sha256 = {Path(file['path']): file['sha256'] for files in plan.inputs.values() for file in files}
        note_sha256(directory / VERIFIED, sha256)
    if spare := vocab_size - index['vocab_size']:
      progress.say(
        f'model.vocab_size={vocab_size}: the tokenizer has {index["vocab_size"]} pieces, {spare} rows are spare'
      )
    return directory
  finally:
    progress.close()


def _check_brought(data: DataConfig, vocab_size: int) -> dict[str, Any]:
  """Returns the index of a prepared directory that is used as it is.

  Raises:
    UserError: if it is not whole or does not fit the settings.
  """
  index = verify(data.prepared_dir)
  if index['vocab_size'] > vocab_size:
    raise UserError(
      f'model.vocab_size={vocab_size} does not fit data.prepared_dir={data.prepared_dir!r}, which was made with '
      f'{index["vocab_size"]} pieces; set --config.model.vocab_size={index["vocab_size"]}'
    )
  if data.tokenizer and given_tokenizer(data.tokenizer, vocab_size).sha256 != index['tokenizer']['sha256']:
    raise UserError(
      f'data.prepared_dir={data.prepared_dir!r} was made with another tokenizer than {data.tokenizer!r}; prepare the '
      'text anew with this one'
    )
  return index


def _build(plan: Plan, data: DataConfig, progress: Progress) -> dict[str, Any]:
  """Makes the directory whole and returns its index.

  After a user's mistake it is removed again: the corrected input has another hash.
  """
  try:
    check_room(plan.directory, sum(map(expected_token_bytes, sum(plan.files.values(), []))))
    held_out = _find_held_out(plan, data.on_bad_line, progress)
    tokenizer = _tokenizer(plan, data, held_out, progress)
    builder = ShardBuilder(plan, tokenizer, held_out)
    if builder.resumed:
      progress.say(f'going on after the last whole shard in {plan.directory}')
    builder.build(data.workers or min(count_cores(), MOST_WORKERS), progress)
    index = _index(plan, tokenizer, builder.state)
    _check_splits(plan, index)
    if valid := index['splits'].get('valid'):
      valid['also_in_train'] = shared_documents(plan.directory, valid, plan.directory, index)
    write_index(plan.directory, index)
    _remove_others(plan.directory, index)
  except UserError:
    _remove_others(plan.directory, None)
    with contextlib.suppress(OSError):  # not empty: there is something in it that is not ours
      plan.directory.rmdir()
    raise
  progress.say(f'prepared {plan.directory}: {_summary(index)}')
  for line in _remarks(index, builder.state['tallies'], tokenizer):
    progress.say(line)
  return index


def _find_held_out(plan: Plan, on_bad_line: str, progress: Progress) -> tuple[float, str]:
  """Returns by what `is_held_out` tells documents apart: the share, or one of them where it takes none or all.

  Of few documents it may. Then the one is held out whose size is nearest to that share of the text, as a ratio.

  Raises:
    UserError: if there is only one, or a line cannot be read.
  """
  share, files = plan.settings['valid_fraction'], plan.files['train']
  meter, sides, sizes = Meter('looking for held-out text', files, progress), set(), Counter()
  for text in read_documents(files, plan.settings['text_key'], Tally(on_bad_line), meter) if share else ():
    raw = text.encode()
    meter.add(len(raw))
    sides.add(is_held_out(raw, share))
    sizes[hashlib.sha256(raw).hexdigest()] += len(raw)
    if len(sides) == 2:
      return share, ''
  if len(sizes) == 1:
    raise UserError(
      f'the text is one document, of which data.valid_fraction={share:g} can hold nothing out; give data.valid_files, '
      f'or more text: a plain one of more than {TEXT_DOCUMENT_BYTES >> 10} KiB is several documents (prepare and bank '
      'also take data.valid_fraction=0)'
    )
  if not sizes:
    return share, ''
  total = sizes.total()
  one = min(sizes, key=lambda sha256: (abs(math.log(sizes[sha256] / (share * total))), sha256))
  progress.say(
    f'data.valid_fraction={share:g} would hold out {"all" if True in sides else "none"} of {len(sizes):,} documents; '
    f'the one with {sizes[one]:,} of the {total:,} bytes is held out instead'
  )
  return 0.0, one


def _tokenizer(plan: Plan, data: DataConfig, held_out: tuple[float, str], progress: Progress) -> Tokenizer:
  """Copies the given tokenizer into the directory, or trains one there, unless an earlier start did."""
  if data.tokenizer:
    path = plan.directory / tokenizer_file_name(data.tokenizer)
    write_file(path, Path(data.tokenizer).read_bytes())
    return load_tokenizer(path)
  path = plan.directory / 'tokenizer.model'
  if not path.is_file():
    sample = sample_text(_training_documents(plan, data.on_bad_line, held_out, progress), SAMPLE_BYTES)
    if not sample:
      raise UserError(_no_document_left(plan))
    progress.say(f'training a tokenizer of {plan.settings["vocab_size"]} pieces')
    write_file(path, train_tokenizer(sample, plan.settings['vocab_size']))
  return load_tokenizer(path)


def _training_documents(plan: Plan, on_bad_line: str, held_out: tuple[float, str], progress: Progress) -> Iterator[str]:
  """Yields the training documents, without those that will be held out."""
  files, settings = plan.files['train'], plan.settings
  meter = Meter('sampling text', files, progress)
  for text in read_documents(files, settings['text_key'], Tally(on_bad_line), meter):
    raw = text.encode()
    meter.add(len(raw))
    if not is_held_out(raw, *held_out):
      yield text


def _index(plan: Plan, tokenizer: Tokenizer, state: dict[str, Any]) -> dict[str, Any]:
  splits = {}
  for split, shards in state['shards'].items():
    if shards:
      sums = {key: sum(shard[key] for shard in shards) for key in ('tokens', 'documents', 'text_bytes')}
      splits[split] = sums | {'shards': shards}
  inputs = {
    split: [file | state['tallies'][split]['files'][file['path']] for file in files]
    for split, files in plan.inputs.items()
  }
  told = {name: getattr(tokenizer, name) for name in ('kind', 'sha256', 'pad_id', 'bos_id', 'eos_id')}
  return {
    'format': FORMAT,
    'identity': plan.identity,
    'vocab_size': tokenizer.vocab_size,
    'dtype': token_dtype(tokenizer.vocab_size).name,
    'tokenizer': {'file': tokenizer.path.name, **told},
    'splits': splits,
    'inexact_documents': state['inexact'],
    'inputs': inputs,
    'settings': plan.settings,
    'versions': {module.__name__: module.__version__ for module in (mmjax, sentencepiece, np)},
  }


def _check_splits(plan: Plan, index: dict[str, Any]) -> None:
  """Raises UserError if a split is empty or an input changed while it was read."""
  for file in sum(plan.inputs.values(), []):
    if file | identify(Path(file['path'])) != file:
      raise UserError(f"'{file['path']}' was changed while it was read; prepare it again")
  if 'train' not in index['splits']:
    raise UserError(_no_document_left(plan))
  if plan.files['valid'] and 'valid' not in index['splits']:
    files = first_three([str(file) for file in plan.files['valid']], 'files')
    raise UserError(f'data.valid_files ({files}) hold no document: every line is empty or bad')


def _no_document_left(plan: Plan) -> str:
  files = first_three([str(file) for file in plan.files['train']], 'files')
  return f'no document is left of {files}: every line is empty or bad'


def _remove_others(directory: Path, index: dict[str, Any] | None) -> None:
  """Removes what the index does not name: leftovers of earlier starts, or everything."""
  keep = {INDEX, VERIFIED, *(name for name, _ in described_files(index))} if index else ()
  for path in directory.iterdir():
    if path.name not in keep and path.is_file():
      with contextlib.suppress(OSError):  # a directory that may only be read
        path.unlink()


def _summary(index: dict[str, Any]) -> str:
  splits = index['splits']
  return '; '.join(
    (f'{name}: ' if len(splits) > 1 else '')  # the only one may be for training or held out
    + f'{split["tokens"]:,} tokens, {split["documents"]:,} document{"s" * (split["documents"] != 1)}, '
    + (f'{split["text_bytes"] / 1e6:,.1f} MB' if split['text_bytes'] >= 1e6 else f'{split["text_bytes"] / 1e3:.1f} kB')
    for name, split in splits.items()
  )


def _remarks(index: dict[str, Any], tallies: dict[str, Any], tokenizer: Tokenizer) -> Iterator[str]:
  """Yields what a user should know about lines left out and documents not kept exactly."""
  for split, tally in tallies.items():
    report = Tally('skip', **tally).report()
    if report:
      yield f'{split}: skipped lines: {report}'
    if empty := sum(c['empty'] for c in tally['files'].values() if BLANK_FILE not in c['skipped']):
      yield f'{split}: empty texts left out: {empty:,}'
  if index['inexact_documents']:
    why = 'it changes text before it cuts it, for example by a space in front'
    if tokenizer.missing_bytes:
      why = (
        f'it has no piece for {tokenizer.missing_bytes} of the 256 bytes, so unknown characters become '
        '<unk> or are lost, and bits per byte do not compare'
      )
    yield f'{index["inexact_documents"]} documents are not reproduced exactly by this tokenizer: {why}'
