"""Checkpoints: what was saved comes back bit for bit, or is refused by name and the step before is used."""

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from mmjax.errors import StorageError, UserError
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir
from tests.helpers import tiny_config, xla_flags


def make_state(seed: int, dtype=jnp.float32) -> dict:
  """A state with all that training has: integer keys, named tuples and empty nodes of optax, scalars, small dtypes."""
  keys = jax.random.split(jax.random.key(seed), 4)
  params = {
    'embedding': {'embedding': jax.random.normal(keys[0], (40, 16), dtype)},
    'memory_bank': jax.random.normal(keys[1], (64, 8), dtype),
    'layers': {i: {'kernel': jax.random.normal(keys[2], (16, 16), jnp.bfloat16)} for i in (0, 1, 10)},
    'special': jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {
    'params': params,
    'opt_state': optimizer.init(params),
    'step': jnp.int32(seed),
    'flags': jnp.array([True, False]),
    'bytes': jnp.arange(5, dtype=jnp.uint8),
  }


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def assert_same(found: dict, expected: dict) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_two(workdir: Path) -> Checkpoints:
  checkpoints = Checkpoints(workdir)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {'at': step}, float(step))
  return checkpoints


def files_of(step_dir: Path) -> list[Path]:
  return sorted(path for path in step_dir.rglob('*') if path.is_file())


def flip_bit(path: Path, position: int) -> None:
  data = bytearray(path.read_bytes())
  data[position // 8] ^= 1 << (position % 8)
  path.write_bytes(data)


def damage_bank(step_dir: Path) -> None:
  """Flips one bit in the values of the bank: in the middle of the biggest file that holds arrays."""
  path = max(files_of(step_dir / 'params'), key=lambda p: p.stat().st_size * ('/d/' in str(p)))
  flip_bit(path, path.stat().st_size * 4)


def test_restored_state_equals_saved_state_bit_for_bit(tmp_path):
  Checkpoints(tmp_path).save(7, make_state(7), {'tokens': 12, 'names': ['a']}, 1.5)
  state, metadata, step = Checkpoints(tmp_path).restore(ABSTRACT)
  assert_same(state, make_state(7))
  assert list(state['params']['layers']) == [0, 1, 10]
  assert (metadata, step) == ({'tokens': 12, 'names': ['a']}, 7)


def test_params_are_restored_without_the_rest(tmp_path):
  Checkpoints(tmp_path).save(1, make_state(1), {'at': 1})
  shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'rest')
  params, metadata, step = Checkpoints(tmp_path).restore_params(ABSTRACT['params'], 'last')
  assert_same(params, make_state(1)['params'])
  assert (metadata, step) == ({'at': 1}, 1)


DAMAGES = {
  'flip': lambda data, rng: change_byte(data, rng, 1 << rng.randrange(8)),
  'change': lambda data, rng: change_byte(data, rng, rng.randrange(1, 256)),
  'truncate': lambda data, rng: data[: rng.randrange(len(data))],
}


def change_byte(data: bytes, rng: random.Random, by: int) -> bytes:
  at = rng.randrange(len(data))
  return data[:at] + bytes([data[at] ^ by]) + data[at + 1 :]


@pytest.mark.parametrize('kind', [*DAMAGES, 'delete'])
@pytest.mark.thorough
def test_damage_to_any_file_never_yields_a_wrong_state(tmp_path, capsys, request, kind):
  """Damages every file of a checkpoint once, or N times with --faults=N where N is over 20."""
  rounds, seed = (request.config.getoption(name) for name in ('faults', 'faults_seed'))
  rounds = 1 if rounds <= 20 or kind == 'delete' else rounds
  rng = random.Random(f'{kind} {seed}')
  save_two(tmp_path)
  pristine, damaged = tmp_path / 'pristine', tmp_path / 'checkpoints'
  damaged.rename(pristine)
  used = []
  for file in files_of(pristine / '2') * rounds:
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(pristine, damaged)
    target = damaged / file.relative_to(pristine)
    if kind == 'delete':
      target.unlink()
    elif data := target.read_bytes():
      target.write_bytes(DAMAGES[kind](data, rng))
    state, metadata, step = Checkpoints(tmp_path).restore(ABSTRACT)
    assert_same(state, make_state(step))
    assert metadata == {'at': step}
    said = capsys.readouterr().err
    assert (step == 1) == (tmp_path / 'checkpoints' / '2.corrupt').is_dir() == ('checkpoint 2' in said)
    used.append(step)
  with capsys.disabled():
    print(f'\n{kind}: {len(used)} damages (--faults_seed={seed}), {used.count(1)} noticed, 0 wrong states')
  assert used.count(1) >= 5 * rounds  # not every file matters: those that do not, restore the right state


def test_flipped_bit_is_named_and_its_step_set_aside(tmp_path, capsys):
  checkpoints = save_two(tmp_path)
  damage_bank(checkpoints.directory / '2')
  state, _, step = checkpoints.restore(ABSTRACT)
  assert step == 1
  assert_same(state, make_state(1))
  said = capsys.readouterr().err
  assert 'params.' in said and 'checkpoint 1 is used instead' in said and 'TensorStore details' not in said
  assert checkpoints.steps() == [1] and (checkpoints.directory / '2.corrupt').is_dir()
  checkpoints.save(2, make_state(2), {})
  damage_bank(checkpoints.directory / '2')
  checkpoints.restore(ABSTRACT)
  assert (checkpoints.directory / '2.corrupt2').is_dir()


def test_best_is_replaced_by_the_next_best_where_it_is_corrupt(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step, metric in ((1, 2.0), (2, 3.0), (3, 1.0)):
    checkpoints.save(step, make_state(step), {}, metric)
  damage_bank(checkpoints.directory / '3')
  assert checkpoints.restore_params(ABSTRACT['params'], 'best')[2] == 2


def test_best_with_an_unreadable_metric_is_not_silently_another(tmp_path, capsys):
  checkpoints = save_two(tmp_path)
  (checkpoints.directory / '1' / 'metadata' / 'metadata').unlink()
  assert checkpoints.restore_params(ABSTRACT['params'], 'best')[2] == 2
  assert 'checkpoint 1' in capsys.readouterr().err


def test_no_whole_step_left_is_an_error_and_never_a_fresh_start(tmp_path):
  checkpoints = save_two(tmp_path)
  for step in (1, 2):
    damage_bank(checkpoints.directory / str(step))
  for _ in range(2):
    checkpoints = Checkpoints(tmp_path)
    assert RunDir(tmp_path).ever_saved
    with pytest.raises(StorageError, match='no whole checkpoint is left'):
      checkpoints.restore(ABSTRACT)


def test_steps_that_vanished_are_missed(tmp_path, capsys):
  checkpoints = save_two(tmp_path)
  shutil.rmtree(checkpoints.directory / '2')
  assert checkpoints.restore(ABSTRACT)[2] == 1
  assert 'checkpoint 2 is gone' in capsys.readouterr().err
  shutil.rmtree(checkpoints.directory / '1')
  assert RunDir(tmp_path).ever_saved
  with pytest.raises(StorageError, match='no whole checkpoint is left'):
    Checkpoints(tmp_path).restore(ABSTRACT)


def test_all_checkpoints_removed_at_once_is_an_error_and_never_a_fresh_start(tmp_path):
  shutil.rmtree(save_two(tmp_path).directory)
  assert RunDir(tmp_path).ever_saved
  with pytest.raises(StorageError, match='no whole checkpoint is left'):
    Checkpoints(tmp_path).restore(ABSTRACT)


def test_nothing_saved_yet_is_told_apart(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  assert not RunDir(tmp_path).ever_saved
  with pytest.raises(UserError, match='no checkpoint was saved'):
    checkpoints.restore(ABSTRACT)


def test_step_asked_for_by_number_is_not_replaced(tmp_path):
  checkpoints = save_two(tmp_path)
  assert checkpoints.restore(ABSTRACT, 1)[2] == 1
  damage_bank(checkpoints.directory / '2')
  with pytest.raises(StorageError, match=r'no whole checkpoint 2 in .*; there are \[1\]'):
    checkpoints.restore(ABSTRACT, 2)


def test_changed_metadata_is_noticed(tmp_path):
  checkpoints = save_two(tmp_path)
  manifest = checkpoints.directory / '2' / 'metadata' / 'metadata'
  changed = manifest.read_text().replace('"metadata": {"at": 2}', '"metadata": {"at": 3}')
  assert changed != manifest.read_text()
  manifest.write_text(changed)
  assert checkpoints.restore(ABSTRACT)[1:] == ({'at': 1}, 1)


def test_step_renamed_by_hand_is_refused(tmp_path):
  checkpoints = save_two(tmp_path)
  (checkpoints.directory / '2').rename(checkpoints.directory / '3')
  assert checkpoints.restore(ABSTRACT)[2] == 1


def test_last_two_and_the_best_are_kept_across_resume(tmp_path):
  metrics = {1: 3.0, 2: 1.0, 3: None, 4: 1.0, 5: float('nan'), 6: 2.0}
  kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6]}
  for step, metric in metrics.items():
    checkpoints = Checkpoints(tmp_path)  # each save by another process, as far as the disk can tell
    checkpoints.save(step, make_state(step), {}, metric)
    assert checkpoints.steps() == kept[step]
  assert checkpoints.best_step == 2
  assert_same(checkpoints.restore(ABSTRACT, 'best')[0], make_state(2))
  checkpoints.save(7, make_state(7), {}, 0.5)
  assert checkpoints.steps() == [6, 7]


def test_without_metrics_best_is_the_last(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(step, make_state(step), {})
  assert checkpoints.best_step is None
  assert checkpoints.restore(ABSTRACT, 'best')[2] == 2


def test_step_after_saving_may_overwrite_the_buffers(tmp_path):
  train_step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
  state = make_state(3)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state, {})
  jax.block_until_ready(train_step(state))
  assert_same(checkpoints.restore(ABSTRACT)[0], make_state(3))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda p: p | {'memory_bank': jax.ShapeDtypeStruct((64, 8), jnp.bfloat16)}, r'float32\[64,8\] saved, bfloat16'),
    (lambda p: p | {'memory_bank': jax.ShapeDtypeStruct((16, 8), jnp.float32)}, r'saved, float32\[16,8\] expected'),
    (lambda p: p | {'new': jax.ShapeDtypeStruct((2,), jnp.float32)}, r'params.new: absent saved'),
    (lambda p: {k: v for k, v in p.items() if k != 'special'}, r'params.special: float32\[5\] saved, absent'),
  ],
)
def test_state_of_another_model_is_refused_and_kept(tmp_path, change, said):
  checkpoints = save_two(tmp_path)
  with pytest.raises(UserError, match=said):
    checkpoints.restore_params(change(ABSTRACT['params']))
  assert checkpoints.steps() == [1, 2]


def test_new_empty_node_in_the_optimizer_is_no_obstacle(tmp_path):
  checkpoints = save_two(tmp_path)
  target = ABSTRACT | {'opt_state': (*ABSTRACT['opt_state'], optax.EmptyState())}
  assert checkpoints.restore(target)[2] == 2


@pytest.mark.parametrize(
  'error', [MemoryError(), OSError(24, 'Too many open files'), ValueError('RESOURCE_EXHAUSTED: x')]
)
def test_lack_of_memory_is_not_taken_for_corruption(tmp_path, monkeypatch, error):
  checkpoints = save_two(tmp_path)

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', fail)
  with pytest.raises(StorageError, match='checkpoint 2 in .* cannot be read'):
    checkpoints.restore(ABSTRACT)
  assert checkpoints.steps() == [1, 2]


def test_state_saved_before_an_entry_existed_is_restored_with_its_start(tmp_path):
  from mmjax.run.placement import place
  from mmjax.training.first_state import restore_state
  from mmjax.training.learner import Learner

  config = tiny_config()
  learner = Learner(config, place(config), 10)
  starts = {'loss_average': jnp.float32(0), 'reads': {'count_M': jnp.zeros(64, jnp.int32), 'updates': jnp.int32(0)}}
  state = jax.tree.map(lambda x: jnp.full(x.shape, 3, x.dtype), learner.shapes) | starts
  older = {name: entry for name, entry in state.items() if name not in starts}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, older, {'tokens': 5})
  restored, metadata = restore_state(learner, checkpoints)
  assert metadata == {'tokens': 5}
  assert_same(restored, state)
  del older['skipped']  # what was there from the beginning stays required
  checkpoints.save(4, older, {})
  with pytest.raises(UserError, match='rest.skipped: absent saved'):
    restore_state(learner, checkpoints)


def test_optimizer_state_is_restored_where_a_schedule_that_may_change_numbers_its_parts_otherwise(tmp_path):
  from mmjax.run.placement import place
  from mmjax.training.first_state import restore_state
  from mmjax.training.learner import Learner

  config = tiny_config(memory__bank_lr_multiplier=4)
  saved, numbers = Learner(config, place(config), 10).shapes, itertools.count()
  saved = jax.tree.map(lambda x: jnp.full(x.shape, next(numbers), x.dtype), saved)
  Checkpoints(tmp_path).save(3, saved, {})
  changed = tiny_config(memory__bank_lr_multiplier=4, train__grad_clip=0, train__embedding_lr_multiplier=2)
  restored, _ = restore_state(Learner(changed, place(changed), 10), Checkpoints(tmp_path))
  assert jax.tree.structure(restored) != jax.tree.structure(saved)
  assert_same(jax.tree.leaves(restored), jax.tree.leaves(saved))


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
  checkpoints = save_two(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**20))
  with pytest.raises(StorageError, match=r'step 3 was not saved: it needs 1\.1 MB and .* has 1\.0 MB free'):
    checkpoints.save(3, make_state(3), {})
  assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize('limit', [300_000, 3_000], ids=['of_an_array', 'of_every_file'])
def test_failed_write_leaves_the_last_good_step(limit, tmp_path, caplog):
  big = {'params': {'x': jax.random.normal(jax.random.key(0), (256, 1024))}, 'step': jnp.int32(3)}
  big['reads'] = {str(i): jnp.arange(40_000) for i in range(20)}  # written by other threads, which fail later
  checkpoints = save_two(tmp_path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # writes fail half-way, as on a full disk
    with pytest.raises(StorageError, match=f'^step 3 could not be saved in {checkpoints.directory}: File too large$'):
      checkpoints.save(3, big, {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  time.sleep(0.2)
  assert not caplog.records  # of threads that outlived the save
  assert checkpoints.restore(ABSTRACT)[2] == 2
  checkpoints.save(3, big, {})
  assert sorted(path.name for path in checkpoints.directory.iterdir()) == ['1', '2', '3']


def test_reading_only_changes_nothing(tmp_path, capsys):
  directory = save_two(tmp_path).directory
  damage_bank(directory / '2')
  (directory / '3.orbax-checkpoint-tmp').mkdir()
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  checkpoints = Checkpoints(tmp_path, read_only=True)
  assert checkpoints.restore_params(ABSTRACT['params'], 'last')[2] == 1
  assert 'checkpoint 2' in capsys.readouterr().err
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


def run_child(code: str, *, devices: int = 1) -> subprocess.Popen:
  """Starts a Python process beside this module, with so many CPU devices."""
  setup = 'from tests.test_checkpoint import *\n'
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': xla_flags(devices),
    'PYTHONPATH': str(Path(__file__).parents[1]),
  }
  command = [sys.executable, '-c', setup + textwrap.dedent(code)]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_save_is_cleaned_up_and_the_last_whole_step_used(tmp_path):
  child = run_child(f"""
    checkpoints = Checkpoints({str(tmp_path)!r})
    for step in range(1, 1000):
      checkpoints.save(step, make_state(step), {{'at': step}})
      print(step, flush=True)
  """)
  seen = [int(child.stdout.readline()) for _ in range(3)]
  time.sleep(random.Random().random() * 0.2)
  child.send_signal(signal.SIGKILL)
  seen += [int(line) for line in child.stdout.read().splitlines()]  # what is in the pipe's buffer, too
  child.wait()
  (tmp_path / 'checkpoints' / '2000.orbax-checkpoint-tmp' / 'params').mkdir(parents=True)
  checkpoints = Checkpoints(tmp_path)
  assert not list(checkpoints.directory.glob('*tmp*'))
  state, metadata, step = checkpoints.restore(ABSTRACT)
  assert step in (seen[-1], seen[-1] + 1)
  assert metadata == {'at': step}
  assert_same(state, make_state(step))


@pytest.mark.thorough
def test_state_moves_between_8_devices_and_1(tmp_path):
  code = f"""
    import zlib
    from mmjax.run.leaves import leaf_crc32
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((2, 4), ('data', 'rows'), axis_types=(AxisType.Auto,) * 2)
    def place(path, x):
      rows = P('rows') if 'memory_bank' in jax.tree_util.keystr(path) else P()
      return NamedSharding(mesh, rows)
    places = jax.tree_util.tree_map_with_path(place, ABSTRACT)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), ABSTRACT, places)
    checkpoints = Checkpoints({str(tmp_path)!r})
    state, _, step = checkpoints.restore(target)
    assert_same(state, make_state(1))
    assert len(state['params']['memory_bank'].sharding.device_set) == 8
    sharded = jax.device_put(make_state(2), places)
    bank = sharded['params']['memory_bank']
    assert leaf_crc32(bank) == zlib.crc32(np.asarray(make_state(2)['params']['memory_bank']).tobytes())
    checkpoints.save(2, sharded, {{}})
    bad = dict(target, step=jax.ShapeDtypeStruct((3,), jnp.int32, sharding=NamedSharding(mesh, P('rows'))))
    with pytest.raises(UserError, match='cannot be sharded'):
      checkpoints.restore(bad)
  """
  Checkpoints(tmp_path).save(1, make_state(1), {})
  child = run_child(code, devices=8)
  _, err = child.communicate(timeout=120)
  assert child.returncode == 0, err
  state, _, step = Checkpoints(tmp_path).restore(ABSTRACT)
  assert step == 2
  assert_same(state, make_state(2))


@pytest.mark.parametrize(('which', 'said'), [('best', 'the best of those left is 2'), ('last', 'using 2')])
def test_a_newest_step_that_was_taken_away_is_told(tmp_path, capfd, which, said):
  checkpoints = Checkpoints(tmp_path)
  for step, metric in ((1, 3.0), (2, 2.0), (3, 1.0)):
    checkpoints.save(step, make_state(step), {}, metric)
  shutil.rmtree(checkpoints.directory / '3')
  assert Checkpoints(tmp_path, read_only=True).restore_params(ABSTRACT['params'], which)[2] == 2
  assert f'checkpoint 3 is gone from {checkpoints.directory}; {said}\n' in capfd.readouterr().err
