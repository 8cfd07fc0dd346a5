"""Makes the rows of a bank from text in stages, each kept on disk until the file is whole; bank.py is the command."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.config import Config
from mmjax.console import Progress
from mmjax.data.bank_file import STAGED_TEXTS, stages_path, texts_path, write_texts
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
from mmjax.files import check_room, storage_errors
from mmjax.interop.files import write_tensors
from mmjax.model.params import BANK

SNIPPETS_A_PART = 2048  # of an encoder's work, saved one after the other

Embed = Callable[[list[str]], np.ndarray]  # from texts to float32 vectors (X, W)


def make_bank(config: Config, out: Path, encoder: str, embed: Embed | None, snippets_a_row: int) -> None:
  """Writes `out`, `out`.sha256 and a .jsonl of the rows' texts; `bank.build_bank` says of what, and what it raises.

  Args:
    config, out, encoder, snippets_a_row: as `build_bank` took and checked them.
    embed: what `encoder` names; None for the built-in.
  """
  model, length = config.model, config.memory.knowledge_length
  progress = Progress(sys.stderr)
  prepared = prepare(config.data, model.vocab_size)
  split = open_split(prepared, 'train', max_seq_len=length, layout='packed', isolate_documents=False)
  start_X = cut_snippets(split, length, snippets_a_row * model.knowledge_num)
  check_room(out, 8 * (len(start_X) + model.knowledge_num) * model.knowledge_dim)
  if len(start_X) < model.knowledge_num:
    choose_rows(np.empty((len(start_X), 1)), model.n_sub_keys, lambda done: None)
  stages = Stages(out, [prepared.name, encoder, length, snippets_a_row, model.knowledge_num, model.knowledge_dim])
  progress.say(f'{len(start_X):,} snippets of {length} tokens; encoding with {encoder}, which may take minutes')
  vector_XP = encode(stages, progress, split, start_X, config, embed)
  progress.say(f'choosing {model.knowledge_num:,} rows')

  def report(done: int) -> None:
    progress.update('choosing rows', done, model.knowledge_num, f'{done:,} rows')

  row_M = stages.run('rows', lambda: choose_rows(vector_XP, model.n_sub_keys, report))
  progress.close()
  bank_MP = standardize(vector_XP[row_M], config.memory.bank_std)
  texts = snippet_texts(split, start_X[row_M], length)
  write_texts(stages.directory / STAGED_TEXTS, texts)  # first: they show whose those beside the bank are
  write_texts(texts_path(out), texts)
  write_tensors(out, {BANK: bank_MP})
  stages.remove()
  progress.say(f'{out}: {bank_MP.shape[0]:,} rows of {bank_MP.shape[1]}, their texts in {texts_path(out)}')
  if (different := len(set(texts))) < len(texts):
    progress.say(f'The text repeats itself: {different:,} of the rows differ from each other')


def encode(
  stages: 'Stages',
  progress: Progress,
  split: TokenSplit,
  start_X: np.ndarray,
  config: Config,
  embed: Embed | None,
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


class Stages:
  """Keeps the arrays of finished stages in `<out>.work/`, so that a build that was stopped goes on after them."""

  def __init__(self, out: Path, made_from: list[Any]):
    """`made_from` names all that decides the arrays; those made from something else are not used."""
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    self.directory = stages_path(out) / key

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
