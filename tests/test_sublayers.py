"""The table of sublayers: it needs no JAX, and one module, one row and one config make a new kind of model."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

import mmjax
from mmjax.config import CHOICES, flatten, load_config
from mmjax.config.sublayers import NGRAM_SETTINGS, SUBLAYERS, Sublayer
from mmjax.errors import UserError
from mmjax.interop.convert import export_run, import_run
from mmjax.model.cost import flops_per_token
from mmjax.model.sublayers.dense import SwiGLU
from mmjax.report.write import write_report
from mmjax.training.loop import fit
from tests.helpers import REPOSITORY, overrides, tiny_config

BASE = str(REPOSITORY / 'configs' / 'base.py')
MODULE = """
from flax import nnx

from mmjax.model.layers import Linear, RMSNorm
from mmjax.model.sublayers import SublayerOutput


class Toy(nnx.Module):
  def __init__(self, model, memory, *, rngs):
    self.norm, self.kernel = RMSNorm(model.dim, model.norm_eps), Linear(model.dim, model.dim, rngs=rngs)

  def flops(self):
    return {'toy': self.kernel.flops()}

  def __call__(self, inputs, dtype):
    return SublayerOutput(self.kernel(self.norm(inputs.h_BTD), dtype))
"""
ROW = Sublayer('a_toy_sublayer:Toy', ())
CONFIG = """
from configs import base
from tests.tiny import TINY


def get_config():
  config = base.get_config()
  config.update_from_flattened_dict({name: value for name, value in TINY.items() if name not in SETTINGS_OF_MEMORIES})
  config.model.sublayer = 'toy'
  return config


SETTINGS_OF_MEMORIES = ('model.knowledge_num', 'model.knowledge_dim', 'model.num_selected')
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """Adds what a new sublayer takes, a module, a row of the table and a config file, and returns the file's path."""
  (tmp_path / 'a_toy_sublayer.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(SUBLAYERS, 'toy', ROW)
  monkeypatch.setitem(CHOICES, 'model.sublayer', tuple(SUBLAYERS))  # as where the row stands in the file
  (tmp_path / 'toy.py').write_text(CONFIG)
  yield str(tmp_path / 'toy.py')
  sys.modules.pop('a_toy_sublayer', None)


def test_new_sublayer_is_one_module_one_row_and_one_config(toy, text, tmp_path):
  config = tiny_config(toy, **overrides(text, train__max_steps=2))
  fit(config, tmp_path / 'run')
  lm = mmjax.load(tmp_path / 'run')
  assert lm.step == 2 and 'kernel' in lm.params['layers'][0]['sublayer']
  dense = tiny_config(model__sublayer='dense', model__hidden_dim=32)
  ffn = 2 * 3 * 2 * 3 * 32 * 32  # layers, trained, a product, of three
  assert flops_per_token(config)['toy'] == ffn / 3
  assert flops_per_token(config)['total'] == flops_per_token(dense)['total'] - ffn * 2 / 3
  for setting in ('memory.ffn_dim=8', 'memory.scores=scale', 'model.hidden_dim=8', 'model.n_experts=3'):
    with pytest.raises(UserError, match=f'{setting.partition("=")[0]}=.* does nothing in a model of toy layers'):
      load_config(toy, [f'--config.{setting}'])


@pytest.mark.thorough
def test_new_sublayer_is_reported_sampled_exported_and_imported(toy, text, tmp_path):
  fit(tiny_config(toy, **overrides(text, train__max_steps=4)), tmp_path / 'run')
  write_report(tmp_path / 'run')
  lm = mmjax.load(tmp_path / 'run')
  assert lm.generate('the memory', max_new_tokens=3)
  tokenizer = str(tmp_path / 'run' / 'tokenizer.model')
  export_run(tmp_path / 'run', tmp_path / 'toy.safetensors', 'last', None)
  import_run(tmp_path / 'toy.safetensors', tmp_path / 'back', BASE, [], tokenizer, None)
  tokens = [lm.tokenizer.encode('the memory')]
  np.testing.assert_array_equal(mmjax.load(tmp_path / 'back').logits(tokens), lm.logits(tokens))


def test_sublayer_without_a_cost_is_none(monkeypatch):
  monkeypatch.delattr(SwiGLU, 'flops')
  with pytest.raises(AttributeError, match='flops'):
    flops_per_token(tiny_config(model__sublayer='dense', model__hidden_dim=24))


def test_own_settings_are_settings():
  names = set(flatten(tiny_config().to_dict()))
  for kind, row in SUBLAYERS.items():
    assert set(row.settings) <= names and all(name.startswith(('model.', 'memory.')) for name in row.settings), kind
  memory = {f'memory.{field.name}' for field in dataclasses.fields(tiny_config().memory)}
  own = {name for row in SUBLAYERS.values() for name in row.settings if name.startswith('memory.')}
  assert memory == own | {'memory.value_layers'} and set(NGRAM_SETTINGS) <= set(SUBLAYERS['ngram_bag'].settings)


def test_table_and_refusals_need_no_jax():
  code = (
    'import sys; from mmjax.config import load_config; from mmjax.config.sublayers import SUBLAYERS as S; '
    'load_config("configs/product_key_bag.py"); print(S["ngram_bag"].reads_ngrams, "jax" in sys.modules)'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
  assert out.split() == ['True', 'False']
