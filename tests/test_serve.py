"""The page of a run: what it says against other routes to the same numbers, its server, and a real browser."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

import mmjax
from mmjax.data.loader import PADDING
from mmjax.data.tokenizer import load_tokenizer
from mmjax.errors import UserError, run_command
from mmjax.inference.api import LanguageModel
from mmjax.inference.memory_reads import MemoryReader
from mmjax.inference.settings import Sampling
from mmjax.run.directory import open_run
from mmjax.serve import view as serve_view
from mmjax.serve.saving import saved_page, static
from mmjax.serve.view import Change, RunView
from mmjax.tools import serve
from tests.browser import CHROMIUM, Browser
from tests.helpers import rarely
from tests.serving import MODELS, TEXT, make_view

pytest.importorskip('uvicorn', reason="needs the extra 'serve'")

from mmjax.serve import web  # noqa: E402
from tests.server import request, serving  # noqa: E402


@pytest.fixture(scope='module')
def bag(tiny_run):
  return make_view(tiny_run, 'bag')


@pytest.fixture(scope='module')
def dense(tiny_run):
  return make_view(tiny_run, 'dense')


def most_read(view):
  """The row that a view's first layer reads most."""
  return view.map(view.reader.layers[0])['hottest'][0][0]


def test_surprise_is_that_of_the_logits_and_reads_are_those_of_read_text(bag):
  found, reads = bag.read(TEXT), bag.reader.read_text(TEXT)
  ids = [token['id'] for token in reads]
  logits_TV = bag.lm.logits([ids[:8]])[0]
  log_TV = jax.nn.log_softmax(logits_TV[:, : bag.lm.tokenizer.vocab_size])
  nats = [token['nats'] for token in found['tokens']]
  assert nats[0] is None and nats[1:9] == pytest.approx([-float(log_TV[t, ids[t + 1]]) for t in range(8)], abs=1e-5)
  best = found['tokens'][3]['likely'][0]
  assert best[1] == pytest.approx(float(jnp.exp(log_TV[2].max())), abs=1e-6)
  assert [token['token'] for token in found['tokens']] == [token['token'] for token in reads]
  for token, expected in zip(found['tokens'], reads, strict=True):
    rows = [[r[name] for name in ('row', 'head', 'score', 'weight', 'ngram')] for r in expected['layers'][0]['rows']]
    assert token['layers'] == [rows]


def test_characters_of_several_tokens_are_shown_whole_and_counted_in_bytes(bag):
  text = 'a 你😀 é'
  found = bag.read(text)
  start, *tokens = found['tokens']
  assert found['bytes'] == len(text.encode()) and start['shown'] == '<eos>'
  assert ''.join(token['shown'] for token in tokens).replace('·', '') == text
  assert '<0xE4>' in [token['token'] for token in tokens] and '\ufffd' not in json.dumps(found)


def test_bytes_are_those_of_a_text_that_the_tokenizer_changes(dense, tmp_path, monkeypatch):
  SentencePieceTrainer.train(
    sentence_iterator=iter([TEXT] * 9), model_prefix=str(tmp_path / 'nfkc'), vocab_size=300, hard_vocab_limit=False,
    model_type='bpe', byte_fallback=True, pad_id=3, minloglevel=2,
  )  # fmt: skip
  monkeypatch.setattr(dense.lm, '_tokenizer', load_tokenizer(tmp_path / 'nfkc.model'))
  text = 'the river，公园。Ｆｕｌｌ'
  assert dense.lm.tokenizer.decode(dense.lm.tokenizer.encode(text)).strip() == unicodedata.normalize('NFKC', text)
  assert dense.read(text)['bytes'] == len(text.encode())
  assert dense.read('the memory')['bytes'] == len('the memory') and dense.read('')['bytes'] == 0
  monkeypatch.setattr(serve_view, 'MOST_TOKENS', 1 + len(dense.lm.tokenizer.encode(text)))
  assert dense.read(text + text)['bytes'] == pytest.approx(len(text.encode()), abs=3) and dense.read(text + text)['cut']


def test_rows_that_started_from_text_are_shown_with_it(bag, monkeypatch):
  row = bag.read(TEXT)['tokens'][2]['layers'][0][0][0]
  monkeypatch.setattr(bag, 'snippets', {row: 'a text', bag.lm.config.model.knowledge_num: 'of no row'})
  assert bag.read(TEXT)['snippets'] == {row: 'a text'} and bag.row(row, 1)['snippet'] == 'a text'


@pytest.mark.parametrize('name', rarely(['bag', 'ngrams'], 'ngrams'))
def test_who_reads_a_row_is_what_inspect_finds(tiny_run, name):
  view = make_view(tiny_run, name)
  row, layer = most_read(view), view.reader.layers[0]
  found = view.row(row, layer)
  expected = view.reader.read_row(row, view.corpus.split, layer=layer, top=16)
  [of_layer] = expected['layers']
  assert found['positions'] == expected['positions'] and found['taken'] == of_layer['taken'] == sum(found['strip']) > 16
  assert [c['before'] for c in found['contexts']] == [c['before'] for c in of_layer['contexts']]
  strengths = [[c['strength'] for c in side['contexts']] for side in (found, of_layer)]
  assert strengths[0] == pytest.approx(strengths[1], abs=1e-5)
  assert found['rank'] == 1 and found['strength_is'] == of_layer['strength_is']
  if name == 'ngrams':  # all that hash there end in the token of a context
    assert sum(count for _, count in found['ngrams']) == found['taken']
    assert sum(count for _, count in view.corpus._ngrams([(0, 3, 2)] * 600)) == 600  # however many they are
    assert all(any(text.endswith(c['token']) for text, _ in found['ngrams']) for c in found['contexts'])


@pytest.mark.thorough
def test_ngrams_of_a_row_and_contexts_end_where_a_document_begins(tiny_run):
  view = make_view(tiny_run, 'ngrams', data__isolate_documents=True)
  split, tokenizer = view.corpus.split, view.lm.tokenizer
  rows = split.rows(np.arange(split.n_rows))
  opens_BT = np.diff(rows['segment'], axis=1, prepend=-1) != 0  # at an EOS, before which the model sees nothing
  b, t = np.argwhere(opens_BT & (np.arange(opens_BT.shape[1]) > 0))[0]
  row = int(view.reader.read_batch(split, split.rows([b]))[0][0, 0, t, 1])  # of the second head, which reads pairs
  said = dict(view.row(row, 0)['ngrams'])
  alone_BT = opens_BT & (rows['input'] == tokenizer.eos_id) & (rows['target'] != PADDING)
  assert said['<eos>'] == alone_BT.sum() > 1 and not any(text.endswith('<eos>') for text in said.keys() - {'<eos>'})
  assert view.reader._context(split, 0.0, int(b), int(t))['before'] == ''
  assert view.reader._context(split, 0.0, int(b), int(t) - 1)['after'] == ''  # the EOS opens the next document
  later = view.reader._context(split, 0.0, int(b), int(t) + 1)['before']
  assert later == tokenizer.decode([tokenizer.eos_id])


def test_map_holds_every_read_once(bag, monkeypatch):
  model, memory = bag.lm.config.model, bag.lm.config.memory
  found = bag.map(None)
  assert sum(found['cells']) == bag.corpus.positions * memory.n_heads * model.num_selected
  assert len(found['cells']) == model.knowledge_num and found['used'] == np.count_nonzero(found['cells'])
  assert [reads for _, reads in found['hottest']] == sorted(found['cells'], reverse=True)[: len(found['hottest'])]
  monkeypatch.setattr('mmjax.serve.view.MAP_SIDE', 3)
  pooled = bag.map(1)
  assert pooled['side'] <= 3 and pooled['line'] == found['side'] and sum(pooled['cells']) == sum(found['cells'])
  monkeypatch.setattr(bag.corpus, 'usage_LM', bag.corpus.usage_LM[:, :60])  # no square: n-grams need none
  uneven = bag.map(None)
  assert sum(uneven['cells']) == np.sum(bag.corpus.usage_LM) and uneven['line'] == 8


@pytest.mark.thorough
def test_changed_bank_computes_what_a_model_with_that_bank_does(bag):
  text = 'the memory'  # shorter than a row
  (row, *_), (other, *_), *_ = bag.read(text)['tokens'][-1]['layers'][0]
  bank_MP = np.array(bag.lm.params['memory_bank'])
  bank_MP[[row, other]] = bank_MP[[other, row]]
  bank_MP[other] *= 0
  changes = [Change(row, other=other), Change(other, scale=0)]
  config = bag.lm.config
  anew = LanguageModel(config, bag.lm.tokenizer, bag.lm.params | {'memory_bank': jnp.asarray(bank_MP)})
  changed = bag.changed(changes)
  ids = bag.lm.encode_prompt(text)
  np.testing.assert_array_equal(changed.logits([ids]), anew.logits([ids]))
  assert np.any(changed.logits([ids]) != bag.lm.logits([ids]))
  assert changed.generate(text, max_new_tokens=20) == anew.generate(text, max_new_tokens=20)
  found = bag.next(text, changes)
  assert found['nats'][1:] != [token['nats'] for token in bag.read(text)['tokens']][1:]
  probability_V = jax.nn.softmax(anew.logits([ids])[0, -1, : bag.lm.tokenizer.vocab_size])
  assert max(after for _, _, after in found['next']) == pytest.approx(float(probability_V.max()), abs=1e-6)
  np.testing.assert_array_equal(bag.changed([Change(row, other=other)] * 2).logits([ids]), bag.lm.logits([ids]))


def test_bank_that_is_switched_off_is_one_of_zeros(bag):
  [off] = web._changes([{'row': None, 'scale': 0}], 'changes')
  zeros = RunView(bag.lm.with_bank(np.zeros(bag.lm.bank_MP.shape)), bag.run)
  assert bag.next(TEXT, [off])['nats'] == [token['nats'] for token in zeros.read(TEXT)['tokens']]
  with pytest.raises(UserError, match='row=None'):
    web._changes([{'row': None, 'other': 1}], 'changes')


@pytest.mark.thorough
def test_page_is_read_as_utf_8_whatever_the_locale():
  code = "from mmjax.serve.saving import static; print(ascii(static('page.js')))"
  plain = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  read = subprocess.run([sys.executable, '-c', code], env=os.environ | plain, capture_output=True, check=True).stdout
  assert read.decode().strip() == ascii(static('page.js')) and '\\u' in read.decode()


def test_page_starts_from_the_defaults_of_sampling():
  fields = re.findall(r'name="(\w+)" type="number".* value="([\d.]+)"', web.static('page.html'))
  assert len(fields) == 4 and all(getattr(Sampling(), name) == float(value) for name, value in fields)


def test_bank_of_another_shape_is_refused(bag, dense):
  with pytest.raises(UserError, match=r'a bank of shape \(2, 2\) does not fit: the model has one of '):
    bag.lm.with_bank(np.zeros((2, 2)))
  for values in (np.zeros((2, 2)), np.zeros(0)):
    with pytest.raises(UserError, match="model.sublayer='dense' has no bank"):
      dense.lm.with_bank(values)


@pytest.mark.thorough
def test_dense_model_says_that_it_has_no_memory_and_reads_all_the_same(dense):
  described = dense.describe()
  assert (
    described['memory'] is None
    and "No rows are read here: the model has no memory to look into: model.sublayer='dense'" in described['remarks'][0]
  )
  tokens = dense.read(TEXT)['tokens']
  assert all(token['nats'] > 0 and token['layers'] == [] for token in tokens[1:])
  assert ''.join(dense.stream(TEXT, [], Sampling(max_new_tokens=5))) == dense.lm.generate(TEXT, max_new_tokens=5)[0]
  for question in (lambda: dense.row(0, 0), lambda: dense.map(None), lambda: dense.next(TEXT, [Change(0, 0.0)])):
    with pytest.raises(UserError, match='has no memory'):
      question()


@pytest.mark.thorough
@pytest.mark.parametrize('name', MODELS)
def test_every_question_is_answered_as_json_for_every_kind(tiny_run, name):
  view = make_view(tiny_run, name)
  text = json.dumps([view.describe(), view.read(TEXT), view.next(TEXT, []), view.health()])
  assert 'loss_zeroed' in text
  if view.reader:
    for layer in view.reader.layers:
      assert json.dumps([view.map(layer), view.row(most_read(view), layer)])


@pytest.fixture(scope='module')
def port(bag, dense):
  with serving([bag, dense]) as port:
    yield port


def test_page_asks_nobody_else_and_its_questions_are_answered(bag, port):
  for path in web.FILES:
    status, headers, text = request(port, path)
    assert status == 200 and "default-src 'none'" in headers['Content-Security-Policy']
    assert not re.search(r'(src|href)="(?!page\.|data:)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)', text)
  assert [run['name'] for run in json.loads(request(port, '/api/runs')[2])] == ['run', 'run-2']
  status, _, text = request(port, '/api/read', {'run': 0, 'text': TEXT})
  assert status == 200 and json.loads(text)['tokens'] == bag.read(TEXT)['tokens']
  sampling = {'max_new_tokens': 30, 'seed': 3}
  status, _, text = request(port, '/api/stream', {'run': 0, 'text': TEXT, 'changes': [], 'sampling': sampling})
  lines = [json.loads(line) for line in text.splitlines()]
  assert lines.pop() == {'done': True} and len(lines) > 1
  assert ''.join(line['text'] for line in lines) == bag.lm.generate(TEXT, **sampling)[0]


@pytest.mark.parametrize(
  ('path', 'body', 'headers', 'status', 'sentence'),
  [
    ('/api/runs', None, {'Host': 'evil.example'}, 421, 'this server answers for localhost, any address and its own'),
    ('/api/runs', None, {'Host': '127.0.0.1.evil.example:80'}, 421, 'this server answers for'),
    ('/api/runs', None, {'Host': '[::1'}, 421, 'this server answers for'),
    ('/api/runs', None, {'Host': ''}, 421, 'this server answers for'),
    ('/api/runs', None, {'Origin': 'http://evil.example'}, 421, 'its own page only'),
    ('/api/read', '{}', {'Content-Type': 'text/plain'}, 415, 'text/plain must be application/json'),
    ('/api/read', '{"run": 0', {}, 400, 'no JSON: '),
    ('/api/read', '[' * 100000, {}, 400, 'no JSON: '),
    ('/api/read', ' ' * 1100000, {}, 413, 'larger than'),
    ('/api/read', [], {}, 400, 'fields run, text'),
    ('/api/read', {'run': 0, 'text': TEXT, 'file': '/etc/passwd'}, {}, 400, 'fields run, text'),
    ('/api/read', {'run': 2, 'text': TEXT}, {}, 400, 'run=2 must be'),
    ('/api/read', {'run': True, 'text': TEXT}, {}, 400, 'run=True must be'),
    ('/api/read', {'run': 0, 'text': 'a' * 20001}, {}, 400, '(20003 characters) must be a text of at most 20,000'),
    ('/api/read', {'run': 0, 'text': ''}, {}, 400, 'the text is empty'),
    ('/api/read', '{"run": 0, "text": "\\ud800"}', {}, 400, 'lone surrogate'),
    ('/api/row', {'run': 0, 'row': 10**6, 'layer': 1}, {}, 400, 'row 1000000 is not in the bank'),
    ('/api/row', {'run': 0, 'row': None, 'layer': 1}, {}, 400, 'row=None must be a whole number'),
    ('/api/row', {'run': 0, 'row': 1, 'layer': None}, {}, 400, 'layer=None must be'),
    ('/api/row', {'run': 0, 'row': 1, 'layer': 0}, {}, 400, 'layer 0 has no memory'),
    ('/api/next', {'run': 0, 'text': TEXT, 'changes': [{'row': 1, 'scale': 1e9}]}, {}, 400, 'scale='),
    ('/api/next', {'run': 0, 'text': TEXT, 'changes': [{'scale': 1}]}, {}, 400, "not {'scale': 1}"),
    ('/api/next', {'run': 0, 'text': TEXT, 'changes': [{'row': 1}] * 1025}, {}, 400, 'at most 1,024'),
    ('/api/next', {'run': 1, 'text': TEXT, 'changes': [{'row': 1, 'scale': 0}]}, {}, 400, 'has no memory'),
    ('/api/stream', {'run': 0, 'text': TEXT, 'changes': [], 'sampling': {'top_p': 2}}, {}, 400, 'top_p=2'),
    ('/api/stream', {'run': 0, 'text': TEXT, 'changes': [], 'sampling': {'max_new_tokens': 513}}, {}, 400, 'to 512'),
    ('/api/grow', {'run': 0}, {}, 404, "no question 'grow'"),
    ('/../view.py', None, {}, 404, 'nothing here'),
    ('/%2e%2e/view.py', None, {}, 404, 'nothing here'),
    ('/page.css', '{}', {}, 405, 'POST is not answered here'),
  ],
)  # fmt: skip
def test_bad_request_is_refused_in_one_sentence(port, path, body, headers, status, sentence):
  found, _, text = request(port, path, body, **headers)
  error = json.loads(text)['error']
  assert found == status and sentence in error and '\n' not in error and 'Traceback' not in error


@pytest.mark.parametrize(
  'host', ['localhost', 'LOCALHOST:80', '127.0.0.1', '127.0.0.1:1', '192.0.2.2:8517', '[::1]:80']
)
def test_own_names_and_any_address_are_answered_whatever_the_port(port, host):
  for headers in ({'Host': host}, {'Host': host, 'Origin': f'http://{host}'}):
    assert request(port, '/api/runs', None, **headers)[0] == 200
  assert request(port, '/api/runs', None, Host=host, Origin='http://localhost:9')[0] == 421


def test_failure_inside_is_one_sentence_and_the_server_goes_on(port, bag, monkeypatch):
  monkeypatch.setattr(RunView, 'health', lambda self: 1 / 0)
  status, _, text = request(port, '/api/health', {'run': 0})
  assert status == 500 and json.loads(text) == {'error': 'the server failed: ZeroDivisionError: division by zero'}
  assert request(port, '/api/map', {'run': 0, 'layer': 1})[0] == 200


@pytest.mark.thorough
def test_client_that_leaves_frees_its_place(port):
  asked = {'run': 0, 'text': TEXT, 'changes': [], 'sampling': {'max_new_tokens': 512, 'temperature': 1.5}}
  for _ in range(web.MOST_STREAMS + 2):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    connection.request('POST', '/api/stream', json.dumps(asked), {'Content-Type': 'application/json'})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.readline()
    answer.close()
    connection.close()
    time.sleep(0.1)
  short = asked | {'sampling': {'max_new_tokens': 2}}
  assert '{"done": true}' in request(port, '/api/stream', short)[2]


@pytest.mark.thorough
def test_server_that_is_stopped_while_it_writes_ends_in_a_word():
  lines = (
    'import asyncio, signal',
    'signal.signal(signal.SIGINT, signal.default_int_handler)',  # jobs in the background begin without it
    'from mmjax.errors import run_command',
    'from mmjax.serve import web',
    'async def write(scope, receive, send):',
    "  assert scope['type'] == 'http'",
    '  await asyncio.sleep(60)',
    'web.make_app = lambda views, hosts: web.Guard(write, hosts)',
    "run_command(lambda: web.serve([], '127.0.0.1', 0))",
  )
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  server = subprocess.Popen([sys.executable, '-c', '\n'.join(lines)], **pipes, start_new_session=True)
  port = int(re.search(r':(\d+) ', server.stdout.readline())[1])
  threading.Timer(0.5, server.send_signal, [signal.SIGINT]).start()
  status, _, said = request(port, '/')
  assert (status, json.loads(said)) == (503, {'error': 'the server was stopped'})
  assert (server.communicate(timeout=60)[1], server.returncode) == ('Interrupted.\n', 130)


def test_client_that_asks_nothing_is_dropped(port, monkeypatch):
  monkeypatch.setattr(web, 'HEAD_SECONDS', 0.2)
  with socket.create_connection(('127.0.0.1', port), timeout=30) as silent:
    silent.sendall(b'GET / HTTP/1.1\r\n')
    assert silent.recv(4096) == b''


def test_request_that_never_arrives_is_dropped(port, monkeypatch):
  monkeypatch.setattr('mmjax.serve.requests.BODY_SECONDS', 0.2)
  with socket.create_connection(('127.0.0.1', port), timeout=30) as slow:
    head = ['POST /api/read HTTP/1.1', f'Host: 127.0.0.1:{port}', 'Content-Type: application/json', 'Content-Length: 9']
    slow.sendall('\r\n'.join([*head, '', '{']).encode())
    assert b'408' in slow.recv(4096)


@pytest.mark.thorough
def test_saved_page_holds_its_answers_and_no_markup_of_the_text(bag, dense):
  text = 'the </script><script>alert(1)</script> row'
  page = saved_page([bag, dense], text)
  assert 'alert(1)</script>' not in page and not re.search(r'(src|href)="(?!data:)', page.partition('<script>')[0])
  data = re.search(r'<script type="application/json" id="saved">(.*?)</script>', page)[1]
  saved = json.loads(data)
  assert saved['text'] == text
  read = json.dumps({'run': 0, 'text': text}, separators=(',', ':'))
  assert saved['answers'][f'read {read}']['tokens'][1:] == bag.read(text)['tokens'][1:]
  assert any(question.startswith('row {"run":0') for question in saved['answers'])


@pytest.mark.parametrize(
  ('flags', 'sentence'),
  [
    (['--workdir', 'nowhere'], 'no run directory'),
    (['--workdir', 'a', '--workdir', 'b', '--workdir', 'c'], 'at most two'),
    (['--workdir', 'a', '--save', 'x.html'], '--save needs --text TEXT: a saved page shows one text'),
    (['--workdir', 'a', '--port', '99999'], '--port 99999 must be'),
  ],
)
def test_command_refuses_in_one_sentence(flags, sentence, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['serve', *flags])
  with pytest.raises(SystemExit) as stopped:
    run_command(serve.main)
  assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_port_that_is_taken_is_refused(bag):
  with socket.create_server(('127.0.0.1', 0)) as taken, pytest.raises(UserError, match='Address already in use'):
    web.serve([bag], '127.0.0.1', taken.getsockname()[1])


@pytest.mark.thorough
def test_command_saves_a_page(tiny_run, tmp_path, monkeypatch, capsys):
  flags = ['--workdir', str(tiny_run), '--text', TEXT, '--save', str(tmp_path / 'page.html')]
  monkeypatch.setattr(sys, 'argv', ['serve', *flags])
  run_command(serve.main)
  assert TEXT in (tmp_path / 'page.html').read_text() and 'Written' in capsys.readouterr().out


@pytest.fixture
def browser():
  if not CHROMIUM:
    pytest.skip('there is no Chromium here (apt-get install chromium)')
  with Browser() as browser:
    yield browser
    assert not browser.errors


TOKENS = "document.querySelectorAll('#reading .card:first-child .t').length"
STOPPED = "document.getElementById('stop').disabled"


@pytest.mark.thorough
def test_browser_types_points_opens_switches_off_compares_streams_and_stops(browser, port, tmp_path):
  browser.open(f'http://127.0.0.1:{port}/')
  browser.wait(f'{TOKENS} > 3')
  browser.js("document.getElementById('text').select(); document.getElementById('text').focus()")
  browser.type(TEXT)
  browser.click('#read')
  browser.wait(f"document.querySelector('#reading').textContent.includes('its bank') && {TOKENS} > 3")
  # The keyboard moves from token to token, and what is shown follows.
  browser.js("document.querySelector('#reading .t').focus()")
  browser.press('ArrowRight')
  browser.press('ArrowRight')
  browser.wait("document.querySelector('#inspector').textContent.includes('token 2')")
  browser.press('Enter')
  browser.wait("document.querySelectorAll('#reading .t')[2].getAttribute('aria-pressed') === 'true'")
  assert 'nats of surprise' in browser.text('#inspector') and 'head 1' in browser.text('#inspector')
  assert 'no memory' in browser.text('#bank') or browser.js("Boolean(document.querySelector('canvas.map'))")
  browser.click('#inspector button.link')
  browser.wait("document.querySelector('#inspector h2')?.textContent.startsWith('Row ')")
  assert 'of the validation text' in browser.text('#inspector')
  browser.click('#inspector button', 'Switch off')
  browser.wait("document.querySelector('.chip')?.textContent.includes('off')")
  browser.wait("document.querySelectorAll('.fill.changed').length > 3")
  browser.js('compare([[{ row: 1e8, scale: 0 }], []]).then(() => 1)')  # refused, so it is taken back and all goes on
  assert 'not in the bank' in browser.text('#status') and 'off' in browser.text('.chip')
  browser.errors = [error for error in browser.errors if 'api/next' not in str(error)]
  browser.click('button', 'Colour by change')
  browser.wait("document.querySelector('#reading').textContent.includes('less surprised')")
  browser.js("document.querySelector('[name=max_new_tokens]').value = 20")
  browser.click('#go')
  browser.wait(
    f"{STOPPED} && ['0-0', '0-1', '1-0'].every(v => document.getElementById('story-' + v).textContent.length > 9)"
  )
  browser.js("document.querySelector('[name=max_new_tokens]').value = 512")
  browser.click('#go')
  browser.wait(f"!{STOPPED} && document.getElementById('story-0-0').textContent.length > 9")
  browser.click('#stop')
  browser.wait(STOPPED)
  stopped = browser.text('#story-0-0')
  time.sleep(0.5)
  assert browser.text('#story-0-0') == stopped
  height = 'document.documentElement.scrollHeight'
  before = browser.js(height)
  browser.js("document.querySelector('canvas.map').scrollIntoView()")
  browser.point(*browser.js("(b => [b.x + 9, b.y + 9])(document.querySelector('canvas.map').getBoundingClientRect())"))
  browser.wait("document.querySelector('.pointed').textContent.includes('click opens it')")
  assert browser.js(height) == before  # or the map moves away from the mouse
  browser.click('#changes button', 'Undo all')
  browser.wait("!document.querySelector('.chip')")
  browser.screenshot(tmp_path / 'desktop.png', whole=True)
  browser.resize(390, 844)
  assert browser.js('document.documentElement.scrollWidth') <= 390
  browser.screenshot(tmp_path / 'phone.png', whole=True)


@pytest.mark.thorough
def test_browser_shows_continuations_of_the_text_and_the_change_that_it_names_alone(browser, port, tmp_path):
  story, field = "document.getElementById('story-0-{}')", "document.querySelector('[name={}]')"
  browser.open(f'http://127.0.0.1:{port}/')
  browser.wait(f'{TOKENS} > 3')
  browser.js(
    f"{field.format('max_new_tokens')}.value = 512; document.getElementById('text').value = 'the memory reads'"
  )
  browser.click('#go')  # reads what stands in the field first
  browser.wait(f'!{STOPPED} && {story.format(0)}.textContent.length > 9')
  assert browser.js('state.text') == 'the memory reads'
  browser.js("document.getElementById('text').value = 'into the stream again'")
  browser.click('#read')  # while it is written
  browser.wait(f"state.text === 'into the stream again' && {STOPPED}")
  time.sleep(0.5)
  assert browser.text('#story-0-0') == 'Press Continue.' and browser.text('#status') == ''
  browser.js(f'{field.format("max_new_tokens")}.value = 20; {field.format("temperature")}.value = 1.5')
  browser.click('#inspector button', 'Switch off the bank')
  browser.wait(f'{story.format(1)}')
  browser.click('#go')
  browser.wait(f'{STOPPED} && {story.format(1)}.textContent.length > 9')
  browser.js('compare([[{ row: 1, scale: 2 }], []]).then(() => 1)')
  assert browser.text('#story-0-1') == 'Press Continue.' != browser.text('#story-0-0')
  browser.js("URL.createObjectURL = blob => { window.blob = blob; return '#' }")
  (tmp_path / 'page.html').write_text(browser.js('save().then(() => blob.text())'))
  browser.open((tmp_path / 'page.html').as_uri())
  browser.wait(f'{TOKENS} > 3')
  assert browser.js(f'{field.format("temperature")}.value') == '1.5'
  assert browser.js(f'{field.format("max_new_tokens")}.value') == '20'


@pytest.mark.thorough
def test_browser_opens_a_saved_page_without_a_server(browser, bag, dense, tmp_path):
  page = tmp_path / 'page.html'
  page.write_text(saved_page([bag, dense], TEXT + '\r\n'))  # a field has other ends of lines
  browser.open(page.as_uri())
  browser.wait(f'{TOKENS} > 3')
  hint = browser.js("document.getElementById('ask').innerText")
  said = 'it answers for the text that it was saved with. Rows in grey are not in it. In the text, arrow keys'
  assert f'Saved page: {said}' in ' '.join(hint.split())
  assert 'Read' not in hint and 'Ctrl+Enter' not in hint
  cells = "[...document.querySelectorAll('#variants %s')]"
  widths = browser.js(f"{cells % '.fill'}.map(bar => +bar.style.getPropertyValue('--w'))")
  said = browser.js(f'{cells % ".n"}.map(cell => parseFloat(cell.textContent))')
  assert len(said) > 3 and said == pytest.approx(widths, abs=0.5)
  chart = "chart('', [{ name: '', points: [[5, %s]] }])"
  ends = f"[...{chart}.querySelectorAll('text')].slice(0, 2).map(at => at.textContent)"
  assert browser.js(ends % 2.5) == ['2.499', '2.501'] and browser.js(ends % 0) == ['-0.001', '0.001']
  browser.click('#inspector button.link:not(:disabled)')
  browser.wait("document.querySelector('#inspector h2')?.textContent.startsWith('Row ')")
  reasons = browser.js("[...document.querySelectorAll('#inspector button:disabled')].map(button => button.title)")
  assert reasons and set(reasons) == {'not in the saved page; the server shows every row'}
  assert browser.js("document.querySelector('[name=max_new_tokens]').value") == '60'
  browser.click('#go')
  browser.wait("document.getElementById('story-0-0').textContent.length > 9")


@pytest.mark.thorough
def test_text_that_is_gone_is_said_and_the_rest_works(run, tmp_path):
  record = json.loads((run / 'run.json').read_text())
  del record['sha256']
  record['starts'][-1]['prepared_dir'] = str(tmp_path / 'gone')
  (run / 'run.json').write_text(json.dumps(record))
  config = json.loads((run / 'config.json').read_text())
  del config['sha256']
  config['data'] |= {'train_files': str(tmp_path / 'gone.jsonl'), 'prepared_dir': str(tmp_path / 'gone')}
  (run / 'config.json').write_text(json.dumps(config))
  view = RunView(mmjax.load(run), open_run(run))
  assert view.corpus is None and 'who reads a row' in view.describe()['remarks'][-1]
  assert view.row(1, view.reader.layers[0])['nearest'] and view.read(TEXT)['tokens']
  assert isinstance(view.reader, MemoryReader)
