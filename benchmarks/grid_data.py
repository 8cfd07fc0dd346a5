"""Packs token shards, for a machine without the text.

  python benchmarks/grid_data.py --share 0.8 --out out/grid_data.tar.xz \\
    --train_files 'corpus/train-*.jsonl.xz' --valid_files corpus/valid.jsonl.xz

Keeps about --share of the training documents, chosen by a hash of their text, and all validation documents; tokenizes
them as training does; and writes the prepared directory as one .tar.xz, which benchmarks/grid_gpu.sh unpacks. A token
takes about 0.94 bytes in it. Without --train_files it takes the embedded corpus.
"""

import argparse
import dataclasses
import json
import lzma
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a bare checkout

from mmjax.config import load_config
from mmjax.config.schema import SETTINGS
from mmjax.data.index import INDEX, described_files, read_index
from mmjax.data.prepare import prepare
from mmjax.data.reader import Tally, find_files, read_documents
from mmjax.data.worker import is_held_out
from mmjax.errors import UserError, run_command

BASE = Path(__file__).resolve().parents[1] / 'configs' / 'base.py'
# Tokens are pairs of bytes: lp and pb tell so; 6 % smaller archives would need ten times the memory.
FILTERS = [{'id': lzma.FILTER_LZMA2, 'preset': 6, 'lc': 0, 'lp': 1, 'pb': 1}]


def main() -> None:
  """Reads flags, prepares, packs, and says how much that is."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--train_files', default='', help='comma-separated paths or globs')
  parser.add_argument('--valid_files', default='', help='the same, held out; by default one document in a hundred')
  parser.add_argument('--share', type=float, default=1.0, help='of the training documents to keep, above 0 to 1')
  parser.add_argument('--vocab_size', type=int, default=SETTINGS['model.vocab_size'].default)
  parser.add_argument('--tokenizer', default='', help='of another run, to compare with it')
  parser.add_argument('--out', type=Path, required=True, help='the archive, .tar.xz')
  arguments = parser.parse_args()
  if not 0 < arguments.share <= 1:
    raise UserError(f'--share={arguments.share} must be above 0 and at most 1')
  with tempfile.TemporaryDirectory() as folder:
    directory = prepare_share(Path(folder), arguments)
    index = read_index(directory)
    pack(directory, arguments.out)
  train, valid = (index['splits'][split] for split in ('train', 'valid'))
  print(
    f'{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB; {train["tokens"]:,} training tokens, '
    f'{valid["tokens"]:,} held out'
  )


def prepare_share(folder: Path, arguments: argparse.Namespace) -> Path:
  """Prepares the documents that are kept; returns the prepared directory, in `folder`."""
  base = load_config(str(BASE)).data
  train_files = arguments.train_files
  if train_files and arguments.share < 1:
    train_files = str(folder / 'train.jsonl')
    with open(train_files, 'w', encoding='utf-8') as file:
      for text in read_documents(find_files(arguments.train_files), base.text_key, Tally(base.on_bad_line)):
        if is_held_out(text.encode(), arguments.share):
          file.write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
  if not arguments.valid_files:  # the same hash chose what is kept, all of it from the low end
    base = dataclasses.replace(base, valid_fraction=base.valid_fraction * arguments.share)
  data = dataclasses.replace(
    base,
    train_files=train_files,
    valid_files=arguments.valid_files,
    tokenizer=arguments.tokenizer,
    prepared_dir=str(folder / 'data'),
  )
  return prepare(data, arguments.vocab_size)


def pack(directory: Path, out: Path) -> None:
  """Writes what the index of a prepared directory names into one archive, without folders."""
  index = read_index(directory)
  names = [INDEX, *(name for name, _ in described_files(index))]
  out.parent.mkdir(parents=True, exist_ok=True)
  with lzma.open(out, 'wb', filters=FILTERS) as stream, tarfile.open(fileobj=stream, mode='w') as archive:
    for name in names:
      archive.add(directory / name, name)


if __name__ == '__main__':
  run_command(main)
