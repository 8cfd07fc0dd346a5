"""Measures every kernel against its plain reference: python benchmarks/kernels.py [--batch 4] [--json kernels.json]

Sizes are those of experiment 1.4.2 at T = 512. Variants of a kernel take turns in one process, so that whatever else
runs on the machine slows all of them; a number is the median of the turns, with its quartiles, and `times` the
reference's median over the variant's, of forward and backward pass together. Torch's attention joins if torch is
installed (on a GPU, if it sees one). Runs on whatever device JAX sees.
"""

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.config import load_config
from mmjax.config.sublayers import SUBLAYERS
from mmjax.kernels import attention, bank, cross_entropy, fusion, matmul, product_key
from mmjax.memory.ngram import last_tokens
from mmjax.model.sublayers import SublayerInput
from mmjax.run.placement import attention_backend, place_reader
from tests import references

T, D, V, N, K, H = 512, 512, 6400, 32, 8, 16  # as in the axis legend
M, P, R, C = 65536, 128, 8, 256
CHUNK_TOKENS = 64  # of the cross entropy, in each row
MAX_REFERENCE_VALUES = 1 << 28  # a reference that builds larger arrays than 1 GiB is left out

Function = Callable[[], Any]


FLOAT32_ONLY = {('bag', 'bfloat16')}  # weighs and sums in float32 whatever the compute dtype


class Case(NamedTuple):
  """One kernel with its inputs: for each variant the forward pass, and it with the backward pass."""

  kernel: str
  dtype: str
  shape: str
  variants: dict[str, tuple[Function, Function]]


def main() -> None:
  """Prints the table and writes the JSON file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--batch', type=int, help='rows of T tokens; default 4 on a CPU, 64 on a GPU')
  parser.add_argument('--repeats', type=int, default=15, help='turns of each variant')
  parser.add_argument('--only', default='', help='part of a kernel name')
  parser.add_argument('--json', type=Path, help='file to write the measurements to')
  args = parser.parse_args()
  platform, device = jax.default_backend(), jax.devices()[0].device_kind
  batch = args.batch or (4 if platform == 'cpu' else 64)
  calls = 1 if platform == 'cpu' else 10  # in a turn: launches of short GPU kernels overlap, as they do in training
  print(f'{device}, jax {jax.__version__}, B={batch}, {args.repeats} turns, milliseconds\n')
  print('| kernel | dtype | shape | variant | forward | quartiles | forward + backward | quartiles | times |')
  print('|---|---|---|---|---:|---:|---:|---:|---:|')
  measurements = []
  for kernel, make_case in CASES.items():
    for dtype in ('float32', 'bfloat16'):
      if args.only in kernel and (kernel, dtype) not in FLOAT32_ONLY:
        measurements += measure(make_case(batch, dtype, platform), args.repeats, calls)
  found = common.environment()
  common.write_json(args.json, found | {'batch': batch, 'turns': args.repeats, 'measurements': measurements})


def measure(case: Case, repeats: int, calls: int) -> list[dict[str, Any]]:
  """Times the variants of a case in turns; prints and returns one line for each."""
  functions = {(name, i): function for name, pair in case.variants.items() for i, function in enumerate(pair)}
  for function in functions.values():  # compiles, and settles allocators
    wait_for((function(), function()))
  times_ms = {key: [] for key in functions}
  for _ in range(repeats):
    for key, function in functions.items():
      start = time.perf_counter()
      out = [function() for _ in range(calls)]
      wait_for(out)
      times_ms[key].append(1e3 * (time.perf_counter() - start) / calls)
  reference_ms = np.median(times_ms['reference', 1]) if 'reference' in case.variants else None
  return [_line(case, name, times_ms[name, 0], times_ms[name, 1], reference_ms) for name in case.variants]


def wait_for(out: Any) -> None:
  """Waits until arrays of JAX, or all that torch has begun on a GPU, are computed."""
  jax.block_until_ready(out)
  torch = sys.modules.get('torch')
  if torch and torch.cuda.is_available():
    torch.cuda.synchronize()


def _line(
  case: Case, name: str, forward_ms: list[float], both_ms: list[float], reference_ms: float | None
) -> dict[str, Any]:
  line = {'kernel': case.kernel, 'dtype': case.dtype, 'shape': case.shape, 'variant': name}
  for key, times_ms in (('forward', forward_ms), ('both', both_ms)):
    line[f'{key}_q1_ms'], line[f'{key}_ms'], line[f'{key}_q3_ms'] = np.percentile(times_ms, (25, 50, 75)).tolist()
  line['times'] = reference_ms / line['both_ms'] if reference_ms else None
  times = f'{line["times"]:.2f}' if reference_ms else '-'
  print(
    f'| {case.kernel} | {case.dtype} | {case.shape} | {name} '
    f'| {line["forward_ms"]:.2f} | {line["forward_q1_ms"]:.2f}-{line["forward_q3_ms"]:.2f} '
    f'| {line["both_ms"]:.2f} | {line["both_q1_ms"]:.2f}-{line["both_q3_ms"]:.2f} '
    f'| {times} |',
    flush=True,
  )
  return line


def _compile(function: Callable, differentiated: tuple[Array, ...], *rest: Array) -> tuple[Function, Function]:
  """Returns `function` of all inputs, and it with its gradient for a cotangent of ones, compiled."""

  def both(*inputs: Array) -> Any:
    first, rest = inputs[: len(differentiated)], inputs[len(differentiated) :]
    out, pullback = jax.vjp(lambda *first: function(*first, *rest), *first)
    return out, pullback(jax.tree.map(jnp.ones_like, out))

  placement = place_reader(load_config(str(common.ROOT / 'configs/exp_1_4_2.py')), dtype='float32')
  return tuple(functools.partial(placement.jit(f), *differentiated, *rest) for f in (function, both))


def _normal(dtype: str, *shape: int) -> Array:
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def _integers(high: int, *shape: int) -> Array:
  return jnp.asarray(np.random.default_rng(0).integers(0, high, shape), jnp.int32)


def attention_case(B: int, dtype: str, platform: str) -> Case:
  """Every backend that runs here, with segments where it is the fastest, and torch."""
  qkv = _normal(dtype, B, T, N, H), _normal(dtype, B, T, K, H), _normal(dtype, B, T, K, H)
  segment_BT = jnp.cumsum(_integers(100, B, T) == 0, axis=1)  # documents of 100 tokens
  backend = attention_backend('auto', jnp.dtype(dtype), platform, 1, H)
  variants = {'reference': _compile(references.causal_attention, qkv, jnp.zeros_like(segment_BT))}
  for name in dict.fromkeys(('xla', backend)):
    variants[name] = _compile(functools.partial(attention.causal_attention, backend=name), qkv)
  attend = functools.partial(attention.causal_attention, backend=backend)
  variants[f'{backend}, segments'] = _compile(attend, qkv, segment_BT)
  if importlib.util.find_spec('torch'):
    variants |= _torch_attention(B, dtype, platform)
  return Case('attention', dtype, f'B={B} T={T} N={N} K={K} H={H}', variants)


def _torch_attention(B: int, dtype: str, platform: str) -> dict[str, tuple[Function, Function]]:
  import torch

  if platform != 'cpu' and not torch.cuda.is_available():
    return {}
  place = {'device': 'cpu' if platform == 'cpu' else 'cuda', 'dtype': getattr(torch, dtype)}
  q, k, v = (torch.randn(B, n, T, H, **place).requires_grad_() for n in (N, K, K))
  ones = torch.ones(B, N, T, H, **place)

  def forward() -> Any:
    repeated = (x.repeat_interleave(N // K, dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, *repeated, is_causal=True)

  def forward_only() -> Any:
    with torch.no_grad():
      return forward()

  return {'torch': (forward_only, lambda: torch.autograd.grad(forward(), (q, k, v), ones))}


def product_key_case(B: int, dtype: str, platform: str) -> Case:
  """Selection, and the gradient of the scores, which 1.4.2 does not take."""
  query_BT2p, keys_2Cp = _normal(dtype, B, T, 2, P // 2), _normal('float32', 2, C, P // 2)
  functions = {'reference': references.product_key_topk, 'candidates': product_key.product_key_topk}
  if B * T * M > MAX_REFERENCE_VALUES:
    del functions['reference']
  variants = {name: _compile(lambda q, k, f=f: f(q, k, R)[1], (query_BT2p, keys_2Cp)) for name, f in functions.items()}
  return Case('product_key', dtype, f'B={B} T={T} C={C} P={P} R={R}', variants)


def bank_case(B: int, dtype: str, platform: str) -> Case:
  """Lookup of rows spread evenly, and its gradient."""
  bank_MP, row_BTR = _normal('float32', M, P), _integers(M, B, T, R)
  variants = {'reference': _compile(lambda b, r: references.bank_lookup(b, r, dtype), (bank_MP,), row_BTR)}
  variants['scatter'] = _compile(functools.partial(bank.bank_lookup, dtype=dtype), (bank_MP,), row_BTR)
  return Case('bank', dtype, f'B={B} T={T} R={R} M={M} P={P}', variants)


def gated_mlp_case(B: int, dtype: str, platform: str) -> Case:
  """The gated MLP of 1.4.2."""
  F = R * P
  kernels = _normal('float32', D + F, D), _normal('float32', D + F, D), _normal('float32', D, D)
  inputs = _normal(dtype, B, T, D), _normal(dtype, B, T, F), *kernels
  split = lambda *x: fusion.gated_mlp(x[:2], *x[2:], jnp.dtype(dtype))  # noqa: E731
  names = {'reference': lambda *x: references.gated_mlp(x[:2], *x[2:]), 'split': split}
  variants = {name: _compile(function, inputs) for name, function in names.items()}
  return Case('gated_mlp', dtype, f'B={B} T={T} D={D} F={F}', variants)


def matmul_case(B: int, dtype: str, platform: str) -> Case:
  """A linear layer; the reference is what autodiff makes of x @ kernel."""
  inputs = _normal(dtype, B, T, D), _normal('float32', D, D)
  names = {'reference': lambda x, kernel: x @ kernel.astype(x.dtype), 'matmul': matmul.matmul}
  variants = {name: _compile(function, inputs) for name, function in names.items()}
  return Case('matmul', dtype, f'B={B} T={T} in={D} out={D}', variants)


def cross_entropy_case(B: int, dtype: str, platform: str) -> Case:
  """Loss over the whole vocabulary."""
  inputs = _normal(dtype, B, T, D), _normal('float32', V, D) * D**-0.5
  rest = _integers(V, B, T), jnp.ones((B, T))
  variants = {
    'reference': _compile(lambda *inputs: references.cross_entropy_sums(*inputs)[0], inputs, *rest),
    'chunked': _compile(lambda *inputs: cross_entropy.cross_entropy_sums(*inputs, CHUNK_TOKENS)[0], inputs, *rest),
  }
  return Case('cross_entropy', dtype, f'B={B} T={T} D={D} V={V}', variants)


def bag_case(B: int, dtype: str, platform: str) -> Case:
  """Weighted sums of 16 rows for each of 4 heads, as memory_bag reads them."""
  row_BThr = _integers(M, B, T, 4, 16)
  inputs = _normal('float32', M, P), _normal('float32', *row_BThr.shape)
  variants = {'reference': _compile(lambda b, w, r: references.bank_bag(b, r, w), inputs, row_BThr)}
  variants['scatter'] = _compile(lambda b, w, r: bank.bank_bag(b, r, w), inputs, row_BThr)
  return Case('bag', dtype, f'B={B} T={T} h=4 r=16 M={M} P={P}', variants)


def sublayer_case(B: int, dtype: str, platform: str) -> Case:
  """All that follows attention, with its norm and the gradient of the bank; the reference is the SwiGLU of 1.4.0."""
  files = {'reference': 'exp_1_4_0', '1.4.1': 'exp_1_4_1', '1.4.2': 'exp_1_4_2'}
  files |= {name: name for name in ('product_key_bag', 'ngram_rows')}
  inputs = _normal('float32', B, T, D), _normal(dtype, B, T, D), _normal('float32', M, P)
  tokens_BT = _integers(V, B, T)
  variants = {}
  for name, file in files.items():
    config = load_config(str(common.ROOT / f'configs/{file}.py'))
    graphdef, params = nnx.split(SUBLAYERS[config.model.sublayer].build(config.model, config.memory, rngs=nnx.Rngs(0)))

    def run(
      params: Any, h_BTD: Array, h_attn_BTD: Array, bank_MP: Array, tokens_BT: Array, made: Any = (config, graphdef)
    ) -> Any:
      config, graphdef = made
      ngrams = config.memory.ngram_of_heads()
      last_BTn = last_tokens(tokens_BT, max(ngrams))
      reads = SublayerInput(h_BTD, h_attn_BTD, bank_MP, last_BTn)
      out = nnx.merge(graphdef, params)(reads, jnp.dtype(dtype))
      return out.delta_BTD, jnp.asarray(out.aux_loss)

    variants[name] = _compile(run, (params, *inputs), tokens_BT)
  return Case('sublayer', dtype, f'B={B} T={T} D={D} M={M} P={P}', variants)


CASES = {
  'attention': attention_case, 'product_key': product_key_case, 'bank': bank_case, 'bag': bag_case,
  'gated_mlp': gated_mlp_case, 'matmul': matmul_case, 'cross_entropy': cross_entropy_case,
  'sublayer': sublayer_case,
}  # fmt: skip


if __name__ == '__main__':
  from mmjax.errors import run_command

  run_command(main)
