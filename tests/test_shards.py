"""Writing shards: the same whatever interrupts it, however many processes do it, and on a disk that fills up."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mmjax.data import shards, worker
from mmjax.data.index import verify
from mmjax.data.prepare import prepare
from mmjax.errors import StorageError, UserError
from tests.preparing import ROOT, VOCAB, Said, contents, damage, run, settings, small_shards

RUNNER = """
import sys
from mmjax.data import blocks, shards
from mmjax.errors import run_command
from mmjax.tools import prepare
blocks.BLOCK_BYTES, shards.SHARD_TOKENS = 4000, 3000
sys.argv = ['prepare', '--out', sys.argv[1], '--train_files', sys.argv[2], '--vocab_size', '400',
  '--valid_fraction', '0.1', '--workers', '1']
if __name__ == '__main__':
  run_command(prepare.main)
"""


def start(out, train, **options):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-c', RUNNER, str(out), str(train)]
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
  )


def finish(process):
  out, err = process.communicate(timeout=60)
  return process.returncode, out.strip(), err


def test_result_does_not_depend_on_the_number_of_workers(tmp_path, corpus, monkeypatch):
  small_shards(monkeypatch)
  one, _ = run(tmp_path, corpus, prepared_dir=str(tmp_path / 'one'), workers=1)
  three, _ = run(tmp_path, corpus, prepared_dir=str(tmp_path / 'three'), workers=3)
  assert contents(one) == contents(three)


@pytest.mark.thorough
def test_killed_at_any_time_it_goes_on_and_ends_with_the_same_files(tmp_path, corpus):
  code, undisturbed, _ = finish(start(tmp_path / 'calm', corpus))
  assert code == 0
  out, resumed = tmp_path / 'killed', 0
  for name in ('tokenizer.model', 'train-00001.bin', 'progress.json', 'train-00003.bin', 'train-00005.bin'):
    process = start(out, corpus)
    while process.poll() is None and not list(out.glob(f'*/{name}')):
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    resumed += 'going on after the last whole shard' in finish(process)[2]
  code, directory, err = finish(start(out, corpus))
  assert code == 0 and resumed + ('going on' in err) >= 2, err
  assert contents(directory) == contents(undisturbed)


@pytest.mark.thorough
def test_interrupted_shards_that_were_damaged_are_made_again(tmp_path, corpus, monkeypatch):
  small_shards(monkeypatch)
  whole, _ = run(tmp_path, corpus, prepared_dir=str(tmp_path / 'whole'))
  monkeypatch.setattr(shards.ShardBuilder, '_finish_shards', stop_after(3))
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, corpus)
  damage(next((tmp_path / 'out').glob('*/train-00001.bin')), 'flipped')
  monkeypatch.undo()
  small_shards(monkeypatch)
  directory, said = run(tmp_path, corpus)
  assert 'going on' not in str(said) and contents(directory) == contents(whole)


def stop_after(rounds):
  real, done = shards.ShardBuilder._finish_shards, []

  def finish_shards(self, position):
    if len(done) == rounds:
      raise KeyboardInterrupt
    done.append(1)
    real(self, position)

  return finish_shards


@pytest.mark.thorough
def test_write_that_fails_ends_with_exit_code_4_and_can_go_on(tmp_path, corpus):

  def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # stands in for a full disk

  command = [sys.executable, '-m', 'mmjax.tools.prepare', '--out', str(tmp_path / 'out'), '--train_files', str(corpus),
    '--vocab_size', '400', '--valid_fraction', '0.1']  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False)
  assert done.returncode == 4, done.stderr
  assert "train-00000.bin' cannot be written: File too large\n" in done.stderr and 'Traceback' not in done.stderr
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and verify(done.stdout.strip())


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path, corpus, monkeypatch):
  monkeypatch.setattr('mmjax.files.free_bytes', lambda path: 1000)
  with pytest.raises(StorageError, match=r'needs about \d+\.\d MB but 0\.0 MB are free'):
    run(tmp_path, corpus)
  assert not list((tmp_path / 'out').glob('*/*'))


def test_two_at_once_make_it_once(tmp_path, corpus):
  first, second = start(tmp_path / 'out', corpus), start(tmp_path / 'out', corpus)
  (code, directory, err), other = finish(first), finish(second)
  assert (code, other[0]) == (0, 0) and directory == other[1]
  assert sorted(('found prepared data' in err, 'found prepared data' in other[2])) == [False, True]


def test_dead_worker_is_one_sentence_and_no_process_is_left(tmp_path, corpus, monkeypatch):
  started, real = [], subprocess.Popen
  monkeypatch.setattr(subprocess, 'Popen', lambda *args, **more: started.append(real(*args, **more)) or started[-1])
  prepare(settings(tmp_path, corpus, workers=2), VOCAB, Said())
  assert len(started) == 2 and all(process.returncode is not None for process in started)

  def ask(self, *_):
    self.process.kill()
    return real_ask(self, *_)

  real_ask = worker._Worker.ask
  monkeypatch.setattr(worker._Worker, 'ask', ask)
  with pytest.raises(UserError, match='a tokenizer process ended with code -9 in .*train.jsonl, from line 1 on'):
    run(tmp_path, corpus, valid_fraction=0.2)
  assert len(started) == 3 and started[-1].returncode == -signal.SIGKILL


def test_large_vocabulary_is_stored_in_four_bytes():
  assert worker.token_dtype(2**16) == np.uint16 and worker.token_dtype(2**16 + 1) == np.uint32


def test_worker_imports_no_jax():
  code = 'import sys, mmjax.data.worker, mmjax.tools.prepare; print("jax" in sys.modules)'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == 'False\n'


def test_tokenizer_process_whose_parent_dies_in_a_message_ends_quietly():
  ours, other = multiprocessing.Pipe()
  command = [sys.executable, '-m', 'mmjax.data.worker', str(other.fileno())]
  child = subprocess.Popen(command, pass_fds=[other.fileno()], stderr=subprocess.PIPE, text=True)
  other.close()
  os.write(ours.fileno(), (1000).to_bytes(4, 'big') + b'{"tokenizer"')  # of 1000 bytes
  ours.close()
  assert child.communicate(timeout=60)[1] == '' and child.returncode == 0
