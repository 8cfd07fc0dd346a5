"""The page over HTTP: a few fixed files and questions in JSON. One thread computes, one question after the other.

What the page may ask of a run is the table QUESTIONS; every field is checked before anything is computed, and an error
is one sentence. Only names that the server was started for are answered, and addresses, so that no other page that the
browser has open can ask through it (DNS rebinding). Sizes, times and the number of those that wait are bounded. No name
of a file is ever taken from a request.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmjax.config.sublayers import VALUES
from mmjax.config.wording import quote
from mmjax.errors import CommandError, UserError
from mmjax.files import finite
from mmjax.inference.settings import Sampling
from mmjax.serve.completions import Completions
from mmjax.serve.requests import Refusal, Worker, answer_error, read_body, whole_number
from mmjax.serve.saving import static
from mmjax.serve.view import Change, RunView

MOST_CHARS = 20_000  # of a text
MOST_CHANGES = 1024
MOST_NEW_TOKENS = 512
MOST_WAITING = 64  # questions at a time
MOST_STREAMS = 8
HEAD_SECONDS = 10  # for a client to say what it asks for
SEND_SECONDS = 30  # for it to take the answer

LOCAL = 'localhost'
FILES = {
  '/': ('page.html', 'text/html'),
  '/page.css': ('page.css', 'text/css'),
  '/page.js': ('page.js', 'text/javascript'),
}
HEADERS = {
  'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
  "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'no-referrer',
  'Cache-Control': 'no-store',
}
# Questions, each a method of RunView, and the fields that it takes.
QUESTIONS = {
  'read': ('text',),
  'next': ('text', 'changes'),
  'row': ('row', 'layer'),
  'map': ('layer',),
  'health': (),
}
STREAM = ('text', 'changes', 'sampling')


class Protocol(H11Protocol):
  """Drops a client that connects and asks nothing."""

  def connection_made(self, transport: asyncio.Transport) -> None:
    """See asyncio."""
    super().connection_made(transport)
    self.loop.call_later(HEAD_SECONDS, lambda: self.cycle or transport.close())


SERVER = {'http': Protocol, 'limit_concurrency': 128, 'timeout_keep_alive': 5, 'timeout_graceful_shutdown': 2}


def serve(views: Sequence[RunView], host: str, port: int) -> None:
  """Prints the address and answers until Ctrl-C or SIGTERM.

  Args:
    views: the runs that are shown, one or two.
    host: name or address to listen on; the page is then opened by it, by the machine's name or by any of its addresses.
    port: 0: any that is free.

  Raises:
    UserError: if nothing can listen there.
  """
  try:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
  except OSError as error:
    raise UserError(f'--host {host} --port {port}: {error.strerror}; --port 0 takes a free one') from None
  port = listening.getsockname()[1]
  shown = f'[{host}]' if ':' in host else host
  app = make_app(views, [LOCAL, host, socket.gethostname()])
  config = uvicorn.Config(app, log_level='warning', access_log=False, server_header=False, **SERVER)
  print(f'http://{shown}:{port}   (Ctrl-C ends it)', flush=True)
  server = uvicorn.Server(config)
  # What still runs when it is stopped is ended, which uvicorn would report as the application's faults.
  logging.getLogger('uvicorn.error').addFilter(lambda record: not server.should_exit)
  server.run([listening])


def make_app(views: Sequence[RunView], hosts: Sequence[str]) -> ASGIApp:
  """Returns the application.

  Args:
    views: the runs that are shown, one or two.
    hosts: names that a request may be for, beside addresses.
  """
  for number, view in enumerate(views):
    if any(view.name == other.name for other in views[:number]):
      view.name += f'-{number + 1}'
  worker, streams = Worker(), asyncio.Semaphore(MOST_STREAMS)

  async def ask(request: Request) -> Response:
    question = request.path_params['question']
    if question not in QUESTIONS:
      raise Refusal(f'no question {question!r:.40}; there are {", ".join(QUESTIONS)}', 404)
    view, fields = read_fields(await read_body(request), QUESTIONS[question], views)
    if worker.waiting >= MOST_WAITING:
      raise Refusal(f'busy: {MOST_WAITING} questions wait already; ask again later', 503)
    return JSONResponse(finite(await worker(lambda: getattr(view, question)(**fields))))

  async def runs(request: Request) -> Response:
    return JSONResponse([view.describe() for view in views])

  async def stream(request: Request) -> Response:
    view, fields = read_fields(await read_body(request), STREAM, views)
    if streams.locked():
      raise Refusal(f'busy: {MOST_STREAMS} continuations are being written already; ask again later', 503)
    iterator = await worker(lambda: view.stream(**fields))
    return StreamingResponse(_pieces(worker, streams, iterator), media_type='application/x-ndjson')

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    growing = asyncio.create_task(_grow(worker, views))
    yield
    growing.cancel()

  routes = [Route(path, _file) for path in FILES]
  routes += [Route('/api/runs', runs), Route('/api/stream', stream, methods=['POST'])]
  routes += [Route('/api/{question}', ask, methods=['POST'])]
  routes += Completions(views, worker).routes
  handlers = dict.fromkeys((CommandError, Exception, 404, 405), answer_error)
  return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), hosts)


class Guard:
  """Answers no other host, no other page and no client that does not take its answer; adds HEADERS.

  A page elsewhere reaches this server by a name that leads here, never by an address: any address may be asked for, and
  any port, which a tunnel may change.
  """

  def __init__(self, app: ASGIApp, hosts: Sequence[str]):
    self.app, self.hosts = app, {host.lower() for host in hosts}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """See ASGI."""
    if scope['type'] != 'http':
      return await self.app(scope, receive, send)

    started = False

    async def send_in_time(message: Message) -> None:
      nonlocal started
      started = True
      if message['type'] == 'http.response.start':
        message['headers'] = [*message['headers'], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
      async with asyncio.timeout(SEND_SECONDS):
        await send(message)

    headers = {name: value.decode('latin-1').lower() for name, value in scope['headers']}
    host, origin = headers.get(b'host', ''), headers.get(b'origin')
    with contextlib.suppress(TimeoutError, ClientDisconnect):
      if not self._is_mine(host) or origin not in (None, f'http://{host}'):
        sentence = f'this server answers for {", ".join(sorted(self.hosts))}, any address and its own page only'
        return await JSONResponse({'error': sentence}, 421)(scope, receive, send_in_time)
      try:
        return await self.app(scope, receive, send_in_time)
      except asyncio.CancelledError:  # the server was stopped
        if not started:
          await JSONResponse({'error': 'the server was stopped'}, 503)(scope, receive, send_in_time)

  def _is_mine(self, host: str) -> bool:
    name = re.sub(r':\d*$', '', host)
    if name in self.hosts:
      return True
    with contextlib.suppress(ValueError):
      return bool(ipaddress.ip_address(name[1:-1] if name.startswith('[') and name.endswith(']') else name))
    return False


def read_fields(body: Any, names: Sequence[str], views: Sequence[RunView]) -> tuple[RunView, dict[str, Any]]:
  """Returns the run that a question is for and its checked fields.

  Raises:
    UserError: if a field is missing, unknown, or breaks its rule.
  """
  if not isinstance(body, dict) or set(body) != {'run', *names}:
    given = ', '.join(map(repr, list(body)[:8])) if isinstance(body, dict) else type(body).__name__
    raise UserError(f'send a JSON object with the fields {", ".join(("run", *names))}, not {given or "none"}')
  view = views[whole_number(body['run'], 'run', most=len(views) - 1)]
  return view, {name: CHECKS[name](body[name], name) for name in names}


def _number_or_none(value: Any, name: str) -> int | None:
  return None if value is None else whole_number(value, name)


def _layer(value: Any, name: str) -> int | str | None:
  return value if value == VALUES else _number_or_none(value, name)


def _text(value: Any, name: str) -> str:
  if not isinstance(value, str) or len(value) > MOST_CHARS:
    raise UserError(f'{name}={quote(value)} must be a text of at most {MOST_CHARS:,} characters')
  return value


def _changes(value: Any, name: str) -> list[Change]:
  if not isinstance(value, list) or len(value) > MOST_CHANGES:
    raise UserError(f'{name}={quote(value)} must be a list of at most {MOST_CHANGES:,} objects')
  found = []
  for change in value:
    if not isinstance(change, dict) or not {'row'} <= set(change) <= {'row', 'scale', 'other'}:
      raise UserError(f"each of {name} must be an object with 'row' and 'scale' or 'other', not {quote(change)}")
    scale, row_or_all = change.get('scale', 1), whole_number if 'other' in change else _number_or_none
    if type(scale) not in (int, float) or not abs(scale) <= 1e3:
      raise UserError(f'scale={scale!r:.40} must be a number from -1000 to 1000')
    other = _number_or_none(change.get('other'), 'other')
    found.append(Change(row_or_all(change['row'], 'row'), float(scale), other))
  return found


def _sampling(value: Any, name: str) -> Sampling:
  if not isinstance(value, dict):
    raise UserError(f'{name}={quote(value)} must be an object')
  sampling = Sampling.of(value)
  whole_number(sampling.max_new_tokens, 'max_new_tokens', 1, MOST_NEW_TOKENS)
  return sampling


CHECKS = {'row': whole_number, 'layer': _layer, 'text': _text, 'changes': _changes, 'sampling': _sampling}


async def _file(request: Request) -> Response:
  name, kind = FILES[request.url.path]
  return Response(static(name), media_type=kind)


async def _pieces(worker: Worker, streams: asyncio.Semaphore, iterator: Any) -> AsyncIterator[str]:
  """Yields a line of JSON for each piece of a continuation; ends with the client."""
  async with streams:
    try:
      while (piece := await worker(next, iterator, None)) is not None:
        yield json.dumps({'text': piece}) + '\n'
      yield json.dumps({'done': True}) + '\n'
    except CommandError as error:
      yield json.dumps({'error': str(error)}) + '\n'


async def _grow(worker: Worker, views: Sequence[RunView]) -> None:
  """Reads the validation texts, a batch at a time, between questions."""
  for view in views:
    while view.corpus is not None and not view.corpus.done:
      try:
        await worker(view.corpus.grow)
      except CommandError as error:
        print(f'{view.name}: {error}', file=sys.stderr, flush=True)
        await asyncio.sleep(1)
