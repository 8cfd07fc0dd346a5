"""mmjax.tools.fit without a compiler: what it prints, refuses and measures. With one: tests/test_ahead.py."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from mmjax.ahead import compiler, trial
from mmjax.ahead.cards import CARDS, find_card
from mmjax.ahead.compiler import prepare_environment
from mmjax.ahead.count import bound_seconds
from mmjax.ahead.estimate import Estimate, check_card, memory_share
from mmjax.ahead.kernels import kernels_of
from mmjax.errors import UserError
from mmjax.run.hlo import Module
from mmjax.tools import fit
from tests.helpers import TINY_CONFIG, tiny_config


@pytest.fixture
def found():
  kernels = kernels_of(Module(Path('tests/module.hlo').read_text()))
  card, parts = CARDS['rtx4090'], {'state': 3e9, 'attention': 2e9, 'gradients': 1e9}
  config = tiny_config()
  return Estimate(config, card, 1, kernels, 6_000_000_000, parts, 4e9, bound_seconds(kernels, card), 1e9)


def test_report_says_what_fits_what_it_costs_and_that_it_is_a_bound(found, capsys):
  batches = {'none': {'batch_size': 96, 'peak_bytes': 18e9, 'settings': '--config.train.batch_size=64'}}
  batches['block'] = {'batch_size': 0, 'peak_bytes': 4e9, 'settings': None}
  measured = {'device': 'Stand-in', 'seconds_an_update': 0.5, 'peak_bytes': 7e9}
  fit.print_report(found, fit.as_dict(found, batches, 20) | {'measured': measured})
  out = capsys.readouterr().out
  for said in (
    'Fits: 6.00 GB at the peak, of 19.0 GB that JAX takes (75% of the card',
    'remat none: 96 rows (18.00 GB); the same update: --config.train.batch_size=64',
    'remat block: none fits',
    'Bound, not measured: at least',
    'Measured here, on Stand-in: 500.0 ms an update',
    'mmjax/model/layers.py:45',
    'all-gather',
  ):
    assert said in out
  assert not dataclasses.replace(found, peak_bytes=20e9).fits


def test_json_holds_plain_numbers(found):
  content = json.loads(json.dumps(fit.as_dict(found, {}, 10)))
  assert content['kernels'] == 49 and content['triton'] == 1
  assert content['costliest'][0]['seconds'] == max(entry['seconds'] for entry in content['costliest'])
  assert sum(kind['seconds'] for kind in content['kinds']) == pytest.approx(content['bound']['seconds_an_update'])


def test_short_times_keep_their_digits():
  assert [fit.as_ms(seconds) for seconds in (3.9e-5, 0.00987, 0.0974, 1.25)] == ['0.039', '9.87', '97.4', '1250.0']


def test_flags_that_exclude_each_other_are_told(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['fit', '--config', TINY_CONFIG, '--gpu', 'l4', '--json', '--markdown'])
  with pytest.raises(SystemExit):
    fit.main()
  assert '--markdown: not allowed with argument --json' in capsys.readouterr().err
  with pytest.raises(UserError, match='several at once need --markdown'):
    find_card('l4,h100')


def test_share_of_memory_is_jax_s(monkeypatch, found):
  monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
  assert found.usable_bytes == 0.75 * found.card.memory_bytes
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '.92')
  assert memory_share() == 0.92


def test_card_without_bfloat16_is_refused_and_told_what_works():
  with pytest.raises(UserError, match=r'Tesla T4.*7\.5.*--config\.train\.dtype=float32'):
    check_card(tiny_config(train__dtype='bfloat16'), CARDS['t4'])
  check_card(tiny_config(train__dtype='float32'), CARDS['t4'])
  check_card(tiny_config(train__dtype='bfloat16'), CARDS['a100_40'])


def test_what_only_a_gpu_can_compile_is_refused():
  with pytest.raises(UserError, match='runtime.triton_gemm=True cannot be compiled without a GPU'):
    compiler.compile_for(tiny_config(runtime__triton_gemm=True), CARDS['h100'])


def test_missing_build_of_jax_is_one_sentence_with_the_command(monkeypatch):
  monkeypatch.setattr(compiler, 'find_spec', lambda name: None)
  monkeypatch.setattr(sys, 'version_info', (3, 12, 1))
  with pytest.raises(UserError, match=r"pip install -e '\.\[train,cuda12\]'") as missing:
    prepare_environment()
  monkeypatch.setattr(sys, 'version_info', (3, 11, 7))
  with pytest.raises(UserError, match=r'Python 3\.12.*python3\.12 -m venv') as old:
    prepare_environment()
  assert '\n' not in f'{missing.value}{old.value}'


@pytest.mark.thorough
def test_measurement_is_that_of_an_update(capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['trial', '--config', TINY_CONFIG])
  trial.main()
  got = json.loads(capsys.readouterr().out)
  assert got['device'] == 'cpu' and 0 < got['seconds_an_update'] < 60


@pytest.mark.thorough
def test_process_that_measures_sees_the_devices_that_this_one_hides(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'none such')  # as this process hides the GPU from JAX
  assert compiler.measured_here(TINY_CONFIG, [], 1)['device'] == 'cpu'
