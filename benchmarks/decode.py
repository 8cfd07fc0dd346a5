"""Measures generation:   python benchmarks/decode.py --config configs/exp_1_4_2.py [--new_tokens 512] [--against torch]

Greedy, batch 1. Prints table rows: tokens/s of the cached decoder and, with --against torch, of the PyTorch port, which
like the code it ports runs the whole sequence for every token; both have the same weights and make the same tokens,
which is checked. Then the time to the first token beside one forward pass over the same prompt. Compilation is not
counted; it is shown.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the port in tests/

from mmjax.config import Config, load_config  # noqa: E402
from mmjax.inference.generate import Decoder  # noqa: E402
from mmjax.inference.settings import Sampling  # noqa: E402
from mmjax.kernels.attention import attention_backend  # noqa: E402
from mmjax.model.lm import Params, build_model, count_params, model_graph  # noqa: E402

NO_EOS = -1  # so that every run makes all its tokens
PROMPT_TOKENS = 16


def main() -> None:
  """Reads flags, measures, prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', default='configs/exp_1_4_2.py')
  parser.add_argument('--new_tokens', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--against', choices=('torch',), help='also run the PyTorch port, uncached')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)
  port, params = torch_pair(config) if arguments.against else (None, build_model(config)[1])
  decoder = Decoder(config, params, eos_id=NO_EOS, dtype=jnp.dtype(arguments.dtype))
  prompt = np.random.default_rng(0).integers(4, config.model.vocab_size, PROMPT_TOKENS).tolist()
  sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=0)

  start = time.perf_counter()
  [made] = decoder.generate([prompt], sampling)
  first_seconds = time.perf_counter() - start
  cached, uncached = [], []
  for repeat in range(arguments.repeats):  # one after the other, so that both see the same machine
    cached.append(seconds_of(lambda: decoder.generate([prompt], sampling)))
    if port is not None and repeat == 0:  # minutes: once
      start = time.perf_counter()
      slow = torch_continuation(port, prompt, arguments.new_tokens)
      uncached.append(time.perf_counter() - start)
      print(f'greedy tokens equal to the port: {sum(map(int.__eq__, made, slow))} of {len(slow)}')
  report_decoding(config, params, arguments, first_seconds, cached, uncached)
  report_first_token(config, params, decoder, arguments)


def torch_pair(config: Config) -> tuple[object, Params]:
  """Returns the port and its weights as mmjax parameters."""
  import torch

  from tests.parity import build_pair

  torch.set_num_threads(len(os.sched_getaffinity(0)))  # the tests, which share their machine, set it to one
  port, _, params = build_pair(config)
  return port.eval(), params


def torch_continuation(port: object, prompt: list[int], new_tokens: int) -> list[int]:
  """Returns the port's greedy continuation."""
  import torch

  return list(port.stream(torch.tensor([prompt]), NO_EOS, new_tokens, 0.0, 1.0, 1.0))


def seconds_of(run: Callable[[], object]) -> float:
  """Times one call."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def report_decoding(
  config: Config,
  params: Params,
  arguments: argparse.Namespace,
  first_seconds: float,
  cached: list[float],
  uncached: list[float],
) -> None:
  """Prints tokens per second, and the memory traffic that bounds them: every weight outside the bank, once a token."""
  seconds, n = statistics.median(cached), arguments.new_tokens
  traffic = count_params(params)[1] * jnp.dtype(arguments.dtype).itemsize * n / seconds
  ratio = f'{uncached[0] / seconds:.1f}' if uncached else 'not measured'
  torch_rate = f'{n / uncached[0]:.1f}' if uncached else 'not measured'
  row = {
    'date': datetime.date.today(),
    'config': config.experiment,
    'device': jax.devices()[0].device_kind,
    'dtype': arguments.dtype,
    'new tokens': n,
    'tokens/s': f'{n / seconds:.0f}',
    'spread': f'{n / max(cached):.0f}-{n / min(cached):.0f}',
    'uncached torch tokens/s': torch_rate,
    'ratio': ratio,
    'GB/s': f'{traffic / 1e9:.1f}',
    'first run, s': f'{first_seconds:.1f}',
  }
  for line in (row, ['---'] * len(row), row.values()):
    print('| ' + ' | '.join(map(str, line)) + ' |')


def report_first_token(config: Config, params: Params, decoder: Decoder, arguments: argparse.Namespace) -> None:
  """Prints the time to the first token and that of one forward pass that computes the last position's logits."""
  graphdef, dtype = model_graph(config), jnp.dtype(arguments.dtype)
  backend = attention_backend('auto', dtype, jax.default_backend(), 1)

  @jax.jit
  def forward(params: Params, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens_BT, dtype=dtype, attention=backend).hidden_BTD[:, -1]).argmax(-1)

  print('| prompt tokens | first token, ms | one forward pass, ms | ratio |')
  print('|---:|---:|---:|---:|')
  sampling = Sampling(max_new_tokens=128, temperature=0)
  for length in (64, config.model.max_seq_len // 2, config.model.max_seq_len):
    prompt = np.random.default_rng(1).integers(4, config.model.vocab_size, (1, length)).astype(np.int32)
    first, whole = [], []
    for _ in range(2 * arguments.repeats + 1):
      first.append(seconds_of(lambda p=prompt: next(decoder.stream(p.tolist(), sampling))))
      whole.append(seconds_of(lambda p=prompt: forward(params, p).block_until_ready()))
    a, b = (statistics.median(times[1:]) * 1e3 for times in (first, whole))  # without the compilation
    print(f'| {length} | {a:.1f} | {b:.1f} | {a / b:.2f} |')


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
