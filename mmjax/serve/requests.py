"""What every request goes through: its body, read with bounds on size and time, and the one thread that computes."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from mmjax.errors import UserError

MOST_BODY_BYTES = 2**17
BODY_SECONDS = 10  # for a request to arrive


class Refusal(UserError):
  """A request that is not answered, with its HTTP status."""

  def __init__(self, sentence: str, status: int):
    super().__init__(sentence)
    self.status = status


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
  if request.headers.get('content-type', '').partition(';')[0].strip() != 'application/json':
    raise Refusal('send JSON, with Content-Type: application/json', 415)
  raw = b''
  try:
    async with asyncio.timeout(BODY_SECONDS):
      async for part in request.stream():
        raw += part
        if len(raw) > MOST_BODY_BYTES:
          raise Refusal(f'the request is larger than {MOST_BODY_BYTES:,} bytes', 413)
    return json.loads(raw)
  except TimeoutError:
    raise Refusal(f'the request took longer than {BODY_SECONDS} seconds to arrive', 408) from None
  except (ValueError, RecursionError) as error:
    raise UserError('the request is not JSON') if not isinstance(error, UserError) else error from None
