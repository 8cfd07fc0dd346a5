"""Runs with settings that are gone: read as before, and refused where what is gone would matter."""

import json

import pytest

import mmjax
from mmjax.config import as_of_today, config_from_dict, load_config
from mmjax.errors import UserError
from mmjax.report.found import FoundRun
from mmjax.report.rows import make_rows
from mmjax.report.sections import settings as settings_of_run
from mmjax.run.directory import RunDir
from mmjax.training.loop import fit
from tests.helpers import TINY_CONFIG, run_config, tiny_config

NEUTRAL = {
  'memory': {'keys_init': 'normal', 'balance_loss_weight': 0.0, 'bank_grad_clip': 0.0, 'revive_after': 0,
             'revive_noise': 0.01, 'revive_keys': False, 'value_conv': 0},
  'runtime': {'scan_layers': True},
}  # fmt: skip
MATTERED = [('keys_init', 'uniform'), ('balance_loss_weight', 0.01), ('bank_grad_clip', 1.0), ('revive_after', 100)]


def saved(**memory):
  """Settings as an old config.json has them."""
  settings = tiny_config().to_dict()
  return {**settings, 'memory': {**settings['memory'], **NEUTRAL['memory'], **memory}, 'runtime': {
    **settings['runtime'], **NEUTRAL['runtime']}}  # fmt: skip


def test_settings_that_did_nothing_are_left_out():
  assert config_from_dict(as_of_today(saved(), to_train=True)) == tiny_config()


@pytest.mark.parametrize(('field', 'value'), MATTERED)
def test_run_that_learned_with_a_setting_that_is_gone_is_read_and_not_trained_on(field, value):
  assert config_from_dict(as_of_today(saved(**{field: value}), to_train=False)) == tiny_config()
  with pytest.raises(UserError, match=rf"memory.{field}='?{value}'?: mmjax no longer has it, .*; commit \w+ trains"):
    as_of_today(saved(**{field: value}), to_train=True)


@pytest.mark.parametrize(('field', 'value'), [('query_key_norm', 'layer_norm'), ('score_activation', 'none')])
def test_weights_that_would_be_read_otherwise_are_refused(field, value):
  with pytest.raises(UserError, match=rf"memory.{field}='{value}': mmjax no longer has it, .*; commit \w+ reads it"):
    as_of_today(saved(**{field: value}), to_train=False)
  with pytest.raises(UserError, match=f"memory.{field}='{value}' must be one of .*: mmjax no longer has it"):
    load_config(TINY_CONFIG, [f'--config.memory.{field}={value}'])


def test_run_with_a_parameter_that_is_gone_is_not_read():
  with pytest.raises(UserError, match=r'memory.value_conv=4: mmjax no longer has it, .*; commit c5a56c4 reads it'):
    as_of_today(saved(value_conv=4), to_train=False)


@pytest.mark.parametrize('name', ['memory.keys_init', 'runtime.scan_layers'])
def test_override_of_what_is_gone_says_so(name):
  with pytest.raises(UserError, match=f"no setting '{name}': mmjax no longer has it"):
    load_config(TINY_CONFIG, [f'--config.{name}=1'])


@pytest.mark.thorough
def test_run_directory_of_such_a_run_draws_samples_and_does_not_go_on(run, tiny_run, text):
  settings = saved(balance_loss_weight=0.01) | {'data': json.loads((run / 'config.json').read_text())['data']}
  (run / 'config.json').write_text(json.dumps(settings))
  assert RunDir(run).read_config() == mmjax.load(run).config
  gone, kept = FoundRun(run), FoundRun(tiny_run)
  assert [name for name, _, remark in settings_of_run(gone)[0].rows if 'no longer' in remark] == [
    'memory.balance_loss_weight'
  ]
  assert [len(row.runs) for row in make_rows([gone, kept])] == [1, 1]  # they are no runs of one model
  with pytest.raises(UserError, match=r'run/config.json: memory.balance_loss_weight=0.01: mmjax no longer has it'):
    fit(run_config(text), run)
  with pytest.raises(UserError, match=r'memory.balance_loss_weight=0.01: mmjax no longer has it'):
    load_config(f'{run}/config.json')
