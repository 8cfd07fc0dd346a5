"""What the fuzzer found once stays mended, and a few hundred of its cases run in every suite."""

import itertools
import re
from pathlib import Path

import pytest

from mmjax.data import blocks, reader
from tests.faults import fuzz

CORPUS = sorted(path for path in Path(__file__).with_name('corpus').glob('*/*'))
CASES = {'jsonl': 150, 'txt': 50, 'compressed': 30, 'safetensors': 40, 'bank': 60, 'config': 60, 'metrics': 100}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  for name in ('BLOCK_BYTES', 'TEXT_DOCUMENT_BYTES'):  # the targets change them
    monkeypatch.setattr(blocks, name, getattr(blocks, name))
  monkeypatch.setattr(reader, 'MOST_SKIPPED', reader.MOST_SKIPPED)


@pytest.mark.parametrize('path', CORPUS, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_what_was_found_stays_mended(path, tmp_path):
  fuzz.check(path.parent.name, path.read_bytes(), tmp_path)


@pytest.mark.parametrize('target', CASES)
def test_mutated_input_is_read_or_refused(target, tmp_path):
  assert sum(fuzz.check(target, data, tmp_path) for data in itertools.islice(fuzz.cases(target, 0), CASES[target]))


def test_fuzzer_finds_what_is_wrong(tmp_path, monkeypatch):
  monkeypatch.setattr(fuzz.Tally, 'skipped', lambda _: {})  # bad lines are lost without a count
  with pytest.raises(AssertionError, match='lines skipped'):
    for data in itertools.islice(fuzz.cases('jsonl', 0), 300):
      fuzz.check('jsonl', data, tmp_path)


def test_every_target_has_its_cases():
  assert set(CASES) | {'tokenizer'} == set(fuzz.TARGETS)  # a damaged SentencePiece model may end the process
  assert {path.parent.name for path in CORPUS} <= set(fuzz.TARGETS)
  assert all(path.stat().st_size < 25_000 and re.fullmatch(r'[a-z0-9_]+', path.name) for path in CORPUS)
