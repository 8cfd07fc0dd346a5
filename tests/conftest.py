"""Compiled programs are shared between the tests of a session, and with the processes that they start."""

import json
import os
import random
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

_cache = tempfile.TemporaryDirectory(prefix='mmjax-compiled-')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _cache.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')
# Tiny programs spend their time in the compiler: without LLVM's optimisations and the newer fusion code test_step, for
# one, takes 25 s of CPU time instead of 41.
_flags = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if tuple(map(int, version('jaxlib').split('.')[:2])) < (0, 11):  # later ones end the process at a flag they dropped
  _flags += ' --xla_cpu_use_fusion_emitters=false'
os.environ.setdefault('XLA_FLAGS', _flags)


WORDS = 'the memory reads a row of its bank and writes what it learned into the stream again'.split()


def pytest_addoption(parser):
  parser.addoption('--faults', type=int, default=20, help='how often runs are killed; over 20, checkpoints damaged')
  parser.addoption('--faults_seed', type=int, default=random.randrange(10**6), help='of the moments; printed')


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """A folder with a few hundred short documents in text.jsonl; their shards go there too."""
  folder = tmp_path_factory.mktemp('text')
  write_documents(folder, 300)
  return folder


@pytest.fixture
def gpu_forms(monkeypatch):
  """Runs on this CPU what a GPU would."""
  import jax

  from mmjax.kernels.forms import traced_for

  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *inputs, default, **_: default(*inputs))
  jax.clear_caches()  # what was traced before has the other form
  with traced_for('gpu'):
    yield
  jax.clear_caches()


@pytest.fixture(params=['cpu', 'gpu'])
def forms(request):
  """Runs a test twice: as a CPU computes, and as a GPU does."""
  if request.param == 'gpu':
    request.getfixturevalue('gpu_forms')
  return request.param


def write_documents(folder, count):
  draw = random.Random(0)
  documents = [' '.join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(count)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': d}) for d in documents))


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
  """A finished run directory of a model of a few thousand parameters; do not write into it."""
  from mmjax.training.loop import fit  # after the environment is set
  from tests.helpers import tiny_config

  folder = tmp_path_factory.mktemp('tiny')
  write_documents(folder, 200)
  config = tiny_config(
    data__train_files=f'{folder}/text.jsonl',
    data__valid_fraction=0.1,
    data__prepared_dir=f'{folder}/prepared',
    data__workers=1,
    train__max_steps=6,
    train__log_interval=2,
    train__eval_interval=3,
    train__checkpoint_interval=3,
  )
  fit(config, folder / 'run')
  return folder / 'run'


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of it to write into, in tmp_path."""
  return Path(shutil.copytree(tiny_run, tmp_path / 'run'))


@pytest.fixture(scope='session')
def texts():
  """Documents in English and Chinese, no two alike."""
  from tests.preparing import some_texts

  return some_texts(400)


@pytest.fixture
def corpus(tmp_path, texts):
  """The texts in a train.jsonl."""
  from tests.preparing import write

  return write(tmp_path / 'train.jsonl', texts)


@pytest.fixture(scope='session')
def shared(tmp_path_factory, texts):
  """A prepared directory and its input; not to be changed."""
  from tests.preparing import run, write

  folder = tmp_path_factory.mktemp('shared')
  corpus = write(folder / 'train.jsonl', texts)
  return run(folder, corpus)[0], corpus


@pytest.fixture
def prepared(shared, tmp_path):
  """A copy of it, and its input, which finds it again."""
  shutil.copytree(shared[0], tmp_path / 'out' / shared[0].name)
  return tmp_path / 'out' / shared[0].name, shared[1]
