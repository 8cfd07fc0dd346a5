"""Where arrays live: a mesh of devices and rules that map parameter names to partitions of it.

The mesh has two axes: `data` divides the batch; `rows` divides the bank by rows, and the batch as well. One device is
a mesh of one. Training divides its own work (`spread`), so that devices meet once an update; in everything else XLA
inserts the communication.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.config import Config
from mmjax.config.sublayers import SUBLAYERS, layer_kinds, uses_bank
from mmjax.errors import UserError
from mmjax.files import path_name
from mmjax.model.params import BANK

ROW_AXIS = 'rows'  # the axis that divides the bank

# (pattern of the parameter's name, partition); the first match wins. Adam's moments carry their parameter's name.
RULES = (
  (rf'{BANK}$', P('rows', None)),
  (r'_MP?$', P('rows')),  # what else there is of every row, by the axes in its name
  (r'.*', P()),
)
BATCH = P(None, ('data', 'rows'), None)  # (accumulation step, row of the micro-batch, position)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh that runtime.data_devices and runtime.row_devices describe, of `devices` or those of JAX.

  Raises:
    UserError: if there are not that many devices, or the batch or the bank cannot be divided by them.
  """
  devices = jax.devices() if devices is None else devices
  n_devices, rows = len(devices), config.runtime.row_devices
  data = config.runtime.data_devices or max(n_devices // rows, 1)
  if data * rows > n_devices:
    raise UserError(
      f'runtime.data_devices={data} x runtime.row_devices={rows} needs {data * rows} devices; there are {n_devices}'
    )
  several = jax.process_count() > 1
  if several and data * rows < n_devices:
    raise UserError(
      f'a run of {jax.process_count()} processes must use all of their {n_devices} devices; set runtime.data_devices=0'
    )
  batch, other = config.train.batch_size, ''
  if fewer := max((n for n in range(1, data) if batch % (n * rows) == 0 and not several), default=0):
    other = f'; or runtime.data_devices={fewer}'
  if uses_bank(config.model, config.memory):
    has_gate = any(SUBLAYERS[kind].has_gate for kind in layer_kinds(config.model, config.memory))
    said = f'runtime.row_devices={rows}'
    _check_divides('model.knowledge_num', config.model.knowledge_num, rows, said, is_square=has_gate)
  used = f'{data * rows} devices' + (f' ({data} x runtime.row_devices={rows})' if rows > 1 else '')
  _check_divides('train.batch_size', batch, data * rows, used, other)
  return _mesh(data, rows, devices)


def one_device() -> Mesh:
  """Returns the mesh of JAX's first device alone."""
  return _mesh(1, 1, jax.devices())


def _mesh(data: int, rows: int, devices: Sequence[jax.Device]) -> Mesh:
  axes, types = ('data', ROW_AXIS), (AxisType.Auto,) * 2
  return jax.make_mesh((data, rows), axes, axis_types=types, devices=devices[: data * rows])


def shardings(mesh: Mesh, tree: Any) -> Any:
  """Returns a tree like `tree` with the NamedSharding of every leaf."""

  def place(path: tuple, leaf: Any) -> NamedSharding:
    return NamedSharding(mesh, next(spec for pattern, spec in RULES if re.search(pattern, path_name(path))))

  return jax.tree_util.tree_map_with_path(place, tree)


def placed(mesh: Mesh, shapes: Any) -> Any:
  """Returns a tree of `jax.ShapeDtypeStruct` like `shapes`, each with its sharding, to compile for or to restore."""

  def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, shapes, shardings(mesh, shapes))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, P())


def spread(gradient: Callable, mesh: Mesh) -> Callable:
  """Runs a gradient on every device for its own rows of the batch, and adds up what they found, once.

  Left to itself XLA adds up the gradients of every micro-batch.

  Args:
    gradient: of (params, batch, *scalars), which returns sums over the batch and gradients that are like the params.
    mesh: of its devices each sees whole parameters, but its own part of what the rules divide.
  """

  def spread_gradient(params: Any, batch: dict[str, jax.Array], *scalars: jax.Array) -> tuple[Any, Any]:
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings(mesh, params))

    def on_device(params: Any, batch: dict[str, jax.Array], *scalars: jax.Array) -> tuple[Any, Any]:
      sums, grads = gradient(params, batch, *scalars)

      def add_up(grad: jax.Array, spec: P) -> jax.Array:
        return jax.lax.psum(grad, [axis for axis in mesh.axis_names if axis not in spec])

      return jax.lax.psum(sums, mesh.axis_names), jax.tree.map(add_up, grads, specs)

    in_specs = (specs, BATCH, *(P() for _ in scalars))
    # Without the check of what varies over devices: it would add up the gradients wherever a parameter is used.
    run = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs), check_vma=False)
    return run(params, batch, *scalars)

  return spread_gradient


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], accumulation_steps: int) -> dict[str, jax.Array]:
  """Moves a batch of A * B rows to the devices as int32 (A, B, T) arrays; `row_id` stays behind.

  Of several processes each is given the whole batch and moves the rows that its own devices need.
  """
  sharding = NamedSharding(mesh, BATCH)

  def put(rows: np.ndarray) -> jax.Array:
    rows_ABT = rows.reshape(accumulation_steps, -1, rows.shape[-1])
    return jax.make_array_from_callback(rows_ABT.shape, sharding, lambda index: rows_ABT[index])

  return {name: put(rows) for name, rows in batch.items() if name != 'row_id'}


def batch_shapes(mesh: Mesh, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns what `put_batch` gives for a training batch, without its values: int32 (A, B, T)."""
  shape = (config.train.accumulation_steps, config.train.batch_size, config.model.max_seq_len)
  array = jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(mesh, BATCH))
  return dict.fromkeys(('input', 'target', 'segment'), array)


def _check_divides(name: str, value: int, divisor: int, what: str, other: str = '', *, is_square: bool = False) -> None:
  if value % divisor:
    if is_square:  # as what comes nearest must be, too: that of a multiple of `step`
      step = next(n for n in range(1, divisor + 1) if n**2 % divisor == 0)
      root = math.isqrt(value) // step * step
      below, above = root**2, (root + step) ** 2
    else:
      below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    nearest = f'{below} and {above}' if below else f'{above}'
    raise UserError(f'{name}={value} must be divisible by the {what}; nearest: {nearest}{other}')
