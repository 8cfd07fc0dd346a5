"""Neither a faulty jaxlib nor JAX's global settings change a number, and mmjax changes no setting of its host's."""

import ctypes
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.config.sublayers import SUBLAYERS
from mmjax.environment import IN_COMMANDS, JAX_SETTINGS, MALLOC, ignore_jax_settings, own_jax_settings
from mmjax.errors import UserError, refuse_wrong_jaxlib
from mmjax.kernels.bank import bank_bag, bank_lookup
from mmjax.kernels.matmul import matmul
from mmjax.kernels.product_key import product_key_topk
from mmjax.model.lm import LM
from mmjax.run.directory import RunDir
from mmjax.training.loop import fit
from tests.helpers import final_state, rarely, tiny_config

# Each with a value that is not JAX's own; disable_jit makes a test of minutes.
OTHER = {
  'enable_x64': True,
  'default_matmul_precision': 'bfloat16',
  'default_prng_impl': 'rbg',
  'threefry_partitionable': False,
  'numpy_dtype_promotion': 'strict',
  'numpy_rank_promotion': 'raise',
  'softmax_custom_jvp': True,
  'debug_nans': True,
  'debug_infs': True,
}


@contextmanager
def other_settings():
  with ExitStack() as stack:
    for name, value in OTHER.items():
      stack.enter_context(getattr(jax, name)(value))
    yield


def current_settings() -> dict[str, object]:
  return {name: getattr(jax.config, f'jax_{name}') for name in JAX_SETTINGS}


@pytest.fixture
def wrong_version(monkeypatch):
  real = metadata.version
  monkeypatch.setattr(metadata, 'version', lambda name: '0.10.2' if name == 'jaxlib' else real(name))
  refuse_wrong_jaxlib.cache_clear()
  yield
  refuse_wrong_jaxlib.cache_clear()


def test_jaxlib_here_sums_products_of_few_columns_right():
  """The reproduction of jax-ml/jax#39103: 7,226 of 40,000 rows are wrong with jaxlib 0.10.2."""
  rng = np.random.default_rng(0)
  A, x_X3 = rng.standard_normal((3, 3)).astype(np.float32), rng.standard_normal((40_000, 3)).astype(np.float32)
  got_X = jax.jit(jax.vmap(lambda x: jnp.sum((A @ x) ** 2)))(x_X3)
  np.testing.assert_allclose(got_X, ((x_X3.astype(np.float64) @ A.T) ** 2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize(
  ('version', 'wrong'),
  [('0.10.1', False), ('0.10.2', True), ('0.10.2.dev20260601', True), ('0.11.0', False), ('0.11.2', False)],
)
def test_jaxlib_that_computes_wrong_results_is_named(monkeypatch, version, wrong):
  monkeypatch.setattr(metadata, 'version', lambda name: version)
  refuse_wrong_jaxlib.cache_clear()
  with pytest.raises(UserError, match=rf'^jaxlib {version} computes .* pip install .*$') if wrong else nullcontext():
    refuse_wrong_jaxlib()
  refuse_wrong_jaxlib.cache_clear()


def test_wrong_jaxlib_is_refused_wherever_something_is_computed(wrong_version, tiny_run):
  bank_MP, row_BT11, x_BTD = jnp.ones((4, 2)), jnp.zeros((1, 1, 1, 1), jnp.int32), jnp.ones((1, 1, 2, 4))
  for compute in (
    lambda: mmjax.load(tiny_run),
    lambda: bank_lookup(bank_MP, row_BT11, jnp.float32),
    lambda: bank_bag(bank_MP, row_BT11, jnp.ones((1, 1, 1, 1))),
    lambda: product_key_topk(x_BTD, jnp.ones((2, 4, 4)), 2),
    lambda: matmul(x_BTD, jnp.ones((4, 4))),
  ):
    with pytest.raises(UserError, match='jaxlib 0.10.2 computes wrong results'):
      compute()


def test_command_with_a_wrong_jaxlib_ends_with_one_sentence(wrong_version, capsys):
  from mmjax.errors import run_command

  with pytest.raises(SystemExit) as ended:
    run_command(lambda: pytest.fail('ran'))
  assert ended.value.code == 2 and capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('first', ['', 'import jax; '])  # some commands import JAX before they begin
def test_command_does_not_use_settings_of_the_environment(first):
  show = 'lambda c=__import__("jax").config: print(c.jax_enable_x64, c.jax_default_prng_impl, c.jax_random_seed_offset)'
  code = f'{first}from mmjax.errors import run_command\ndef main():\n  ({show})()\nrun_command(main)'
  variables = os.environ | {'JAX_ENABLE_X64': '1', 'JAX_DEFAULT_PRNG_IMPL': 'rbg', 'JAX_RANDOM_SEED_OFFSET': '7'}
  done = subprocess.run([sys.executable, '-c', code], env=variables, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'False threefry2x32 0'
  assert 'JAX_ENABLE_X64=1' in done.stderr and done.stderr.count('\n') == 1


def test_settings_that_are_ignored_exist_and_others_are_left(monkeypatch):
  for name in (*JAX_SETTINGS, *IN_COMMANDS):
    assert f'jax_{name}' in jax.config.values, name
    monkeypatch.setenv(f'JAX_{name}'.upper(), 'x')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  values = {name: jax.config.values[f'jax_{name}'] for name in IN_COMMANDS}
  try:
    assert 'JAX_DEBUG_NANS=x' in ignore_jax_settings()
  finally:
    for name, value in values.items():
      jax.config.update(f'jax_{name}', value)
  assert ignore_jax_settings() is None and os.environ['JAX_PLATFORMS'] == 'cpu'


def test_own_settings_are_what_jax_starts_with():
  assert current_settings() == JAX_SETTINGS
  with other_settings(), own_jax_settings():
    assert current_settings() == JAX_SETTINGS


@pytest.mark.thorough
def test_training_in_a_program_with_other_settings_ends_bit_for_bit_the_same(tmp_path, tiny_run):
  config = RunDir(tiny_run).read_config()
  with other_settings():
    before = current_settings()
    fit(config, tmp_path / 'run')
    assert current_settings() == before
  ours, theirs = final_state(tmp_path / 'run'), final_state(tiny_run)
  assert ours.keys() == theirs.keys()
  for name, array in ours.items():
    assert array.dtype == theirs[name].dtype and np.array_equal(array, theirs[name]), name


@pytest.mark.thorough
@pytest.mark.parametrize('sublayer', ['memory_bag', 'ngram_bag'])
def test_lazy_training_in_a_program_with_other_settings_ends_the_same(tmp_path, text, sublayer):
  from tests.helpers import run_config

  config = run_config(
    text,
    model__sublayer=sublayer,
    memory__bank_update='lazy',
    train__max_steps=3,
    model__dropout=0.1,
  )
  fit(config, tmp_path / 'plain')
  with other_settings():
    fit(config, tmp_path / 'other')
  ours, theirs = final_state(tmp_path / 'other'), final_state(tmp_path / 'plain')
  assert all(np.array_equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.thorough
def test_model_in_a_program_with_other_settings_answers_the_same(tiny_run):
  def answers() -> list:
    lm = mmjax.load(tiny_run)
    logits_BTV = np.asarray(lm.logits([[5, 6, 7]]))
    sampled, pieces, within = lm.generate('the memory', max_new_tokens=8, seed=3), [], []
    for piece in lm.stream('the memory', max_new_tokens=8, seed=3):
      pieces.append(piece)
      within.append(current_settings())
    return [logits_BTV, logits_BTV.dtype, sampled, pieces], within

  plain, _ = answers()
  with other_settings():
    other, within = answers()
    assert within and all(settings == current_settings() for settings in within)
  assert np.array_equal(plain[0], other[0]) and plain[1:] == other[1:]


@pytest.mark.parametrize('sublayer', rarely(SUBLAYERS, 'moe'))
@pytest.mark.thorough
def test_modules_of_a_64_bit_program_have_the_same_parameters_and_answers(sublayer):
  config = tiny_config(model__sublayer=sublayer)

  def run() -> list:
    model = LM(config.model, config.memory, rngs=nnx.Rngs(0))
    tokens_BT = np.arange(2 * 16, dtype=np.int32).reshape(2, 16)
    out = model(tokens_BT, dtype=jnp.float32, attention='xla_blocked')
    return [np.asarray(x) for x in jax.tree.leaves((nnx.state(model, nnx.Param), out))]

  plain = run()
  with jax.enable_x64(True):
    wide = run()
  assert [x.dtype for x in plain] == [x.dtype for x in wide]
  assert all(np.array_equal(x, y) for x, y in zip(plain, wide, strict=True))


USES_MEMORY_AGAIN = """
import ctypes, resource, sys
from mmjax.errors import run_command

def main():
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(8):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

run_command(main) if sys.argv[1] == 'command' else main()
"""


def test_a_command_uses_freed_memory_again_unless_the_environment_says_otherwise():
  def faults(how: str, **environment: str) -> int:
    environment = {name: value for name, value in os.environ.items() if 'MALLOC' not in name} | environment
    command = [sys.executable, '-c', USES_MEMORY_AGAIN, how]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if not (mallopt and all(mallopt(parameter, value) for parameter, value in MALLOC)):
    pytest.skip('a C library without these settings')
  usual = faults('library')
  assert faults('command') < 0.3 * usual  # 8 blocks, each of whose pages is cleared once or eight times
  assert faults('command', MALLOC_MMAP_THRESHOLD_='1048576') > 0.9 * usual
  assert faults('command', GLIBC_TUNABLES='glibc.malloc.perturb=0') > 0.9 * usual


RETURNS_MEMORY = """
import ctypes
from mmjax.environment import keep_freed_memory, return_freed_memory

def resident():
  return int(open('/proc/self/statm').read().split()[1])

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
keep_freed_memory()
found = [resident()]
blocks = [libc.malloc(1 << 20) for _ in range(64)]
for block in blocks:
  ctypes.memset(block, 1, 1 << 20)
found.append(resident())
for block in blocks:
  libc.free(block)
found.append(resident())
return_freed_memory()
print(*found, resident())
"""


def test_memory_that_a_compiler_freed_is_returned():
  if not hasattr(ctypes.CDLL(None), 'malloc_trim') or sys.platform != 'linux':
    pytest.skip('a C library without it')
  environment = {name: value for name, value in os.environ.items() if 'MALLOC' not in name}
  command = [sys.executable, '-c', RETURNS_MEMORY]
  said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
  before, used, freed, returned = map(int, said.split())  # pages
  assert freed - before > 0.9 * (used - before) > 10_000 > 10 * (returned - before)
