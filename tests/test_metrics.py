"""The log of a run, bank health against closed forms, and the FLOP count against the jaxpr of the real model."""

import json
import math
import resource
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mmjax.config import CHOICES, load_config
from mmjax.errors import UserError
from mmjax.evaluation.probes import bank_health
from mmjax.model.cost import flops_per_token
from mmjax.run.log import MetricsLog, peak_memory, read_metrics
from mmjax.run.nvidia import device_peak_flops
from mmjax.run.sharding import make_mesh
from mmjax.training.window import MEANS, Window
from tests.helpers import build_model, tiny_config


def write_steps(log: MetricsLog, *steps: int) -> None:
  for step in steps:
    log.write({'kind': 'train', 'step': step, 'loss': step / 2})


def steps_in(workdir: Path) -> list[int]:
  return [record['step'] for record in read_metrics(workdir / 'metrics.jsonl')]


def read_events(workdir: Path) -> list[Event]:
  """Reads TensorBoard files by their format: length, CRC, protocol buffer, CRC."""
  events = []
  for path in sorted((workdir / 'tensorboard').iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      events.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def test_log_is_strict_json_and_holds_what_was_written(tmp_path):
  record = {'kind': 'train', 'step': 3, 'loss': float('nan'), 'grad_norm': np.float64('inf'), 'bank': [{'layer': 0}]}
  log = MetricsLog(tmp_path)
  log.write(record)
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line, parse_constant=pytest.fail) == record | {'loss': None, 'grad_norm': None}
  assert read_metrics(tmp_path / 'metrics.jsonl') == [json.loads(line)]
  log.close()
  assert not any(event.summary.value for event in read_events(tmp_path))  # where tensorboardX would warn of each


def test_numbers_are_mirrored_to_tensorboard(tmp_path):
  log = MetricsLog(tmp_path)
  log.truncate_after(4)
  bank, probes = [{'layer': 1, 'used_share': 0.25, 'head_overlap': None}], {'loss_zeroed': 3.5}
  log.write({'kind': 'train', 'step': 5, 'loss': 2.5, 'mfu': None, 'bank': bank, 'probes': probes})
  log.close()
  version, start, *scalars = read_events(tmp_path)
  assert version.file_version == 'brain.Event:2'
  assert (start.step, start.session_log.status) == (5, SessionLog.START)  # hides what an earlier start wrote beyond
  values = {(event.step, value.tag): value.simple_value for event in scalars for value in event.summary.value}
  assert values == {
    (5, 'train/loss'): 2.5,
    (5, 'train/layer_1/used_share'): 0.25,
    (5, 'train/probes/loss_zeroed'): 3.5,
  }


def test_two_logs_in_one_second_keep_their_events(tmp_path):
  for step in (1, 2, 3):
    log = MetricsLog(tmp_path)
    log.truncate_after(step - 1)
    write_steps(log, step)
    log.close()
  assert {event.step for event in read_events(tmp_path) if event.HasField('summary')} == {1, 2, 3}


@pytest.mark.parametrize(('step', 'left'), [(-1, []), (0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_log_is_cut_back_to_the_step_resumed_from(tmp_path, step, left):
  write_steps(MetricsLog(tmp_path), 1, 2, 3)
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"kind": "train", "st')  # kill -9 in the middle of a line
  assert steps_in(tmp_path) == [1, 2, 3]
  log = MetricsLog(tmp_path)
  log.truncate_after(step)
  assert steps_in(tmp_path) == left
  write_steps(log, 50)
  assert steps_in(tmp_path) == [*left, 50]


def test_last_line_may_lack_its_end(tmp_path):
  write_steps(MetricsLog(tmp_path), 1, 2)
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes().rstrip(b'\n'))  # as some editors save it
  assert steps_in(tmp_path) == [1, 2]
  log = MetricsLog(tmp_path)
  log.truncate_after(2)
  write_steps(log, 3)
  assert steps_in(tmp_path) == [1, 2, 3]


def test_damaged_line_is_named_and_gone_after_resuming(tmp_path):
  write_steps(MetricsLog(tmp_path), 1)
  with open(tmp_path / 'metrics.jsonl', 'ab') as file:
    file.write(b'\xff\x00\n')
  write_steps(MetricsLog(tmp_path), 2)
  with pytest.raises(UserError, match=r'metrics\.jsonl:2 must be a JSON object, not .*xff'):
    steps_in(tmp_path)
  MetricsLog(tmp_path).truncate_after(2)
  assert steps_in(tmp_path) == [1, 2]


def test_log_that_was_not_begun_is_empty(tmp_path):
  assert read_metrics(tmp_path / 'metrics.jsonl') == []


def test_full_disk_is_told_once_and_leaves_whole_lines(tmp_path, capsys):
  log = MetricsLog(tmp_path)
  write_steps(log, 1)
  size = (tmp_path / 'metrics.jsonl').stat().st_size
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # the next line is cut after 10 bytes
    write_steps(log, 2, 3)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  said = capsys.readouterr().err
  assert said.count('metrics.jsonl cannot be written') == said.count('TensorBoard files cannot be written') == 1
  write_steps(log, 4)
  log.close()
  assert steps_in(tmp_path) == [1, 4]


def test_events_after_a_full_disk_can_be_read(tmp_path, capsys):
  log = MetricsLog(tmp_path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  write_steps(log, 1)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    write_steps(log, *range(2, 30))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  write_steps(log, 30)
  log.close()
  steps = {event.step for event in read_events(tmp_path) if event.HasField('summary')}
  assert {1, 30} <= steps


@pytest.mark.parametrize(
  ('counts', 'used_share', 'kl', 'rows', 'hottest'),
  [
    ([3] * 16, 1, 0, 16, 1 / 16),
    ([0] * 15 + [7], 1 / 16, math.log(16), 1, 1),
    ([5, 5] + [0] * 6, 0.25, math.log(4), 2, 0.5),
    ([2, 1, 1, 0], 0.75, math.log(4) - 1.5 * math.log(2), 2**1.5, 0.5),
    ([0] * 4, 0, math.log(4), 0, 0),
    ([2**31 - 1] * 4, 1, 0, 4, 0.25),
  ],
)
def test_bank_health_has_its_closed_forms(counts, used_share, kl, rows, hottest):
  found = bank_health(np.array(counts, np.int32))
  assert found == pytest.approx(
    {'used_share': used_share, 'kl_to_uniform': kl, 'effective_rows': rows, 'hottest_share': hottest}, abs=1e-12
  )
  assert found['kl_to_uniform'] >= 0 and all(type(value) is float for value in found.values())


def test_peak_memory_of_a_cpu_is_the_process():
  n_bytes, of_what = peak_memory()
  status = Path('/proc/self/status').read_text()
  peak_kib = int(next(line for line in status.splitlines() if line.startswith('VmHWM')).split()[1])
  assert of_what == 'process'
  assert n_bytes == pytest.approx(peak_kib * 1024, rel=0.05)


def is_jaxpr(value: object) -> bool:
  return hasattr(value, 'jaxpr') or hasattr(value, 'eqns')


def count_dot_flops(jaxpr) -> int:
  """Counts 2 * m * n * k of every dot_general, following calls, the dearest branch, and scans times their length."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      contracted = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
      total += 2 * contracted * math.prod(eqn.outvars[0].aval.shape)
    times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
    inner = [value for value in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(value)]
    counts = [count_dot_flops(getattr(value, 'jaxpr', value)) for value in inner]
    total += times * (max(counts) if eqn.primitive.name == 'cond' else sum(counts))
  return total


MANY_HEADS = {'memory__n_heads': 3, 'memory__layers': '1', 'memory__ffn_dim': 24}
CHEAP = MANY_HEADS | {'memory__key_dim': 6, 'memory__bag_gate': False}


@pytest.mark.parametrize(
  ('sublayer', 'changes'),
  [
    *((name, {}) for name in CHOICES['model.sublayer']),
    ('gated_fusion', MANY_HEADS | {'memory__scores': 'scale'}),
    ('memory_bag', MANY_HEADS),
    ('memory_bag', CHEAP),
    ('ngram_bag', MANY_HEADS | {'memory__value_layers': 'all'}),
  ],
)
@pytest.mark.thorough
def test_flops_are_those_of_the_models_matrix_products(sublayer, changes):
  config = tiny_config(model__sublayer=sublayer, **changes)
  graphdef, params = build_model(config)
  rows, length = 3, config.model.max_seq_len
  tokens_BT = jnp.zeros((rows, length), jnp.int32)

  def loss(params):
    model = nnx.merge(graphdef, params)
    return jnp.sum(model.logits(model(tokens_BT, attention='xla').hidden_BTD) ** 2)

  counted = count_dot_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) / tokens_BT.size
  flops = flops_per_token(config)
  # Not useful and so not in the count: plain attention multiplies what it masks, too (T positions instead of
  # (T + 1) / 2 on average), and every expert of the mixture runs on every token.
  masked = flops['attention'] * (2 * length / (length + 1) - 1)
  model = config.model
  unchosen = model.n_layers * (model.n_experts - model.experts_per_token) if sublayer == 'moe' else 0
  sums = flops.get('bag_reads', 0)  # multiplied and added without a matrix product
  assert counted == flops['total'] - sums + masked + unchosen * 3 * 2 * 3 * model.dim * model.dense_hidden_dim


def test_flops_of_the_record_are_those_of_the_facts():
  flops = flops_per_token(load_config('configs/exp_1_4_2.py'))
  weights = 32_383_488 - 8_388_608 - 8 * 2 * 256 * 64 - 17 * 512  # all but bank, sub-keys and norms
  gate = 8 * 512 * 128
  assert flops['total'] - flops['attention'] - flops['gate'] == 6 * (weights - gate)
  assert flops['gate'] == 2 * (gate + 8 * 512 * 64)
  assert flops['attention'] == 3 * 8 * 4 * 512 * 513 / 2
  assert flops['total'] == pytest.approx(0.16e9, rel=0.05)


def test_mfu_counts_every_position_and_the_speed_only_tokens(monkeypatch):
  config = tiny_config(data__layout='padded')
  monkeypatch.setattr('mmjax.training.window.device_peak_flops', lambda *_: 1e12)
  window = Window()
  for tokens in (10, 20):  # of 2 x 4 rows of 16
    window.add(dict.fromkeys((*MEANS, 'learning_rate'), 1.0) | {'applied': True, 'tokens': tokens})
  line = window.report(config, make_mesh(config, jax.devices()[:1]))
  assert line['tokens_per_second'] * line['seconds'] == pytest.approx(30)
  flops = 2 * 8 * 16 * flops_per_token(config)['total']
  assert line['mfu'] * line['seconds'] == pytest.approx(flops / 1e12)


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H200', 989e12),
    ('NVIDIA A100-SXM4-40GB', 312e12),
    ('NVIDIA GeForce RTX 4090', 165.2e12),
    ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12),
    ('NVIDIA A10G', 70e12),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
    ('Tesla V100-SXM2-16GB', None),
    ('cpu', None),
  ],
)
def test_peak_is_that_of_the_device_or_unknown(kind, peak):
  assert device_peak_flops(kind, 'bfloat16') == peak
  assert device_peak_flops(kind, 'float32') is None
