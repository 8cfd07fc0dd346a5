"""/v1/models and /v1/completions, as OpenAI's clients know them.

A text prompt is read as everywhere in this package, after the token that rows begin with; a list of token ids as it is.
Log-probabilities are those of the model, whatever the temperature. A field that is not supported is refused by name
unless its value asks for nothing; `user` is ignored.
"""

import asyncio
import bisect
import codecs
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mmjax.data.tokenizer import Tokenizer
from mmjax.errors import CommandError, UserError
from mmjax.files import finite
from mmjax.inference.memory_reads import token_text
from mmjax.inference.settings import Sampling
from mmjax.serve.batch import MOST_JOBS, MOST_LOGPROBS, Batch, Job, Token
from mmjax.serve.requests import Refusal, Worker, protocol_error, read_body, whole_number
from mmjax.serve.view import RunView

MOST_CHOICES = 64  # of one request
MOST_STOPS = 16  # OpenAI takes 4; tasks of lm-evaluation-harness have more
DEFAULTS = {
  'max_tokens': 16, 'temperature': 1.0, 'top_p': 1.0, 'n': 1, 'stream': False, 'stop': None, 'echo': False,
  'logprobs': None, 'seed': None, 'user': None, 'stream_options': None,
}  # fmt: skip
# Fields of the protocol that say nothing at these values, and are refused at others.
UNSUPPORTED = {
  'best_of': (None, 1), 'frequency_penalty': (None, 0), 'presence_penalty': (None, 0), 'logit_bias': (None, {}),
  'suffix': (None, ''),
}  # fmt: skip
STREAM_OPTIONS = {'include_usage': (False, True), 'include_obfuscation': (False,)}
Echo = list[tuple[int, float | None, list[tuple[int, float]]]]  # id, log-probability, likeliest tokens with theirs


class Asked(NamedTuple):
  """A checked request.

  Attributes:
    starts: whether prompts begin with a token that the client did not send.
    seeded: whether the client gave a seed; a prompt then gets the same texts whatever prompts stand beside it.
    tells_usage: whether a stream ends with the counts of tokens.
  """

  view: RunView
  prompts: list[list[int]]
  starts: bool
  seeded: bool
  sampling: Sampling
  max_tokens: int
  n: int
  stream: bool
  stops: list[str]
  echo: bool
  logprobs: int | None
  tells_usage: bool


class Choice:
  """One continuation as it grows: its text, cut at the first stop, and its log-probabilities."""

  def __init__(self, asked: Asked, index: int):
    self.asked, self.index, self.finish_reason, self.n_tokens = asked, index, None, 0
    self._text, self._sent, self._prompt, self._reach = '', 0, 0, max(map(len, asked.stops), default=1) - 1
    self._logprobs = {'tokens': [], 'token_logprobs': [], 'top_logprobs': [], 'text_offset': []}
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

  def echo(self, prompt: Echo) -> None:
    """Puts the prompt before the continuation; stops are not looked for in it."""
    for token in prompt:
      self._add(*token)
    self._prompt = len(self._text)
    self.finish_reason = None if self.asked.max_tokens else 'length'

  def add(self, token: Token) -> None:
    """Takes a token that was written; the choice ends with EOS, a stop or the last token asked for."""
    self.n_tokens += 1
    before = len(self._text)
    self._add(*token)  # EOS too, which has no text: clients count on a log-probability for each token
    ended = token.id == self.asked.view.lm.tokenizer.eos_id
    self.finish_reason = 'stop' if ended else 'length' if self.n_tokens == self.asked.max_tokens else None
    if self.finish_reason:
      self._text += self._decoder.decode(b'', final=True)
    at = [self._text.find(stop, max(self._prompt, before - self._reach)) for stop in self.asked.stops]
    if found := [place for place in at if place >= 0]:
      self._text, self.finish_reason = self._text[: min(found)], 'stop'
      kept = sum(offset < len(self._text) for offset in self._logprobs['text_offset'])
      self._logprobs = {name: values[:kept] for name, values in self._logprobs.items()}

  def _add(self, token: int, log_prob: float | None, top: Sequence[tuple[int, float]]) -> None:
    tokenizer = self.asked.view.lm.tokenizer
    if self.asked.logprobs is not None:
      told = None if log_prob is None else {}
      for other, value in () if told is None else ((token, log_prob), *top[: self.asked.logprobs]):
        told.setdefault(_name(tokenizer, other), value)
      values = _name(tokenizer, token), log_prob, told, len(self._text)
      for name, value in zip(self._logprobs, values, strict=True):
        self._logprobs[name].append(value)
    self._text += self._decoder.decode(tokenizer.decode_bytes([token]))

  def piece(self) -> dict[str, Any]:
    """Returns what is new since the last piece, as the protocol has it; what may become a stop is held back."""
    end = max(self._sent, len(self._text) - (0 if self.finish_reason else self._reach))
    text, self._sent = self._text[self._sent : end], end
    offsets = self._logprobs['text_offset']
    told = len(offsets) if self.finish_reason else bisect.bisect_left(offsets, end)  # not those of what is held back
    logprobs = {name: values[:told] for name, values in self._logprobs.items()}
    self._logprobs = {name: values[told:] for name, values in self._logprobs.items()}
    logprobs = None if self.asked.logprobs is None else logprobs
    return {'text': text, 'index': self.index, 'logprobs': logprobs, 'finish_reason': self.finish_reason}


class Completions:
  """The routes, and a running batch for each run."""

  def __init__(self, views: Sequence[RunView], worker: Worker):
    self.views, self.worker = {view.name: view for view in views}, worker
    self.batches = {view.name: Batch(view.lm, worker) for view in views}
    self.routes = [
      Route('/v1/models', self.models),
      Route('/v1/models/{name:path}', self.model),
      Route('/v1/completions', self.complete, methods=['POST']),
    ]

  async def models(self, request: Request) -> Response:
    """Lists the runs."""
    return JSONResponse({'object': 'list', 'data': [_model(name) for name in self.views]})

  async def model(self, request: Request) -> Response:
    """Describes one run; raises Refusal if it is not here."""
    name = request.path_params['name']
    self._view(name)
    return JSONResponse(_model(name))

  async def complete(self, request: Request) -> Response:
    """Answers a request, as a whole or as a stream of events.

    Raises:
      UserError: as `read_body` does, or if a field breaks its rule.
      Refusal: while MOST_JOBS completions are being written.
    """
    asked = self._check(await read_body(request))
    if self.batches[asked.view.name].full:
      raise Refusal(f'busy: {MOST_JOBS} completions, the most at a time, are being written; ask again later', 429)
    echoes = [await self.worker(_echo, asked, prompt) for prompt in asked.prompts] if asked.echo else []
    head = {'id': f'cmpl-{secrets.token_hex(12)}', 'object': 'text_completion', 'created': int(time.time())}
    head |= {'model': asked.view.name}
    if asked.stream:
      return StreamingResponse(self._events(asked, echoes, head), media_type='text/event-stream')
    writing, leaving = asyncio.create_task(self._whole(asked, echoes)), asyncio.create_task(request.receive())
    await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not writing.done():
      writing.cancel()
      return Response(status_code=499)  # nobody reads it
    return JSONResponse(finite(head | writing.result()))

  async def _whole(self, asked: Asked, echoes: list[Echo]) -> dict[str, Any]:
    choices = [Choice(asked, index) for index in range(len(asked.prompts) * asked.n)]
    pieces = [piece async for piece in self._pieces(choices, echoes)]
    return {'choices': sorted(pieces, key=lambda piece: piece['index']), 'usage': _usage(asked, choices)}

  async def _events(self, asked: Asked, echoes: list[Echo], head: dict[str, Any]) -> AsyncIterator[str]:
    choices = [Choice(asked, index) for index in range(len(asked.prompts) * asked.n)]
    try:
      async for piece in self._pieces(choices, echoes):
        yield f'data: {json.dumps(finite(head | {"choices": [piece]}))}\n\n'
      if asked.tells_usage:
        yield f'data: {json.dumps(head | {"choices": [], "usage": _usage(asked, choices)})}\n\n'
      yield 'data: [DONE]\n\n'
    except CommandError as error:
      yield f'data: {json.dumps(protocol_error(error))}\n\n'

  async def _pieces(self, choices: list[Choice], echoes: list[Echo]) -> AsyncIterator[dict[str, Any]]:
    """Yields pieces of the choices as they are written; without `stream` the last, which is then all of each."""
    grown: asyncio.Queue = asyncio.Queue()

    async def write(choice: Choice) -> None:
      asked, number = choice.asked, choice.index // choice.asked.n
      if asked.echo:
        choice.echo(echoes[number])
      job = Job(asked.prompts[number], asked.sampling, choice.index % asked.n if asked.seeded else choice.index)
      async with contextlib.aclosing(self.batches[asked.view.name].write(job)) as tokens:
        while not choice.finish_reason:
          choice.add(await anext(tokens))
          if asked.stream and not choice.finish_reason and (piece := choice.piece())['text']:
            grown.put_nowait(piece)
      grown.put_nowait(choice.piece())

    def tell(task: asyncio.Task) -> None:
      if not task.cancelled() and task.exception():
        grown.put_nowait(task.exception())

    writing = [asyncio.create_task(write(choice)) for choice in choices]
    for task in writing:
      task.add_done_callback(tell)
    try:
      left = len(choices)
      while left:
        piece = await grown.get()
        if isinstance(piece, BaseException):
          raise piece
        left -= piece['finish_reason'] is not None
        yield piece
    finally:
      for task in writing:
        task.cancel()

  def _check(self, body: Any) -> Asked:
    """Returns a request whose every field keeps its rule.

    Raises:
      Refusal: for the first that does not.
    """
    if not isinstance(body, dict):
      raise UserError(f'the request must be a JSON object with model and prompt, not {body!r:.80}')
    for name, value in body.items():
      known = value in UNSUPPORTED[name] if name in UNSUPPORTED else name in (*DEFAULTS, 'model', 'prompt')
      known |= name == 'best_of' and value == body.get('n')  # all that are made are sent
      if not known:
        raise Refusal(f'{name:.80}={value!r:.40} is not supported; leave it out', field=name[:80])
    asked = DEFAULTS | {name: value for name, value in body.items() if value is not None}
    view = self._view(asked.get('model'))
    for name in ('stream', 'echo'):
      if not isinstance(asked[name], bool):
        raise Refusal(f'{name}={asked[name]!r:.40} must be true or false', field=name)
    prompts, starts = _prompts(view, asked.get('prompt'))
    n = whole_number(asked['n'], 'n', 1, MOST_CHOICES // len(prompts))
    most, longest = view.lm.config.model.max_seq_len, max(map(len, prompts))
    max_tokens = whole_number(asked['max_tokens'], 'max_tokens', 0 if asked['echo'] else 1, most)
    if longest + max_tokens > most:
      said = f'max_tokens={max_tokens} and a prompt of {longest} are more than model.max_seq_len={most}'
      raise Refusal(said, field='max_tokens')
    logprobs = None if asked['logprobs'] is None else whole_number(asked['logprobs'], 'logprobs', 0, MOST_LOGPROBS)
    seeded = asked['seed'] is not None
    seed = asked['seed'] if seeded else secrets.randbelow(2**31)
    try:
      sampling = Sampling(max(1, max_tokens), asked['temperature'], asked['top_p'], seed=seed)
    except UserError as error:  # 'temperature=-1 must be ...'
      raise Refusal(str(error), field=str(error).partition('=')[0]) from None
    stream, echo, options = asked['stream'], asked['echo'], asked['stream_options'] or {}
    known = isinstance(options, dict) and all(value in STREAM_OPTIONS.get(name, ()) for name, value in options.items())
    if not known or (options and not stream):
      said = f"stream_options={options!r:.60} must be {{'include_usage': true or false}}, with stream=true only"
      raise Refusal(said, field='stream_options')
    return Asked(
      view=view, prompts=prompts, starts=starts, seeded=seeded, sampling=sampling, max_tokens=max_tokens, n=n,
      stream=stream, stops=_stops(asked['stop']), echo=echo, logprobs=logprobs,
      tells_usage=bool(options.get('include_usage')),
    )  # fmt: skip

  def _view(self, name: Any) -> RunView:
    if not isinstance(name, str) or name not in self.views:
      said = 'model is missing' if name is None else f'model {name!r:.80} is not here'
      raise Refusal(f'{said}; there are {", ".join(self.views)}', 404, 'model')
    return self.views[name]


def _stops(value: Any) -> list[str]:
  stops = [] if value is None else [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
    said = f'stop={value!r:.80} must be a text or a list of at most {MOST_STOPS}, none of them empty'
    raise Refusal(said, field='stop')
  return stops


def _prompts(view: RunView, value: Any) -> tuple[list[list[int]], bool]:
  """Returns lists of token ids, and whether they begin with a token that the client did not send."""

  def refuse(said: str) -> NoReturn:
    raise Refusal(f'prompt {said}', field='prompt')

  lm, most = view.lm, view.lm.config.model.max_seq_len
  values = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
  if len(values) > MOST_CHOICES:
    refuse(f'must be at most {MOST_CHOICES} prompts, not {len(values)}')
  starts = all(isinstance(prompt, str) for prompt in values)
  if not starts and not all(isinstance(p, list) and p and all(type(t) is int for t in p) for p in values):
    refuse(f'must be a text, a list of texts, a list of token ids, or a list of such lists, not {value!r:.80}')
  if starts:
    values = [[lm.tokenizer.start_id(lm.config.data.layout), *lm.tokenizer.encode(prompt)] for prompt in values]
  for prompt in values:
    if len(prompt) > most:
      refuse(f'has {len(prompt)} tokens, more than model.max_seq_len={most}')
    if strange := [token for token in prompt if not 0 <= token < lm.tokenizer.vocab_size]:
      refuse(f'holds token id {strange[0]!s:.40}, outside of the vocabulary, which is 0..{lm.tokenizer.vocab_size - 1}')
  return values, starts


def _echo(asked: Asked, prompt: list[int]) -> Echo:
  """Returns a prompt as it is echoed; nothing is computed unless log-probabilities are wanted."""
  echo: Echo = [(token, None, []) for token in prompt]
  if asked.logprobs is not None and len(prompt) > 1:
    log_TV = asked.view.lm.next_log_probs(prompt)[:-1]
    best_TX = np.argsort(-log_TV, axis=-1, kind='stable')[:, : asked.logprobs]
    for t, (token, log_V, best_X) in enumerate(zip(prompt[1:], log_TV, best_TX, strict=True), 1):
      echo[t] = (token, float(log_V[token]), [(int(at), float(log_V[at])) for at in best_X])
  return echo[asked.starts :]


def _usage(asked: Asked, choices: Sequence[Choice]) -> dict[str, int]:
  n_prompt, n_new = sum(len(p) - asked.starts for p in asked.prompts), sum(choice.n_tokens for choice in choices)
  return {'prompt_tokens': n_prompt, 'completion_tokens': n_new, 'total_tokens': n_prompt + n_new}


def _name(tokenizer: Tokenizer, token: int) -> str:
  """Returns a token's text, or as OpenAI does its bytes where these are no text."""
  raw = tokenizer.decode_bytes([token])
  try:
    return raw.decode() or token_text(tokenizer, token)
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in raw)


def _model(name: str) -> dict[str, Any]:
  return {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'mmjax'}
