"""Functions of arrays that may have explicit axes of a mesh, as `jax.make_mesh` makes them."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec


def on_any_mesh(run: Callable, specs: Callable[[PartitionSpec], Any], first: Array, *others: Any) -> Any:
  """Returns run(first, *others); explicit axes of a mesh are left to the compiler, as automatic ones are.

  Args:
    run: a function of the arrays.
    specs: takes the PartitionSpec of `first`; returns those of the result, a tree.
    first: an array.
    others: trees of arrays, or None.
  """
  shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves((first, others))]
  on_mesh = [sharding for sharding in shardings if sharding.mesh.explicit_axes]
  if on_mesh:
    spec = shardings[0].spec if shardings[0].mesh.explicit_axes else PartitionSpec()
    places = jax.tree.map(
      lambda spec: on_mesh[0].update(spec=spec), specs(spec), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    run = jax.sharding.auto_axes(run, out_sharding=places)
  return run(first, *others)
