"""A server on a free port, and a plain client: for tests and benchmarks."""

import contextlib
import http.client
import json
import socket
import threading

import uvicorn

from mmjax.serve import web


@contextlib.contextmanager
def serving(views):
  """Answers on a free port meanwhile."""
  with socket.create_server(('127.0.0.1', 0)) as listening:
    port = listening.getsockname()[1]
    config = uvicorn.Config(web.make_app(views, [web.LOCAL]), log_level='error', **web.SERVER)
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
