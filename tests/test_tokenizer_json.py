"""A peer's weights and its tokenizer.json through every command: prepare, import, eval, train, sample, export."""

import json
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import eval as eval_command
import mmjax
import train as train_command
from mmjax.console import printable
from mmjax.interop.files import read_tensors, write_tensors
from mmjax.interop.names import TIED, to_tensors
from mmjax.tools import convert, prepare, sample
from tests.helpers import build_model, tiny_config

tokenizers = pytest.importorskip('tokenizers')

VOCAB, T = 320, 16
WORDS = 'the memory reads a row of its bank and writes what it learned, naïvely, 记忆 读取 它的 行 🙂'.split()


def write_tokenizer(path: Path, documents: list[str]) -> None:
  """Trains and writes a tokenizer.json: byte-level BPE with a space in front of all text, three control tokens."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=VOCAB,
    special_tokens=['<unk>', '<s>', '</s>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(documents, trainer)
  assert backend.get_vocab_size() == VOCAB
  backend.save(str(path))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
  """The current directory: train.jsonl, valid.jsonl, tokenizer.json and model.safetensors under a peer's names."""
  draw = random.Random(0)
  documents = [' '.join(draw.choices(WORDS, k=draw.randint(5, 40))) for _ in range(130)]
  for name, part in (('train.jsonl', documents[:100]), ('valid.jsonl', documents[100:])):
    (tmp_path / name).write_text('\n'.join(json.dumps({'text': text}) for text in part))
  write_tokenizer(tmp_path / 'tokenizer.json', documents)
  config = tiny_config(model__vocab_size=VOCAB, model__n_layers=1)
  tensors = to_tensors(build_model(config)[1], config)
  write_tensors(tmp_path / 'model.safetensors', tensors | {TIED: tensors['tok_embeddings.weight']})
  monkeypatch.chdir(tmp_path)
  return tmp_path


def bits_per_byte(lm: mmjax.LanguageModel, folder: Path) -> tuple[float, int]:
  """Measures as the definition says: the peer's own library, logits row by row, float64, bytes of the files' text."""
  backend = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  texts = [json.loads(line)['text'] for line in (folder / 'valid.jsonl').read_text().splitlines()]
  eos = backend.token_to_id('</s>')
  stream = [eos] + [token for text in texts for token in (*backend.encode(text).ids, eos)]
  nats = 0.0
  for start in range(0, len(stream) - 1, T):
    row = np.array(stream[start : start + T + 1])
    logits = np.asarray(lm.logits(row[None, :-1])[0], np.float64)
    nats -= (logits[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(logits).sum(-1))).sum()
  n_bytes = sum(len(text.encode()) for text in texts)
  return nats / math.log(2) / n_bytes, n_bytes


@pytest.mark.thorough
def test_weights_and_tokenizer_json_go_through_every_command(folder, monkeypatch, capfd):
  monkeypatch.setattr('mmjax.report.write.write_report', lambda run: run)  # seconds of plots, whatever the tokenizer

  def run(command, *flags: object) -> str:
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, flags)])
    monkeypatch.setattr('warnings.showwarning', warnings.showwarning)  # commands set it; this puts it back afterwards
    command.main()
    return capfd.readouterr().out

  files = ('--train_files', 'train.jsonl', '--valid_files', 'valid.jsonl')
  prepared = run(prepare, *files, '--out', 'data', '--tokenizer', 'tokenizer.json', '--workers', 2).split()[-1]
  index = json.loads((folder / prepared / 'index.json').read_text())
  assert index['tokenizer']['kind'] == 'huggingface' and index['vocab_size'] == VOCAB
  assert index['inexact_documents'] == 130  # all: each gets a space in front, which is no byte of the text

  settings = {
    'model.n_heads': 4, 'model.max_seq_len': T, 'data.train_files': 'train.jsonl', 'data.valid_files': 'valid.jsonl',
    'data.prepared_dir': 'data', 'data.workers': 1, 'train.batch_size': 8, 'train.accumulation_steps': 1,
    'train.max_steps': 2, 'train.dtype': 'float32', 'train.learning_rate': 1e-2,
  }  # fmt: skip
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  source = ('--from', 'model.safetensors', '--tokenizer', 'tokenizer.json')
  said = run(convert, 'import', *source, '--out', 'run', '--config', 'configs/base.py', *flags)
  assert f'vocab_size {VOCAB}' in said

  shown = run(sample, '--workdir', 'run', '--prompt', '记忆', '--max_new_tokens', 8)
  lm = mmjax.load('run')
  assert shown == printable(lm.generate('记忆', max_new_tokens=8)[0]) + '\n'

  command = next(line for line in said.splitlines() if line.startswith('Train on: ')).split()[4:]
  run(train_command, *(flag.replace("'TEXT'", 'train.jsonl') for flag in command))
  assert len(list((folder / 'data').iterdir())) == 1  # what prepare made was found again
  run(eval_command, '--workdir', 'run', '--checkpoint', 'last', '--max_new_tokens', 8)
  found = json.loads((folder / 'run' / 'eval.json').read_text())
  assert found['checkpoint'] == 2
  want, n_bytes = bits_per_byte(mmjax.load('run', 'last'), folder)
  assert found['text_bytes'] == n_bytes
  assert found['bits_per_byte'] == pytest.approx(want, rel=1e-5)
  assert (folder / 'run' / 'tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()

  run(convert, 'export', '--workdir', 'run', '--checkpoint', 'last', '--to', 'back.safetensors')
  before, after = read_tensors(folder / 'model.safetensors'), read_tensors(folder / 'back.safetensors')
  assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
  moved = {name for name in before if not np.array_equal(before[name], after[name])}
  assert before.keys() - moved == {'layers.0.memory_gate.keys', 'layers.0.memory_gate.gate_proj.weight'}
