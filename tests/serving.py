"""What tests of the server share: models with random weights, a server on a free port, and a plain client."""

import contextlib
import http.client
import json
import socket
import threading

import pytest

import mmjax
from mmjax.inference.api import LanguageModel
from mmjax.model.lm import build_model
from mmjax.run.directory import open_run
from mmjax.serve.view import RunView
from tests.helpers import tiny_config

uvicorn = pytest.importorskip('uvicorn', reason="needs the extra 'serve'")
web = pytest.importorskip('mmjax.serve.web', reason="needs the extra 'serve'")

TEXT = 'the memory reads a row of its bank'
MODELS = {
  'bag': {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__layers': '1', 'memory__bank_std': 2.0},
  'ngrams': {'model__sublayer': 'ngram_bag', 'model__num_selected': 1, 'memory__n_heads': 2, 'memory__ngrams': '1,2'},
  'mixed': {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__ngram_layers': '1', 'memory__ngrams': '2'},
  'cross_attention': {'model__sublayer': 'cross_attention', 'memory__bank_std': 2.0},
  'dense': {'model__sublayer': 'dense'},
}


def make_view(tiny_run, name, **more):
  """The page's view of a model with random weights, with the tokenizer and the text of a run."""
  config = tiny_config(**MODELS[name], **more)
  view = RunView(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]), open_run(tiny_run))
  while view.corpus and not view.corpus.done:
    view.corpus.grow()
  return view


@contextlib.contextmanager
def serving(views):
  """Answers on a free port meanwhile."""
  with socket.create_server(('127.0.0.1', 0)) as listening:
    port = listening.getsockname()[1]
    config = uvicorn.Config(web.make_app(views, [f'127.0.0.1:{port}']), log_level='error', **web.SERVER)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
      yield port
    finally:
      server.should_exit = True
      thread.join(30)


def request(port, path, body=None, **headers):
  """Returns status, headers and body of an answer."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  body = json.dumps(body) if isinstance(body, dict | list) else body
  sent = ({} if body is None else {'Content-Type': 'application/json'}) | headers
  connection.request('GET' if body is None else 'POST', path, body, sent)
  answer = connection.getresponse()
  with contextlib.closing(connection):
    return answer.status, answer.headers, answer.read().decode()
