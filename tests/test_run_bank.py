"""The bank file that a run started from: recorded by its hash, and checked wherever the file is used again."""

import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.config import load_config
from mmjax.errors import UserError
from mmjax.files import read_json, seal
from mmjax.report.found import FoundRun
from mmjax.report.rows import make_rows, summary
from mmjax.report.write import write_report
from mmjax.tools import inspect
from mmjax.training.loop import fit
from tests.helpers import TINY_CONFIG, overrides


def write_bank(path, seed):
  """Writes a bank of 64 x 8 and texts that name its seed."""
  rows = np.random.default_rng(seed).standard_normal((64, 8)).astype(np.float32)
  save_file({'memory_bank': rows}, path)
  lines = [json.dumps({'row': row, 'text': f'seed {seed}, row {row}'}) for row in range(64)]
  path.with_suffix('.jsonl').write_text('\n'.join(lines))


def settings(text, bank, **more):
  more = {'memory__bank_init': 'file', 'memory__bank_file': bank, 'train__max_steps': 2} | more
  flags = [f'--config.{name.replace("__", ".")}={value}' for name, value in overrides(text, **more).items()]
  return load_config(TINY_CONFIG, flags)


@pytest.fixture(scope='module')
def trained(text, tmp_path_factory):
  folder = tmp_path_factory.mktemp('bank')
  write_bank(folder / 'bank.safetensors', 0)
  fit(settings(text, folder / 'bank.safetensors'), folder / 'run')
  return folder


@pytest.fixture
def case(trained, text, tmp_path):
  """A run and the bank file it names, both to be changed at will; and how it goes on."""
  bank = tmp_path / 'bank.safetensors'
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  config.pop('sha256')
  config['memory']['bank_file'] = str(bank)
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))

  def go_on(**more):
    fit(settings(text, bank, **{'train__max_steps': 3} | more), tmp_path / 'run', allow_config_change=True)

  return tmp_path / 'run', bank, go_on


def look(run, monkeypatch, capsys, *flags):
  out = run.parent / 'look.json'
  arguments = ['--workdir', run, '--row', 3, '--layer', 0, '--positions', 16, '--json', out, *flags]
  monkeypatch.setattr(sys, 'argv', ['inspect', *map(str, arguments)])
  inspect.main()
  found = json.loads(out.read_text())
  said = ''.join(capsys.readouterr().out.split())  # which a terminal breaks into lines, also within a path
  assert said.startswith(''.join(found['remark'].split()[:4]))
  return found['row']['snippet'], found['remark']


def forget(run):
  """Makes run.json one of an earlier version."""
  record = read_json(run / 'run.json')
  record['identity'] = {name: record['identity'][name] for name in ('data_sha256', 'tokenizer_sha256')}
  (run / 'run.json').write_text(json.dumps(seal(record)))


@pytest.mark.thorough
def test_bank_and_its_texts_are_recorded_by_hash_and_shown(case, monkeypatch, capsys):
  run, bank, go_on = case
  identity = read_json(run / 'run.json')['identity']
  assert identity['bank_sha256'] == hashlib.sha256(bank.read_bytes()).hexdigest()
  assert identity['bank_texts_sha256'] == hashlib.sha256(bank.with_suffix('.jsonl').read_bytes()).hexdigest()
  assert look(run, monkeypatch, capsys) == ('seed 0, row 3', '')
  assert 'is still that file' in write_report(run).read_text()


@pytest.mark.thorough
def test_texts_of_a_rebuilt_bank_are_not_shown_for_an_old_run(case, monkeypatch, capsys):
  run, bank, go_on = case
  write_bank(bank, 1)
  snippet, remark = look(run, monkeypatch, capsys)
  assert snippet is None and remark.endswith("bank.jsonl' is not what it was when the run started.")
  assert 'is another file now' in write_report(run).read_text()
  with pytest.raises(UserError, match=r'is not the bank that the run in .* started from .* name that file, or one'):
    go_on()
  bank.unlink()
  bank.with_suffix('.jsonl').unlink()
  assert look(run, monkeypatch, capsys)[1].startswith('The texts that the rows started from are not shown: there is no')
  assert 'is gone' in write_report(run).read_text()
  go_on()  # the checkpoint holds the bank
  assert 'bank_sha256' in read_json(run / 'run.json')['identity']


@pytest.mark.thorough
def test_bank_under_another_name_is_the_same_bank(case, monkeypatch, capsys):
  run, bank, go_on = case
  for name in ('bank.safetensors', 'bank.jsonl'):
    (bank.parent / name).rename(bank.parent / name.replace('bank', 'moved'))
  moved = bank.with_name('moved.safetensors')
  assert look(run, monkeypatch, capsys, f'--config.memory.bank_file={moved}') == ('seed 0, row 3', '')
  go_on(memory__bank_file=moved)


@pytest.mark.thorough
def test_run_that_never_saved_does_not_start_again_from_another_bank(case):
  run, bank, go_on = case
  shutil.rmtree(run / 'checkpoints')
  (run / 'newest_checkpoint').unlink()
  write_bank(bank, 1)
  with pytest.raises(UserError, match='is not the bank that the run'):
    go_on()


@pytest.mark.thorough
def test_run_of_an_earlier_version_says_that_it_has_no_record(case, monkeypatch, capsys):
  run, bank, go_on = case
  forget(run)
  write_bank(bank, 1)
  snippet, remark = look(run, monkeypatch, capsys)
  assert snippet == 'seed 1, row 3' and 'does not say which bank file the run started from: the texts shown' in remark
  assert 'does not say which bank file' in write_report(run).read_text()
  go_on()
  assert 'bank_sha256' not in read_json(run / 'run.json')['identity']


@pytest.mark.thorough
def test_comparison_tells_runs_from_other_banks_apart_and_takes_runs_without_one(case):
  run, bank, _ = case
  other, old = run.with_name('other'), run.with_name('old')
  shutil.copytree(run, other)
  record = read_json(other / 'run.json')
  record['identity']['bank_sha256'] = 'f' * 64
  (other / 'run.json').write_text(json.dumps(seal(record)))
  shutil.copytree(run, old)
  forget(old)
  rows = make_rows([FoundRun(path) for path in (run, other, old)])
  assert [list(summary(rows[0], row)['changed']) for row in rows] == [[], ['memory.bank_file'], ['memory.bank_file']]
