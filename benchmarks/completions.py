"""Measures /v1/completions:   python benchmarks/completions.py --workdir RUN [--clients 1,4,16] [--max_tokens 64]

Prints tokens a second of so many clients that each ask again and again, beside `lm.generate` one prompt at a time. Each
answer is compared with that to the same request alone; then `--soak N` asks N requests of mixed kinds, some of which
leave, and tells the growth of the process's memory. Needs the extra 'serve'.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import common

import mmjax
from mmjax.run.directory import open_run
from mmjax.serve.view import RunView
from tests.server import serving


def main() -> None:
  """Reads flags, measures, prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--clients', default='1,4,16')
  parser.add_argument('--requests', type=int, default=32, help='of all clients together, for each number of clients')
  parser.add_argument('--max_tokens', type=int, default=64)
  parser.add_argument('--soak', type=int, default=0, help='requests of mixed kinds at the end')
  arguments = parser.parse_args()
  lm = mmjax.load(arguments.workdir)
  view = RunView(lm, open_run(arguments.workdir))
  view.corpus = None  # nothing but completions is computed
  prompts = [f'The {word} of' for word in 'list set name value type end size kind form rest'.split()]
  asked = [
    {'model': view.name, 'prompt': prompt, 'max_tokens': arguments.max_tokens, 'seed': seed, 'logprobs': 0}
    for seed, prompt in enumerate(itertools.islice(itertools.cycle(prompts), arguments.requests))
  ]
  with serving([view]) as port:
    rows = [alone_row(lm, asked)]
    expected = [complete(port, fields) for fields in asked]
    for clients in map(int, arguments.clients.split(',')):
      rows.append(clients_row(port, clients, asked, expected))
    common.print_table(rows)
    if arguments.soak:
      soak(port, arguments.soak, asked, expected)


def alone_row(lm: mmjax.LanguageModel, asked: list[dict]) -> dict[str, str]:
  """Returns the row of `lm.generate`, one prompt at a time."""
  prompts = [lm.encode_prompt(fields['prompt']) for fields in asked]
  settings = {'max_new_tokens': asked[0]['max_tokens'], 'temperature': 1.0, 'top_p': 1.0}
  lm.generate_tokens(prompts[:1], **settings)
  start = time.perf_counter()
  made = sum(len(lm.generate_tokens([p], seed=seed, **settings)[0]) for seed, p in enumerate(prompts))
  speed = made / (time.perf_counter() - start)
  return {'asked by': 'lm.generate, one at a time', 'tokens/s': f'{speed:,.0f}', 'as alone': '-'}


def clients_row(port: int, clients: int, asked: list[dict], expected: list[dict]) -> dict[str, str]:
  """Returns the row of so many clients at once."""
  with ThreadPoolExecutor(clients) as pool:
    start = time.perf_counter()
    answers = list(pool.map(lambda fields: complete(port, fields), asked))
    seconds = time.perf_counter() - start
  made = sum(answer['usage']['completion_tokens'] for answer in answers)
  equal = sum(a['choices'] == e['choices'] for a, e in zip(answers, expected, strict=True))
  return {
    'asked by': f'{clients} clients',
    'tokens/s': f'{made / seconds:,.0f}',
    'as alone': f'{equal} of {len(asked)}',
  }


def soak(port: int, requests: int, asked: list[dict], expected: list[dict]) -> None:
  """Asks again and again, from 32 clients; a quarter of them leaves before the answer."""
  start, before = time.perf_counter(), common.resident_bytes('VmRSS')

  def ask(number: int) -> bool | None:
    fields = asked[at := number % len(asked)]
    if random.Random(number).random() < 0.25:
      connection = connect(port, fields | {'stream': True, 'max_tokens': 100})
      connection.getresponse().readline()
      return connection.close()
    return complete(port, fields)['choices'] == expected[at]['choices']

  with ThreadPoolExecutor(32) as pool:
    found = list(pool.map(ask, range(requests)))
  print(
    f'soak: {requests} requests in {time.perf_counter() - start:.0f} s, {found.count(None)} left, '
    f'{found.count(False)} wrong; memory {before / 1e6:.0f} -> {common.resident_bytes("VmRSS") / 1e6:.0f} MB'
  )


def complete(port: int, fields: dict) -> dict:
  """Returns the answer to one request."""
  with contextlib.closing(connect(port, fields)) as connection:
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
      sys.exit(f'{answer.status}: {text.decode()}')
    return json.loads(text)


def connect(port: int, fields: dict) -> http.client.HTTPConnection:
  """Sends a request and returns its connection."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=600)
  connection.request('POST', '/v1/completions', json.dumps(fields), {'Content-Type': 'application/json'})
  return connection


if __name__ == '__main__':
  main()
