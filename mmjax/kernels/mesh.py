"""Several devices: arrays with explicit axes of a mesh, and rows of a bank that devices exchange.

Where a bank is divided by rows, a device asks the others for the rows that it reads, once for each row, and gives back
the sum of its gradients, in float32. They exchange rows in rounds, because the size of an array is fixed: in one round
a device may ask another for as many rows as an even share of its reads. Most often one round is enough.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from mmjax.kernels import SELDOM


def on_any_mesh(run: Callable, specs: Callable[[PartitionSpec], Any], first: Array, *others: Any) -> Any:
  """Returns run(first, *others); explicit axes of a mesh are left to the compiler, as automatic ones are.

  Args:
    run: a function of the arrays.
    specs: takes the PartitionSpec of `first`; returns those of the result, a tree.
    first: an array.
    others: trees of arrays, or None.

  Raises:
    ValueError: if they lie on several meshes.
  """
  shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves((first, others))]
  on_mesh = [sharding for sharding in shardings if sharding.mesh.explicit_axes]
  if len({sharding.mesh for sharding in on_mesh}) > 1:
    raise ValueError(f'arrays lie on different meshes: {on_mesh}')
  if on_mesh:
    spec = shardings[0].spec if shardings[0].mesh.explicit_axes else PartitionSpec()
    places = jax.tree.map(
      lambda spec: on_mesh[0].update(spec=spec), specs(spec), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    run = jax.sharding.auto_axes(run, axes=on_mesh[0].mesh.explicit_axes, out_sharding=places)
  return run(first, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange_rows(part_MP: Array, row_X: Array, axis: str, dtype: jnp.dtype) -> Array:
  """Gathers rows of a bank of which each device of the axis holds a part.

  Args:
    part_MP: float, this device's M rows; the devices of the axis hold all of them, in order.
    row_X: int32, the rows that this device reads, numbered within the whole bank; as many on each device.
    axis: name of a mesh axis, inside `jax.shard_map`.
    dtype: of the result, and of the rows that travel.

  Returns:
    rows_XP in `dtype`.
  """
  return _exchange_fwd(part_MP, row_X, axis, dtype)[0]


def _exchange_fwd(part_MP, row_X, axis, dtype):
  n_devices, n_rows, n_reads = jax.lax.axis_size(axis), len(part_MP), len(row_X)
  first_M = jnp.full(n_devices * n_rows, n_reads, jnp.int32).at[row_X].min(jnp.arange(n_reads))
  first_X = first_M[row_X]  # the read that asks for this row
  asks_Xd = (first_X == jnp.arange(n_reads))[:, None] & (row_X[:, None] // n_rows == jnp.arange(n_devices))
  turn_X = jnp.sum(jnp.where(asks_Xd, jnp.cumsum(asks_Xd, axis=0) - 1, 0), axis=1)  # 0, 1, ... at each device
  n_rounds = jax.lax.pmax(jnp.max(turn_X) // _room(row_X, axis) + 1, axis)

  def read(ask_Y: Array, place_X: Array, rows_XP: Array) -> Array:
    answer_YP = _all_to_all(part_MP[ask_Y].astype(dtype), axis)
    return rows_XP + answer_YP.at[place_X].get(mode='fill', fill_value=0)

  plan = row_X, turn_X[first_X], n_rounds
  return _rounds(read, jnp.zeros((n_reads, part_MP.shape[1]), dtype), plan, n_rows, axis), (part_MP, plan)


def _exchange_bwd(axis, dtype, residuals, grad_XP):
  part_MP, plan = residuals

  def add(ask_Y: Array, place_X: Array, sums_MP: Array) -> Array:
    sums_YP = jnp.zeros((len(ask_Y), grad_XP.shape[1]), jnp.float32).at[place_X].add(grad_XP.astype(jnp.float32))
    return sums_MP.at[ask_Y].add(_all_to_all(sums_YP, axis))

  sums_MP = _rounds(add, jnp.zeros(part_MP.shape, jnp.float32), plan, len(part_MP), axis)
  return sums_MP.astype(part_MP.dtype), None


exchange_rows.defvjp(_exchange_fwd, _exchange_bwd)


def _rounds(one: Callable, found: Array, plan: tuple[Array, Array, Array], n_rows: int, axis: str) -> Array:
  """Returns what rounds of one(ask_Y, place_X, found) make of `found`.

  `ask_Y` are the rows that the devices ask this one for, numbered within its part; where nothing is asked for stands a
  number past its end, which scatters drop. `place_X` is where the answer to a read of this device comes in, past the
  end if not in this round.
  """
  row_X, turn_X, n_rounds = plan
  room = _room(row_X, axis)
  size = room * jax.lax.axis_size(axis)

  def one_round(i: Array | int, found: Array) -> Array:
    turn_now_X = turn_X - i * room
    place_X = jnp.where((turn_now_X >= 0) & (turn_now_X < room), row_X // n_rows * room + turn_now_X, size)
    ask_Y = jnp.full(size, n_rows, jnp.int32).at[place_X].set(row_X % n_rows, mode='drop')
    return one(_all_to_all(ask_Y, axis), place_X, found)

  found = one_round(0, found)
  with jax.named_scope(SELDOM):
    return jax.lax.fori_loop(1, n_rounds, one_round, found)


def _room(row_X: Array, axis: str) -> int:
  """Returns how many rows a device may ask another one for in a round: an even share of its reads."""
  return -(-len(row_X) // jax.lax.axis_size(axis))


def _all_to_all(x: Array, axis: str) -> Array:
  """Sends each device of the axis its part of the first axis; returns what this one gets, in the order of devices."""
  return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)
