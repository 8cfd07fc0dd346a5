"""Measures generation:   python benchmarks/decode.py --config configs/exp_1_4_2.py [--new_tokens 512] [--against torch]

Greedy, batch 1. Prints table rows: tokens/s of the cached decoder and, with --against torch, of the PyTorch port, which
like the code it ports runs the whole sequence for every token; both have the same weights, and how many of their tokens
are equal is told. Then the time to the first token beside one forward pass over the same prompt. Compilation is not
counted; it is shown.
"""

import argparse
import time
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.config import Config, load_config
from mmjax.environment import count_cores
from mmjax.inference.generate import NO_EOS, Decoder
from mmjax.inference.settings import Sampling
from mmjax.model.cost import count_params
from mmjax.model.params import Params, init_params, model_graph
from mmjax.run.placement import place_reader

PROMPT_TOKENS = 16


def main() -> None:
  """Reads flags, measures, prints the tables, writes the JSON file."""
  parser = common.parser(__doc__)
  parser.add_argument('--new_tokens', type=int, default=512)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--against', choices=('torch',), help='also run the PyTorch port, uncached, once: minutes')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)
  port, params = torch_pair(config) if arguments.against else (None, jax.jit(partial(init_params, config))())
  decoder = Decoder(config, params, eos_id=NO_EOS, placement=place_reader(config, dtype=arguments.dtype))
  decoding = measure_decoding(decoder, port, config, arguments)
  weights_bytes = count_params(params)[1] * jnp.dtype(arguments.dtype).itemsize
  common.print_table([decoding_row(decoding, weights_bytes, arguments)])
  print()
  first_token = measure_first_token(config, params, decoder, arguments)
  common.print_table(map(first_token_row, first_token))
  found = common.environment()
  common.write_json(arguments.json, found | {'config': config.to_dict(), **decoding, 'first_token': first_token})


def measure_decoding(
  decoder: Decoder, port: object | None, config: Config, arguments: argparse.Namespace
) -> dict[str, Any]:
  """Returns seconds of all new tokens: with compilation, cached, of the port; and how many tokens agree with it."""
  prompt = np.random.default_rng(0).integers(4, config.model.vocab_size, PROMPT_TOKENS).tolist()
  sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=0)
  start = time.perf_counter()
  [made] = decoder.generate([prompt], sampling)
  found = {'first_seconds': time.perf_counter() - start, 'uncached_seconds': None, 'equal_tokens': None}
  found['seconds'] = [common.seconds_of(lambda: decoder.generate([prompt], sampling)) for _ in range(arguments.repeats)]
  if port is not None:
    start = time.perf_counter()
    slow = torch_continuation(port, prompt, arguments.new_tokens)
    found['uncached_seconds'] = time.perf_counter() - start
    found['equal_tokens'] = sum(map(int.__eq__, made, slow))
  return found


def torch_pair(config: Config) -> tuple[object, Params]:
  """Returns the port and its weights as mmjax parameters."""
  import torch

  from tests.parity import build_pair

  torch.set_num_threads(count_cores())  # the tests, which share their machine, set it to one
  port, _, params = build_pair(config)
  return port.eval(), params


def torch_continuation(port: object, prompt: list[int], new_tokens: int) -> list[int]:
  """Returns the port's greedy continuation."""
  import torch

  return list(port.stream(torch.tensor([prompt]), NO_EOS, new_tokens, 0.0, 1.0, 1.0))


def decoding_row(found: dict[str, Any], weights_bytes: int, arguments: argparse.Namespace) -> dict[str, str]:
  """Returns the line of the table; GB/s is what bounds decoding: every weight outside the bank, read once a token."""
  n, slow = arguments.new_tokens, found['uncached_seconds']
  rate = common.spread([n / seconds for seconds in found['seconds']])
  return {
    'dtype': arguments.dtype,
    'new tokens': str(n),
    'tokens/s': f'{rate["median"]:.0f}',
    'range': f'{rate["min"]:.0f}-{rate["max"]:.0f}',
    'uncached torch tokens/s': f'{n / slow:.1f}' if slow else '',
    'times torch': f'{rate["median"] * slow / n:.1f}' if slow else '',
    'tokens equal to torch': str(found['equal_tokens']) if slow else '',
    'GB/s': f'{weights_bytes * rate["median"] / 1e9:.1f}',
    'first run, s': f'{found["first_seconds"]:.1f}',
  }


def measure_first_token(
  config: Config, params: Params, decoder: Decoder, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
  """Times the first token, and beside it one forward pass that computes the last position's logits."""
  graphdef, placement = model_graph(config), place_reader(config, dtype=arguments.dtype)

  @placement.jit
  def forward(params: Params, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model.logits(
      model(tokens_BT, dtype=placement.dtype, attention=placement.attention).hidden_BTD[:, -1]
    ).argmax(-1)

  found = []
  sampling = Sampling(max_new_tokens=128, temperature=0)
  for length in sorted({min(64, config.model.max_seq_len), config.model.max_seq_len // 2, config.model.max_seq_len}):
    prompt = np.random.default_rng(1).integers(4, config.model.vocab_size, (1, length)).astype(np.int32)
    first, whole = [], []
    for _ in range(2 * arguments.repeats + 1):
      first.append(common.seconds_of(lambda p=prompt: next(decoder.stream(p.tolist(), sampling))))
      whole.append(common.seconds_of(lambda p=prompt: forward(params, p).block_until_ready()))
    # Without the compilation.
    found.append({'prompt_tokens': length, 'first': common.spread(first[1:]), 'forward': common.spread(whole[1:])})
  return found


def first_token_row(found: dict[str, Any]) -> dict[str, str]:
  """Returns a line of the table."""
  first, forward = (1e3 * found[name]['median'] for name in ('first', 'forward'))
  return {
    'prompt tokens': str(found['prompt_tokens']),
    'first token, ms': f'{first:.1f}',
    'one forward pass, ms': f'{forward:.1f}',
    'ratio': f'{first / forward:.2f}',
  }


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
