"""SentencePiece models: read, as any project ships them, and trained, as BPE with byte fallback.

The one character that SentencePiece cannot tell from a space, U+2581, is encoded as its three bytes.

Source: Sennrich et al. 2016, arXiv:1508.07909; Kudo and Richardson 2018, arXiv:1808.06226.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from mmjax.data.tokenizer import EOS_NAMES, SPACE, Spans, Tokenizer
from mmjax.errors import UserError

SAMPLE_CHARS = 4096  # training text is taken in slices of this many characters
LEAST_VOCABULARY = 4 + 256  # control tokens and bytes of a tokenizer that is trained; the text's characters come on top
CHARACTER_COVERAGE = 0.998  # of the training text; rarer characters become bytes and leave pieces to frequent strings


def load_spm_tokenizer(path: Path) -> Tokenizer:
  """Reads a SentencePiece model; see mmjax.data.tokenizer.load_tokenizer.

  Raises:
    UserError: if the file is none, or has no token that can end a document.
  """
  if not path.stat().st_size:  # asked before sentencepiece is, which would say much and nothing
    raise UserError(f"'{path}' is not a SentencePiece model: it is empty")
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    pieces = [_piece_bytes(model, token) for token in range(model.get_piece_size())]
  except (RuntimeError, OSError, ValueError) as error:
    raise UserError(f"'{path}' is not a SentencePiece model: {error}") from None
  eos_id = _eos_id(model, path)
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


def _eos_id(model: sentencepiece.SentencePieceProcessor, path: Path) -> int:
  eos_id = model.eos_id()
  if eos_id < 0:  # none is marked
    named = (model.piece_to_id(name) for name in EOS_NAMES)
    eos_id = next((token for token in named if not model.is_unknown(token)), -1)
  if eos_id < 0:
    raise UserError(f"'{path}' has no end-of-sequence token (eos_id) and none of {', '.join(EOS_NAMES)}")
  return eos_id


def _piece_bytes(model: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
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
      allow_whitespace_only_pieces=True,  # or indentation takes a token a space: a third of all in Python code
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
    return 'no tokenizer can be trained on this text: it has nothing but line ends'
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
