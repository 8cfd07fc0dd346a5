"""The Python of README and guide that needs no trained run does what it says."""

import importlib.util
import itertools
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.config.history import LAST_WITH_REMOVED

GATE = ('plain JAX', 'Flax NNX', 'Flax Linen', 'Equinox')


def python_blocks(page, title):
  section = Path(page).read_text().partition(f'\n{title}')[2].partition('\n## ')[0]
  return re.findall(r'([^\n]*)\n\n```python\n(.*?)```', section, re.DOTALL)


def run(block, names):
  exec(block, names)  # noqa: S102 - the text of this repository


@pytest.fixture(scope='module')
def examples():
  """The examples of the README by what they are written for, and the names that the first of them defines."""
  blocks = python_blocks('README.md', '## A memory layer')
  found = {kind: block for kind in GATE for text, block in blocks if f'n {kind}' in text}
  assert set(found) == set(GATE) and len(blocks) == len(GATE)
  names = {}
  run(found['plain JAX'], names)
  return found, names


@pytest.mark.thorough
@pytest.mark.parametrize('kind', GATE)
def test_gate_of_the_example_learns(examples, kind, capsys, tmp_path, monkeypatch):
  if kind == 'Equinox' and importlib.util.find_spec('equinox') is None:
    pytest.skip('equinox is not installed')
  blocks, names = examples
  assert blocks[kind].count('\n') <= 15
  monkeypatch.chdir(tmp_path)  # as in a project of one's own
  run(blocks[kind], dict(names))
  assert float(capsys.readouterr().out) > 0.01


@pytest.mark.thorough
def test_memories_and_optimizers_of_the_guide_do_what_it_says(examples):
  names = dict(examples[1])
  for _, block in python_blocks('docs/guide.md', '## A memory in your own model'):
    run(block, names)
  assert names['row_BThr'].shape == (2, 16, 4, 1)

  later = names['update'](names['params'], names['state'], names['x_BTD'], jnp.zeros_like(names['x_BTD']))
  assert later[2] < names['value']  # the first update helped

  slopes = jax.tree.map(jnp.ones_like, names['params'])
  first = names['optimizer'].init(names['params'])
  updates, _ = names['optimizer'].update(slopes, first, names['params'])
  assert jnp.allclose(updates['bank'], -16 * 2e-3, rtol=1e-3)  # no decay
  kernel = names['params']['memory']['down']['kernel']
  assert jnp.allclose(updates['memory']['down']['kernel'], -2e-3 * (1 + 0.01 * kernel), rtol=1e-3)

  def loss(bank_MP):
    out = names['memory'].apply(names['params']['memory'], names['x_BTD'], bank_MP)
    return jnp.mean(out.delta_BTD**2)

  want = names['bank_MP'] - 0.1 * jax.grad(loss)(names['bank_MP'])
  np.testing.assert_allclose(names['new_bank_MP'], want, rtol=1e-5, atol=1e-7)
  assert np.any(names['new_bank_MP'] != names['bank_MP'])


def test_way_from_the_command_to_the_gradient_takes_at_most_a_thousand_lines():
  way = Path('README.md').read_text().partition('from the command to the gradient')[2]
  files = re.findall(r'\]\(([\w/]+\.py)\)', way)
  assert files == [
    'train.py', 'mmjax/training/loop.py', 'mmjax/training/learner.py', 'mmjax/training/step.py',
    'mmjax/evaluation/loss.py', 'mmjax/model/lm.py', 'mmjax/model/sublayers/memory.py', 'mmjax/memory/base.py',
    'mmjax/memory/gate.py', 'mmjax/memory/fusion.py',
  ]  # fmt: skip
  assert sum(len(Path(file).read_text().splitlines()) for file in files) <= 1000


def test_commits_that_documents_and_messages_name_are_in_the_history():
  log = subprocess.run(['git', 'log', '--format=%H'], capture_output=True, text=True, check=False).stdout.split()
  known = {commit[:7] for commit in log}
  if LAST_WITH_REMOVED not in known:
    pytest.skip('the history is not here')
  for path in ('BENCHMARKS.md', *map(str, Path('docs').glob('*.md')), 'mmjax/config/history.py'):
    named = {word for word in re.findall(r'\b[0-9a-f]{7}\b', Path(path).read_text()) if re.search('[a-f]', word)}
    assert {word for word in named if re.search('[0-9]', word)} <= known, path


def test_way_to_the_gradient_is_at_most_as_long_as_promised_and_each_file_names_the_next():
  way = Path('README.md').read_text().partition('To follow the code')[2].partition('\n\n')[0]
  files = re.findall(r'\]\((\S+\.py)\)', way)
  promised = int(re.search(r'these ([\d,]+) lines', way)[1].replace(',', ''))
  lines = {file: Path(file).read_text().splitlines() for file in files}
  assert len(files) > 5 and sum(map(len, lines.values())) <= promised
  for file, following in itertools.pairwise(files):
    assert Path(following).name in '\n'.join(lines[file][:12]), file
  assert any('value_and_grad' in line for line in lines['mmjax/training/step.py'])
