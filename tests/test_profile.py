"""Profiles: a tiny run's trace and table; scopes of operations and nested times against hand-made ones."""

import gzip
import json
import re
import time

import jax
import pytest

from mmjax.config.sublayers import SUBLAYERS
from mmjax.run.directory import RunDir
from mmjax.run.scopes import SCOPES, innermost_scope, operation_scopes
from mmjax.training.loop import fit
from mmjax.training.profile import self_times
from mmjax.training.recorder import Recorder
from tests.helpers import make_step, random_batch, rarely, tiny_config


@pytest.mark.thorough
@pytest.mark.parametrize('steps', [2, 100])  # more end at the evaluation, which is no part of a step
def test_profiled_run_writes_a_trace_and_says_where_the_time_goes(tiny_run, tmp_path, capsys, steps):
  config = RunDir(tiny_run).read_config()
  assert config.train.eval_interval == 3
  fit(config.with_settings({'train.profile_steps': steps}), tmp_path)
  out = capsys.readouterr().out
  assert 'Profile of 2 steps' in out
  shares = {
    name.strip(): float(share) for name, share in re.findall(r'^  (\D+?) +[\d.]+ ms a step +([\d.]+)%', out, re.M)
  }
  assert {'attention', 'gate', 'fusion', 'loss', 'optimizer'} <= shares.keys() <= {*SCOPES, 'not attributed'}
  assert sum(shares.values()) == pytest.approx(100, abs=1) and shares.get('not attributed', 0) < 50
  [trace] = (tmp_path / 'profile').rglob('*.trace.json.gz')
  with gzip.open(trace) as file:  # Chrome's format, which Perfetto reads
    events = json.load(file)['traceEvents']
  assert any(event.get('args', {}).get('hlo_module') == 'jit_train_step' for event in events)


@pytest.mark.thorough
def test_what_is_reported_and_saved_after_the_last_step_is_no_part_of_it(tiny_run, tmp_path, capsys, monkeypatch):
  report = Recorder.report
  monkeypatch.setattr(Recorder, 'report', lambda *args: (time.sleep(2), report(*args)))
  config = RunDir(tiny_run).read_config()  # evaluates after 3 updates, of which the first is not profiled
  fit(config.with_settings({'train.profile_steps': 100, 'train.log_interval': 100, 'train.max_steps': 3}), tmp_path)
  [milliseconds] = re.findall(r'Profile of 2 steps, ([\d.]+) ms each', capsys.readouterr().out)
  assert float(milliseconds) < 1000


@pytest.mark.thorough
def test_start_of_one_step_says_that_it_profiles_nothing(tiny_run, tmp_path, capsys):
  config = RunDir(tiny_run).read_config()
  fit(config.with_settings({'train.profile_steps': 2, 'train.max_steps': 1, 'train.warmup_steps': 0}), tmp_path)
  assert 'Nothing was profiled: the trace begins with the second step' in capsys.readouterr().out


def test_run_without_profile_steps_writes_none(tiny_run):
  assert not (tiny_run / 'profile').exists()


@pytest.mark.parametrize(
  ('op_name', 'scope'),
  [
    ('jit(train_step)/while/body/jvp(gate)/dot_general', 'gate'),
    ('jit(train_step)/while/body/transpose(jvp(attention))/while/mul', 'attention'),
    ('jit(train_step)/jvp(feed_forward/norm)/mul', 'norm'),
    ('jit(train_step)/optimizer/gather', 'optimizer'),
    ('jit(train_step)/while/body/gather_gate_x/dot', None),
  ],
)
def test_innermost_scope_of_a_name(op_name, scope):
  assert innermost_scope(op_name) == scope


def test_fusion_without_a_name_belongs_to_most_of_its_parts():
  text = """HloModule jit_train_step
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %a = f32[8] add(%p, %p), metadata={op_name="jit(train_step)/jvp(gate)/add"}
  %b = f32[8] add(%a, %p), metadata={op_name="jit(train_step)/jvp(gate)/add"}
  ROOT %c = f32[8] add(%b, %p), metadata={op_name="jit(train_step)/jvp(loss)/add"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %fusion.1 = f32[8] fusion(%x), kind=kLoop, calls=%fused
  ROOT %d = f32[8] add(%fusion.1, %x), metadata={op_name="jit(train_step)/optimizer/add"}
}
"""
  assert operation_scopes(text) == {'a': 'gate', 'b': 'gate', 'c': 'loss', 'fusion.1': 'gate', 'd': 'optimizer'}


def test_time_of_an_operation_leaves_out_what_ran_within_it():
  events = [
    ('inner', 20.0, 30.0),
    ('loop', 0.0, 100.0),
    ('inner', 60.0, 10.0),
    ('leaf', 25.0, 5.0),
    ('next', 100.0, 7.0),
  ]
  times = {name: round(seconds * 1e9) for name, seconds in self_times(events).items()}
  assert times == {'loop': 60, 'inner': 35, 'leaf': 5, 'next': 7}


@pytest.mark.parametrize('kind', rarely(SUBLAYERS, 'memory_bag'))
def test_heavy_operations_of_every_sublayer_belong_to_a_scope(kind):
  config = tiny_config(model__n_layers=1, model__sublayer=kind, train__accumulation_steps=1)
  step, first = make_step(config)
  text = jax.jit(step).lower(jax.eval_shape(first), random_batch(config)).as_text(debug_info=True)
  names = re.findall(r'loc\("(jit\(train_step\)[^"]*)"', text)
  heavy = [name for name in names if re.search(r'/(dot_general|gather|scatter-add|top_k|sort|exp|logistic)$', name)]
  assert len(heavy) > 9 and not [name for name in heavy if innermost_scope(name) is None]


@pytest.mark.thorough
def test_scopes_change_nothing_but_names():
  config = tiny_config(model__n_layers=1)
  step, first = make_step(config)
  lowered = jax.jit(step).lower(jax.eval_shape(first), random_batch(config))
  assert not any(f'"{scope}' in lowered.as_text() for scope in SCOPES)
  assert '(attention)' in lowered.as_text(debug_info=True)
