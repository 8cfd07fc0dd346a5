"""The kernels on several devices, batch and bank sharded, give what they give on one."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmjax.kernels.attention import causal_attention
from mmjax.kernels.bank import BankShard, Reads, add_reads, bank_bag, bank_lookup
from mmjax.kernels.cross_entropy import cross_entropy_sums
from mmjax.kernels.fusion import gated_mlp
from mmjax.kernels.matmul import matmul
from mmjax.kernels.mesh import _exchange_fwd
from mmjax.kernels.product_key import product_key_topk
from mmjax.memory import GatedFusion, MemoryBag, NgramBag, cached_last_tokens, last_tokens
from tests.helpers import xla_flags

REPOSITORY = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
SIZES = {'dim': 6, 'n_rows': 16, 'row_dim': 4, 'n_heads': 2, 'rows_per_head': 2}
READS = {  # (data, rows) of the mesh, what its devices read of 16 rows, rounds of each device
  'any_rows': ((1, 4), RNG.integers(0, 16, (4, 24)), [1] * 4),
  'one_row': ((1, 4), np.full((4, 24), 5), [1] * 4),  # which each asks for once
  'one_part': ((1, 4), np.tile([4, 5, 6, 7], (4, 1)), [4] * 4),
  'a_device_with_one_part': ((1, 4), np.array([[0, 4, 8, 12]] * 3 + [[15, 13, 12, 14]]), [4] * 4),
  'fewer_reads_than_devices': ((1, 4), np.array([[3, 2], [15, 3], [0, 0], [7, 7]]), [2] * 4),
  'two_groups': ((2, 2), np.array([[0, 1, 2, 3, 4], [8, 0, 9, 1, 9], [9, 9, 9, 9, 9], [15, 3, 3, 3, 3]]), [2, 2, 1, 1]),
}


@pytest.mark.thorough
def test_kernels_on_four_devices_equal_one_device():
  flags = {
    'XLA_FLAGS': xla_flags(4),
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(REPOSITORY),
  }
  run = subprocess.run([sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  kernels = ['attention', 'product_key', 'bank', 'bag', 'gated_mlp', 'matmul', 'cross_entropy']
  assert run.stdout.split() == [*kernels, *READS, 'MemoryBag', 'GatedFusion', 'NgramBag']


def main():
  assert jax.device_count() == 4
  check_kernels(jax.make_mesh((2, 2), ('data', 'rows'), axis_types=(AxisType.Auto,) * 2))
  for name, (devices, row_BX, n_rounds) in READS.items():
    check_parts(devices, row_BX, n_rounds)
    print(name)
  check_shapes_of_parts()
  mesh = jax.make_mesh((2, 2), ('data', 'rows'))  # its axes are explicit
  check_memories(mesh)
  check_mapped(mesh)
  check_ngrams(mesh)
  check_added_reads(mesh)


def check_kernels(mesh):
  batch, rows, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in ((('data', 'rows'),), ('rows',), ()))
  qkv = [normal(4, 9, n, 4) for n in (4, 2, 2)]
  check(
    'attention', lambda q, k, v, s: causal_attention(q, k, v, s, backend='xla'), [*qkv, integers(2, 4, 9)], [batch] * 4
  )
  check('product_key', lambda q, k: product_key_topk(q, k, 4), [normal(4, 6, 4, 4), normal(4, 8, 4)], [batch, whole])
  lookup_inputs = [normal(16, 4), integers(16, 4, 6, 3)]
  check('bank', lambda b, r: bank_lookup(b, r, jnp.float32), lookup_inputs, [rows, batch])
  check('bag', bank_bag, [normal(16, 4), integers(16, 4, 6, 2, 3), normal(4, 6, 2, 3)], [rows, batch, batch])
  mlp_inputs = [normal(4, 6, 4), normal(4, 6, 6), normal(10, 5), normal(10, 5), normal(5, 4)]
  mlp = lambda *x: gated_mlp(x[:2], *x[2:], jnp.float32)  # noqa: E731
  check('gated_mlp', mlp, mlp_inputs, [batch, batch, whole, whole, whole], ('all-gather',))
  check('matmul', matmul, [normal(4, 64, 8, dtype=jnp.bfloat16), normal(8, 5)], [batch, whole], ('all-gather',))
  inputs = [normal(4, 7, 8, dtype=jnp.bfloat16), normal(11, 8), integers(11, 4, 7), jnp.ones((4, 7))]
  check(
    'cross_entropy',
    lambda *inputs: cross_entropy_sums(*inputs, 3)[0] / 100,
    inputs,
    [batch, whole, batch, batch],
    ('all-gather',),
  )


def check_parts(devices, row_BX, n_rounds):
  """Compares what devices read of the parts of a bank, and its gradient, with NumPy's."""
  bank_MP, grad_BXP = RNG.standard_normal((16, 3)), RNG.standard_normal((*row_BX.shape, 3))
  batch, rows = PartitionSpec(('data', 'rows')), PartitionSpec('rows')

  def on_device(part_MP, row_BX, grad_BXP):
    read = lambda part_MP: bank_lookup(BankShard(part_MP, 'rows'), row_BX, jnp.float32)  # noqa: E731
    rows_BXP, grads = jax.vjp(read, part_MP)
    rounds = _exchange_fwd(part_MP, row_BX.reshape(-1), 'rows', jnp.float32)[1][1][2]
    return rows_BXP, jax.lax.psum(grads(grad_BXP)[0], 'data'), rounds[None]

  mesh = jax.make_mesh(devices, ('data', 'rows'), axis_types=(AxisType.Auto,) * 2)
  run = jax.shard_map(
    on_device, mesh=mesh, in_specs=(rows, batch, batch), out_specs=(batch, rows, batch), check_vma=False
  )
  found_BXP, found_MP, rounds = jax.jit(run)(np.float32(bank_MP), np.int32(row_BX), np.float32(grad_BXP))
  np.testing.assert_array_equal(found_BXP, np.float32(bank_MP)[row_BX])
  sums_MP = np.zeros((16, 3))
  np.add.at(sums_MP, row_BX, grad_BXP)
  np.testing.assert_allclose(found_MP, sums_MP, rtol=1e-5, atol=1e-5)
  assert rounds.tolist() == n_rounds


def check_shapes_of_parts():
  """Compares reads of the parts of a bank by narrow numbers, token by token and of nothing, with NumPy's."""
  bank_MP, spec = np.float32(RNG.standard_normal((256, 3))), PartitionSpec('rows')
  row_Xr, weight_Xr = RNG.integers(0, 256, (1600, 5)), np.float32(RNG.standard_normal((1600, 5)))
  mesh = jax.make_mesh((4,), ('rows',), axis_types=(AxisType.Auto,))
  sum_XP = np.einsum('xrp,xr->xp', bank_MP[row_Xr], weight_Xr)
  bag = lambda part, row, weight: bank_bag(BankShard(part, 'rows'), row, weight)  # noqa: E731
  by_token = lambda part, row, weight: jax.vmap(functools.partial(bag, part))(row, weight)  # noqa: E731
  rows = lambda part, row, weight: bank_lookup(BankShard(part, 'rows'), row, jnp.float32)  # noqa: E731
  for read, dtype, n, want in [
    (rows, np.uint8, 1600, bank_MP[row_Xr]),
    (bag, np.uint8, 1600, sum_XP),
    (by_token, np.int32, 16, sum_XP[:16]),
    (rows, np.int32, 0, bank_MP[row_Xr[:0]]),
    (bag, np.int32, 0, sum_XP[:0]),
  ]:
    run = jax.shard_map(read, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    np.testing.assert_allclose(jax.jit(run)(bank_MP, row_Xr[:n].astype(dtype), weight_Xr[:n]), want, atol=1e-5)


def check_memories(mesh):
  batch, rows, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (('data',), ('rows',), ()))
  for memory in (MemoryBag(**SIZES), GatedFusion(**SIZES), NgramBag(**SIZES, ngrams=(1, 2))):
    params, structure = jax.tree.flatten(memory.init(jax.random.key(0)))

    def apply(x_BTD, bank_MP, token_BT, *params, memory=memory, structure=structure):
      row_BThr = memory.rows(token_BT) if isinstance(memory, NgramBag) else None
      out = memory.apply(structure.unflatten(params), x_BTD, bank_MP, row_BThr)
      return out.delta_BTD, out.row_BTR

    inputs = [normal(4, 3, 6), normal(16, 4), integers(50, 4, 3), *params]
    check(type(memory).__name__, apply, inputs, [batch, rows, batch, *[whole] * len(params)])
    placed = [inputs[0], jax.device_put(inputs[1], rows), *inputs[2:]]  # the bank alone lies on the mesh
    for got, want in zip(jax.jit(apply)(*placed), jax.jit(apply)(*inputs), strict=True):
      np.testing.assert_allclose(got, want, atol=1e-6)


def check_mapped(mesh):
  """A memory, and its gradient, within jax.shard_map over some axes of an explicit mesh."""
  memory = MemoryBag(**SIZES)
  params, x_BTD, bank_MP = memory.init(jax.random.key(0)), normal(4, 3, 6), normal(16, 4)

  def apply(x_BTD, bank_MP):
    return jnp.sum(jnp.sin(memory.apply(params, x_BTD, bank_MP).delta_BTD))

  def on_device(*inputs):
    loss, (grad_BTD, grad_MP) = jax.value_and_grad(apply, argnums=(0, 1))(*inputs)
    return jax.lax.psum(loss, 'data'), (grad_BTD, jax.lax.psum(grad_MP, 'data'))

  want = jax.value_and_grad(apply, argnums=(0, 1))(x_BTD, bank_MP)
  batch, whole = PartitionSpec('data'), PartitionSpec()
  for names in ({'data'}, {'data', 'rows'}):
    specs = {'in_specs': (batch, whole), 'out_specs': (whole, (batch, whole)), 'axis_names': names}
    with jax.set_mesh(mesh):
      placed = jax.device_put(x_BTD, NamedSharding(mesh, batch))
      got = jax.jit(jax.shard_map(on_device, mesh=mesh, **specs, check_vma=False))(placed, bank_MP)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
  other = jax.make_mesh((4,), ('other',))
  placed = (jax.device_put(x, NamedSharding(m, whole)) for x, m in ((x_BTD, mesh), (bank_MP, other)))
  with pytest.raises(ValueError, match='arrays lie on different meshes'):
    apply(*placed)


def check_ngrams(mesh):
  tokens_BT, memory = integers(50, 4, 4), NgramBag(**SIZES, ngrams=(1, 2), signs=True)
  for spec in ((), ('data',), ('data', 'rows'), (None, ('data', 'rows'))):
    placed = jax.device_put(tokens_BT, NamedSharding(mesh, PartitionSpec(*spec)))
    last = jax.jit(lambda tokens: last_tokens(tokens, 2, tokens % 2))(placed)
    position_BT = jax.device_put(jnp.tile(jnp.arange(4), (4, 1)), placed.sharding)
    cached = jax.jit(lambda tokens, position: cached_last_tokens(tokens, position, 2))(placed, position_BT)
    np.testing.assert_array_equal(cached, last_tokens(tokens_BT, 2))
    whole = last_tokens(tokens_BT, 2, tokens_BT % 2)
    got = last, *jax.jit(memory.addresses)(last), jax.jit(memory.rows)(placed), memory.rows(placed)
    wants = whole, *memory.addresses(whole), memory.rows(tokens_BT), memory.rows(tokens_BT)
    assert last.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), last.ndim)
    for one, want in zip(got, wants, strict=True):
      np.testing.assert_array_equal(one, want)
    bank_MP = normal(16, 4)
    for of_bank in ((), ('rows',), (None, 'rows')):
      placed_MP = jax.device_put(bank_MP, NamedSharding(mesh, PartitionSpec(*of_bank)))
      sums = jax.jit(memory.sums_of)(last, placed_MP)
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), sums, memory.sums_of(whole, bank_MP))


def check_added_reads(mesh):
  batch, rows = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('data', 'rows'))
  bank_MP, row_BThr = normal(16, 4), integers(16, 4, 3, 2, 2)
  for reads in (Reads(normal(4, 3, 2, 4), normal(4, 3, 2, 2)), Reads(normal(4, 3, 2, 2, 4), None)):
    placed = jax.tree.map(lambda x: jax.device_put(x, batch), reads)
    got = jax.jit(add_reads)(jax.device_put(bank_MP, rows), jax.device_put(row_BThr, batch), placed)
    assert got.sharding.is_equivalent_to(rows, got.ndim)
    np.testing.assert_allclose(got, add_reads(bank_MP, row_BThr, reads), atol=1e-6)


def normal(*shape, dtype=jnp.float32):
  return jnp.asarray(RNG.standard_normal(shape), dtype)


def integers(high, *shape):
  return jnp.asarray(RNG.integers(0, high, shape), jnp.int32)


def check(name, function, inputs, shardings, forbidden=()):
  """`function` returns a pytree; its float leaves' sum of squares is differentiated by all float inputs."""
  floats = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

  def loss(*inputs):
    out = function(*inputs)
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves), out

  run = jax.jit(jax.value_and_grad(loss, argnums=floats, has_aux=True))
  sharded = [jax.device_put(x, s) for x, s in zip(inputs, shardings, strict=True)]
  text = run.lower(*sharded).compile().as_text()
  assert not any(op in text for op in forbidden), name
  for a, e in zip(jax.tree.leaves(run(*sharded)), jax.tree.leaves(run(*inputs)), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(e, np.float32), rtol=2e-3, atol=1e-3)
  print(name)


if __name__ == '__main__':
  main()
