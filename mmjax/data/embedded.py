"""The text that every CPython carries, as a small corpus for a first run without any download.

One document a module: the docstrings of the standard library (parsed from its sources, never imported) and of the
built-in modules, each under its name; and one for each topic of the language's documentation (pydoc_data.topics).
It is extracted on the user's machine and differs a little between Python versions.
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmjax.console import Progress
from mmjax.errors import UserError
from mmjax.files import locked_directory, sha256_of, write_file, write_json

# Folders of the library without text of their own; a codec's docstring is the same line but for its name.
LEFT_OUT = {'__pycache__', 'dist-packages', 'encodings', 'idle_test', 'site-packages', 'test', 'tests'}
LEAST_BYTES = 10**6  # a Python without its sources or topics gives less than this, a whole one over twice as much


def build_embedded_corpus(directory: Path, progress: Progress) -> Path:
  """Writes embedded.jsonl (key `text`) and, beside it, embedded.json with its sha256; reuses them where they are whole.

  Args:
    directory: where to write.
    progress: where to say that the corpus is being built, which takes some seconds.

  Returns:
    The path of embedded.jsonl.

  Raises:
    UserError: if this Python lacks its sources or its documentation topics.
    StorageError: if the files cannot be written.
  """
  corpus, record = directory / 'embedded.jsonl', directory / 'embedded.json'
  with locked_directory(directory, lambda: progress.say(f'another process uses {directory}: waiting for it')):
    if not _is_whole(corpus, record):
      progress.say(f'building the embedded corpus {corpus}')
      _write_corpus(corpus, record)
  return corpus


def _write_corpus(corpus: Path, record: Path) -> None:
  data = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in embedded_documents()).encode()
  if len(data) < LEAST_BYTES:
    raise UserError(
      f'this Python ({sys.executable}) carries only {len(data)} bytes of documentation: its standard library has no '
      'sources; use a full CPython, or give text with --config.data.train_files'
    )
  write_file(corpus, data)
  facts = {'sha256': hashlib.sha256(data).hexdigest(), 'bytes': len(data), 'documents': data.count(b'\n')}
  write_json(record, facts | {'python': sys.version})


def _is_whole(corpus: Path, record: Path) -> bool:
  try:
    facts = json.loads(record.read_bytes())
    return facts['python'] == sys.version and facts['sha256'] == sha256_of(corpus)
  except (OSError, ValueError, KeyError, TypeError):
    return False


def embedded_documents() -> list[str]:
  """Returns the documents, sorted; of equal docstrings only the first is kept."""
  seen: set[str] = set()
  documents = set(_topics())
  for docstrings in (*_library_modules(), *_builtin_modules()):
    new = [(name, text) for name, text in docstrings if text not in seen]
    seen.update(text for _, text in new)
    documents.add('\n\n'.join(f'{name}\n{text}' for name, text in new))
  return sorted(text for text in documents if text.strip())


def _topics() -> list[str]:
  try:
    topics = importlib.import_module('pydoc_data.topics').topics
  except ImportError:
    raise UserError(
      f'this Python ({sys.executable}) lacks pydoc_data, a part of the standard library; use a full CPython, '
      'or give text with --config.data.train_files'
    ) from None
  return [text.strip() for text in topics.values()]


def _library_modules() -> Iterator[list[tuple[str, str]]]:
  """Yields the named docstrings of each module of the standard library, in order of its path."""
  root = Path(sysconfig.get_path('stdlib'))
  for path in sorted(root.rglob('*.py')):
    folders = path.relative_to(root).parts[:-1]
    if LEFT_OUT.isdisjoint(folders):
      module = '.'.join([*folders, path.stem]).removesuffix('.__init__')
      with contextlib.suppress(SyntaxError, ValueError, OSError):  # some files are broken on purpose
        yield list(_docstrings(module, ast.parse(path.read_bytes())))


def _docstrings(name: str, node: Any) -> Iterator[tuple[str, str]]:
  if text := ast.get_docstring(node):
    yield name, text
  for child in node.body:
    if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      yield from _docstrings(f'{name}.{child.name}', child)


def _builtin_modules() -> Iterator[list[tuple[str, str]]]:
  """Yields the named docstrings of each module that is compiled into the interpreter."""
  for module_name in sorted(sys.builtin_module_names):
    module = importlib.import_module(module_name)
    members = [(module_name, module)]
    for name, value in sorted(vars(module).items()):
      value = vars(module).get(f'__{name}__', value)  # sys keeps the hooks there that this process may have replaced
      if inspect.isroutine(value) or inspect.isclass(value):
        members.append((f'{module_name}.{name}', value))
      if inspect.isclass(value):
        inner = sorted((key, item) for key, item in vars(value).items() if callable(item))
        members += [(f'{module_name}.{name}.{key}', item) for key, item in inner]
    yield [(name, text) for name, value in members if (text := inspect.getdoc(value))]
