"""A run's tokenizer as a tokenizer.json that cuts every text into the same ids.

A SentencePiece model becomes a BPE of the tokenizers package: two pieces merge where the text of both is a piece, those
of the best score first. Its pieces hold spaces as they are, so nothing is changed before or after, and U+2581, which
SentencePiece writes for a space, becomes three bytes as in mmjax. A tokenizer.json stays as it is, but for what
mmjax.data.hf_tokenizer changes too.

What is written puts the token that rows begin with in front, unless add_special_tokens=False.
"""

import json
from typing import Any

import sentencepiece

from mmjax.data.hf_tokenizer import open_backend
from mmjax.data.tokenizer import SPACE, Tokenizer
from mmjax.errors import UserError

# What a normalizer would change and a pre-tokenizer would cut: all of it must come out as in mmjax.
PROBE = (
  f" a  b\n\n c\t\rﬁ Ａ e\u0301 é 你好\u3000。 \U0001f600 {SPACE}x </s> <s> <0x41> 12345 \x00 don't  \n        if  "
)


def as_tokenizer_json(tokenizer: Tokenizer, start_id: int) -> Any:
  """Returns a tokenizer of the tokenizers package that cuts text as this one does, with `start_id` in front.

  Raises:
    UserError: if the package is missing, or there is none that does.
  """
  try:
    import tokenizers
  except ImportError:
    raise UserError("a tokenizer.json is written with the package tokenizers: pip install 'mmjax[hf]'") from None
  if tokenizer.kind == 'huggingface':
    backend = open_backend(tokenizer.path)[0]
    backend.add_special_tokens([backend.id_to_token(tokenizer.eos_id)])
  else:
    backend = _from_sentencepiece(tokenizer)
  start = backend.id_to_token(start_id)
  process = tokenizers.processors.TemplateProcessing
  backend.post_processor = process(f'{start} $A', f'{start} $A $B', [(start, start_id)])
  backend.encode_special_tokens = True
  ids = range(tokenizer.vocab_size)
  for text in (PROBE, tokenizer.decode(ids), tokenizer.decode(ids[::-1])):
    if backend.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
      raise UserError(
        f"'{tokenizer.path}' cannot be written as a tokenizer.json that cuts text alike; BPE with byte fallback that "
        'changes no text before it cuts, as prepare trains it, can'
      )
  return backend


def tokenizer_settings(tokenizer: Tokenizer, backend: Any, start_id: int, max_seq_len: int) -> dict[str, Any]:
  """Returns what tokenizer_config.json holds."""
  before = json.dumps(json.loads(backend.to_str())['pre_tokenizer'])
  return {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': backend.id_to_token(start_id),
    'eos_token': backend.id_to_token(tokenizer.eos_id),
    'pad_token': backend.id_to_token(tokenizer.pad_id),
    'model_max_length': max_seq_len,
    'model_input_names': ['input_ids', 'attention_mask'],
    'add_prefix_space': '"add_prefix_space": true' in before,  # transformers before version 5 sets it, by default False
    'clean_up_tokenization_spaces': False,
    'split_special_tokens': True,  # text that looks like a control token stays text
  }


def _from_sentencepiece(tokenizer: Tokenizer) -> Any:
  from tokenizers import AddedToken, decoders, models
  from tokenizers import Tokenizer as Backend

  model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.path.read_bytes())
  pieces = [model.id_to_piece(token).replace(SPACE, ' ') for token in range(model.get_piece_size())]
  control = [token for token in range(len(pieces)) if model.is_control(token) or model.is_unknown(token)]
  id_of = {piece: token for token, piece in enumerate(pieces)}
  merges = []
  for token, piece in enumerate(pieces):
    if not (model.is_byte(token) or token in control):
      halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
      score = model.get_score(token)
      merges += [(-score, id_of[a], id_of[b], (a, b)) for a, b in halves if a in id_of and b in id_of]
  unknown = pieces[model.unk_id()] if model.unk_id() >= 0 else None
  bpe = models.BPE(id_of, [pair for *_, pair in sorted(merges)], unk_token=unknown, byte_fallback=True)
  backend = Backend(bpe)
  backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
  backend.add_special_tokens([AddedToken(pieces[token], normalized=False) for token in control])
  return backend
