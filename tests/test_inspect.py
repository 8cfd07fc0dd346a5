"""Looking into a memory: rows, contexts and effects against plain loops, the command, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.console import show
from mmjax.data.loader import PADDING
from mmjax.errors import UserError
from mmjax.inference import memory_reads
from mmjax.inference.api import LanguageModel
from mmjax.inference.measure import open_text
from mmjax.inference.memory_reads import KEPT_CONTEXTS, MemoryReader, strongest, token_text
from mmjax.model.layers import rope_angles
from mmjax.run.directory import open_run
from mmjax.tools import inspect
from tests.helpers import build_model, run_main, tiny_config

BAG = {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__layers': '1', 'memory__bank_std': 2.0}
TEXT = 'the memory reads a row of its bank and writes what it learned'


@pytest.fixture(scope='module')
def reader(tiny_run):
  """A bag memory with random weights, in the second layer alone, with the tokenizer of a run."""
  config = tiny_config(**BAG)
  return MemoryReader(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]))


@pytest.fixture(scope='module')
def forward(reader):
  """Rows, scores and log-probabilities of whole rows of tokens, with any bank."""

  @jax.jit
  def run(bank_MP, tokens_BT):
    model = nnx.merge(build_model(reader.lm.config)[0], reader.lm.params | {'memory_bank': bank_MP})
    out = model(tokens_BT)
    return out.row_LBTR[0], out.score_LBTR[0], jax.nn.log_softmax(model.logits(out.hidden_BTD))

  return lambda tokens_BT, bank=None: jax.device_get(
    run(reader.lm.params['memory_bank'] if bank is None else bank, jnp.asarray(tokens_BT, jnp.int32))
  )


@pytest.fixture(scope='module')
def split(tiny_run):
  return open_text(mmjax.load(tiny_run).config, open_run(tiny_run))


def test_rows_of_a_text_are_those_that_the_model_read(reader, forward):
  tokenizer, length = reader.lm.tokenizer, reader.lm.config.model.max_seq_len
  ids = [tokenizer.eos_id, *tokenizer.encode(TEXT)]
  assert length < len(ids)
  found = reader.read_text(TEXT)
  assert [token['id'] for token in found] == ids
  assert ''.join(token['token'] for token in found) == '<eos>' + TEXT
  padded = np.pad(ids, (0, -len(ids) % length)).reshape(-1, length)
  row_BTR, score_BTR, _ = forward(padded)
  for token, row_R, score_R in zip(found, row_BTR.reshape(-1, 6), score_BTR.reshape(-1, 6), strict=False):
    [layer] = token['layers']
    assert layer['layer'] == 1
    weight_R = np.concatenate([np.exp(s) / np.exp(s).sum() for s in score_R.astype(np.float64).reshape(2, 3)])
    order = np.argsort(-weight_R)
    assert [(read['row'], read['head']) for read in layer['rows']] == [(row_R[i], i // 3) for i in order]
    assert [read['weight'] for read in layer['rows']] == pytest.approx(weight_R[order], rel=1e-4)
    assert [read['score'] for read in layer['rows']] == pytest.approx(score_R[order], abs=1e-4)
  assert [len(t['layers'][0]['rows']) for t in reader.read_text(TEXT, layer=1, top=2)] == [2] * len(ids)
  with pytest.raises(UserError, match='top=-1 must be at least 1'):
    reader.read_text(TEXT, top=-1)


@pytest.mark.thorough
def test_rows_that_ngrams_address_are_shown_with_these(tiny_run, capsys):
  config = tiny_config(model__sublayer='ngram_bag', model__num_selected=1, memory__n_heads=2, memory__ngrams='1,2')
  reader = MemoryReader(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]))
  found = reader.read_text(TEXT)
  texts = [token['token'] for token in found]
  row_of = {}
  for t, token in enumerate(found):
    before = texts[t - 1] if t % config.model.max_seq_len else ''  # the model sees rows one by one
    reads = token['layers'][1]['rows']
    assert [read['ngram'] for read in reads] == [texts[t], before + texts[t]]
    assert all(read['score'] is None and read['weight'] is None for read in reads)
    assert reads[0]['row'] == row_of.setdefault(token['id'], reads[0]['row'])  # the same token, the same row
  tables = inspect.tokens_tables(found, 5, 80)
  assert tables[0].title == 'Rows that each token took: row, ngram'
  read = {'row': 1, 'score': None, 'weight': None, 'ngram': 'a[/i]'}
  show(*inspect.tokens_tables([{'token': 'x', 'layers': [{'layer': 0, 'rows': [read]}]}], 5, 200))
  assert 'a[/i]' in capsys.readouterr().out  # brackets in a text are no markup
  assert inspect.contexts_table([], '').header == ['contexts that take it; the token that took it is in «»']


@pytest.mark.thorough
@pytest.mark.parametrize(('sublayer', 'ngrams'), [('ngram_bag', '1,2'), ('ngram_bucket', '2,1')])
def test_row_of_a_range_is_shown_with_its_head_and_token(tiny_run, sublayer, ngrams):
  own = {'model__num_selected': 2, 'memory__n_heads': 2, 'memory__ngrams': ngrams, 'memory__ngram_ranges': 'own'}
  config = tiny_config(model__sublayer=sublayer, model__knowledge_num=2000, memory__value_layers='all', **own)
  reader = MemoryReader(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]))
  for token in reader.read_text(TEXT):
    for entry in token['layers'][:2]:  # values, where each row has a range also if the sublayer reads whole buckets
      for read in entry['rows']:
        alone = int(ngrams[2 * read['head']]) == 1
        found = reader.range_of(read['row'], entry['layer'])
        assert found == {'head': read['head'], 'token': token['token'] if alone else None}
  assert reader.range_of(1999, 0) is None  # left over


@pytest.mark.thorough
def test_rows_that_a_gate_selects_are_in_no_range(tiny_run):
  own = {'memory__ngram_ranges': 'own', 'memory__ngram_layers': '0', 'model__knowledge_num': 1024}
  config = tiny_config(model__sublayer='memory_bag', **own)
  reader = MemoryReader(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]))
  assert reader.range_of(5, 0)['head'] == 0 and reader.range_of(5, 1) is None


@pytest.mark.thorough
def test_gate_of_engram_is_the_weight_of_all_that_a_token_reads(tiny_run):
  config = tiny_config(model__sublayer='engram_bag', memory__n_heads=2, model__num_selected=2)
  reader = MemoryReader(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]))
  found = [token['layers'][0]['rows'] for token in reader.read_text(TEXT)]
  assert all(read['score'] is None and read['ngram'] for rows in found for read in rows)
  weight_TR = np.array([[read['weight'] for read in rows] for rows in found])
  # The value of the gate, over the 2 rows of a head.
  assert weight_TR.min() > 0 and weight_TR.max() < 0.5 and np.ptp(weight_TR) > 0.05
  np.testing.assert_array_equal(weight_TR, weight_TR[:, :1].repeat(4, axis=1))
  assert inspect.tokens_tables(reader.read_text(TEXT), 5, 80)[0].title.endswith('row, weight, ngram')


def test_contexts_and_effect_of_a_row_equal_plain_loops(reader, forward, split):
  rows = split.rows(np.arange(split.n_rows))
  row_BTR, score_BTR, log_BTV = forward(rows['input'])
  predicted = rows['target'] != PADDING
  row = int(np.bincount(row_BTR[predicted].ravel()).argsort()[-20])  # one that is taken, but not everywhere
  weight_BTR = np.concatenate([np.exp(s) / np.exp(s).sum(-1, keepdims=True) for s in np.split(score_BTR, 2, -1)], -1)
  taken = [
    (float(weight_BTR[b, t][row_BTR[b, t] == row].max()), b, t)
    for b, t in np.argwhere(predicted)
    if row in row_BTR[b, t]
  ]
  best = sorted(taken, key=lambda c: -c[0])[:KEPT_CONTEXTS]
  assert 8 < len(taken) < predicted.sum() / 2

  found = reader.read_row(row, split, top=4)
  [layer] = found['layers']
  assert (found['positions'], layer['layer'], layer['taken']) == (predicted.sum(), 1, len(taken))
  assert [context['strength'] for context in layer['contexts']] == pytest.approx([s for s, _, _ in best[:4]], rel=1e-4)
  for context in layer['contexts']:
    b, t = context['corpus_row'], context['position']
    assert row in row_BTR[b, t]
    assert context['token'] == token_text(reader.lm.tokenizer, rows['input'][b, t])
    assert context['before'] == reader.lm.tokenizer.decode(rows['input'][b, :t].tolist())
    assert context['after'] == reader.lm.tokenizer.decode([i for i in rows['target'][b, t : t + 8].tolist() if i >= 0])

  bank = np.array(reader.lm.params['memory_bank'])
  bank[row] = bank.mean(axis=0)  # the only layer with a memory reads it
  changes = log_BTV.astype(np.float64) - forward(rows['input'], bank)[2]
  change_V = np.mean([changes[b, t] for _, b, t in best], axis=0)
  effect = layer['effect']
  assert effect['contexts'] == len(best)
  gain = np.mean([changes[b, t, rows['target'][b, t]] for _, b, t in best])
  assert effect['next_token_gain'] == pytest.approx(gain, abs=1e-5)
  log_with, log_without = (np.array([x[b, t] for _, b, t in best], np.float64) for x in (log_BTV, log_BTV - changes))
  rise_V = np.exp(log_with).mean(0) - np.exp(log_without).mean(0)
  shown = {name: [t['probability'] - t['probability_without'] for t in effect[name]] for name in ('up', 'down')}
  assert shown['up'] == pytest.approx(np.sort(rise_V)[::-1][:4], abs=1e-6)
  assert shown['down'] == pytest.approx(np.sort(rise_V)[:4], abs=1e-6)
  for token in effect['up'] + effect['down']:
    assert token['log_change'] == pytest.approx(change_V[token['id']], abs=1e-5)
    assert token['probability'] == pytest.approx(np.exp(log_with).mean(0)[token['id']], rel=1e-4)
  assert np.abs(change_V).max() > 1e-3


def test_strongest_contexts_come_first_and_equal_ones_from_all_of_the_text():
  equal = [(0.0, row, at) for row in range(50) for at in range(20)]
  found = strongest([(0.5, 7, 3), *equal, (0.9, 9, 9)], 102)
  assert found[:2] == [(0.9, 9, 9), (0.5, 7, 3)] and len(found) == 102 and set(found[2:]) < set(equal)
  assert 20 < np.mean([row for _, row, _ in found[2:]]) < 30 and 8 < np.mean([at for *_, at in found[2:]]) < 11
  in_parts = strongest(strongest(equal[:300], 100) + equal[300:], 100)  # as a text is read
  assert in_parts == strongest(reversed(equal), 100) == found[2:]


@pytest.mark.thorough
def test_rows_of_the_embedding_that_no_piece_has_are_no_tokens(tiny_run, split):
  config, tokenizer = tiny_config(**BAG, model__vocab_size=304), mmjax.load(tiny_run).tokenizer
  reader = MemoryReader(LanguageModel(config, tokenizer, build_model(config)[1]))
  row = int(reader.read_text(TEXT, top=1)[3]['layers'][0]['rows'][0]['row'])
  [found] = reader.read_row(row, split, top=304)['layers']
  assert {token['id'] for token in found['effect']['up']} == set(range(tokenizer.vocab_size))


@pytest.mark.thorough
def test_a_row_is_replaced_in_its_own_layer_only(tiny_run, split):
  reader = MemoryReader(mmjax.load(tiny_run))
  row = reader.read_text('the memory')[-1]['layers'][0]['rows'][0]['row']
  [found] = reader.read_row(row, split, layer=0, top=KEPT_CONTEXTS)['layers']
  bank = reader.lm.params['memory_bank']

  @jax.jit
  def log_probabilities(tokens_BT, banks):
    model = nnx.merge(build_model(reader.lm.config)[0], reader.lm.params)
    angle_BTa = rope_angles(jnp.arange(tokens_BT.shape[1])[None], model.head_dim, model.rope_theta)

    def attend(attention, x_BTD, norm):
      return attention(x_BTD, norm, angle_BTa, tokens_BT, None, jnp.float32, 'xla')

    x_BTD = model.embedding[...][tokens_BT]
    for layer, bank_MP in zip(model.layers, banks, strict=True):
      x_BTD, _, _ = layer(x_BTD, bank_MP, None, None, attend=attend, dtype=jnp.float32)
    return jax.nn.log_softmax(model.logits(model.norm(x_BTD)))

  rows, at = (np.array([context[name] for context in found['contexts']]) for name in ('corpus_row', 'position'))
  tokens_BT = split.rows(rows)['input']
  changed = bank.at[row].set(bank.mean(axis=0))
  change_BTV = log_probabilities(tokens_BT, [bank, bank]) - log_probabilities(tokens_BT, [changed, bank])
  change_V = np.asarray(change_BTV, np.float64)[np.arange(len(at)), at].mean(axis=0)
  assert {token['id']: token['log_change'] for token in found['effect']['up']} == pytest.approx(
    {token['id']: change_V[token['id']] for token in found['effect']['up']}, abs=1e-5
  )
  assert np.abs(change_V).max() > 1e-3


def test_command_prints_tables_and_writes_json(run, tiny_run, tmp_path, monkeypatch, capfd):
  settings = json.loads((run / 'config.json').read_text())
  settings['memory'] |= {'bank_init': 'file', 'bank_file': f'{tmp_path}/bank.safetensors'}
  del settings['sha256']  # changed on purpose
  (run / 'config.json').write_text(json.dumps(settings))
  lines = [json.dumps({'row': row, 'text': f'snippet\x1b {row}'}) for row in range(64)]
  (tmp_path / 'bank.jsonl').write_text('\n'.join(lines))
  reader = MemoryReader(mmjax.load(tiny_run))
  row = reader.read_text('the memory')[-1]['layers'][1]['rows'][0]['row']

  flags = ['--workdir', str(run), '--text', 'the\x1b[2J memory', '--row', str(row), '--json', f'{tmp_path}/found.json']
  code, out, err = run_main(inspect.main, monkeypatch, capfd, *flags, '--top', '2')
  assert code == 0, err
  found = json.loads((tmp_path / 'found.json').read_text())
  assert found['text']['tokens'] == json.loads(json.dumps(reader.read_text('the\x1b[2J memory')))
  assert [entry['layer'] for entry in found['row']['layers']] == [0, 1]
  assert found['row']['snippet'] == f'snippet\x1b {row}' and f'snippet\\x1b {row}' in out
  assert '\x1b' not in out and 'layer 1' in out and f'Row {row} over' in out
  assert max(entry['taken'] for entry in found['row']['layers']) > 0 and '«' in out
  assert found['row']['effect_is'][:40] in out.replace('\n', ' ')
  for line in found['text']['most_taken']:
    took = [t for t in found['text']['tokens'] if line['row'] in [r['row'] for r in t['layers'][line['layer']]['rows']]]
    assert line['tokens'] == len(took) and line['weight'] is None and line['snippet'] == f'snippet\x1b {line["row"]}'


@pytest.mark.thorough
def test_text_that_is_cut_is_said(tiny_run, monkeypatch, capfd):
  monkeypatch.setattr(memory_reads, 'MOST_TOKENS', 4)
  for text, cut in (('the memory reads a row of its bank', True), ('t', False)):
    code, out, err = run_main(inspect.main, monkeypatch, capfd, '--workdir', str(tiny_run), '--text', text)
    assert code == 0, err
    assert ('Of the text the first 4 tokens were looked at.' in out) == cut


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--text', ''], 'the text is empty'),
    (['--text', 'a', '--layer', '2'], 'layer 2 has no memory; layers that have one: 0, 1'),
    (['--row', '64'], 'row 64 is not in the bank, which has rows 0 to 63'),
    (['--row', '-1'], '--row -1 must be at least 0'),
    (['--text', 'a', '--top', '0'], '--top 0 must be at least 1'),
    ([], 'give --text, --text_file, --row or --taught'),
    (['--text', 'a', '--text_file', 'b'], "give --text 'a' or --text_file 'b', not both"),
    (['--taught'], 'taught no rows: its memory.teach_rows is 0'),
    (['--text', 'a', '--without', '--checkpoint', '3'], 'whatever checkpoint=3 says; give one of them'),
    (['--taught', '--without'], '--taught lists the rows that --without takes out; give one of them'),
    (['--text_file', 'no/such/file'], "'no/such/file' cannot be read: No such file"),
  ],
)
def test_bad_input_is_refused_in_one_sentence(tiny_run, monkeypatch, capfd, flags, said):
  code, out, err = run_main(inspect.main, monkeypatch, capfd, '--workdir', str(tiny_run), *flags)
  assert (code, out) == (2, '')
  assert said in err and err.count('\n') == 1


@pytest.mark.thorough
def test_a_model_without_memory_is_refused(tiny_run):
  config = tiny_config(model__sublayer='dense')
  with pytest.raises(UserError, match="no memory to look into: model.sublayer='dense'"):
    MemoryReader(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]))
