"""Text to token ids and back, exactly: SentencePiece BPE with byte fallback, or a Hugging Face tokenizer.json.

A piece is the bytes it stands for. Decoding joins them, so `decode(encode(text)) == text` for every string where the
tokenizer covers all bytes and changes none before it cuts. The one character that SentencePiece itself cannot tell from
a space, U+2581, is encoded as its three bytes. Text that only looks like a control token ('</s>') is encoded as text.
No token means padding: which targets count is told by their place in a row (mmjax.data.loader).

Source: Sennrich et al. 2016, arXiv:1508.07909; Kudo and Richardson 2018, arXiv:1808.06226.
"""

import hashlib
import io
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from mmjax.config import user_path
from mmjax.errors import UserError
from mmjax.files import check_sha256

SPACE = '\u2581'  # how a SentencePiece piece writes a space
SLICE_CHARS = 2**18  # longer text is encoded in slices, cut before a space where there is one: memory stays bounded
SAMPLE_CHARS = 4096  # training text is taken in slices of this many characters
LEAST_VOCABULARY = 4 + 256  # control tokens and bytes of a tokenizer that is trained; the text's characters come on top
CHARACTER_COVERAGE = 0.998  # of the training text; rarer characters become bytes and leave pieces to frequent strings


EOS_NAMES = (
  '</s>', '<|im_end|>', '<|end_of_text|>', '<|endoftext|>', '<eos>', '<|eos|>', '[EOS]', '<|eot_id|>', '<|end|>',
  '<end_of_turn>', '<｜end▁of▁sentence｜>', '<|end▁of▁sentence|>', '<EOS>', '<|eod|>', '<eod>',
)  # fmt: skip

Spans = list[tuple[int, int]]  # for each token the characters of the text that it comes from: first, and one after last


class Slice(NamedTuple):
  """The ids of a slice of text; `exact`: whether they decode to it.

  more_bytes: int64[len(ids)], UTF-8 bytes of the text that each token stands for, less those of its piece.
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
    self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    self.vocab_size = len(piece_bytes)
    self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
    self._piece_bytes = list(piece_bytes)
    self._bytes_per_token = np.array([len(piece) for piece in piece_bytes], np.int32)
    self._encode_slice, self._spans = encode_slice, spans
    # Unigram, user-defined symbols and BPE that ignores merges find control tokens in text, which is cut within them.
    found = [name for name, token in controls.items() if token in encode_slice(name)]
    within = '|'.join(f'(?<={re.escape(name[0])})(?={re.escape(name[1:])})' for name in found)
    self._cut = re.compile(within).split if found else lambda text: [text]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without control tokens.

    Raises:
      UserError: if it is no str, or holds a lone surrogate, which is no character.
    """
    return [token for part in self.encode_slices(text) for token in part.ids]

  def encode_slices(self, text: str) -> Iterator[Slice]:
    """Yields the ids of a text of any length, a bounded part at a time, with the bytes that they stand for."""
    if not isinstance(text, str):
      raise UserError(f'a text must be a str, not {type(text).__name__}')
    try:
      text.encode('utf-8')
    except UnicodeEncodeError as error:
      raise UserError(f'the text holds a lone surrogate at character {error.start}, which is no text') from None
    start = 0
    while start < len(text):
      stop = _slice_end(text, start)
      yield self._encode(text[start:stop])
      start = stop

  def _encode(self, text: str) -> Slice:
    parts, raw = self._cut(text), text.encode()
    ids = [token for part in parts for token in self._encode_slice(part)]
    decoded, more_bytes = self.decode_bytes(ids), np.zeros(len(ids), np.int64)
    if decoded == b' ' + raw:  # by far the most frequent change
      more_bytes[0] = -1
    elif decoded != raw and ids:
      more_bytes += share_bytes(text, self._spans_of(parts), piece := self._bytes_per_token[ids]) - piece
    return Slice(ids, more_bytes, decoded == raw)

  def _spans_of(self, parts: Sequence[str]) -> Spans:
    found, at = [], 0
    for part in parts:
      found += [(at + start, at + stop) for start, stop in self._spans(part)]
      at += len(part)
    return found

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
    """Returns the UTF-8 bytes that ids stand for, which may end within a character."""
    for token in (min(ids, default=0), max(ids, default=0)):
      if not 0 <= token < self.vocab_size:
        raise UserError(f'token id {token} is not in the vocabulary, which is 0..{self.vocab_size - 1}')
    return b''.join([self._piece_bytes[token] for token in ids])

  def bytes_per_token(self) -> np.ndarray:
    """Returns int32[V]: the UTF-8 bytes that each piece stands for, 0 for control tokens."""
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
    piece_bytes: int[len(spans)], of each token's piece.
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


def load_tokenizer(path: str | Path) -> Tokenizer:
  """Reads a SentencePiece model, or a Hugging Face tokenizer where the name ends in .json.

  Raises:
    UserError: if there is no such file, it is not the one whose hash lies beside it, it is no tokenizer, or it has no
      token that can end a document.
  """
  path = user_path(path)
  if not path.is_file():
    raise UserError(f"no tokenizer file '{path}'")
  check_sha256(path)
  if tokenizer_file_name(path) == 'tokenizer.json':
    from mmjax.data.hf_tokenizer import load_hf_tokenizer  # needs an optional dependency

    return load_hf_tokenizer(path)
  return _load_sentencepiece(path)


def tokenizer_file_name(path: str | Path) -> str:
  """Returns what a tokenizer's file is called where it is kept: its name says which kind it is."""
  return 'tokenizer.json' if Path(path).suffix.lower() == '.json' else 'tokenizer.model'


def _load_sentencepiece(path: Path) -> Tokenizer:
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    pieces = [_sentencepiece_bytes(model, token) for token in range(model.get_piece_size())]
  except (RuntimeError, OSError, ValueError) as error:
    raise UserError(f"'{path}' is not a SentencePiece model: {error}") from None
  if not pieces:
    raise UserError(f"'{path}' is not a SentencePiece model: it is empty")
  eos_id = model.eos_id()
  if eos_id < 0:  # none is marked
    named = (model.piece_to_id(name) for name in EOS_NAMES)
    eos_id = next((token for token in named if not model.is_unknown(token)), -1)
  if eos_id < 0:
    raise UserError(f"'{path}' has no end-of-sequence token (eos_id) and none of {', '.join(EOS_NAMES)}")
  pieces[eos_id] = b''  # a user-defined symbol is text as others see it
  space_ids = [model.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()]
  byte_fallback = all(model.is_byte(token) for token in space_ids)

  def encode_slice(text: str) -> list[int]:
    if SPACE not in text or not byte_fallback:
      return model.encode(text)
    parts = model.encode(text.split(SPACE))
    return parts[0] + [token for part in parts[1:] for token in space_ids + part]

  def spans(text: str) -> Spans:
    found, at = [], 0
    for number, part in enumerate(text.split(SPACE) if byte_fallback else [text]):
      if number:
        found += [(at, at + 1)] * len(space_ids)
        at += 1
      mapping = model.encode(part, return_type='offset_mapping')
      last, of_part = None, []
      for token, (start, stop) in zip(reversed(mapping['ids']), reversed(mapping['offsets']), strict=True):
        if not (model.is_byte(token) and start == stop):  # of a character's bytes only the last has its span
          last = (at + start, at + stop)
        of_part.append(last)
      found += reversed(of_part)
      at += len(part)
    return found

  pad_id = next((token for token in (model.pad_id(), model.unk_id()) if token >= 0), eos_id)
  bos_id = model.bos_id() if model.bos_id() >= 0 else eos_id
  controls = {model.id_to_piece(eos_id): eos_id}
  return Tokenizer(path, 'sentencepiece', pieces, encode_slice, spans, controls, pad_id, bos_id, eos_id)


def _sentencepiece_bytes(model: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
  if model.is_control(token) or model.is_unknown(token):
    return b''
  if model.is_byte(token):
    return bytes([int(model.id_to_piece(token)[3:5], 16)])
  return model.id_to_piece(token).replace(SPACE, ' ').encode()


def train_tokenizer(sample: Sequence[str], vocab_size: int) -> bytes:
  """Trains a SentencePiece BPE tokenizer with byte fallback.

  Args:
    sample: pieces of training text, see `sample_text`.
    vocab_size: V, with 4 control tokens and 256 bytes among them.

  Returns:
    The model file for `load_tokenizer`: pad 0, bos 1, eos 2, unk 3 (never used), bytes from 4.

  Raises:
    UserError: if the text cannot fill the vocabulary, or does not fit into it.
  """
  model = io.BytesIO()
  # Spaces stand for what the trainer would skip a whole sentence for: its own marks and NUL. They become bytes later.
  sentences = (text.translate({0x2581: ' ', 0x2585: ' ', 0: ' '}) for text in sample)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences,
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      byte_fallback=True,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      character_coverage=CHARACTER_COVERAGE,
      max_sentence_length=4 * SAMPLE_CHARS + 1,  # bytes: no slice is left out
      num_threads=1,  # the number is written into the model: its hash must not depend on the machine
      minloglevel=2,
    )
  except RuntimeError as error:
    raise UserError(_why_no_vocabulary(str(error), vocab_size)) from None
  return model.getvalue()


def _why_no_vocabulary(error: str, vocab_size: int) -> str:
  flags = '(--config.model.vocab_size={0}; prepare: --vocab_size {0})'.format
  if 'too high' in error:
    largest = error.rpartition('<=')[2].strip(' .\n')
    return (
      f'model.vocab_size={vocab_size} is more pieces than the training text can fill; largest possible: {largest} '
      + flags(largest)
    )
  if 'smaller than required_chars' in error:
    least = error.rpartition(' vs ')[2].split('.')[0]
    return (
      f'model.vocab_size={vocab_size} cannot hold the characters of the training text; least possible: {least} '
      + flags(least)
    )
  if '!sentences_.empty()' in error:
    return 'no training document is left: every line is empty, bad or held out (data.valid_fraction)'
  return f'no tokenizer of model.vocab_size={vocab_size} can be trained on this text: {error}'


def sample_text(documents: Iterator[str], sample_bytes: int) -> list[str]:
  """Picks slices spread evenly over a corpus of unknown length, in one pass and bounded memory.

  Every n-th slice of SAMPLE_CHARS characters is kept; whenever that exceeds `sample_bytes`, every second of them is let
  go and n doubles. The result depends on the documents and their order only.
  """
  kept: list[str] = []
  kept_bytes, stride, number = 0, 1, 0
  for text in documents:
    for start in range(0, len(text), SAMPLE_CHARS):
      if number % stride == 0:
        kept.append(text[start : start + SAMPLE_CHARS])
        kept_bytes += len(kept[-1].encode())
        while kept_bytes > sample_bytes and len(kept) > 1:
          kept, stride = kept[::2], 2 * stride
          kept_bytes = sum(len(part.encode()) for part in kept)
      number += 1
  return kept
