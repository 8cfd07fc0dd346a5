"""The Python of README and guide that needs no trained run does what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx


def test_memory_layer_of_readme_and_guide_runs_and_learns(tmp_path, monkeypatch):
  pages = {'README.md': '## A memory layer', 'docs/guide.md': '## A memory in your own model'}
  sections = [Path(page).read_text().partition(f'\n{title}')[2].partition('\n## ')[0] for page, title in pages.items()]
  monkeypatch.chdir(tmp_path)  # as in a project of one's own
  names = {}
  for block in re.findall(r'```python\n(.*?)```', '\n'.join(sections), re.DOTALL):
    exec(block, names)  # noqa: S102 - the text of this repository
  assert names['out'].row_BTR.shape == (2, 16, 64)
  for module, rows in (('memory', None), ('ngram_memory', names['row_BThr'])):
    graphdef, params = nnx.split(names[module])

    def loss(params, bank_MP, graphdef=graphdef, rows=rows):
      out = nnx.merge(graphdef, params)(names['x_BTD'], names['x_BTD'], bank_MP, jnp.float32, rows)
      return jnp.mean(out.delta_BTD**2) + out.aux_loss

    slopes = jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(params, names['bank_MP'][...]))
    assert all(jnp.any(slope != 0) for slope in slopes)

  slopes = jax.tree.map(jnp.ones_like, names['params'])
  updates, _ = names['optimizer'].update(slopes, names['state'], names['params'])
  assert jnp.allclose(updates['bank'], -16 * 2e-3, rtol=1e-3)  # no decay
  kernel = names['params']['memory']['down']['kernel'][...]
  assert jnp.allclose(updates['memory']['down']['kernel'][...], -2e-3 * (1 + 0.01 * kernel), rtol=1e-3)
