"""Feeds damaged and made-up input to everything that reads foreign files, for as long as one likes:

  python -m tests.faults.fuzz [--seconds 300] [--seed 0] [TARGET ...]

A target takes bytes and must answer or raise UserError; where there is a second, simpler way to the answer, both must
agree. Another exception, a crash, more than CASE_SECONDS or MEMORY_BYTES is a finding: its input is written to
--found. Once mended, a small form of it goes to tests/faults/corpus/TARGET/, which tests/faults/test_fuzz.py reads.
Cases are mutations of valid input by a seeded generator, so that a run can be repeated.
"""

import argparse
import gzip
import json
import lzma
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from mmjax.config import config_from_dict, flatten, load_config
from mmjax.data import blocks, reader
from mmjax.data.bank_file import read_bank
from mmjax.data.blocks import LONGEST_LINE_BYTES
from mmjax.data.reader import Tally, read_documents
from mmjax.data.spm_tokenizer import train_tokenizer
from mmjax.data.tokenizer import load_tokenizer
from mmjax.errors import UserError
from mmjax.interop.files import read_tensors
from mmjax.interop.names import canonical, check_accounted, tensor_shapes, to_params
from mmjax.interop.sizes import read_kv_heads, read_sizes
from mmjax.run.log import read_metrics
from tests.helpers import TINY

CASE_SECONDS = 10
MEMORY_BYTES = 8 * 2**30  # of address space, most of it libraries
BASE = 'configs/base.py'
NUMBERS = (
  b'0',
  b'-1',
  b'1e999',
  b'1' + b'0' * 400,
  b'9' * 5000,
  b'18446744073709551616',
  b'2147483648',
  b'1.5',
  b'NaN',
)
TOKENS = {
  'jsonl': (b'\n', b'\r\n', b'\0', b'\xef\xbb\xbf', b'\xff', b'{"text": "a"}\n', b'\\ud800', b'"text"', b'[' * 3000,
            b'null', b' ', b'\\u0000', b'\xe2\x80\xa8', b'{', b'"', b'\xf4\x90\x80\x80', b'-'),
  'safetensors': (b'F32', b'I64', b'BF16', b'F8_E4M3', b'"shape":[', b'"data_offsets":[', b'layers.0.', b'module.',
                  b'{"a":', b'..', b'/', b'\xff', b'__metadata__', b'pos_cis', b'F4'),
  'config': (b'--config.', b'model.', b'train.', b'=', b'.', b'true', b'{', b'[', b'()', b'"', b'\\', b'nan', b'all',
             b'0,1', b'middle', b'\n', b'1_0', b'0x10', b'1j'),
  'tokenizer': (b'"special":', b'"id":', b'null', b'"decoder":', b'{}', b'[]', b'<0x0A>', b'\xe2\x96\x81', b'\x08\x96'),
}  # fmt: skip


def read_jsonl(data: bytes, folder: Path) -> None:
  """The reader against line by line reading with the standard library alone."""
  path = folder / 'a.jsonl'
  path.write_bytes(data)
  blocks.BLOCK_BYTES = 50  # so that most input is several blocks
  tally, reader.MOST_SKIPPED = Tally('skip'), 1  # any share of bad lines may be skipped here
  found = list(read_documents([path], 'text', tally))
  lines = [line for line in data.removeprefix(b'\xef\xbb\xbf').split(b'\n') if line.strip()]
  expected = [text for text in map(_text_by_hand, lines) if text is not None]
  assert found == [text for text in expected if text], 'other documents than by hand'
  skipped = sum(tally.skipped().values())
  assert skipped == len(lines) - len(expected) + (not lines), f'{skipped} lines skipped, not {len(lines)}'
  first = None
  try:
    list(read_documents([path], 'text', Tally('fail')))
  except UserError as error:
    first = str(error)
  assert (first is None) == (skipped == 0), 'the first bad line is no error'
  assert first is None or re.match(rf'{re.escape(str(path))}:\d+: .*\(byte \d+\)', first), first


def _text_by_hand(line: bytes) -> str | None:
  """Returns the document of a line, None where it is bad."""
  if len(line) > LONGEST_LINE_BYTES or b'\0' in line or line.startswith(b'\xef\xbb\xbf'):
    return None
  try:
    record = json.loads(line.decode())
    text = record['text'] if isinstance(record, dict) else None
    return text if isinstance(text, str) and text.encode() is not None else None
  except (ValueError, RecursionError, KeyError):
    return None


def read_compressed(data: bytes, folder: Path) -> None:
  """Compressed text: gzip or xz by its first byte."""
  path = folder / ('a.jsonl.gz' if data[:1] == b'\x1f' else 'a.jsonl.xz')
  path.write_bytes(data)
  list(read_documents([path], 'text', Tally('skip')))


def read_text(data: bytes, folder: Path) -> None:
  """A .txt is kept or refused; only stretches of nothing but white space may be left out."""
  path = folder / 'a.txt'
  path.write_bytes(data)
  blocks.TEXT_DOCUMENT_BYTES = 40
  kept = ''.join(read_documents([path], 'text', Tally('fail'))).encode()
  assert kept.split() == data.removeprefix(b'\xef\xbb\xbf').split(), 'text was changed'


def import_safetensors(data: bytes, folder: Path) -> None:
  """Everything that an import does with a file before it writes: either it fits in every shape, or it is refused."""
  path = folder / 'model.safetensors'
  path.write_bytes(data)
  tensors = canonical(read_tensors(path), str(path))
  shapes = {name: value.shape for name, value in tensors.items()}
  sizes = read_sizes(shapes, str(path))
  overrides = [f'--config.model.{name}={value}' for name, value in sizes.items()]
  overrides += ['--config.model.n_heads=4', '--config.model.max_seq_len=16']
  model = load_config(BASE, [*overrides, '--config.model.n_kv_heads=1']).model
  config = load_config(BASE, [*overrides, f'--config.model.n_kv_heads={read_kv_heads(shapes, model.dim, 4, "file")}'])

  check_accounted(shapes, tensor_shapes(config), str(path))
  to_params(tensors, config)


def import_bank(data: bytes, folder: Path) -> None:
  """A bank file: rows that are numbers, or refused."""
  path = folder / 'bank.safetensors'
  path.write_bytes(data)
  rows = read_bank(path, (9, 4))
  assert rows.dtype == np.float32 and np.isfinite(rows).all()


def parse_config(data: bytes, folder: Path) -> None:
  """config.json where the data are a JSON object, else command-line overrides; what is accepted survives JSON."""
  text = data.decode('utf-8', 'surrogateescape')
  try:
    settings = json.loads(text)
  except (ValueError, RecursionError):
    settings = None
  if isinstance(settings, dict):
    config = config_from_dict(settings)
  else:
    config = load_config(BASE, text.split('\n'))
  assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def open_tokenizer(data: bytes, folder: Path) -> None:
  """tokenizer.json where the data begin so, else a SentencePiece model; what is accepted tokenizes."""
  path = folder / ('tokenizer.json' if data.lstrip()[:1] == b'{' else 'tokenizer.model')
  path.write_bytes(data)
  tokenizer = load_tokenizer(path)
  ids = tokenizer.encode('the memory 字 \u2581 \0 </s>')
  tokenizer.decode([*ids, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id])
  assert len(tokenizer.bytes_per_token()) == tokenizer.vocab_size


def open_metrics(data: bytes, folder: Path) -> None:
  """A log of metrics, as a report reads it."""
  path = folder / 'metrics.jsonl'
  path.write_bytes(data)
  assert all(isinstance(record, dict) for record in read_metrics(path))


def _jsonl_seeds() -> list[bytes]:
  lines = [
    b'{"text": "one"}',
    b'{"id": 3, "text": "zw\xc3\xb6lf \\u5b57 \\ud83d\\ude00", "x": [1, {"y": -2.5e3}]}',
    b'{"text": ""}',
  ]
  return [b'\n'.join(lines), b'\r\n'.join(lines) + b'\r\n', b'\xef\xbb\xbf' + lines[0] + b'\n\n' + lines[1]]


def _tensor_seeds() -> list[bytes]:
  config = load_config(BASE, [f'--config.{name}={value}' for name, value in TINY.items()])

  shapes = tensor_shapes(config)
  small = {name: np.zeros((1, 4), np.float32) for name in list(shapes)[:6]}
  return [save({name: np.ones(shape, np.float32) for name, shape in shapes.items()}), save(small)]


def _tokenizer_seeds() -> list[bytes]:
  seeds = [train_tokenizer(['the memory reads a row of its bank, 知识'] * 9, 300)]
  try:
    from tests.test_tokenizer import hugging_face
  except ImportError:  # the package tokenizers is optional
    return seeds
  with tempfile.TemporaryDirectory() as folder:
    return [*seeds, hugging_face(Path(folder) / 'tokenizer.json').read_bytes()]


def _config_seeds() -> list[bytes]:
  flags = [f'--config.{name}={value}' for name, value in TINY.items()]
  config = load_config(BASE, flags)
  rest = [f'--config.{name}={value}' for name, value in flatten(config.to_dict()).items()]
  return ['\n'.join(flags).encode(), '\n'.join(rest).encode(), json.dumps(config.to_dict()).encode()]


TARGETS: dict[str, tuple[Callable[[bytes, Path], None], Callable[[], list[bytes]], str]] = {
  'jsonl': (read_jsonl, _jsonl_seeds, 'jsonl'),
  'compressed': (
    read_compressed,
    lambda: [pack(b'\n'.join(_jsonl_seeds()[0:1] * 5)) for pack in (gzip.compress, lzma.compress)],
    'jsonl',
  ),
  'txt': (read_text, lambda: ['One.\n\nTwo zwölf 字.\r\n'.encode() * 5], 'jsonl'),
  'safetensors': (import_safetensors, _tensor_seeds, 'safetensors'),
  'bank': (import_bank, lambda: [save({'memory_bank': np.ones((9, 4), np.float32)})], 'safetensors'),
  'config': (parse_config, _config_seeds, 'config'),
  'tokenizer': (open_tokenizer, _tokenizer_seeds, 'tokenizer'),
  'metrics': (open_metrics, lambda: [b'{"kind": "train", "step": 1, "loss": 2.5}\n' * 3], 'jsonl'),
}


def mutated(seeds: list[bytes], tokens: tuple[bytes, ...], draw: random.Random) -> bytes:
  """Returns a seed with one to eight changes."""
  data = bytearray(draw.choice(seeds))
  for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
    at, span = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 8, 50, 1000))
    kind = draw.randrange(7)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
      del data[at : at + span]
    elif kind == 2:
      data[at:at] = data[at : at + span] * draw.choice((1, 2, 50))
    elif kind == 3:
      data[at:at] = draw.choice(tokens)
    elif kind == 4:
      other = draw.choice(seeds)
      start = draw.randrange(len(other) + 1)
      data[at : at + span] = other[start : start + span]
    elif kind == 5 and (numbers := list(re.finditer(rb'-?\d+(\.\d+)?', data[:100_000]))):
      number = draw.choice(numbers)
      data[number.start() : number.end()] = draw.choice((*NUMBERS, str(draw.randrange(2**34)).encode()))
    else:
      del data[at:]
  return bytes(data)


def cases(target: str, seed: int) -> Iterator[bytes]:
  """Yields the input of a target without end: first its seeds as they are, then mutations."""
  _, make_seeds, tokens = TARGETS[target]
  seeds, draw = make_seeds(), random.Random(f'{target} {seed}')
  yield from seeds
  while True:
    yield mutated(seeds, TOKENS[tokens], draw)


def check(target: str, data: bytes, folder: Path) -> bool:
  """Runs a target on one input; returns whether it was accepted, raises what is a finding."""
  try:
    TARGETS[target][0](data, folder)
  except UserError as error:
    assert len(str(error)) < 20_000, 'a sentence without end'
    return False
  return True


def run_target(target: str, seconds: float, seed: int, found: Path) -> None:
  """Runs one target in this process until time is up or something is found."""
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  signal.signal(signal.SIGALRM, _too_slow)
  end, count, accepted = time.monotonic() + seconds, 0, 0
  current = found / f'{target}-current'
  with tempfile.TemporaryDirectory() as folder:
    for data in cases(target, seed):
      current.write_bytes(data)  # what crashes this process can be read by the one that started it
      signal.alarm(CASE_SECONDS)
      try:
        accepted += check(target, data, Path(folder))
      except Exception as error:  # noqa: BLE001 - the purpose of all this
        traceback.print_exception(error, limit=-3, chain=False)
        sys.exit(1)
      signal.alarm(0)
      count += 1
      if time.monotonic() > end:
        break
  current.unlink()
  print(f'{target}: {count:,} cases, {accepted:,} accepted, nothing found', flush=True)


def _too_slow(*_: object) -> None:
  raise TimeoutError(f'more than {CASE_SECONDS} s')


def main() -> None:
  """Runs the targets one after the other, each in a process of its own; exit code 1 if something was found."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('targets', nargs='*', default=list(TARGETS), help=f'of {", ".join(TARGETS)}; default: all')
  parser.add_argument('--seconds', type=float, default=60, help='for each target')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--found', type=Path, default=Path('out/fuzz'), help='where inputs go that were not borne')
  parser.add_argument('--here', action='store_true', help='run the first target in this process')
  arguments = parser.parse_args()
  arguments.found.mkdir(parents=True, exist_ok=True)
  if arguments.here:
    run_target(arguments.targets[0], arguments.seconds, arguments.seed, arguments.found)
    return
  findings = 0
  for target in arguments.targets:
    command = [sys.executable, '-m', 'tests.faults.fuzz', target, '--here', '--seconds', str(arguments.seconds)]
    done = subprocess.run([*command, '--seed', str(arguments.seed), '--found', str(arguments.found)], check=False)
    if done.returncode:
      findings += 1
      path = arguments.found / f'{target}-{arguments.seed}-{time.time_ns()}'
      (arguments.found / f'{target}-current').rename(path)
      print(f'{target}: ended with code {done.returncode}; input in {path}', flush=True)
  sys.exit(findings > 0)


if __name__ == '__main__':
  main()
