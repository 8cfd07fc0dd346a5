"""What every request goes through: its body, read with bounds on size and time, and the one thread that computes.

An error is one sentence: the page gets it as {"error": ...}, a client of /v1 in the form of that protocol.
"""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mmjax.errors import CommandError, UserError, first_line

MOST_BODY_BYTES = 2**20  # 64 prompts of 512 tokens, a text of which JSON may write as \uXXXX
BODY_SECONDS = 10  # for a request to arrive


class Refusal(UserError):
  """A request that is not answered: its HTTP status, and the field that breaks its rule, if it is one."""

  def __init__(self, sentence: str, status: int = 400, field: str | None = None):
    super().__init__(sentence)
    self.status, self.field = status, field


def whole_number(value: Any, field: str, least: int = 0, most: int = 2**31 - 1) -> int:
  """Returns a field that is a whole number in these bounds; raises Refusal if it is none."""
  if type(value) is not int or not least <= value <= most:
    raise Refusal(f'{field}={value!r:.40} must be a whole number from {least} to {most}', field=field)
  return value


def protocol_error(error: Exception) -> dict[str, Any]:
  """Returns an error as clients of /v1 know it."""
  told = {'message': str(error), 'type': 'invalid_request_error', 'param': getattr(error, 'field', None), 'code': None}
  return {'error': told}


async def answer_error(request: Request, error: Exception) -> Response:
  """Returns the answer to a request that was refused, or in which something failed."""
  status, is_protocol = getattr(error, 'status', 400), request.url.path.startswith('/v1/')
  if not isinstance(error, CommandError):
    status = getattr(error, 'status_code', 500)
    where = '; there are /v1/models and /v1/completions' if is_protocol else ''
    said = {404: f'there is nothing here{where}', 405: f'{request.method} is not answered here'}
    error = CommandError(said.get(status, f'the server failed: {first_line(error)}'))
  told = protocol_error(error) if is_protocol else {'error': str(error)}
  return Response(json.dumps(told), status, media_type='application/json')  # in ASCII: half a character has no UTF-8


class Worker:
  """One thread for all that computes, in the order in which it was asked. `waiting`: how many wait for it."""

  def __init__(self):
    self._pool, self.waiting = ThreadPoolExecutor(1, 'compute'), 0

  async def __call__(self, function: Callable, *arguments: Any) -> Any:
    """Returns function(*arguments), computed there."""
    self.waiting += 1
    try:
      return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
    finally:
      self.waiting -= 1


async def read_body(request: Request) -> Any:
  """Returns the JSON that a request carries.

  Raises:
    UserError: if it is none, too large or too slow.
  """
  kind = request.headers.get('content-type', '')
  if kind.partition(';')[0].strip() != 'application/json':
    raise Refusal(f'Content-Type: {kind or "none"} must be application/json; send JSON and say so', 415)
  raw = b''
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for part in request.stream():
        raw += part
        if len(raw) > MOST_BODY_BYTES:
          raise Refusal(f'the request is larger than {MOST_BODY_BYTES:,} bytes, the most; send less text', 413)
    return json.loads(raw)
  except TimeoutError:
    raise Refusal(f'the request took over {BODY_SECONDS} seconds to arrive, the most; send it again', 408) from None
  except (ValueError, RecursionError) as error:
    raise error if isinstance(error, UserError) else UserError(f'the request is no JSON: {first_line(error)}') from None
