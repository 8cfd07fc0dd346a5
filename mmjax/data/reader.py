"""Finds text files, reads them in blocks, and counts what is in them: nothing is dropped without being counted."""

import codecs
import glob
import importlib
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mmjax.config import expand_home, user_path
from mmjax.config.wording import nearest_file
from mmjax.console import Progress
from mmjax.data.blocks import Block
from mmjax.data.formats import (
  DAMAGED,
  ENDINGS,
  FORMATS,
  NO_KEY,
  NO_UTF8,
  PACKINGS,
  TOO_LONG,
  BadLine,
  NotText,
  decode,
  ending_of,
  may_be_blank,
  parse_block,
)
from mmjax.data.unpack import NotUnpacked
from mmjax.errors import UserError, file_error

BLANK_FILE = 'blank file'
MOST_SKIPPED = 0.001  # share of lines that on_bad_line='skip' may leave out; a document of plain text counts as a line
SKIP_HINT = (
  f'; to leave out such lines (of plain text: documents), at most one in {1 / MOST_SKIPPED:,.0f}: '
  '--config.data.on_bad_line=skip (prepare: --on_bad_line skip)'
)
ENCODING_HINT = (
  '; of text in another encoding: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW (GB18030, BIG5, SHIFT_JIS, ...)'
)
LONGEST_PATH = 4096  # characters; Linux knows no longer one


def find_files(patterns: str) -> list[Path]:
  """Returns the files that comma-separated paths and globs name: a glob's sorted, each file once, in the order given.

  Their names are those given: where they are links, what these lead to says nothing. A path that exists is meant as it
  is, with whatever commas and brackets are in it.

  Raises:
    UserError: if a path does not exist, is a directory, has another ending or is there twice, or a pattern matches
      nothing.
  """
  files: dict[str, Path] = {}
  paths = set()  # as they are, no globs: these may overlap
  for name, found in _each_named(patterns):
    for file in found:
      _check_file(file)
      place = os.path.realpath(file)
      if file == Path(expand_home(name)):
        if place in paths:
          raise UserError(f'{str(file)!r} is named twice in {patterns!r}; each file is read once')
        paths.add(place)
      files.setdefault(place, file)
  if not files:
    raise UserError(f'no file is named in {patterns!r}')
  return list(files.values())


def split_names(patterns: str) -> list[str]:
  """Cuts comma-separated paths and globs apart, as `find_files` reads them.

  Raises:
    UserError: if two of them name the same file, or a pattern matches nothing.
  """
  names, seen = [], set()
  for name, found in _each_named(patterns):
    if twice := [str(file) for file in found if os.path.realpath(file) in seen]:
      raise UserError(f'{twice[0]!r} is named twice in {patterns!r}')
    seen |= {os.path.realpath(file) for file in found}
    names.append(name)
  return names


def _each_named(patterns: str) -> Iterator[tuple[str, list[Path]]]:
  """Yields each path or glob of a comma-separated list, and the files that it names."""
  parts = patterns.split(',')
  while parts:
    found, used = _first_named(parts)
    if found:
      name = ','.join(parts[:used])
      yield (name if _matches(name) else name.strip()), found
    parts = parts[used:]


def _first_named(parts: Sequence[str]) -> tuple[list[Path], int]:
  """Returns what the first of comma-separated parts names, and how many parts its name takes: it may hold commas."""
  first = parts[0].strip()
  if not first:
    return [], 1
  folder = None  # a/b,c.jsonl may lie beside a folder a/b
  for used in range(1, len(parts) + 1):
    text = ','.join(parts[:used])
    if len(text) > LONGEST_PATH:
      break
    found = _matches(text) or _matches(text.strip())  # a name may begin or end with a space
    if found and not any(path.is_dir() for path in found):
      return found, used
    folder = folder or (found and (found, used))
  if folder:
    return folder
  if glob.has_magic(first):
    raise UserError(f'no file matches the pattern {first!r}, which starts from {str(Path.cwd())!r}')
  return [Path(expand_home(first))], 1  # which is missing: `_check_file` says in what way


def _matches(text: str) -> list[Path]:
  """Returns what a path or glob names, sorted: what is called just that, or matches below the folders that are."""
  path = Path(expand_home(text))
  if os.path.lexists(path):
    return [path]
  folder = next((parent for parent in path.parents if os.path.lexists(parent)), Path())
  pattern = os.path.join(glob.escape(str(folder)), path.relative_to(folder))
  return sorted(
    {Path(found) for found in glob.glob(pattern, recursive=True)} if glob.has_magic(pattern) else (), key=str
  )


def _check_file(path: Path) -> None:
  try:
    str(path).encode()
    mode = path.stat().st_mode
  except UnicodeEncodeError:  # bytes that are no text reach Python as lone surrogates
    raise UserError(f'the file name {ascii(str(path))} is not UTF-8; rename the file') from None
  except (FileNotFoundError, NotADirectoryError):
    leads = f", a link to '{os.readlink(path)}', leads nowhere" if path.is_symlink() else ''
    raise UserError(f"'{path}'{leads}" if leads else f"no file '{path}'{nearest_file(path)}") from None
  except OSError as error:  # a name that is too long, a folder that may not be entered, links in a circle
    raise file_error(error, f"'{path}' cannot be read") from None
  if stat.S_ISDIR(mode):
    raise UserError(f"'{path}' is a directory; name its files, for example '{path}/*{_ending_in(path)}'")
  if not stat.S_ISREG(mode):
    raise UserError(f"'{path}' must be a regular file, not a pipe or a device; write its text to one")
  if not (ending := ending_of(path)):
    before = ' or '.join(end for end, packing in PACKINGS.items() if end and not packing.holds)
    alone = ' or '.join(end for end, packing in PACKINGS.items() if packing.holds)
    raise UserError(
      f"'{path}' must end in {' or '.join(FORMATS)}, alone or followed by {before}, or in {alone}; of plain text with "
      'another name give a link that ends in .txt'
    )
  _, packing = ENDINGS[ending]
  try:
    if package := PACKINGS[packing].package:
      importlib.import_module(package)
  except ImportError:
    raise UserError(f"'{path}' needs the package {package}: pip install 'mmjax[formats]'") from None


def _ending_in(folder: Path) -> str:
  """Returns the ending of most files of a folder that end as text does, '.jsonl.xz', or that of a format."""
  try:
    paths = sorted(folder.iterdir())
    found = Counter(path.name[-len(ending) :] for path in paths if (ending := ending_of(path)))  # as it is spelled
  except OSError:  # it may not be listed
    found = Counter()
  return found.most_common(1)[0][0] if found else next(iter(FORMATS))


class Place(NamedTuple):
  """Where in a list of files reading begins: number of the file from 0, of the line from 1, uncompressed offset."""

  file: int = 0
  line: int = 1
  byte: int = 0


START = Place()


class Meter:
  """Sums up a pass over files, and shows its share of the bytes on disk, its tokens and its speed."""

  def __init__(self, stage: str, files: Sequence[Path], progress: Progress):
    self._stage, self._progress = stage, progress
    self._total_bytes = sum(file.stat().st_size for file in files)
    self._read_bytes = self._text_bytes = self._tokens = 0
    self._start_seconds = time.monotonic()

  def read(self, disk_bytes: int) -> None:
    """Notes how much has been read from the disk."""
    self._read_bytes = disk_bytes

  def add(self, text_bytes: int, tokens: int = 0) -> None:
    """Adds text that is done, and shows the sums."""
    self._text_bytes += text_bytes
    self._tokens += tokens
    speed = self._text_bytes / 1e6 / max(time.monotonic() - self._start_seconds, 1e-3)
    note = f'{self._tokens / 1e6:.1f} M tokens, {speed:.1f} MB/s' if self._tokens else f'{speed:.1f} MB/s'
    self._progress.update(self._stage, self._read_bytes, self._total_bytes, note)


def read_files(files: Sequence[Path], start: Place = START, meter: Meter | None = None) -> Iterator[Block]:
  """Yields the blocks of all files in order.

  Args:
    files: as `find_files` gives them.
    start: where to begin; where a block ended.
    meter: told before each block how many bytes were read, as they lie on the disk.

  Raises:
    UserError: if a file cannot be opened, is damaged, or ends before its compressed data do.
  """
  before = sum(file.stat().st_size for file in files[: start.file])
  line, byte = start.line, start.byte
  for file in files[start.file :]:
    for block, disk_bytes in _read_file(file, line, byte):
      if meter:
        meter.read(before + disk_bytes)
      yield block
    before += file.stat().st_size
    line, byte = 1, 0


def _read_file(file: Path, line: int, byte: int) -> Iterator[tuple[Block, int]]:
  content, packing = ENDINGS[ending_of(file)]
  try:
    with file.open('rb') as raw, PACKINGS[packing].unpack(raw) as handle:
      handle.seek(byte)
      for piece in FORMATS[content].cut(handle):
        too_long = piece if isinstance(piece, int) else 0
        block = Block(str(file), line, byte, b'' if too_long else piece, too_long)
        line, byte = block.end
        yield block, raw.tell()
      if not byte:  # an empty file gives one empty block
        yield Block(str(file), line, byte, b''), 0
  except DAMAGED as error:
    raise UserError(
      f"'{file}' is damaged or cut short: {error} (after byte {byte} of its uncompressed text)"
    ) from error
  except NotUnpacked as error:
    raise UserError(f"'{file}' cannot be unpacked: {error} (after byte {byte} of its uncompressed text)") from error
  except OSError as error:
    raise file_error(error, f"'{file}' cannot be read") from error


def _what_helps(line: BadLine) -> str:
  """Returns what to type after a bad line; '' where that stands in it, or all lines will be as bad."""
  if line.kind.startswith((BLANK_FILE, 'UTF-')) or (line.kind == NO_KEY and line.line == 1):
    return ''
  if line.kind == TOO_LONG:
    return f'; cut the document into several, or give it as a .txt, which is cut by itself{SKIP_HINT}'
  return (ENCODING_HINT if line.kind == NO_UTF8 else '') + SKIP_HINT


class Tally:
  """Counts lines by file; in 'fail' mode the first bad line ends the reading, in 'skip' mode too many bad lines do.

  `files` maps each file to {'lines', 'empty', 'skipped': {kind: count}}, `examples` each kind to its first line: plain
  values, so that they can be saved. A Tally counts in those that it is given.
  """

  def __init__(self, on_bad_line: str, files: dict[str, dict] | None = None, examples: dict[str, str] | None = None):
    self.on_bad_line = on_bad_line
    self.files = {} if files is None else files
    self.examples = {} if examples is None else examples

  def add(self, file: str, lines: int, empty: int, bad: Sequence[BadLine]) -> None:
    """Counts one block; files come one after the other. Raises UserError for a bad line in 'fail' mode."""
    if file not in self.files:
      self._end_file()
    counts = self.files.setdefault(file, {'lines': 0, 'empty': 0, 'skipped': {}})
    counts['lines'] += lines
    counts['empty'] += empty
    for line in bad:
      if self.on_bad_line == 'fail':
        raise UserError(f'{line}{_what_helps(line)}')
      counts['skipped'][line.kind] = counts['skipped'].get(line.kind, 0) + 1
      self.examples.setdefault(line.kind, str(line))

  def _end_file(self) -> None:
    """Counts the last file, if it has no line that is not blank and needs one, as one bad line."""
    last = next(reversed(self.files), '')  # no list of them: there may be many files
    if last and not self.files[last]['lines'] and not may_be_blank(last):
      self.add(last, 1, 0, [BadLine(last, 1, 0, BLANK_FILE, 'the file is empty or blank')])

  def end(self) -> None:
    """Ends the last file. Raises UserError if more than MOST_SKIPPED of all lines were skipped."""
    self._end_file()
    lines, skipped = sum(counts['lines'] for counts in self.files.values()), sum(self.skipped().values())
    if skipped > MOST_SKIPPED * lines:
      raise UserError(
        f'{skipped} of {lines} lines (of plain text: documents) are bad ({skipped / lines:.2%}), more than the '
        f'{MOST_SKIPPED:.1%} that on_bad_line=skip allows; mend or remove them: {self.report()}'
      )

  def skipped(self) -> Counter[str]:
    """Returns how many lines of each kind were skipped, over all files."""
    return sum((Counter(counts['skipped']) for counts in self.files.values()), Counter())

  def report(self) -> str:
    """Returns '3 x not JSON (first: FILE:LINE: ...), ...', or '' where nothing was skipped."""
    return ', '.join(f'{n} x {kind} (first: {self.examples[kind]})' for kind, n in sorted(self.skipped().items()))


def read_documents(files: Sequence[Path], text_key: str, tally: Tally, meter: Meter | None = None) -> Iterator[str]:
  """Yields the documents of all files in order, never more than a block of them in memory.

  Raises:
    UserError: for a bad file, and for bad lines as `tally` decides.
  """
  for block in read_files(files, meter=meter):
    parsed = parse_block(block, text_key)
    tally.add(block.file, parsed.lines, parsed.empty, parsed.bad)
    yield from parsed.documents
  tally.end()


def read_text(path: str | Path, what: str) -> str:
  """Returns the text of a small UTF-8 file, without the byte order mark that may open it; `what` is for messages.

  Raises:
    UserError: if it cannot be read or is no text.
  """
  path = user_path(path)
  try:
    return decode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
  except NotText as bad:
    raise UserError(f"{what} '{path}': {bad.what} (byte {bad.byte})") from None
  except OSError as error:
    raise file_error(error, f"{what} '{path}' cannot be read") from None
