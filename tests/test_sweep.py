"""Sweeps: all runs that are kept are checked before one starts; runs are made, skipped, stopped, resumed and recorded.

Most tests put a small stand-in in the place of the process that trains: it leaves in its directory what a run leaves.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmjax import console
from mmjax.console import Progress
from mmjax.errors import CommandError, StoppedError, UserError
from mmjax.report.found import FoundRun
from mmjax.run.directory import RunDir
from mmjax.tools import sweep as sweep_tool
from mmjax.tools import sweep_runs
from mmjax.tools.sweep_file import Planned, read_sweep
from mmjax.tools.sweep_runs import Sweep
from tests.helpers import TINY, rarely, tiny_config

REPOSITORY = Path(__file__).parent.parent
SWEEP = """
from mmjax.tools.sweep_file import Run

def get_runs(steps='4', codes='0,0,0'):
  codes = codes.split(',')
  settings = {'train.max_steps': int(steps), 'data.train_files': 'text.jsonl'}
  return [Run(name, 'configs/base.py', settings | {'data.text_key': code}, seed)
    for (name, seed), code in zip([('a', 0), ('a', 1), ('b', 0)], codes)]
"""
# Reports every 20 ms what a run reports, saves when it is told to stop (told twice it does not), and ends with the
# code in data.text_key.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from mmjax.config import load_config
path, arguments = Path(sys.argv[-1]), sys.argv[1:-2]
config = load_config(arguments[1], arguments[2:])
(path / 'checkpoints').mkdir(parents=True, exist_ok=True)
(path / 'config.json').write_text(json.dumps(config.to_dict()))
(path / 'run.json').write_text('{}')
stopped = []
signal.signal(signal.SIGTERM, lambda *_: os._exit(130) if stopped else stopped.append(1))
start = max([int(p.name) for p in (path / 'checkpoints').iterdir()], default=0)
with open(path / 'starts', 'a') as file:
  file.write(f'{start}\\n')
for step in range(start + 1, config.train.max_steps + 1):
  time.sleep(0.02)
  with open(path / 'metrics.jsonl', 'a') as log:
    for kind in ('train', 'eval'):
      record = {'kind': kind, 'step': step, 'loss': 9 - step / 1000, 'tokens': 8 * step, 'bits_per_byte': 2.5}
      log.write(json.dumps(record) + '\\n')
  if stopped:
    time.sleep(0.2)  # to save
    break
code = int(config.data.text_key)
if not code or stopped:
  (path / 'checkpoints' / str(step)).mkdir()
print('the last words', file=sys.stderr)
sys.exit(75 if stopped else code)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
  """Runs the command in this process with the stand-in; returns what it raised, or None."""
  (tmp_path / 'sweep.py').write_text(SWEEP)
  (tmp_path / 'stand_in.py').write_text(STAND_IN)
  monkeypatch.setattr(sweep_runs, 'CHILD', (sys.executable, str(tmp_path / 'stand_in.py')))
  monkeypatch.setattr(sweep_runs, 'LOOK_SECONDS', 0.02)
  monkeypatch.setenv('PYTHONPATH', str(REPOSITORY))

  def run(*flags: str) -> BaseException | None:
    monkeypatch.setattr(sys, 'argv', ['sweep', str(tmp_path / 'sweep.py'), '--out', str(tmp_path / 'out'), *flags])
    try:
      sweep_tool.main()
    except CommandError as error:
      return error
    return None

  return run


def recorded(tmp_path: Path) -> dict[str, dict]:
  return json.loads((tmp_path / 'out' / 'sweep.json').read_text())['runs']


def starts(tmp_path: Path, name: str) -> list[int]:
  """The steps from which a run was started."""
  return [int(line) for line in (tmp_path / 'out' / name / 'starts').read_text().split()]


def test_runs_are_made_once_and_a_failure_does_not_end_the_sweep(sweep, tmp_path, capsys):
  error = sweep('--set', 'codes=0,3,1')
  assert error.exit_code == 3 and '2 of 3 runs are not done; a-s1 diverged: the last words' in str(error)
  found = recorded(tmp_path)
  assert {name: run['state'] for name, run in found.items()} == {'a-s0': 'done', 'a-s1': 'diverged', 'b-s0': 'failed'}
  assert (found['a-s0']['step'], found['a-s0']['loss'], found['b-s0']['exit_code']) == (4, 8.996, 1)
  said = capsys.readouterr().out
  assert '[1/3] a-s0  done  4 updates  validation loss 8.9960, 2.5000 bits per byte' in said
  assert re.search(r'\[3/3\] b-s0  failed  4 updates  training loss 8.9960  \d+ s  exit code 1: the last words', said)
  # Again: what is done and what diverged is left alone, what failed is tried again.
  assert sweep('--set', 'codes=0,3,1').exit_code == 3
  assert [len(starts(tmp_path, name)) for name in ('a-s0', 'a-s1', 'b-s0')] == [1, 1, 2]
  assert sweep('--set', 'codes=0,3,1', '--retry', '--only', 'a-*').exit_code == 3
  assert [len(starts(tmp_path, name)) for name in ('a-s0', 'a-s1', 'b-s0')] == [1, 2, 2]
  sweep('--set', 'codes=0,3,1', '--retry', '--only', 'b-*')
  assert list(recorded(tmp_path)) == ['a-s0', 'a-s1', 'b-s0']  # compare measures against the first


def test_limit_of_time_saves_and_the_same_command_goes_on(sweep, tmp_path, monkeypatch):
  class Clock:  # an hour passes once the run has reported
    time = time.time

    @staticmethod
    def monotonic() -> float:
      return 3600.0 if FoundRun(tmp_path / 'out' / 'a-s0').last_reports() else 0.0

  flags = ('--set', 'steps=40', '--only', 'a-s0,b-*')
  with monkeypatch.context() as patch:
    patch.setattr(sweep_tool, 'time', Clock)
    patch.setattr(sweep_runs, 'time', Clock)
    error = sweep(*flags, '--max_minutes', '59')
  assert isinstance(error, StoppedError) and 'the same command goes on' in str(error)
  step = FoundRun(tmp_path / 'out' / 'a-s0', tiny_config(train__max_steps=40)).step
  assert 0 < step < 40 and f'Stopped in a-s0, step {step};' in str(error)
  assert recorded(tmp_path)['a-s0']['state'] == 'stopped' and not (tmp_path / 'out' / 'b-s0').exists()
  assert sweep(*flags) is None
  assert starts(tmp_path, 'a-s0') == [0, step] and starts(tmp_path, 'b-s0') == [0]


@pytest.mark.parametrize('number', rarely([signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], signal.SIGINT))
def test_signal_saves_the_running_one_and_exits_75(sweep, tmp_path, number):
  command = (
    'import sys; from mmjax.errors import run_command; from mmjax.tools import sweep, sweep_runs; '
    f'sweep_runs.CHILD = (sys.executable, {str(tmp_path / "stand_in.py")!r}); run_command(sweep.main)'
  )
  flags = [str(tmp_path / 'sweep.py'), '--out', str(tmp_path / 'out'), '--set', 'steps=2000']
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  process = subprocess.Popen([sys.executable, '-c', command, *flags], cwd=REPOSITORY, start_new_session=True, **pipes)
  wait_for(lambda: FoundRun(tmp_path / 'out' / 'a-s0').last_reports())
  os.killpg(process.pid, number)  # as Ctrl-C does: to the whole group of the terminal
  out, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  assert 'Stopped in a-s0, step' in err and 'a-s0  stopped' in out and 'not begun' in out
  step = FoundRun(tmp_path / 'out' / 'a-s0', tiny_config()).step
  assert FoundRun(tmp_path / 'out' / 'a-s0').last_reports()['train']['step'] == step > 0


def wait_for(condition, seconds: float = 60) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'waited in vain'
    time.sleep(0.05)


def test_run_without_its_checkpoints_is_finished_if_it_was_evaluated_at_the_end(sweep, tmp_path):
  assert sweep() is None
  for name in ('a-s0', 'a-s1'):
    for path in (tmp_path / 'out' / name / 'checkpoints').iterdir():
      path.rmdir()
  (tmp_path / 'out' / 'a-s0' / 'checkpoints').rmdir()
  assert sweep() is None
  assert [len(starts(tmp_path, name)) for name in ('a-s0', 'a-s1', 'b-s0')] == [1, 2, 1]


def test_changed_setting_is_refused_before_any_run_starts(sweep, tmp_path):
  assert sweep('--only', 'b-*') is None
  error = sweep('--set', 'steps=5')
  assert isinstance(error, UserError) and 'b-s0 was made with other settings: train.max_steps' in str(error)
  assert not (tmp_path / 'out' / 'a-s0').exists()


@pytest.mark.parametrize('minutes', ['-1', 'nan'])
def test_minutes_that_are_none_are_refused(sweep, minutes):
  assert 'must be at least 0' in str(sweep('--max_minutes', minutes, '--dry_run'))


def test_dry_run_lists_and_changes_nothing(sweep, tmp_path, capsys):
  assert sweep('--dry_run', '--set', 'codes=0,0,7', '--config.model.dim=64') is None
  said = capsys.readouterr().out
  assert '3 runs, in' in said and 'data.text_key=7' in said
  assert 'all with data.train_files=text.jsonl model.dim=64 train.max_steps=4' in said
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--set', 'step=3'], "get_runs() has no argument 'step'; did you mean 'steps'?"),
    (['--set', 'steps'], "--set 'steps' is not understood"),
    (['--set', 'steps=-1'], "run 'a': train.max_steps=-1 must be"),
    (['--only', 'c-*'], "no run matches 'c-*'; there are a-s0, a-s1, b-s0"),
    (['--only', 'a-*,c-*'], "no run matches 'c-*'; there are a-s0, a-s1, b-s0"),
    (['--config.model.dimm=3'], "no setting 'model.dimm'; did you mean 'model.dim'?"),
    (['--config.seed=3'], '--config.seed=3 must be left out'),
  ],
)
def test_mistakes_are_refused_before_anything_starts(sweep, tmp_path, flags, said):
  error = sweep(*flags)
  assert isinstance(error, UserError) and said in str(error)
  assert not (tmp_path / 'out').exists()


@pytest.mark.thorough
def test_overrides_concern_the_runs_that_are_kept():
  zeros = ['--config.memory.bank_std=0']
  with pytest.raises(UserError, match="run 'g0-3M': .*memory.bank_std=0.0 does nothing"):
    read_sweep('sweeps/lasting.py', overrides=zeros)
  [kept] = read_sweep('sweeps/lasting.py', overrides=zeros, only='g52-3M-s0')
  assert kept.name == 'g52-3M-s0' and kept.config.memory.bank_std == 0


def test_two_runs_of_one_name_are_refused(tmp_path):
  (tmp_path / 'sweep.py').write_text(SWEEP.replace("('a', 1)", "('a', 0)"))
  with pytest.raises(UserError, match="two runs are called 'a-s0'"):
    read_sweep(str(tmp_path / 'sweep.py'))
  (tmp_path / 'sweep.py').write_text('def get_runs():\n  return [1]\n')
  with pytest.raises(UserError, match=r'must return a list of mmjax.tools.sweep_file.Run, not \[1\]'):
    read_sweep(str(tmp_path / 'sweep.py'))


def test_second_sweep_in_a_folder_is_refused(sweep, tmp_path):
  from mmjax.files import locked_directory

  with locked_directory(tmp_path / 'out', lambda: None):
    error = sweep()
  assert isinstance(error, UserError) and 'another sweep works in' in str(error)


def test_run_that_a_process_still_has_is_waited_for(sweep, tmp_path, capsys):
  """So it is where the sweep before was killed and its run is still saving."""
  begun, run = time.monotonic(), RunDir(tmp_path / 'out' / 'a-s0')
  run.__enter__()
  threading.Timer(1.5, run.__exit__).start()
  sweep('--only', 'a-s0')
  assert time.monotonic() - begun > 1.5
  assert recorded(tmp_path)['a-s0']['state'] == 'done'
  assert re.search(r'\[1/1\] a-s0  waits: .*a-s0 is in use by process', capsys.readouterr().out)


def test_steps_of_a_run_by_epochs_come_from_its_data(tiny_run):
  assert FoundRun(tiny_run).total == 6 and FoundRun(tiny_run).finished
  index = json.loads((tiny_run / 'data.json').read_text())
  by_epochs = tiny_config(train__max_steps=0, train__epochs=2)
  tokens, rows = index['splits']['train']['tokens'], by_epochs.train.batch_size * by_epochs.train.accumulation_steps
  assert FoundRun(tiny_run, by_epochs).total == 2 * -(-tokens // by_epochs.model.max_seq_len) // rows
  assert FoundRun(tiny_run / 'nowhere', by_epochs).total is None


def test_live_line_shows_steps_loss_and_time_left(tmp_path, monkeypatch):
  monkeypatch.setattr(console, 'LINE_SECONDS', 0)
  now, begun = [100.0], time.time() - 60
  monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
  run = Planned('a', tiny_config(train__max_steps=40), [])
  (tmp_path / 'a').mkdir()
  shown = Sweep(tmp_path, [run])
  shown.progress = Progress(stream := io.StringIO())
  report = {'kind': 'train', 'step': 10, 'loss': 5.25}
  for line in ('', json.dumps(report) + '\n{"kind": "tra', json.dumps(report | {'step': 20, 'loss': None}) + '\n'):
    (tmp_path / 'a' / 'metrics.jsonl').write_text(line)
    shown.show(run, '[1/1] a', begun)
    now[0] += 20
  assert stream.getvalue().splitlines() == [
    '[1/1] a  step 10/40  loss 5.2500', '[1/1] a  step 20/40  loss not finite  40 s left'
  ]  # fmt: skip


@pytest.mark.thorough
def test_killed_sweep_leaves_a_saved_run_that_the_same_command_finishes(tmp_path):
  words = 'a sweep ends and its runs are saved and go on where they were'.split()
  documents = [json.dumps({'text': ' '.join(words[i % 7 :] * 3)}) for i in range(200)]
  (tmp_path / 'text.jsonl').write_text('\n'.join(documents))
  settings = {name: value for name, value in TINY.items() if 'knowledge' not in name and 'selected' not in name}
  settings |= {'train.max_steps': 400, 'train.log_interval': 5, 'data.train_files': f'{tmp_path}/text.jsonl'}
  settings |= {'data.prepared_dir': f'{tmp_path}/data', 'data.valid_fraction': 0.1, 'data.workers': 1}
  runs = f"[Run('one', 'configs/exp_1_4_0.py', {settings!r}, seed) for seed in (0, 1)]"
  (tmp_path / 'sweep.py').write_text(f'from mmjax.tools.sweep_file import Run\n\n\ndef get_runs():\n  return {runs}\n')
  command = [sys.executable, '-m', 'mmjax.tools.sweep', str(tmp_path / 'sweep.py'), '--out', str(tmp_path / 'out')]
  process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
  wait_for(lambda: FoundRun(tmp_path / 'out' / 'one-s0').last_reports(), 120)
  process.kill()
  process.wait()
  log = tmp_path / 'out' / 'logs' / 'one-s0.log'
  wait_for(lambda: 'the same command goes on from there' in log.read_text())
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'Resuming' in log.read_text() and done.stdout.count('validation loss') >= 2
  other = FoundRun(tmp_path / 'out' / 'one-s1')
  assert other.finished and other.config.seed == 1


@pytest.mark.parametrize(
  ('run', 'said'),
  [
    ("Run('a', 'configs/base.py', {'seed': 1})", r"run 'a' has 'seed' in its overrides; give it as Run\(seed=...\)"),
    (
      "Run('a', 'configs/base.py', {'experiment': 'b'})",
      r"'experiment' in its overrides; give it as Run\(name=...\)",
    ),
    ("Run('a', 'configs/base.py', {}, '0')", "seed='0' of run 'a' must be an int"),
    ("Run('a', 'configs/base.py', None)", "overrides of run 'a' must be a dict, not None"),
  ],
)
def test_run_of_a_sweep_file_that_says_something_else_than_it_seems_is_refused(tmp_path, run, said):
  text = f'from mmjax.tools.sweep_file import Run\ndef get_runs(a=1):\n  return [{run}]\n'
  (tmp_path / 'sweep.py').write_text(text)
  with pytest.raises(UserError, match=said):
    read_sweep(str(tmp_path / 'sweep.py'))
  with pytest.raises(UserError, match='--set a=... is given twice'):
    read_sweep(str(tmp_path / 'sweep.py'), ['a=1', 'a=2'])
