"""Names of arrays end in their axes: every letter in use stands in the legend, once, and the legend has no others."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import mmjax.kernels
import mmjax.memory

SUFFIX = re.compile(r'_*[a-z]\w*_([0-9A-Za-z]*[A-Z][0-9A-Za-z]*)')


def names_in(tree):
  for node in ast.walk(tree):
    for field in ('id', 'arg', 'attr', 'value'):  # the last of keys of dicts
      if isinstance(name := getattr(node, field, None), str):
        yield name


def letters_in_use():
  """Returns the names that have each letter as an axis."""
  found = defaultdict(set)
  for path in Path('mmjax').rglob('*.py'):
    for name in names_in(ast.parse(path.read_text())):
      if match := SUFFIX.fullmatch(name):
        for letter in re.sub(r'\d', '', match[1]):
          found[letter].add(name)
  return found


def legend(module=mmjax.kernels):
  table = module.__doc__.rpartition('\n\n  ')[2]
  return re.findall(r'(?:^|  )([A-Za-z])  (\w[^\n]*?)(?=  |\n|$)', f'  {table}', re.MULTILINE)


def test_legend_has_every_letter_in_use_with_one_meaning():
  letters, meanings = zip(*legend(), strict=True)
  used = letters_in_use()
  assert len(used['D']) > 10 and 'rows_BTRP' in used['R']
  unknown = {letter: sorted(names) for letter, names in used.items() if letter not in letters}
  assert not unknown
  assert max(Counter(letters).values()) == max(Counter(meanings).values()) == 1
  assert not set(letters) - set(used), 'letters that no array has'


def symbols_of_the_documents():
  """Returns letters and meanings of the table in docs/memory.md; a row may have several, `$B, T$`."""
  table = Path('docs/memory.md').read_text().partition('\n## Symbols\n')[2].partition('\n| vectors')[0]
  for symbols, said in re.findall(r'^\| \$([^$=]+?)(?: = [^$]*)?\$ \| ([^|]+) \|', table, re.MULTILINE):
    yield from zip(symbols.split(', '), said.split(', '), strict=True)


def test_parts_of_the_legend_elsewhere_say_what_it_says():
  def meanings(pairs):
    return {letter: re.split(r' \$?= |[:;] ', said)[0] for letter, said in pairs}

  whole, of_memories, of_documents = map(meanings, (legend(), legend(mmjax.memory), symbols_of_the_documents()))
  assert len(of_memories) == 12 and len(of_documents) > 12
  assert of_memories.items() <= whole.items()
  assert of_documents.items() <= whole.items()


def test_shapes_in_docstrings_are_written_as_numpy_prints_them():
  bracketed = re.compile(r'\b(?:int|uint|float|bool)\d*\[[^\]\n]*\]')
  texts = {
    node: ast.get_docstring(node) or ''
    for path in Path('mmjax').rglob('*.py')
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
  }
  assert len(texts) > 1000 and not [match for text in texts.values() for match in bracketed.findall(text)]
