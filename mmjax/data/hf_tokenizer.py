"""Reads a Hugging Face tokenizer.json: byte-level BPE (GPT-2, Qwen), or BPE or Unigram with byte fallback (Llama).

Control tokens are found by their usual names, as the file does not say which is which.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.tokenizer import EOS_NAMES, SPACE, Spans, Tokenizer
from mmjax.errors import UserError

BOS_NAMES = ('<s>', '<|im_start|>', '<|begin_of_text|>', '<|startoftext|>', '<bos>', '<|bos|>', '[BOS]')
MOST_PIECES = 2**22  # the largest vocabularies in use have 2**18; a lying id must not fill the memory
PAD_NAMES = ('<pad>', '<|pad|>', '<|padding|>', '[PAD]', '<|finetune_right_pad_id|>', '<|endoftext|>', '<unk>')
READ = 'byte-level BPE, or BPE or Unigram with byte fallback,'


def load_hf_tokenizer(path: Path) -> Tokenizer:
  """Reads a tokenizer.json; see mmjax.data.tokenizer.load_tokenizer.

  Raises:
    UserError: if the package tokenizers is missing, or the file is no tokenizer.json, cannot keep every text, has ids
      from MOST_PIECES on, or has no token that can end a document.
  """
  backend, settings, special = open_backend(path)
  model = type(backend.model).__name__
  parts = json.dumps([settings.get(name) for name in ('normalizer', 'pre_tokenizer', 'decoder')])
  byte_level, byte_fallback = '"type": "ByteLevel"' in parts, bool(settings['model'].get('byte_fallback'))
  if not (model == 'BPE' and byte_level) and not (model in ('BPE', 'Unigram') and byte_fallback):
    raise UserError(f"'{path}' is {model} and cannot keep every text; {READ} can")
  vocab = backend.get_vocab(with_added_tokens=True)
  largest = max(vocab.values(), default=0)
  if largest >= MOST_PIECES:
    raise UserError(f"'{path}' has a token id {largest}; ids must be below {MOST_PIECES}")
  eos_id = _find(special, EOS_NAMES)
  if eos_id is None and (name := next((name for name in EOS_NAMES if name in vocab), None)):
    backend.add_special_tokens([name])  # it is there, but nothing marks it: now text cannot write it either
    eos_id = special[name] = vocab[name]
  if eos_id is None:
    raise UserError(f"'{path}' has none of the tokens that end a document: {', '.join(EOS_NAMES)}")
  within, end = (settings['model'].get(key) or '' for key in ('continuing_subword_prefix', 'end_of_word_suffix'))
  pieces = _piece_bytes(backend, byte_level, within, end)
  pad_id, bos_id = (_find(special, names, eos_id) for names in (PAD_NAMES, BOS_NAMES))

  def encode_slice(text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids

  def spans(text: str) -> Spans:
    return backend.encode(text, add_special_tokens=False).offsets

  return Tokenizer(path, 'huggingface', pieces, encode_slice, spans, special, pad_id, bos_id, eos_id)


def open_backend(path: Path) -> tuple[Any, dict[str, Any], dict[str, int]]:
  """Returns the tokenizer of the package tokenizers, what the file says, and the ids of its control tokens.

  It cuts a text as mmjax does, whole and always alike.

  Raises:
    UserError: if that package is missing, or the file is no tokenizer.json.
  """
  try:
    import tokenizers
  except ImportError:
    raise UserError(f"'{path}' needs the package tokenizers: pip install 'mmjax[hf]'") from None
  try:
    text = path.read_text(encoding='utf-8')
    settings, backend = json.loads(text), tokenizers.Tokenizer.from_str(text)
    special = {token['content']: token['id'] for token in settings['added_tokens'] if token['special']}
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # noqa: BLE001 - of the backend: Exception, or a panic of Rust, which is none
    raise UserError(f"'{path}' is not a tokenizer.json: {error}") from None
  backend.no_truncation()
  backend.no_padding()
  backend.post_processor = None  # adds control tokens, which nobody asks for, and may leave spaces out of the offsets
  backend.encode_special_tokens = True  # text that looks like a control token stays text
  if type(backend.model).__name__ == 'BPE':
    backend.model.dropout = None  # merges left out at random: a text would have other tokens each time
  return backend, settings, special


def _find(tokens: Mapping[str, int], names: Sequence[str], otherwise: int | None = None) -> int | None:
  return next((tokens[name] for name in names if name in tokens), otherwise)


def _piece_bytes(backend: Any, byte_level: bool, within: str, end: str) -> list[bytes]:
  """Returns the bytes of every piece, b'' for control tokens and for ids that no piece has.

  Args:
    backend: of the tokenizers package.
    byte_level: whether a character of a piece stands for a byte.
    within: what pieces that go on with a word begin with ('##'), or ''.
    end: what pieces that end a word end in (CLIP's '</w>'), or ''. It stands for the space behind the word.
  """
  vocab, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
  pieces = [b''] * (max(vocab.values()) + 1)
  table = _byte_level_table()
  for piece, token in vocab.items():
    if token in added:
      pieces[token] = b'' if added[token].special else piece.encode()
      continue
    piece = piece.removeprefix(within)
    if end and piece.endswith(end):
      piece = piece.removesuffix(end) + SPACE
    if byte_level:
      pieces[token] = b''.join(table[char] if char in table else char.replace(SPACE, ' ').encode() for char in piece)
    elif re.fullmatch('<0x[0-9A-F]{2}>', piece):
      pieces[token] = bytes([int(piece[3:5], 16)])
    else:
      pieces[token] = piece.replace(SPACE, ' ').encode()
  return pieces


def _byte_level_table() -> dict[str, bytes]:
  """Returns which byte each character of a byte-level piece stands for.

  Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100.
  Source: Radford et al. 2019, the GPT-2 vocabulary.
  """
  plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in plain]
  return {chr(byte): bytes([byte]) for byte in plain} | {chr(0x100 + n): bytes([b]) for n, b in enumerate(others)}
