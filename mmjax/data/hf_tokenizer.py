"""Reads a Hugging Face tokenizer.json: byte-level BPE (GPT-2, Qwen, MiniMind), or BPE with byte fallback (Llama).

Control tokens are found by their usual names, as the file does not say which is which.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.data.tokenizer import SPACE, Tokenizer, choose_pad
from mmjax.errors import UserError

EOS_NAMES = ('</s>', '<|im_end|>', '<|end_of_text|>', '<|endoftext|>', '<eos>', '<|eos|>', '[EOS]')
BOS_NAMES = ('<s>', '<|im_start|>', '<|begin_of_text|>', '<|startoftext|>', '<bos>', '<|bos|>', '[BOS]')
MOST_PIECES = 2**22  # the largest vocabularies in use have 2**18; a lying id must not fill the memory
PAD_NAMES = ('<pad>', '<|pad|>', '<|padding|>', '[PAD]', '<|finetune_right_pad_id|>', '<|endoftext|>', '<unk>')


def load_hf_tokenizer(path: Path) -> Tokenizer:
  """Reads a tokenizer.json; see mmjax.data.tokenizer.load_tokenizer."""
  try:
    import tokenizers
  except ImportError:
    raise UserError(f"'{path}' needs the package tokenizers: pip install 'mmjax[hf]'") from None
  try:
    text = path.read_text(encoding='utf-8')
    settings, backend = json.loads(text), tokenizers.Tokenizer.from_str(text)
    added = {token['id']: token for token in settings['added_tokens']}
    decoder = settings['decoder'] or {}
    kinds = {part['type'] for part in decoder.get('decoders', [decoder]) if 'type' in part}
    special = {token['content']: token['id'] for token in added.values() if token['special']}
  except Exception as error:  # noqa: BLE001 - the backend raises bare Exception for what it cannot read
    raise UserError(f"'{path}' is not a tokenizer.json: {error}") from None
  backend.no_truncation()
  backend.no_padding()
  backend.encode_special_tokens = True  # text that looks like a control token stays text
  if kinds.isdisjoint(('ByteLevel', 'ByteFallback')):
    raise UserError(f"'{path}' is neither byte-level BPE nor BPE with byte fallback: it cannot keep every text")
  largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
  if largest >= MOST_PIECES:
    raise UserError(f"'{path}' has a token id {largest}; ids must be below {MOST_PIECES}")
  pieces = _piece_bytes(backend, added, 'ByteLevel' in kinds)
  eos_id = _find(special, EOS_NAMES)
  if eos_id is None:
    raise UserError(f"'{path}' has none of the tokens that end a document: {', '.join(EOS_NAMES)}")
  pads = [special[name] for name in PAD_NAMES if name in special]
  pad_id = choose_pad(pieces, pads, eos_id)
  bos_id = _find(special, BOS_NAMES)

  def encode_slice(text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids

  return Tokenizer(path, 'huggingface', pieces, encode_slice, pad_id, eos_id if bos_id is None else bos_id, eos_id)


def _find(special: Mapping[str, int], names: Sequence[str]) -> int | None:
  return next((special[name] for name in names if name in special), None)


def _piece_bytes(backend: Any, added: Mapping[int, Mapping[str, Any]], byte_level: bool) -> list[bytes]:
  """Returns the bytes of every piece, b'' for control tokens and for ids that no piece has."""
  vocab = backend.get_vocab(with_added_tokens=True)
  pieces = [b''] * (max(vocab.values()) + 1)
  table = _byte_level_table()
  for piece, token in vocab.items():
    if token in added:
      pieces[token] = b'' if added[token]['special'] else piece.encode()
    elif byte_level:
      pieces[token] = b''.join(table[char] if char in table else char.encode() for char in piece)
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
