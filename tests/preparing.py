"""What tests of prepared text share: a small corpus, and how it is prepared and read back."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np

from mmjax.config import load_config
from mmjax.console import Progress
from mmjax.data import blocks, shards
from mmjax.data.index import read_index
from mmjax.data.prepare import prepare
from mmjax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]

WORDS = 'the memory of a model holds rows that keys select and a gate mixes 知识 由 键 选择 \u2581'.split()

VOCAB = 400


def some_texts(count):
  rng = random.Random(0)
  return [f'{n} ' + ' '.join(rng.choices(WORDS, k=rng.randint(1, 120))) for n in range(count)]


class Said(Progress):
  """Keeps what was said."""

  def __init__(self):
    super().__init__(quiet=True)
    self.lines = []

  def say(self, message):
    self.lines.append(message)

  def __str__(self):
    return '\n'.join(self.lines)


def write(path, texts):
  path.write_text(''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts), encoding='utf-8')
  return path


def settings(tmp_path, train, **changes):
  data = load_config(str(ROOT / 'configs' / 'base.py')).data
  defaults = {'train_files': str(train), 'prepared_dir': str(tmp_path / 'out'), 'workers': 1, 'valid_fraction': 0.1}
  return dataclasses.replace(data, **defaults | changes)


def run(tmp_path, train, vocab_size=VOCAB, **changes):
  said = Said()
  return prepare(settings(tmp_path, train, **changes), vocab_size, said), said


def documents(directory, split):
  """Decodes a split independently of the loader."""
  entry = read_index(directory)
  pieces = load_tokenizer(directory / entry['tokenizer']['file'])
  found = []
  for shard in entry['splits'][split]['shards']:
    tokens = np.fromfile(directory / shard['file'], entry['dtype']).tolist()
    offsets = np.load(directory / shard['offsets_file']).tolist()
    assert offsets[0] == 0 and offsets[-1] == len(tokens) == shard['tokens']
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
      assert tokens[stop - 1] == pieces.eos_id and pieces.eos_id not in tokens[start : stop - 1]
      found.append(pieces.decode(tokens[start : stop - 1]))
  return found


def contents(directory):
  """Returns every file's bytes, but for times and places in the index."""
  files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
  entry = json.loads(files.pop('index.json'))
  files.pop('verified.json')
  return files | {'splits': entry['splits'], 'tokenizer': entry['tokenizer']}


def small_shards(monkeypatch):
  monkeypatch.setattr(blocks, 'BLOCK_BYTES', 4000)
  monkeypatch.setattr(shards, 'SHARD_TOKENS', 3000)


def damage(path, how):
  data = bytearray(path.read_bytes())
  if how == 'flipped':
    data[len(data) // 2] ^= 1
  path.write_bytes(data[:-3] if how == 'cut' else data)
  if how == 'deleted':
    path.unlink()
