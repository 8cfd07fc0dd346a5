"""One placement for everything that runs a trained model: the run's own where it can run, else what was asked for."""

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_command
import mmjax
from mmjax.errors import UserError
from mmjax.inference.memory_reads import MemoryReader
from mmjax.model import layers
from mmjax.run import placement
from mmjax.run.directory import RunDir
from mmjax.run.placement import place, place_reader
from mmjax.tools import inspect, sample
from mmjax.training.loop import fit
from tests.helpers import rarely, run_config, tiny_config


def with_attention(run, folder, attention, dtype='float32'):
  """Copies a run whose config names another backend and dtype."""
  shutil.copytree(run, folder)
  directory = RunDir(folder)
  config = directory.read_config()
  directory.write_config(config.with_settings({'runtime.attention': attention, 'train.dtype': dtype}))
  return folder


@pytest.fixture
def used(monkeypatch):
  """The backends and dtypes of attention that were compiled."""
  found = set()
  original = layers.causal_attention

  def spy(q_BTNH, *arrays, backend):
    found.add((backend, q_BTNH.dtype.name))
    return original(q_BTNH, *arrays, backend=backend)

  monkeypatch.setattr(layers, 'causal_attention', spy)
  return found


def run_command(command, monkeypatch, *flags):
  monkeypatch.setattr(sys, 'argv', ['command', *map(str, flags)])
  command.main()


COMMANDS = {
  'eval': (eval_command, ('--max_new_tokens', 2)),
  'sample': (sample, ('--prompt', 'the memory', '--max_new_tokens', 2)),
  'inspect': (inspect, ('--text', 'the memory', '--row', 1, '--layer', 0, '--positions', 64)),
}


@pytest.mark.parametrize('name', rarely(COMMANDS, 'sample'))
@pytest.mark.thorough
def test_commands_use_the_attention_of_the_run_or_the_one_asked_for(name, tiny_run, tmp_path, monkeypatch, used):
  run = with_attention(tiny_run, tmp_path / 'run', 'xla')
  command, flags = COMMANDS[name]
  run_command(command, monkeypatch, '--workdir', run, *flags)
  assert used == {('xla', 'float32')}
  used.clear()
  run_command(command, monkeypatch, '--workdir', run, *flags, '--attention', 'xla_blocked', '--dtype', 'bfloat16')
  assert used == {('xla_blocked', 'bfloat16')}


@pytest.mark.thorough
def test_losses_are_in_the_dtype_of_the_run_and_text_in_float32(tiny_run, tmp_path, monkeypatch, used):
  run = with_attention(tiny_run, tmp_path / 'run', 'auto', 'bfloat16')
  run_command(eval_command, monkeypatch, '--workdir', run, '--max_new_tokens', 2)
  assert used == {('xla_blocked', 'bfloat16'), ('xla_blocked', 'float32')}
  found = json.loads((run / 'eval.json').read_text())
  assert (found['attention'], found['dtype']) == ('xla_blocked', 'bfloat16')
  assert 'xla_blocked attention in bfloat16' in (run / 'report.md').read_text()


@pytest.mark.thorough
def test_api_and_reader_take_them_as_keywords(tiny_run, used):
  lm = mmjax.load(tiny_run, attention='xla', dtype='bfloat16')
  lm.logits([[5, 6, 7]])
  MemoryReader(lm).read_text('the memory')
  lm.generate('the memory', max_new_tokens=2)
  assert used == {('xla', 'bfloat16')} and lm.placement.attention == 'xla'
  exact = mmjax.load(tiny_run).logits([[5, 6, 7]])
  np.testing.assert_allclose(lm.logits([[5, 6, 7]]), exact, atol=0.1)


@pytest.mark.parametrize(
  ('asked', 'said'),
  [
    ({'attention': 'cudnn'}, "attention 'cudnn' .* needs an NVIDIA GPU and bfloat16"),
    ({'attention': 'flash'}, "attention='flash' must be one of auto, xla, xla_blocked, cudnn"),
    ({'attention': ''}, "attention='' must be one of auto"),
    ({'dtype': ''}, "dtype='' must be one of float32"),
    ({'dtype': 'int32'}, "dtype='int32' must be one of float32, bfloat16"),
    ({'dtype': 'half a float'}, "dtype='half a float' must be one of float32, bfl"),
    ({'dtype': 'float64'}, "dtype='float64' must be one of float32, bf"),
  ],
)
def test_what_cannot_run_here_is_refused_where_it_was_asked_for(tiny_run, asked, said):
  with pytest.raises(UserError, match=said):
    mmjax.load(tiny_run, **asked)


def test_run_of_a_gpu_is_read_on_a_cpu(tiny_run, tmp_path):
  run = with_attention(tiny_run, tmp_path / 'run', 'cudnn', 'bfloat16')
  assert mmjax.load(run).placement.attention == 'xla_blocked'
  with pytest.raises(UserError, match='needs an NVIDIA GPU'):
    place(RunDir(run).read_config())


def test_attention_that_cannot_run_is_refused_before_anything_is_written(text, tmp_path):
  with pytest.raises(UserError, match="attention 'cudnn' .* needs an NVIDIA GPU"):
    fit(run_config(text, runtime__attention='cudnn', data__prepared_dir=f'{tmp_path}/data'), tmp_path / 'run')
  assert not list(tmp_path.iterdir())


def test_on_a_gpu_the_run_decides_and_float32_never_gets_cudnn(monkeypatch):
  monkeypatch.setattr(placement, 'platform_of', lambda mesh: 'gpu')
  own, xla = (tiny_config(runtime__attention=name, model__dim=32, model__n_heads=4) for name in ('auto', 'xla'))
  assert place_reader(xla, dtype='bfloat16').attention == 'xla'
  assert place_reader(own, dtype=jnp.bfloat16).attention == 'cudnn'
  assert place_reader(own, dtype='float32').attention == 'xla'
  assert place_reader(tiny_config(runtime__attention='cudnn'), dtype='float32').attention == 'xla'
  assert place_reader(own, dtype='float32').options == {
    'xla_gpu_enable_triton_gemm': False,
    'xla_disable_hlo_passes': placement.TRITON_PASSES,
    'xla_gpu_experimental_enable_fusion_autotuner': False,
  }
