"""Memories in models whose arrays have explicit axes of a mesh, as `jax.make_mesh` makes them."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array


def on_any_mesh(run: Callable[..., tuple], x_BTD: Array, *others: Any) -> tuple:
  """Runs a memory with its arrays; explicit axes are left to the compiler too, and the output lies as the input does.

  Args:
    run: returns delta_BTD, row_BTR, score_BTR and aux_loss of what follows.
    x_BTD: the input.
    others: trees of arrays, or None.
  """
  shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves((x_BTD, others))]
  on_mesh = [sharding for sharding in shardings if sharding.mesh.explicit_axes]
  if on_mesh:
    spec = shardings[0].spec if shardings[0].mesh.explicit_axes else ()
    like_x, like_rows, whole = (on_mesh[0].update(spec=axes) for axes in (spec, spec[:2], ()))
    run = jax.sharding.auto_axes(run, out_sharding=(like_x, like_rows, like_rows, whole))
  return run(x_BTD, *others)
