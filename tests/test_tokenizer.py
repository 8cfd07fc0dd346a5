"""Tokenizers: exact round trip, control tokens out of reach of text, sampling, and a sentence for what goes wrong."""

import json
import sys
import tracemalloc
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.data import tokenizer as tokenizer_module
from mmjax.data.spm_tokenizer import SAMPLE_CHARS, sample_text, train_tokenizer
from mmjax.data.tokenizer import load_tokenizer, share_bytes
from mmjax.errors import UserError

ENGLISH = 'The quick brown fox jumps over the lazy dog, and 42 other foxes do not.\n\nA new paragraph begins here.'
CHINESE = '敏捷的棕色狐狸跳过了懒狗。天地玄黄，宇宙洪荒，日月盈昃，辰宿列张。'
LOOKS_LIKE_CONTROL = ['</s>', '<s>', '<pad>', '<unk>', '<0x0A>', '<|endoftext|>', '<|im_end|>', 'a</s>b <s>']
HOSTILE = [
  '', ' ', '  two  spaces  ', '\t\ttabs', '\r\n', '\0', 'a\0b', '\u2581', 'a\u2581 \u2581b', '\u2581' * 3,
  '\u2585', '\ufeff', '\u2028', 'e\u0301', '\U0001f468\u200d\U0001f469', '\ufffd', '\u2047', 'ﬁ', *LOOKS_LIKE_CONTROL,
]  # fmt: skip


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
  path.write_bytes(train_tokenizer([ENGLISH, CHINESE] * 20, 400))
  return load_tokenizer(path)


def hugging_face(path, names=('<unk>', '<s>', '</s>'), decoder='byte_level', vocab_size=600):
  """Writes a tokenizer.json as such projects ship it; MiniMind's has these three control tokens first."""
  tokenizers = pytest.importorskip('tokenizers')
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=decoder == 'byte_fallback'))
  alphabet = []
  if decoder == 'byte_level':
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  elif decoder == 'byte_fallback':
    backend.normalizer = tokenizers.normalizers.Replace(' ', '\u2581')
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    names = [*names, *(f'<0x{byte:02X}>' for byte in range(256))]
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=list(names), initial_alphabet=alphabet, show_progress=False
  )
  backend.train_from_iterator([ENGLISH, CHINESE] * 20, trainer)
  backend.save(str(path))
  if decoder == 'byte_fallback':  # bytes are pieces, not control tokens
    stored = json.loads(path.read_text())
    stored['added_tokens'] = stored['added_tokens'][: len(names) - 256]
    path.write_text(json.dumps(stored))
  return path


def check_round_trip(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert int(tokenizer.bytes_per_token()[ids].sum()) == len(text.encode())
  assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize('text', [ENGLISH, CHINESE, *HOSTILE])
def test_trained_tokenizer_reproduces_text(trained, text):
  check_round_trip(trained, text)


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.text() | st.sampled_from(HOSTILE)).map(''.join))
def test_trained_tokenizer_reproduces_any_text(trained, text):
  check_round_trip(trained, text)


@pytest.mark.parametrize('decoder', ['byte_level', 'byte_fallback'])
def test_hugging_face_tokenizer_reproduces_text(tmp_path, decoder):
  tokenizer = load_tokenizer(hugging_face(tmp_path / 'tokenizer.json', decoder=decoder))
  for text in [ENGLISH, CHINESE, *HOSTILE]:
    if decoder == 'byte_level' or '\u2581' not in text:  # which such a tokenizer cannot tell from a space
      check_round_trip(tokenizer, text)


@pytest.mark.parametrize(
  ('names', 'expected'),  # pad, bos, eos
  [
    (('<unk>', '<s>', '</s>'), (0, 1, 2)),  # MiniMind
    (('<|endoftext|>', '<|im_start|>', '<|im_end|>'), (0, 1, 2)),  # Qwen
    (('<pad>', '<unk>', '<bos>', '<eos>'), (0, 2, 3)),
    (('<|endoftext|>',), (0, 0, 0)),  # GPT-2
  ],
)
def test_control_tokens_of_hugging_face_tokenizers_are_found_by_name(tmp_path, names, expected):
  path = hugging_face(tmp_path / 'tokenizer.json', names)
  tokenizer = load_tokenizer(path)
  size = len(json.loads(path.read_text())['model']['vocab'])
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == expected
  assert tokenizer.vocab_size == size
  assert tokenizer.start_id('packed') == tokenizer.eos_id and tokenizer.start_id('padded') == tokenizer.bos_id
  assert tokenizer.bytes_per_token()[list(expected)].tolist() == [0, 0, 0]


def test_hugging_face_tokenizer_without_a_use_is_refused(tmp_path):
  with pytest.raises(UserError, match='none of the tokens that end a document'):
    load_tokenizer(hugging_face(tmp_path / 'tokenizer.json', names=['<unk>']))
  with pytest.raises(
    UserError, match='is BPE and cannot keep every text; byte-level BPE, or BPE or Unigram with byte fallback, can'
  ):
    load_tokenizer(hugging_face(tmp_path / 'tokenizer.json', decoder='none'))


def test_hugging_face_tokenizer_without_the_package_says_what_to_install(tmp_path, monkeypatch):
  path = hugging_face(tmp_path / 'tokenizer.json')
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(UserError, match=r"pip install 'mmjax\[hf\]'"):
    load_tokenizer(path)


def test_trained_tokenizer_has_the_size_and_control_tokens_asked_for(trained):
  assert trained.vocab_size == 400 and trained.kind == 'sentencepiece'
  assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
  lengths = trained.bytes_per_token()
  assert lengths.dtype == np.int32 and lengths[:4].tolist() == [0] * 4 and (lengths[4:260] == 1).all()
  assert lengths[4:].min() == 1 and lengths.max() > 2


def test_training_is_deterministic_and_skips_no_long_or_strange_text():
  long = 'unbroken' * (SAMPLE_CHARS // 8)
  sample = [ENGLISH, CHINESE, long, '\u2581\u2585\0 sentinel sentinel ' * 4]
  assert train_tokenizer(sample, 380) == train_tokenizer(sample, 380)
  model = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(sample, 380))
  pieces = {model.id_to_piece(token) for token in range(380)}
  assert any('unbroken' in piece for piece in pieces) and any('sentinel' in piece for piece in pieces)


def test_indentation_is_one_token(tmp_path):
  code = ''.join(f'def f{n}(x):\n    if x:\n        return {n}\n\n' for n in range(200))
  (tmp_path / 'tokenizer.model').write_bytes(train_tokenizer([code], 330))
  tokenizer = load_tokenizer(tmp_path / 'tokenizer.model')
  for depth in (4, 8):
    text = f'\n{depth * " "}return'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) <= 4
  assert tokenizer.decode(tokenizer.encode(code)) == code


def test_vocabulary_that_the_text_cannot_fill_names_the_largest():
  with pytest.raises(UserError, match=r'model.vocab_size=5000 is more pieces .*largest possible: (\d+)') as caught:
    train_tokenizer([ENGLISH], 5000)
  largest = int(str(caught.value).partition('largest possible: ')[2].split()[0])
  assert len(train_tokenizer([ENGLISH], largest))
  with pytest.raises(UserError, match='model.vocab_size=270 cannot hold the characters .*least possible: 3'):
    train_tokenizer([''.join(chr(0x4E00 + n) for n in range(100))], 270)
  with pytest.raises(UserError, match='it has nothing but line ends'):
    train_tokenizer(['\n\n'], 300)


def test_lone_surrogate_and_foreign_ids_are_refused(trained):
  with pytest.raises(UserError, match='lone surrogate at character 1'):
    trained.encode('a\ud800')
  with pytest.raises(UserError, match='the text holds byte 0xe4, which is not UTF-8, at character 1: that is not text'):
    trained.encode(b'a\xe4'.decode(errors='surrogateescape'))
  for token in (400, -1):
    with pytest.raises(UserError, match=f'token id {token} is not in the vocabulary, which is 0..399'):
      trained.decode([5, token])


@pytest.mark.parametrize('ids', [None, 5, 'ab', [None], [1.5], np.array([[5, 6]])])
def test_what_is_no_list_of_ids_is_refused(trained, ids):
  with pytest.raises(UserError, match='token ids must be a list of integers, not '):
    trained.decode(ids)


def test_cut_character_decodes_to_replacement(trained):
  ids = trained.encode('\U0001f600')
  assert len(ids) == 4 and trained.decode(ids[:-1]) == '\ufffd' and trained.decode_bytes(ids[:2]) == b'\xf0\x9f'
  assert trained.decode([trained.bos_id, *ids, trained.eos_id, trained.pad_id]) == '\U0001f600'


@pytest.mark.parametrize('text', [ENGLISH * 50, CHINESE * 50, 'x' * 3000, ' ' * 3000, '\u2581' * 3000])
def test_long_text_is_encoded_in_slices_without_loss(trained, monkeypatch, text):
  whole = trained.encode(text)
  monkeypatch.setattr(tokenizer_module, 'SLICE_CHARS', 100)
  slices = list(trained.encode_slices(text))
  assert len(slices) >= len(text) // 100
  assert trained.decode([token for part in slices for token in part.ids]) == text
  if text.startswith(ENGLISH):  # words end before a space anyway: the ids are the same
    assert [token for part in slices for token in part.ids] == whole


@pytest.mark.parametrize('name', ['tokenizer.model', 'tokenizer.json'])
@pytest.mark.parametrize('data', [b'', b'\0' * 100, b'{"a": 1}', b'[' * 100_000, b'\xff\xfe'])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(UserError, match=f'{name}. is not a'):
    load_tokenizer(path)
  with pytest.raises(UserError, match='no tokenizer file'):
    load_tokenizer(tmp_path / 'none.model')


def test_tokenizer_with_another_hash_beside_it_is_refused(trained, tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(trained.path.read_bytes())
  beside = tmp_path / 'tokenizer.model.sha256'
  beside.write_text(f'{trained.sha256}  tokenizer.model\n')
  assert load_tokenizer(path).sha256 == trained.sha256
  for text in (trained.sha256[::-1], '', '\x1b[2J', '\udcff'):
    beside.write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(UserError, match=r'sha256 is \w{64}, but tokenizer.model.sha256 says') as caught:
      load_tokenizer(path)
    assert str(caught.value).isprintable()


def test_sentencepiece_model_without_padding_has_no_further_id(tmp_path):
  for byte_fallback in (True, False):
    path = tmp_path / 'tokenizer.model'
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([ENGLISH, CHINESE] * 9), model_prefix=str(path).removesuffix('.model'), vocab_size=340,
      model_type='bpe', byte_fallback=byte_fallback, hard_vocab_limit=byte_fallback, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == size


def test_sample_is_spread_evenly_over_documents_of_both_languages():
  documents = [ENGLISH * 100] * 300 + [CHINESE * 200] * 100  # one after the other, as files often are
  sample = sample_text(iter(documents), 200_000)
  size = sum(len(text.encode()) for text in sample)
  assert 90_000 <= size <= 200_000
  chinese = sum(len(text.encode()) for text in sample if text[0] > '\u3000')
  total = sum(len(text.encode()) for text in documents)
  assert abs(chinese / size - sum(len(text.encode()) for text in documents[300:]) / total) < 0.1
  assert sample == sample_text(iter(documents), 200_000)
  assert ''.join(sample_text(iter(documents[:3]), 10**9)) == ''.join(documents[:3])


def test_sampling_holds_no_more_than_the_sample():
  tracemalloc.start()
  sample_text((str(number) * 4000 for number in range(3000)), 500_000)
  assert tracemalloc.get_traced_memory()[1] < 2_000_000
  tracemalloc.stop()


def no_bytes(backend, tokenizers):
  """BPE that is to fall back to bytes and has none, as the library's own trainer makes it."""
  backend.model = tokenizers.models.BPE(byte_fallback=True, unk_token='<unk>')
  backend.normalizer = tokenizers.normalizers.Replace(' ', '\u2581')
  backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])


def prepended(backend, tokenizers):
  no_bytes(backend, tokenizers)
  replace = tokenizers.normalizers.Replace(' ', '\u2581')
  backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend('\u2581'), replace])


def byte_level(**parts):
  def change(backend, tokenizers):
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=parts.get('space', False))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)  # which would leave out spaces
    if 'normalizer' in parts:
      backend.normalizer = getattr(tokenizers.normalizers, parts['normalizer'])()

  return change


KINDS = {
  'no_bytes': no_bytes,
  'prepended': prepended,
  'prefix_space': byte_level(space=True),
  'nfkc': byte_level(normalizer='NFKC'),
  'lowercase': byte_level(normalizer='Lowercase'),
  'strip_accents': byte_level(normalizer='StripAccents'),
  'sentencepiece_defaults': {},
  'llama': {
    'model_type': 'bpe',
    'byte_fallback': True,
    'normalization_rule_name': 'identity',
    'remove_extra_whitespaces': False,
  },
  'nmt_nfkc_bytes': {'model_type': 'bpe', 'byte_fallback': True},
}
MIXED = [
  'The ﬁrst foxes ½ ① naïve café　wide １２３ 狐狸 jumped over lazy dogs', '🙂🙂 Ünïcödé ﬀ 漢字',
  'İstanbul, the QUICK brown fox', '  two  spaces and a tab\tand\n\nlines ', ' ', 'x',
]  # fmt: skip


def make_tokenizer(folder, kind):
  """Writes a tokenizer of one of KINDS, trained on a few sentences, and returns its path."""
  change, path = KINDS[kind], folder / ('tokenizer.model' if isinstance(KINDS[kind], dict) else 'tokenizer.json')
  if isinstance(change, dict):
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([ENGLISH, *MIXED[2:3]] * 9), model_prefix=str(path).removesuffix('.model'),
      vocab_size=330 if change else 60, hard_vocab_limit=False, minloglevel=2, **change,
    )  # fmt: skip
    return path
  tokenizers = pytest.importorskip('tokenizers')
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  change(backend, tokenizers)
  bytewise = backend.pre_tokenizer is not None
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=['<unk>', '</s>'], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet() if bytewise else [],
  )  # fmt: skip
  backend.train_from_iterator([ENGLISH] * 9, trainer)
  if kind == 'prepended':  # with its bytes, as Llama's
    stored = json.loads(backend.to_str())
    size = len(stored['model']['vocab'])
    stored['model']['vocab'] |= {f'<0x{byte:02X}>': size + byte for byte in range(256)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(stored))
  backend.save(str(path))
  return path


def normalized(kind, text):
  """What the tokenizer makes of a text before it cuts it, by the standard library alone; None: not known."""
  if kind in ('prepended', 'prefix_space', 'llama'):
    return (' ' if kind != 'prefix_space' or text[:1].strip() else '') + text
  ways = {
    'nfkc': lambda: unicodedata.normalize('NFKC', text),
    'lowercase': text.lower,
    'strip_accents': lambda: ''.join(char for char in text if unicodedata.category(char) != 'Mn'),
  }
  return ways[kind]() if kind in ways else None


@pytest.mark.parametrize('kind', KINDS)
def test_slices_of_words_have_the_tokens_of_the_whole(tmp_path, monkeypatch, kind):
  tokenizer, text = load_tokenizer(make_tokenizer(tmp_path, kind)), ENGLISH.strip() + f' {ENGLISH.strip()}' * 20
  [whole] = tokenizer.encode_slices(text)
  monkeypatch.setattr(tokenizer_module, 'SLICE_CHARS', 60)
  slices = list(tokenizer.encode_slices(text))
  assert len(slices) > 20
  if kind not in ('no_bytes', 'prepended'):  # whose pieces are whole sentences here
    assert [token for part in slices for token in part.ids] == whole.ids
  bytes_of_tokens = [(tokenizer.bytes_per_token()[part.ids] + part.more_bytes).sum() for part in (whole, *slices)]
  assert bytes_of_tokens[0] == sum(bytes_of_tokens[1:]) == len(text.encode())
  assert all(part.exact for part in slices[1:]) or kind not in ('prepended', 'prefix_space', 'llama')


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_stand_for_the_bytes_of_the_text_before_it_was_changed(tmp_path, kind):
  tokenizer, exact = load_tokenizer(make_tokenizer(tmp_path, kind)), 0
  for text in MIXED:
    [part] = tokenizer.encode_slices(text)
    bytes_X = tokenizer.bytes_per_token()[part.ids] + part.more_bytes
    if part.ids:
      assert bytes_X.sum() == len(text.encode()) and bytes_X.min() >= 0, (text, bytes_X)
    assert part.exact == (tokenizer.decode(part.ids) == text)
    for cut in range(1, len(part.ids)):
      decoded = tokenizer.decode_bytes(part.ids[:cut])
      lengths = {len(text[:stop].encode()) for stop in range(len(text) + 1)
                 if (new := normalized(kind, text[:stop])) is not None and new.encode() == decoded}  # fmt: skip
      if lengths:  # the cut is between two characters
        assert int(bytes_X[:cut].sum()) in lengths, (text, cut)
        exact += 1
  assert exact > 30 or normalized(kind, '') is None


def test_a_character_that_is_spread_over_tokens_counts_byte_by_byte():
  text, spans = (
    'a漢ﬁ b',
    [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (2, 3), (4, 5)],
  )  # the space is dropped
  assert share_bytes(text, spans, np.ones(7, np.int32)).tolist() == [1, 1, 1, 1, 1, 2, 2]


def test_a_byte_that_no_piece_stands_for_is_told(tmp_path):
  missing = {kind: load_tokenizer(make_tokenizer(tmp_path, kind)).missing_bytes for kind in ('no_bytes', 'llama')}
  assert missing['no_bytes'] > 200 and missing['llama'] == 0


@pytest.mark.parametrize(
  ('model', 'said'),
  [('WordLevel', 'is WordLevel and cannot keep every text'), ('WordPiece', 'is WordPiece'), ('Unigram', 'is Unigram')],
)
def test_what_cannot_keep_every_text_is_refused_by_its_kind(tmp_path, model, said):
  tokenizers = pytest.importorskip('tokenizers')
  vocab = [('<unk>', 0.0), ('</s>', 0.0), ('a', -1.0)]
  settings = {'unk_id': 0} if model == 'Unigram' else {'unk_token': '<unk>'}
  vocab = vocab if model == 'Unigram' else {name: at for at, (name, _) in enumerate(vocab)}
  tokenizers.Tokenizer(getattr(tokenizers.models, model)(vocab, **settings)).save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(UserError, match=said):
    load_tokenizer(tmp_path / 'tokenizer.json')


@pytest.mark.parametrize('how', ['added', 'in the vocabulary'])
def test_end_of_text_that_nothing_marks_is_found_and_out_of_reach_of_text(tmp_path, how):
  path = hugging_face(tmp_path / 'tokenizer.json', names=['<|endoftext|>'])
  stored = json.loads(path.read_text())
  if how == 'added':
    stored['added_tokens'][0]['special'] = False
  else:
    stored['added_tokens'] = []
  path.write_text(json.dumps(stored))
  tokenizer = load_tokenizer(path)
  assert tokenizer.eos_id == tokenizer.bos_id == 0
  check_round_trip(tokenizer, 'a<|endoftext|>b')


def test_sentencepiece_model_whose_end_of_text_is_a_plain_piece_is_read(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([ENGLISH] * 9), model_prefix=str(tmp_path / 'tokenizer'), vocab_size=340, model_type='bpe',
    byte_fallback=True, eos_id=-1, bos_id=-1, user_defined_symbols=['<|endoftext|>'], minloglevel=2,
  )  # fmt: skip
  tokenizer = load_tokenizer(tmp_path / 'tokenizer.model')
  assert tokenizer.eos_id == tokenizer.bos_id == 1
  check_out_of_reach(tokenizer, '<|endoftext|>')


def check_out_of_reach(tokenizer, name):
  for text in (name, f'a {name} b', f'{name}{name}\n{name}'):
    [part] = tokenizer.encode_slices(text)
    assert tokenizer.eos_id not in part.ids
    assert name in tokenizer.decode(part.ids).replace(' ', '')
    assert (tokenizer.bytes_per_token()[part.ids] + part.more_bytes).sum() == len(text)
  assert tokenizer.decode([tokenizer.eos_id]) == ''


@pytest.mark.parametrize('model', ['Unigram', 'BPE that ignores merges'])
def test_end_of_text_among_the_pieces_is_out_of_reach_of_text(tmp_path, model):
  path = hugging_face(tmp_path / 'tokenizer.json', names=['</s>'])
  stored = json.loads(path.read_text())
  if model == 'Unigram':
    pieces = ['</s>', *'</s>abcd ', *(f'<0x{byte:02X}>' for byte in range(256))]
    stored['model'] = {
      'type': 'Unigram', 'unk_id': 1, 'byte_fallback': True, 'vocab': [[piece, -1.0] for piece in dict.fromkeys(pieces)]
    }  # fmt: skip
    stored['pre_tokenizer'] = stored['decoder'] = None
  else:
    stored['model']['ignore_merges'] = True
    stored['pre_tokenizer']['use_regex'] = False
  path.write_text(json.dumps(stored))
  check_out_of_reach(load_tokenizer(path), '</s>')


def test_text_has_the_same_tokens_each_time_where_a_tokenizer_leaves_merges_out_at_random(tmp_path):
  path = hugging_face(tmp_path / 'tokenizer.json')
  plain = load_tokenizer(path).encode(ENGLISH)
  stored = json.loads(path.read_text())
  stored['model']['dropout'] = 0.5
  path.write_text(json.dumps(stored))
  assert [load_tokenizer(path).encode(ENGLISH) for _ in range(3)] == [plain] * 3


def test_marks_within_and_behind_words_are_no_text(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix='</w>', continuing_subword_prefix='##'))
  split = tokenizers.pre_tokenizers.Split(' ', 'removed')
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=900, special_tokens=['</s>'], end_of_word_suffix='</w>', continuing_subword_prefix='##',
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
  )  # fmt: skip
  backend.train_from_iterator([ENGLISH] * 9, trainer)
  backend.save(str(tmp_path / 'tokenizer.json'))
  tokenizer, text = load_tokenizer(tmp_path / 'tokenizer.json'), 'The quick brown fox'
  [part] = tokenizer.encode_slices(text)
  assert tokenizer.decode(part.ids).strip() == text
  assert (tokenizer.bytes_per_token()[part.ids] + part.more_bytes).sum() == len(text)


def test_file_that_makes_the_backend_panic_is_refused(tmp_path):
  path = hugging_face(tmp_path / 'tokenizer.json')
  stored = json.loads(path.read_text())
  stored['model']['continuing_subword_prefix'] = '####'  # longer than the pieces of its merges
  path.write_text(json.dumps(stored))
  with pytest.raises(UserError, match='is not a tokenizer.json'):
    load_tokenizer(path)
