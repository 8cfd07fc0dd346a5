"""Commands as a person types them: bad input gives exit code 2, one clear sentence, and leaves nothing behind."""

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from mmjax.config import load_config
from mmjax.errors import StorageError, UserError, run_command
from mmjax.run.directory import RunDir
from tests.helpers import TINY, rarely, run_main

REPOSITORY = Path(__file__).parent.parent


def run_train(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
  """Runs train.py in this process; returns its exit code and stderr."""
  code, _, err = run_main(train.main, monkeypatch, capsys, *arguments)
  return code, err


def tiny_flags(tmp_path: Path, **settings: object) -> list[str]:
  values = TINY | {'data.prepared_dir': f'{tmp_path}/data', 'data.workers': 1}
  values |= {name.replace('__', '.'): value for name, value in settings.items()}
  return ['--config', 'configs/base.py', '--workdir', f'{tmp_path}/run'] + [
    f'--config.{name}={value}' for name, value in values.items()
  ]


def sentence_of(err: str) -> str:
  """The last line of stderr; there must be no traceback above it."""
  assert 'Traceback' not in err
  return err.strip().splitlines()[-1]


GOOD = json.dumps({'text': 'a document like any other'})
BAD_TEXT = {
  'missing': (None, 'text.jsonl'),
  'empty': (b'', 'text.jsonl'),
  'not JSON': (f'{GOOD}\n{{"text": \n'.encode(), 'text.jsonl:2'),
  'not UTF-8': (f'{GOOD}\n'.encode() + b'{"text": "\xff\xfe"}\n', 'text.jsonl:2'),
  'nested too deep': (f'{GOOD}\n'.encode() + b'{"text": ' + b'[' * 100_000 + b']' * 100_000 + b'}\n', 'text.jsonl:2'),
  'without the key': (f'{GOOD}\n{json.dumps({"body": "x", "title": "y"})}\n'.encode(), "'body', 'title'"),
  'no string': (f'{GOOD}\n{json.dumps({"text": 3})}\n'.encode(), 'text.jsonl:2'),
}


@pytest.mark.parametrize(
  ('module', 'flags'),
  [
    ('eval', ['--workdir', '~/r']),
    ('mmjax.tools.sample', ['--workdir', '~/r']),
    ('mmjax.tools.report', ['--workdir', '~/r']),
    ('mmjax.tools.inspect', ['--workdir', '~/r', '--row', '1']),
    ('mmjax.tools.inspect', ['--workdir', 'x', '--text_file', '~/r']),
    ('mmjax.tools.inspect', ['--workdir', 'x', '--row', '1', '--json', '~/r/x.json']),
    ('mmjax.tools.compare', ['~/r']),
    ('mmjax.tools.breakdown', ['~/r']),
    ('mmjax.tools.cost', ['--config', '~/r.py']),
    ('mmjax.tools.sweep', ['~/r.py']),
    ('mmjax.tools.prepare', ['--train_files', '~/r.jsonl']),
    ('mmjax.tools.prepare', ['--tokenizer', '~/r.model']),
    ('mmjax.tools.bank', ['build', '--files', '~/r.txt', '--out', 'x.safetensors']),
    ('mmjax.tools.convert', ['import', '--from', '~/r.pth', '--out', 'x']),
    ('mmjax.tools.convert', ['export', '--workdir', '~/r', '--to', 'x.safetensors']),
    ('train', ['--config', '~/r.py']),
    ('train', ['--config', 'configs/base.py', '--config.data.train_files=~/r.jsonl']),
  ],
)
def test_home_is_meant_by_a_leading_tilde_in_every_path(module, flags, tmp_path, monkeypatch, capfd):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setattr(sys, 'argv', [module, *flags])
  with pytest.raises(SystemExit) as stopped:
    run_command(importlib.import_module(module).main)
  err = capfd.readouterr().err
  assert stopped.value.code == 2 and ('~' not in err or 'must lie in a folder that is there' in err), err


@pytest.mark.parametrize(
  ('tool', 'flags', 'output'),
  [
    ('inspect', ['--workdir', 'x', '--row', '1'], '--json'),
    ('breakdown', ['x'], '--json'),
    ('breakdown', ['x'], '--markdown'),
    ('serve', ['--workdir', 'x', '--text', 'a'], '--save'),
  ],
)
def test_folder_of_what_will_be_written_is_looked_for_at_once(tool, flags, output, tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', [tool, *flags, output, 'nowhere/x'])
  with pytest.raises(SystemExit):
    run_command(importlib.import_module(f'mmjax.tools.{tool}').main)
  assert f"{output} 'nowhere/x' must lie in a folder that is there" in capfd.readouterr().err
  monkeypatch.setattr(sys, 'argv', [tool, *flags, output, str(tmp_path)])
  with pytest.raises(SystemExit):
    run_command(importlib.import_module(f'mmjax.tools.{tool}').main)
  assert 'is a folder and must be a file' in capfd.readouterr().err
  monkeypatch.setattr(sys, 'argv', [tool, *flags, output, '/proc/x'])  # takes no file, whoever asks
  with pytest.raises(SystemExit):
    run_command(importlib.import_module(f'mmjax.tools.{tool}').main)
  assert "'/proc/x' cannot be written" in capfd.readouterr().err


def test_home_is_where_what_is_written_goes(text, tmp_path, monkeypatch, capfd):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  flags = ['--config.data.prepared_dir=~/d', '--config.runtime.compilation_cache_dir=~/c']
  config = load_config('configs/base.py', flags)
  assert (config.data.prepared_dir, config.runtime.compilation_cache_dir) == (f'{tmp_path}/d', f'{tmp_path}/c')
  prepare = ['--train_files', f'{text}/text.jsonl', '--out', '~/p', '--vocab_size', '300', '--workers', '1']
  monkeypatch.setattr(sys, 'argv', ['prepare', *prepare])
  importlib.import_module('mmjax.tools.prepare').main()
  out, err = capfd.readouterr()
  assert out.startswith(f'{tmp_path}/p/text-')
  train = f'python train.py --config configs/exp_1_4_2.py --config.data.prepared_dir={out.strip()}'
  assert err.splitlines()[-1] == f'Train on it: {train} --config.model.vocab_size=300'
  assert RunDir('~/r').path == tmp_path / 'r'
  assert [path.name for path in tmp_path.iterdir()] == ['p']


@pytest.mark.parametrize('case', BAD_TEXT)
def test_bad_text_is_named_by_file_and_line(case, tmp_path, monkeypatch, capsys):
  content, said = BAD_TEXT[case]
  if content is not None:
    (tmp_path / 'text.jsonl').write_bytes(content)
  flags = tiny_flags(tmp_path, data__train_files=f'{tmp_path}/text.jsonl')
  code, err = run_train(monkeypatch, capsys, *flags)
  assert code == 2
  assert said in sentence_of(err)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.model.knowledge_num=65', 'nearest: 64 and 81'),
    ('--config.model.num_selected=9', 'at most the 8 sub-keys'),
    ('--config.model.dim=30', 'must be divisible by model.n_heads=4'),
    ('--config.train.learning_rat=1', "did you mean 'train.learning_rate'?"),
    ('--learning_rate=1', 'is not understood'),
  ],
)
def test_bad_setting_is_refused_before_anything_is_written(flag, said, tmp_path, monkeypatch, capsys):
  code, err = run_train(monkeypatch, capsys, *tiny_flags(tmp_path), flag)
  assert code == 2
  assert said in sentence_of(err)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('error', 'code', 'said'),
  [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/disk/a'), 4, '/disk/a: No space left on device'),
    (OSError(errno.EROFS, os.strerror(errno.EROFS)), 4, 'Read-only file system'),
    (OSError(errno.EIO, os.strerror(errno.EIO), 'a'), 4, 'a: Input/output error'),
    (OSError(errno.ESTALE, os.strerror(errno.ESTALE), 'nfs/a'), 4, 'nfs/a: Stale file handle'),
    (PermissionError(errno.EACCES, os.strerror(errno.EACCES), 'b'), 2, 'b: Permission denied'),
    (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), 'n'), 2, 'n: File name too long'),
    (UserError('no file \x1b[2J\x07\u202e \udcff'), 2, 'no file \\x1b[2J\\x07\\u202e \\udcff'),
    (StorageError('two\nlines'), 4, 'two\nlines'),
    (KeyboardInterrupt(), 130, 'Interrupted.'),
    (BrokenPipeError(), 141, ''),
  ],
)
def test_what_ends_a_command_is_one_plain_sentence_and_a_code(error, code, said, capfd):
  def fail():
    raise error

  with pytest.raises(SystemExit) as stopped:
    run_command(fail)
  assert (stopped.value.code, capfd.readouterr().err) == (code, said and f'{said}\n')


def outcome(lines):
  """Runs a program; returns its exit code and what it wrote to stdout and stderr."""
  done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], capture_output=True, text=True, timeout=60)
  return done.returncode, done.stdout, done.stderr


def test_ctrl_c_does_not_wait_for_the_end_of_python_in_which_threads_of_jax_crash():
  lines = [
    'import atexit',
    'from mmjax.errors import run_command',
    'def main():',
    "  atexit.register(print, 'Python ends')",
    "  print('written before')",
    '  raise KeyboardInterrupt',
    'run_command(main)',
  ]
  assert outcome(lines) == (130, 'written before\n', 'Interrupted.\n')


def test_ctrl_c_within_a_callback_of_the_garbage_collector_is_heard():
  lines = [
    'import gc, signal, time',
    'from mmjax.errors import run_command',
    'def interrupt(*_):',
    '  gc.callbacks.clear()',
    '  signal.raise_signal(signal.SIGINT)',
    'def main():',
    '  signal.signal(signal.SIGINT, signal.default_int_handler)',  # a shell ignores it in what runs in the background
    '  gc.callbacks.append(interrupt)',
    '  gc.collect()',
    '  time.sleep(30)',
    "  print('not heard')",
    'run_command(main)',
  ]
  assert outcome(lines) == (130, '', 'Interrupted.\n')


@pytest.mark.parametrize('write', ['print', 'show'])
def test_output_that_nobody_reads_is_no_error(write):
  code = 'from mmjax.console import show\nfrom mmjax.errors import run_command\n'
  code += f'run_command(lambda: [{write}("x" * 1000) for _ in range(1000)])'
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.read(10)
  process.stdout.close()
  assert process.wait(60) == 141 and process.stderr.read() == b''
  process.stderr.close()


def test_tokenizer_with_more_pieces_than_the_model_is_refused_with_both_numbers(tmp_path, monkeypatch, capsys):
  (tmp_path / 'text.jsonl').write_text('\n'.join(json.dumps({'text': f'document {i} of many'}) for i in range(50)))
  flags = tiny_flags(tmp_path, data__train_files=f'{tmp_path}/text.jsonl', model__vocab_size=280 + 20)
  prepare = [sys.executable, '-m', 'mmjax.tools.prepare', '--train_files', f'{tmp_path}/text.jsonl']
  done = subprocess.run(
    [*prepare, '--vocab_size', '300', '--out', f'{tmp_path}/prepared'],
    cwd=REPOSITORY, capture_output=True, text=True, env=os.environ,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (tokenizer,) = Path(tmp_path).rglob('tokenizer.model')
  code, err = run_train(
    monkeypatch, capsys, *flags, f'--config.data.tokenizer={tokenizer}', '--config.model.vocab_size=299'
  )
  assert code == 2
  assert '300' in sentence_of(err) and '299' in sentence_of(err)


def test_workdir_that_is_empty_is_refused(tmp_path, monkeypatch, capsys):
  flags = tiny_flags(tmp_path, data__train_files=f'{tmp_path}/missing.jsonl')
  code, err = run_train(monkeypatch, capsys, *flags, '--workdir', '')
  assert code == 2 and 'a path is empty' in sentence_of(err)


def test_workdir_that_is_a_file_is_refused(tmp_path, monkeypatch, capsys):
  (tmp_path / 'run').write_text('a file')
  (tmp_path / 'text.jsonl').write_text('\n'.join(json.dumps({'text': f'document {i} of many'}) for i in range(99)))
  code, err = run_train(monkeypatch, capsys, *tiny_flags(tmp_path, data__train_files=f'{tmp_path}/text.jsonl'))
  assert code == 2
  assert 'is a file' in sentence_of(err)
  assert (tmp_path / 'run').read_text() == 'a file'


@pytest.mark.parametrize('guarded', [True, False])
def test_ctrl_c_during_imports_ends_the_command_though_a_library_swallows_it(guarded):
  lines = [
    'import contextlib, os, signal, time',
    'from mmjax.errors import interrupt_ends_at_once',
    'signal.signal(signal.SIGINT, signal.default_int_handler)',  # jobs in the background begin without it
    f'with {"interrupt_ends_at_once" if guarded else "contextlib.nullcontext"}():',
    '  try:',
    '    os.kill(os.getpid(), signal.SIGINT)',
    '    time.sleep(5)',
    '  except:',
    '    pass',
    'print("goes on")',
  ]
  done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=REPOSITORY, capture_output=True, text=True)
  got = (done.returncode, done.stdout, done.stderr)
  assert got == ((130, '', 'Interrupted.\n') if guarded else (0, 'goes on\n', ''))


LOADING = {  # commands as they are typed; what they name need not be there, for they ask only afterwards
  'bank': 'build --files {folder}/text.jsonl --out {folder}/bank.safetensors',
  'breakdown': '{folder}',
  'compare': '{folder}',
  'convert': 'export --workdir {folder} --to {folder}/weights.safetensors',
  'cost': '--config configs/base.py',
  'inspect': '--workdir {folder} --text x',
  'report': '--workdir {folder}',
  'sample': '--workdir {folder} --prompt x',
  'serve': '--workdir {folder}',
  'sweep': 'sweeps/memory.py',
}


@pytest.mark.parametrize('command', rarely(LOADING, 'train'))
def test_ctrl_c_while_a_command_loads_jax_is_one_word(command, tmp_path):
  """The jax that it finds here is an import that is interrupted, and swallows that."""
  (tmp_path / 'jax').mkdir()
  (tmp_path / 'jax' / '__init__.py').write_text(
    'import os, signal, time\ntry:\n  os.kill(os.getpid(), signal.SIGINT)\n  time.sleep(5)\nexcept:\n  pass\n'
  )
  (tmp_path / 'text.jsonl').write_text('{"text": "one"}\n')
  done = subprocess.run(
    [sys.executable, '-m', f'mmjax.tools.{command}', *LOADING[command].format(folder=tmp_path).split()],
    cwd=REPOSITORY,
    env=os.environ | {'PYTHONPATH': f'{tmp_path}{os.pathsep}{REPOSITORY}'},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout, done.stderr) == (130, '', 'Interrupted.\n')
