"""Text to token ids and back, exactly: SentencePiece BPE with byte fallback, or a Hugging Face tokenizer.json.

A piece is the bytes it stands for. Decoding joins them, so `decode(encode(text)) == text` for every string where the
tokenizer covers all bytes and changes none before it cuts. Text that only looks like a control token ('</s>') is
encoded as text. No token means padding: which targets count is told by their place in a row (mmjax.data.loader).
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmjax.config import user_path
from mmjax.config.wording import nearest_file
from mmjax.errors import UserError
from mmjax.files import check_sha256, sha256_of

SPACE = '\u2581'  # how a SentencePiece piece writes a space
SLICE_CHARS = 2**18  # longer text is encoded in slices, cut before a space where there is one: memory stays bounded
EOS_NAMES = (
  '</s>', '<|im_end|>', '<|end_of_text|>', '<|endoftext|>', '<eos>', '<|eos|>', '[EOS]', '<|eot_id|>', '<|end|>',
  '<end_of_turn>', '<｜end▁of▁sentence｜>', '<|end▁of▁sentence|>', '<EOS>', '<|eod|>', '<eod>',
)  # fmt: skip

Spans = list[tuple[int, int]]  # for each token the characters of the text that it comes from: first, and one after last


class Slice(NamedTuple):
  """The ids of a slice of text; `exact`: whether they decode to it.

  more_bytes: int64 (len(ids),), UTF-8 bytes of the text that each token stands for, less those of its piece.
  """

  ids: list[int]
  more_bytes: np.ndarray
  exact: bool


class Tokenizer:
  """A vocabulary of byte strings and how to cut text into them.

  Attributes:
    path: the file it was read from.
    sha256: of that file.
    kind: 'sentencepiece' or 'huggingface'.
    vocab_size: V.
    bos_id, eos_id: control tokens.
    pad_id: what fills up a row's input behind its last token; any id would do.
  """

  def __init__(
    self,
    path: Path,
    kind: str,
    piece_bytes: Sequence[bytes],
    encode_slice: Callable[[str], list[int]],
    spans: Callable[[str], Spans],
    controls: Mapping[str, int],
    pad_id: int,
    bos_id: int,
    eos_id: int,
  ):
    self.path, self.kind = path, kind
    self.sha256 = sha256_of(path)
    self.vocab_size = len(piece_bytes)
    self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
    self._piece_bytes = list(piece_bytes)
    self._bytes_per_token = np.array([len(piece) for piece in piece_bytes], np.int32)
    self._encode_slice, self._spans = encode_slice, spans
    # Unigram, user-defined symbols and BPE that ignores merges find control tokens in text, which is cut within them.
    found = [name for name, token in controls.items() if token in encode_slice(name)]
    within = '|'.join(f'(?<={re.escape(name[0])})(?={re.escape(name[1:])})' for name in found)
    self._cut = re.compile(within).split if found else lambda text: [text]
    self._adds_space = self.decode_bytes(encode_slice('a')) == b' a'

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without control tokens.

    Raises:
      UserError: if it is no str, or holds a lone surrogate, which bytes that are not UTF-8 become, too.
    """
    return [token for part in self.encode_slices(text) for token in part.ids]

  def encode_slices(self, text: str) -> Iterator[Slice]:
    """Yields the ids of a text of any length, a bounded part at a time, with the bytes that they stand for.

    Raises:
      UserError: as `encode` does, when the first part is asked for.
    """
    if not isinstance(text, str):
      raise UserError(f'a text must be a str, not {type(text).__name__}')
    try:
      text.encode('utf-8')
    except UnicodeEncodeError as error:
      code = ord(text[error.start])
      byte = f'byte 0x{code - 0xDC00:02x}, which is not UTF-8,' if 0xDC80 <= code <= 0xDCFF else 'a lone surrogate'
      raise UserError(f'the text holds {byte} at character {error.start}: that is not text') from None
    start = 0
    while start < len(text):
      stop = _slice_end(text, start)
      part = text[start:stop]
      # Within a text, the space that the tokenizer puts in front of a slice is that of the text itself.
      own = start > 0 and self._adds_space and part[0] == ' ' and part[1:2].strip() != ''
      yield self._encode(part, part[1:] if own else part)
      start = stop

  def _encode(self, text: str, given: str) -> Slice:
    """Encodes a text by giving the tokenizer all of it, or what follows its first character."""
    parts, raw = self._cut(given), text.encode()
    ids = [token for part in parts for token in self._encode_slice(part)]
    decoded, more_bytes = self.decode_bytes(ids), np.zeros(len(ids), np.int64)
    if decoded == b' ' + raw:  # by far the most frequent change
      more_bytes[0] = -1
    elif decoded != raw and ids:
      spans, at = [], len(text) - len(given)
      for part in parts:
        spans += [(at + start, at + stop) for start, stop in self._spans(part)]
        at += len(part)
      more_bytes += share_bytes(text, spans, piece := self._bytes_per_token[ids]) - piece
    return Slice(ids, more_bytes, decoded == raw)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; control tokens are nothing, bytes that form no character become U+FFFD.

    Raises:
      UserError: if ids are no integers, or one is not in the vocabulary.
    """
    try:
      ids = [operator.index(token) for token in ids]
    except TypeError:
      raise UserError(f'token ids must be a list of integers, not {ids!r:.40}') from None
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  def decode_bytes(self, ids: Sequence[int]) -> bytes:
    """Returns the UTF-8 bytes that ids stand for, which may end within a character.

    Raises:
      UserError: if an id is not in the vocabulary.
    """
    for token in (min(ids, default=0), max(ids, default=0)):
      if not 0 <= token < self.vocab_size:
        raise UserError(f'token id {token} is not in the vocabulary, which is 0..{self.vocab_size - 1}')
    return b''.join([self._piece_bytes[token] for token in ids])

  def bytes_per_token(self) -> np.ndarray:
    """Returns int32 (V,): the UTF-8 bytes that each piece stands for, 0 for control tokens."""
    return self._bytes_per_token

  @property
  def missing_bytes(self) -> int:
    """How many of the 256 bytes no piece stands for: text that only they could write is lost, or unknown."""
    return 256 - len({piece for piece in self._piece_bytes if len(piece) == 1})

  def start_id(self, layout: str) -> int:
    """Returns the token that a prompt begins with: what stands before a document in rows of that layout."""
    return {'packed': self.eos_id, 'padded': self.bos_id}[layout]


def share_bytes(text: str, spans: Spans, piece_bytes: np.ndarray) -> np.ndarray:
  """Returns how many UTF-8 bytes of a text each of its tokens stands for: int64, whose sum is the text's.

  A token's bytes end where its span does. Where the next one begins before that, both are parts of one character, and
  the first has as many bytes as its piece. What was left out between two tokens counts with the second, at the end
  with the last.

  Args:
    text: what was encoded, perhaps into other characters than its own.
    spans: of its tokens, at least one.
    piece_bytes: int (len(spans),), of each token's piece.
  """
  points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  byte_of_char = np.cumsum([0, *(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))]).tolist()
  ends, end = [], 0
  for (_, stop), (next_start, _), size in zip(spans, [*spans[1:], (len(text), 0)], piece_bytes.tolist(), strict=True):
    stop, next_start = byte_of_char[stop], byte_of_char[next_start]
    end = max(end, stop if next_start >= stop else min(max(end + size, next_start), stop))
    ends.append(end)
  ends[-1] = byte_of_char[-1]
  return np.diff(ends, prepend=0)


def _slice_end(text: str, start: int) -> int:
  """Returns where the slice from `start` ends: before the last space in its second half, where words end anyway."""
  stop = start + SLICE_CHARS
  if stop >= len(text):
    return len(text)
  at = text.rfind(' ', start + SLICE_CHARS // 2, stop)
  return at if at > 0 else stop


def load_tokenizer(path: str | Path, most: int | None = None) -> Tokenizer:
  """Reads a SentencePiece model, or a Hugging Face tokenizer where the name ends in .json.

  Args:
    path: of the file.
    most: V of the model that it is for.

  Raises:
    UserError: if there is no such file, it is not the one whose hash lies beside it, it is no tokenizer, it has no
      token that can end a document, or it has more pieces than the model.
  """
  path = user_path(path)
  if not path.is_file():
    raise UserError(f"no tokenizer file '{path}'{nearest_file(path)}")
  check_sha256(path)
  if tokenizer_file_name(path) == 'tokenizer.json':
    from mmjax.data.hf_tokenizer import load_hf_tokenizer as load  # needs an optional dependency
  else:
    from mmjax.data.spm_tokenizer import load_spm_tokenizer as load
  tokenizer = load(path)
  if most is not None and tokenizer.vocab_size > most:
    raise UserError(f"'{path}' has {tokenizer.vocab_size} pieces but the model has {most}; they do not belong together")
  return tokenizer


def tokenizer_file_name(path: str | Path) -> str:
  """Returns what a tokenizer's file is called where it is kept: its name says which kind it is."""
  return 'tokenizer.json' if Path(path).suffix.lower() == '.json' else 'tokenizer.model'
