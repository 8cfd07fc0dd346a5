"""eval.py: the numbers of the training loop, on the same text; other text; prompts; what is refused."""

import json
import shutil
from pathlib import Path

import pytest

import eval as eval_command
import mmjax
from mmjax.console import printable
from mmjax.data.worker import is_held_out
from mmjax.evaluation.evaluate import EvalResult
from mmjax.inference.measure import beginnings, distinct_share, open_text, read_prompts, repeated_share
from mmjax.run.directory import RunDir
from tests.helpers import run_main


def run_eval(monkeypatch, capfd, *flags: str) -> tuple[int, str, str]:
  return run_main(eval_command.main, monkeypatch, capfd, '--max_new_tokens', 12, *flags)


@pytest.mark.thorough
def test_evaluation_repeats_the_numbers_of_training(run, monkeypatch, capfd):
  code, out, _ = run_eval(monkeypatch, capfd, '--workdir', str(run), '--checkpoint', 'last')
  assert code == 0
  found = json.loads((run / 'eval.json').read_text())
  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  logged = [line for line in lines if line['kind'] == 'eval'][-1]
  assert found['checkpoint'] == logged['step']
  for name in ('loss', 'perplexity', 'bits_per_byte', 'accuracy', 'tokens', 'text_bytes'):
    assert found[name] == pytest.approx(logged[name], rel=1e-6)
  assert all(health.pop('loss_zeroed') > 0 for health in found['bank'])
  assert found['bank'] == logged['bank']
  assert found['probes'] == pytest.approx(logged['probes'], rel=1e-6)
  assert f'{found["probes"]["loss_zeroed"]:.4f}' in out
  assert f'{found["loss"]:.4f}' in out and f'{found["bits_per_byte"]:.4f}' in out

  lm = mmjax.load(run, 'last')
  prompts = beginnings(open_text(lm.config, RunDir(run)))
  assert [sample['prompt'] for sample in found['samples']] == prompts
  texts = lm.generate(prompts, max_new_tokens=12)
  assert [sample['continuation'] for sample in found['samples']] == texts
  rows = lm.generate_tokens([lm.encode_prompt(prompt) for prompt in prompts], max_new_tokens=12)
  rows = [[token for token in row if token != lm.tokenizer.eos_id] for row in rows]
  assert found['distinct_2'] == distinct_share(rows, 2)
  assert found['repeated_4grams'] == repeated_share(rows, 4)
  assert printable(texts[0]) in (run / 'report.md').read_text()


@pytest.mark.thorough
def test_other_text_is_cut_with_the_tokenizer_of_the_run(run, tmp_path, monkeypatch, capfd):
  (tmp_path / 'other.txt').write_text('the bank reads the memory\n\nand writes it again')
  code, _, _ = run_eval(monkeypatch, capfd, '--workdir', str(run), '--valid_files', f'{tmp_path}/other.txt')
  assert code == 0
  found = json.loads((run / 'eval.json').read_text())
  tokenizer = mmjax.load(run).tokenizer
  documents = ['the bank reads the memory\n\nand writes it again']
  assert found['text_bytes'] == sum(len(d) for d in documents)
  assert found['tokens'] == sum(len(tokenizer.encode(d)) + 1 for d in documents)  # and an EOS each
  assert found['valid_files'] == f'{tmp_path}/other.txt'


@pytest.fixture
def moved(tiny_run, tmp_path):
  """A folder as it comes to another machine: run, text, prepared directory, and nothing where these were before."""
  for name in ('run', 'text.jsonl', 'prepared'):
    (shutil.copytree if (tiny_run.parent / name).is_dir() else shutil.copy)(tiny_run.parent / name, tmp_path / name)
  for name, change in (('config.json', change_config), ('run.json', change_record)):
    stored = json.loads((tmp_path / 'run' / name).read_text())
    del stored['sha256']  # changed on purpose
    change(stored)
    (tmp_path / 'run' / name).write_text(json.dumps(stored))
  return tmp_path


def change_config(stored):
  stored['data'] |= {'train_files': '/nowhere/text.jsonl', 'prepared_dir': '/nowhere/prepared'}


def change_record(stored):
  stored['starts'][-1]['prepared_dir'] = '/nowhere/prepared/text-0123456789ab'


def measured(folder):
  found = json.loads((folder / 'run' / 'eval.json').read_text())
  return {name: found[name] for name in ('loss', 'tokens', 'text_bytes', 'accuracy')}


@pytest.mark.thorough
def test_validation_text_is_known_by_its_hash_wherever_it_is(moved, tiny_run, tmp_path, monkeypatch, capfd):
  run = ('--workdir', str(moved / 'run'), '--checkpoint', 'last')
  code, _, err = run_eval(monkeypatch, capfd, *run)
  assert code == 2 and "no file '/nowhere/text.jsonl'" in err and 'give --config.data.prepared_dir=DIR' in err
  records = [json.loads(line) for line in (tiny_run / 'metrics.jsonl').read_text().splitlines()]
  logged = [record for record in records if record['kind'] == 'eval'][-1]
  record = json.loads((tiny_run / 'run.json').read_text())
  finished = moved / 'prepared' / Path(record['starts'][-1]['prepared_dir']).name  # others' text lies beside it
  (moved / 'elsewhere').mkdir()
  monkeypatch.chdir(moved / 'elsewhere')
  finished.rename(moved / 'shards')
  for given in (f'prepared_dir={moved}/shards', 'prepared_dir=..', f'train_files={moved}/text.jsonl'):
    flags = [f'--config.data.prepared_dir={moved}/new', f'--config.data.{given}', '--config.data.workers=1']
    code, _, err = run_eval(monkeypatch, capfd, *run, *flags)
    assert code == 0, err
    assert measured(moved) == pytest.approx({name: logged[name] for name in measured(moved)}, rel=1e-6)
  code, _, err = run_eval(monkeypatch, capfd, *run, '--config.model.dim=8')
  assert code == 2 and 'model.dim belongs to the run' in err


def test_other_validation_text_than_in_training_is_refused(moved, monkeypatch, capfd):
  with (moved / 'text.jsonl').open('a') as handle:
    handle.write('\n{"text": "the bank of the stream"}\n')
  shutil.rmtree(moved / 'prepared')
  code, _, err = run_eval(
    monkeypatch, capfd, '--workdir', str(moved / 'run'), f'--config.data.train_files={moved}/text.jsonl',
    f'--config.data.prepared_dir={moved}/new', '--config.data.workers=1',
  )  # fmt: skip
  assert code == 2
  assert 'was started with other data' in err and 'data.train_files /nowhere/text.jsonl -> ' in err
  assert not (moved / 'run' / 'eval.json').exists()


def test_what_cannot_be_written_is_refused_before_the_work(run, monkeypatch, capfd):
  (run / 'eval.json').mkdir()
  monkeypatch.setattr('mmjax.inference.api.load_run', None)  # which nobody calls
  code, _, err = run_eval(monkeypatch, capfd, '--workdir', str(run))
  assert code == 2 and "eval.json' is a folder and must be a file" in err


@pytest.mark.thorough
def test_evaluation_makes_nothing_where_it_is_called(run, tiny_run, tmp_path, monkeypatch, capfd):
  stored = json.loads((run / 'config.json').read_text())
  del stored['sha256']
  stored['data'] |= {'train_files': '', 'prepared_dir': 'out/data'}  # as of a run on the embedded corpus
  (run / 'config.json').write_text(json.dumps(stored))
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  (tmp_path / 'other.txt').write_text('the bank reads the memory')
  for more in ([], ['--valid_files', f'{tmp_path}/other.txt']):
    code, _, err = run_eval(monkeypatch, capfd, '--workdir', str(run), *more)
    assert code == 0 and not list((tmp_path / 'here').iterdir()), err
  stored = json.loads((run / 'run.json').read_text())
  del stored['sha256'], stored['starts'][-1]['prepared_dir']  # as of an earlier version
  (run / 'run.json').write_text(json.dumps(stored))
  code, _, err = run_eval(monkeypatch, capfd, '--workdir', str(run))
  assert code == 2 and 'cannot be found; give --config.data.prepared_dir=DIR' in err
  assert not list((tmp_path / 'here').iterdir())
  shutil.copytree(tiny_run.parent / 'prepared', tmp_path / 'out' / 'data')  # as `out` is copied from a machine
  code, _, err = run_eval(monkeypatch, capfd, '--workdir', str(run))
  assert code == 0 and not list((tmp_path / 'here').iterdir()), err


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (None, 'No such file'),
    (b'\n  \n', 'has no prompt'),
    (b'good\n\xff\n', 'not UTF-8: invalid start byte 0xff (byte 5)'),
    (b'\xff\xfea\0', 'is UTF-16'),
  ],
)
def test_bad_prompts_are_refused_before_anything_is_written(run, tmp_path, monkeypatch, capfd, content, said):
  if content is not None:
    (tmp_path / 'prompts.txt').write_bytes(content)
  code, out, err = run_eval(monkeypatch, capfd, '--workdir', str(run), '--prompts', f'{tmp_path}/prompts.txt')
  assert (code, out) == (2, '')
  assert said in err and err.count('\n') == 1
  assert not (run / 'eval.json').exists()


def test_only_the_end_of_a_line_ends_a_prompt(tmp_path):
  (tmp_path / 'prompts.txt').write_bytes('\ufeffa\u2028b\x85c\x0cd\re\x1cf\r\n\n \nsecond'.encode())
  assert read_prompts(tmp_path / 'prompts.txt') == ['a\u2028b\x85c\x0cd\re\x1cf', 'second']


@pytest.mark.thorough
def test_other_text_that_the_run_has_learned_is_said_with_numbers(moved, monkeypatch, capfd):
  lines = (moved / 'text.jsonl').read_text().splitlines()
  held_out = [line for line in lines if is_held_out(json.loads(line)['text'].encode(), 0.1)]
  learned = [line for line in lines if line not in held_out]
  (moved / 'other.jsonl').write_text('\n'.join([*learned[:5], *held_out[:3]]))
  flags = ('--valid_files', f'{moved}/other.jsonl', f'--config.data.prepared_dir={moved}/prepared')
  code, out, err = run_eval(monkeypatch, capfd, '--workdir', str(moved / 'run'), *flags)
  [said] = json.loads((moved / 'run' / 'eval.json').read_text())['remarks']
  assert code == 0 and said.startswith('5 of 8 validation documents (') and said[:30] in out, err
  assert (moved / 'run' / 'report.md').read_text().count(said) == 1


@pytest.mark.thorough
def test_hostile_prompts_are_answered_and_printed_plainly(run, tmp_path, monkeypatch, capfd):
  lines = ['\x1b[2J\x07 the memory \u202e', 'the bank reads ' * 700_000, 'the row', '```\t# title']
  (tmp_path / 'prompts.txt').write_text('\n'.join(lines))
  monkeypatch.setattr('mmjax.inference.measure.measure_split', lambda *_: EvalResult(1.0, 2.7, 1.5, 0.1, 9, 9, [], {}))
  code, out, err = run_eval(monkeypatch, capfd, '--workdir', str(run), '--prompts', f'{tmp_path}/prompts.txt')
  assert code == 0 and 'its end is used' in err
  found = json.loads((run / 'eval.json').read_text())
  assert [sample['prompt'] for sample in found['samples']] == [lines[0], '...' + lines[1][-2000:], *lines[2:]]
  for text in (out, (run / 'report.md').read_text()):
    assert all(char.isprintable() or char in '\n\t' for char in text) and len(text) < 40_000
    assert '\\x1b[2J\\x07 the memory \\u202e' in text


def test_a_directory_that_is_no_run_is_refused(tmp_path, monkeypatch, capfd):
  code, _, err = run_eval(monkeypatch, capfd, '--workdir', str(tmp_path))
  assert code == 2
  assert 'is not a run directory' in err and err.count('\n') == 1
  assert list(tmp_path.iterdir()) == []


def test_prompts_come_one_a_line(tmp_path):
  (tmp_path / 'prompts.txt').write_bytes('\ufeffΑ first\r\n\n second\n'.encode())
  assert read_prompts(tmp_path / 'prompts.txt') == ['Α first', ' second']
  assert [prompt.split()[0] for prompt in read_prompts('configs/record_prompts.txt')] == ['The', 'Ayn', 'Apollo']


def test_held_out_documents_begin_as_their_text_does(run, tmp_path):
  texts = ['the bank reads the memory and writes it again', 'row', '漢字漢字漢字漢字', ' ', 'a row', 'and again']
  (tmp_path / 'other.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  config = RunDir(run).read_config()
  found = beginnings(open_text(config, RunDir(run), f'{tmp_path}/other.jsonl'), 6)
  texts.remove(' ')
  assert len(found) == 5 and all(text.startswith(start) for text, start in zip(texts, found, strict=True))
  assert found[1] == 'row' and 0 < len(found[2]) < 8 and len(found[0]) < len(texts[0])
  assert beginnings(open_text(config, RunDir(run), f'{tmp_path}/other.jsonl')) == [found[0], found[2], 'a row']
