"""Completions as OpenAI's clients ask for them: against other routes to the same tokens, in company, and refused."""

import asyncio
import contextlib
import http.client
import json
import threading
import time

import jax
import numpy as np
import pytest

from mmjax.inference.settings import Sampling

pytest.importorskip('uvicorn', reason="needs the extra 'serve'")

from mmjax.serve import batch, requests  # noqa: E402
from tests.helpers import rarely  # noqa: E402
from tests.server import request, serving  # noqa: E402
from tests.serving import make_view  # noqa: E402


@pytest.fixture(scope='module')
def view(tiny_run):
  return make_view(tiny_run, 'mixed', model__max_seq_len=128)


@pytest.fixture(scope='module')
def port(view):
  with serving([view]) as port:
    yield port


PROMPT = 'the memory'
ASKED = {'model': 'run', 'prompt': PROMPT, 'max_tokens': 20, 'seed': 5}


def complete(port, **fields):
  status, _, text = request(port, '/v1/completions', ASKED | fields)
  assert status == 200, text
  return json.loads(text)


def texts(answer):
  return [choice['text'] for choice in answer['choices']]


@pytest.mark.thorough
def test_models_are_the_runs(port):
  listed = json.loads(request(port, '/v1/models')[2])
  assert [model['id'] for model in listed['data']] == ['run']
  assert json.loads(request(port, '/v1/models/run')[2])['object'] == 'model'
  assert request(port, '/v1/models/other')[0] == 404
  said = json.loads(request(port, '/v1/chat/completions', {})[2])['error']['message']
  assert said == 'there is nothing here; there are /v1/models and /v1/completions'


HOW = [{'temperature': 0}, {'temperature': 0.75, 'top_p': 0.9}, {'temperature': 1.3}, {}]


@pytest.mark.parametrize('how', rarely(HOW, HOW[0]))
def test_completion_is_what_generate_writes(port, view, how):
  answer = complete(port, **how)
  expected = view.lm.generate(PROMPT, max_new_tokens=20, seed=5, **({'temperature': 1.0, 'top_p': 1.0} | how))
  assert texts(answer) == expected and len(expected[0]) > 20
  assert answer['usage']['completion_tokens'] <= 20 and answer['choices'][0]['finish_reason'] in ('stop', 'length')


@pytest.mark.thorough
def test_log_probabilities_with_echo_are_those_of_the_logits(port, view):
  answer = complete(port, echo=True, logprobs=2, max_tokens=6, temperature=0)
  [choice] = answer['choices']
  found = choice['logprobs']
  ids = view.lm.encode_prompt(PROMPT)
  [new] = view.lm.generate_tokens([ids], max_new_tokens=6, temperature=0)
  whole = [*ids, *new]
  log_TV = np.asarray(jax.nn.log_softmax(view.lm.logits([whole])[0, :, : view.lm.tokenizer.vocab_size]))
  expected = [log_TV[t, token] for t, token in enumerate(whole[1:])]
  assert found['token_logprobs'] == pytest.approx(expected, abs=1e-5)
  n_prompt = len(ids) - 1
  assert found['token_logprobs'][:n_prompt] == pytest.approx(
    [float(x) for x in np.asarray(jax.nn.log_softmax(view.lm.logits([ids])[0]))[np.arange(n_prompt), ids[1:]]], abs=1e-6
  )
  assert ''.join(found['tokens'][:n_prompt]) == PROMPT and choice['text'].startswith(PROMPT)
  assert found['text_offset'][:3] == [len(''.join(found['tokens'][:at])) for at in range(3)]
  for top, log_V in zip(found['top_logprobs'], log_TV, strict=False):
    assert max(top.values()) == pytest.approx(float(log_V.max()), abs=1e-5) and 2 <= len(top) <= 3


def test_end_of_text_is_a_token_with_a_log_probability(port, view):
  tokenizer = view.lm.tokenizer
  prompt, eos = view.lm.encode_prompt(PROMPT), tokenizer.eos_id
  # So hot that EOS comes soon in one of these; lm-evaluation-harness takes the last entry for what was written.
  fields = {'prompt': prompt, 'temperature': 1e6, 'max_tokens': 100, 'n': 16, 'logprobs': 1, 'echo': True}
  answer = complete(port, **fields)
  ended = [choice for choice in answer['choices'] if choice['finish_reason'] == 'stop']
  assert ended and all(choice['logprobs']['tokens'][-1] == '<eos>' for choice in ended)
  told = sum(len(choice['logprobs']['token_logprobs']) - len(prompt) for choice in answer['choices'])
  assert told == answer['usage']['completion_tokens'] and tokenizer.decode([eos]) == ''


def test_highest_temperature_stays_a_number():
  group = batch._Group(1)
  group.place(0, batch.Job([1], Sampling(temperature=1e308)))
  assert np.isfinite(group.state['temperature_B']).all()  # what has no piece would be NaN otherwise, and be drawn


def test_token_ids_are_read_as_they_are(port, view):
  ids = view.lm.encode_prompt(PROMPT)
  assert texts(complete(port, prompt=ids)) == texts(complete(port))
  answer = complete(port, prompt=[ids, ids[:3]], echo=True, max_tokens=0, logprobs=0)
  assert [choice['logprobs']['token_logprobs'][0] for choice in answer['choices']] == [None, None]
  assert [len(choice['logprobs']['tokens']) for choice in answer['choices']] == [len(ids), 3]
  assert answer['usage']['completion_tokens'] == 0


def test_choices_differ_and_the_first_is_that_of_one(port):
  several = texts(complete(port, n=3, prompt=[PROMPT, 'a row']))
  assert len(several) == 6 and len(set(several)) == 6
  assert [several[0], several[3]] == [texts(complete(port))[0], texts(complete(port, prompt='a row'))[0]]
  assert texts(complete(port, seed=None)) != texts(complete(port, seed=None))
  assert len(set(texts(complete(port, seed=None, prompt=[PROMPT] * 3)))) == 3


def test_stop_ends_the_text_before_it(port):
  [whole] = texts(complete(port))
  stop = whole[5:8]
  answer = complete(port, stop=[stop, 'never there'], logprobs=0)
  assert texts(answer) == [whole[: whole.index(stop)]] and answer['choices'][0]['finish_reason'] == 'stop'
  assert all(offset < whole.index(stop) for offset in answer['choices'][0]['logprobs']['text_offset'])
  assert streamed(port, stop=stop)[0] == whole[: whole.index(stop)]
  assert texts(complete(port, stop=[PROMPT[-4:] + whole[:2], stop], echo=True)) == [PROMPT + whole[: whole.index(stop)]]


def streamed(port, **fields):
  """Returns the text of a stream, and how many pieces it had."""
  pieces = pieces_of(port, **fields)
  return ''.join(piece['text'] for piece in pieces), len(pieces)


def pieces_of(port, **fields):
  """Returns the pieces of a stream."""
  status, headers, text = request(port, '/v1/completions', ASKED | {'stream': True} | fields)
  assert status == 200 and headers['Content-Type'].startswith('text/event-stream')
  *events, last = [line.removeprefix('data: ') for line in text.split('\n\n') if line]
  assert last == '[DONE]'
  pieces = [json.loads(event)['choices'][0] for event in events]
  assert [piece['finish_reason'] is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
  return pieces


def test_stream_is_the_same_text_in_pieces(port):
  text, pieces = streamed(port)
  assert text == texts(complete(port))[0] and pieces > 3


def test_stream_tells_its_usage_if_asked(port):
  options = {'stream': True, 'stream_options': {'include_usage': True}}
  *_, last, done = request(port, '/v1/completions', ASKED | options)[2].strip().split('\n\n')
  told = json.loads(last.removeprefix('data: '))
  assert done.endswith('[DONE]') and told['choices'] == [] and told['usage'] == complete(port)['usage']


def test_stream_has_the_log_probabilities_of_the_whole(port):
  cut_at = texts(complete(port, max_tokens=20, temperature=3, seed=1))[0][8:10]
  for seed in range(4):  # so hot that many tokens are a part of a character
    for stop in (None, 'never there at all', cut_at):
      fields = {'max_tokens': 20, 'temperature': 3, 'seed': seed, 'stop': stop, 'logprobs': 0}
      whole = complete(port, **fields)['choices'][0]['logprobs']
      parts = [piece['logprobs'] for piece in pieces_of(port, **fields)]
      assert {name: [value for part in parts for value in part[name]] for name in whole} == whole


def test_answers_do_not_depend_on_company(port):
  asked = [{'prompt': f'the row {at}', 'seed': at, 'max_tokens': 8 + 3 * at, 'logprobs': 1} for at in range(24)]
  alone = [complete(port, **fields)['choices'] for fields in asked]
  together = [None] * len(asked)

  def ask(at):
    time.sleep(0.01 * at)  # each joins a batch that is running
    together[at] = complete(port, **asked[at])['choices']

  threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(asked))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert together == alone  # log-probabilities bit for bit


def test_client_that_leaves_frees_its_place(port, view):
  for stream in (True, False) * batch.SLOTS:
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    asked = ASKED | {'max_tokens': 100, 'temperature': 2, 'stream': stream, 'n': 4}
    connection.request('POST', '/v1/completions', json.dumps(asked), {'Content-Type': 'application/json'})
    if stream:
      assert connection.getresponse().readline()
    connection.close()
  begin = time.monotonic()
  assert complete(port, max_tokens=4)
  assert time.monotonic() - begin < 20


def test_job_that_is_left_is_written_no_further(view):
  async def leave():
    running = batch.Batch(view.lm, requests.Worker())
    job = batch.Job(view.lm.encode_prompt(PROMPT), Sampling(max_new_tokens=100, temperature=2.0))
    async with contextlib.aclosing(running.write(job)) as tokens:
      await anext(tokens)
    await running._running
    return job.made

  assert asyncio.run(leave()) <= 3 * batch.BLOCK_STEPS


@pytest.mark.parametrize(
  ('fields', 'name', 'sentence'),
  [
    ({'best_of': 2}, 'best_of', 'is not supported'),
    ({'best_of': 2, 'n': 3}, 'best_of', 'is not supported'),
    ({'logit_bias': {'5': 1}}, 'logit_bias', 'is not supported'),
    ({'suffix': 'x'}, 'suffix', 'is not supported'),
    ({'presence_penalty': 0.5}, 'presence_penalty', 'is not supported'),
    ({'tools': []}, 'tools', 'is not supported'),
    ({'model': 'gpt'}, 'model', "'gpt' is not here; there are run"),
    ({'model': ['run']}, 'model', "['run'] is not here"),
    ({'prompt': 5}, 'prompt', 'must be a text'),
    ({'prompt': {}}, 'prompt', 'must be a text'),
    ({'prompt': []}, 'prompt', 'must be a text'),
    ({'prompt': [[10**6]]}, 'prompt', 'token id 1000000, outside of the vocabulary'),
    ({'prompt': [5] * 129}, 'prompt', 'has 129 tokens, more than model.max_seq_len=128'),
    ({'max_tokens': 0}, 'max_tokens', '0 must be a whole number from 1 to 128'),
    ({'max_tokens': 128}, 'max_tokens', 'are more than model.max_seq_len=128'),
    ({'max_tokens': True}, 'max_tokens', 'must be a whole number'),
    ({'n': 65}, 'n', 'from 1 to 64'),
    ({'logprobs': 6}, 'logprobs', 'from 0 to 5'),
    ({'stop': ['a'] * 17}, 'stop', 'at most 16'),
    ({'stop': ''}, 'stop', 'none of them empty'),
    ({'stream': 1}, 'stream', 'stream=1 must be true or false'),
    ({'stream_options': {'include_usage': True}}, 'stream_options', 'with stream=true'),
    ({'stream_options': {'more': 1}, 'stream': True}, 'stream_options', 'include_usage'),
    ({'stream_options': {'include_obfuscation': True}, 'stream': True}, 'stream_options', 'include_usage'),
    ({'stream_options': ['include_usage'], 'stream': True}, 'stream_options', 'include_usage'),
    ({'temperature': -1}, 'temperature', 'temperature=-1'),
    ({'top_p': 'x'}, 'top_p', "top_p='x'"),
    ({'seed': -1}, 'seed', 'seed=-1'),
    ({'seed': 10**400}, 'seed', 'seed=1000'),
    ({'stop': 0}, 'stop', 'must be a text or a list'),
    ({'\ud800': 1}, '\ud800', 'is not supported'),
  ],
)  # fmt: skip
def test_field_that_breaks_its_rule_is_refused_by_name(port, fields, name, sentence):
  status, _, text = request(port, '/v1/completions', ASKED | fields)
  error = json.loads(text)['error']
  assert status == (404 if name == 'model' else 400)
  assert error['param'] == name and sentence in error['message'] and '\n' not in error['message']


@pytest.mark.thorough
def test_the_real_client_is_served(port, view):
  openai = pytest.importorskip('openai', reason='needs the openai package')
  client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none')
  assert [model.id for model in client.models.list()] == ['run']
  answer = client.completions.create(**ASKED, logprobs=1, echo=True)
  pieces = client.completions.create(**ASKED, stream=True)
  assert PROMPT + ''.join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
  assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens
  with pytest.raises(openai.BadRequestError, match='best_of=3 is not supported'):
    client.completions.create(**ASKED, best_of=3)
  with pytest.raises(openai.NotFoundError, match='is not here'):
    client.completions.create(**(ASKED | {'model': 'gpt'}))
