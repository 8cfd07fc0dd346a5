"""The embedded corpus: documented text of this Python, found again, and refused where Python lacks it."""

import hashlib
import json
import sys
import sysconfig
import time

import pytest

from mmjax.console import Progress
from mmjax.data import embedded
from mmjax.data.embedded import build_embedded_corpus, embedded_documents
from mmjax.errors import UserError

LIBRARY = {
  'one.py': '"""Module one."""\ndef f():\n  """Function.\n\n  Indented."""\n  def g():\n    """Inner."""\n',
  'package/__init__.py': '"""The package."""\nclass A:\n  """Class A."""\n  async def h(self):\n    """Method h."""\n',
  'package/copy.py': '"""Module one."""\n',
  'package/broken.py': '"""Broken."""\ndef (:\n',
  'test/left_out.py': '"""Left out."""\n',
  'plain.py': 'x = 1\n',
}


@pytest.fixture
def library(tmp_path, monkeypatch):
  root = tmp_path / 'lib'
  for name, source in LIBRARY.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(source)
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(root))
  return root


def test_docstrings_are_taken_from_sources_by_module_without_copies(library):
  documents = embedded_documents()
  assert 'one\nModule one.\n\none.f\nFunction.\n\nIndented.\n\none.f.g\nInner.' in documents
  assert 'package\nThe package.\n\npackage.A\nClass A.\n\npackage.A.h\nMethod h.' in documents
  assert not any(mark in text for text in documents for mark in ('package.copy', 'package.broken', 'left_out'))
  assert any('builtins.len\nReturn the number of items in a container.' in text for text in documents)
  assert any(text.startswith('The "assert" statement') for text in documents)
  assert documents == sorted(set(documents)) == embedded_documents()


def test_text_does_not_depend_on_hooks_that_the_process_has_set(library, monkeypatch):
  for name in ('unraisablehook', 'excepthook', 'displayhook', 'breakpointhook'):
    monkeypatch.setattr(sys, name, getattr(sys, f'__{name}__'))
  usual = embedded_documents()
  assert any('\n\nsys.unraisablehook\nHandle an unraisable exception.' in text for text in usual)
  for name in ('unraisablehook', 'excepthook', 'displayhook', 'breakpointhook'):
    monkeypatch.setattr(sys, name, lambda *_: None)
  assert embedded_documents() == usual


@pytest.mark.thorough
def test_corpus_is_built_once_and_recorded(tmp_path, monkeypatch):
  said = []

  class Said(Progress):
    def say(self, message):
      said.append(message)

  start = time.monotonic()
  corpus = build_embedded_corpus(tmp_path / 'data', Said(quiet=True))
  assert time.monotonic() - start < 60  # seconds on an idle machine; others may be busy
  record = json.loads((tmp_path / 'data' / 'embedded.json').read_text())
  data = corpus.read_bytes()
  assert record['sha256'] == hashlib.sha256(data).hexdigest() and record['python'] == sys.version
  assert len(data) == record['bytes'] > 2_000_000 and record['documents'] > 300
  assert all(set(json.loads(line)) == {'text'} for line in data.splitlines())
  assert said == [f'building the embedded corpus {corpus}']
  monkeypatch.setattr(embedded, 'embedded_documents', lambda: ['x' * 10**6])
  assert build_embedded_corpus(tmp_path / 'data', Said(quiet=True)).read_bytes() == data and len(said) == 1
  corpus.write_bytes(data[:-1])
  assert build_embedded_corpus(tmp_path / 'data', Said(quiet=True)).read_bytes() != data and len(said) == 2


def test_python_without_sources_or_topics_is_one_sentence(library, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r'carries only \d+ bytes of documentation: its standard library has no sources'):
    build_embedded_corpus(tmp_path / 'data', Progress(quiet=True))
  assert not list((tmp_path / 'data').iterdir())
  monkeypatch.setitem(sys.modules, 'pydoc_data.topics', None)
  with pytest.raises(UserError, match='lacks pydoc_data'):
    build_embedded_corpus(tmp_path / 'data', Progress(quiet=True))
