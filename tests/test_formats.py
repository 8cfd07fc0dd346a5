"""The table of formats: a new one is a function and a row, as the guide says, and all that reads text reads it."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

USE = """
import dataclasses, json, sys
import mmjax
from mmjax.data.prepare import prepare
from mmjax.console import Progress
from mmjax.errors import UserError
from mmjax.inference.measure import measure_text
from mmjax.run.directory import open_run

run, *files = sys.argv[1:]
lm, found = mmjax.load(run), {}
for file in files:
  data = {'train_files': file, 'valid_fraction': 0.0, 'prepared_dir': f'{file}-prepared', 'workers': 2}
  data |= {'tokenizer': f'{run}/tokenizer.model'}
  try:
    directory = prepare(dataclasses.replace(lm.config.data, **data), 300, Progress(quiet=True))
    shards = {path.name: path.read_bytes().hex() for path in sorted(directory.glob('train*'))}
    found[file] = [shards, measure_text(lm, open_run(run), file).to_dict()]
  except UserError as error:
    found[file] = str(error)
print(json.dumps(found))
"""


@pytest.mark.thorough
def test_new_format_is_one_row_and_is_prepared_and_evaluated_with(run, tmp_path):
  for folder in ('mmjax', 'configs'):
    shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(REPOSITORY / 'pyproject.toml', tmp_path)
  table = tmp_path / 'mmjax' / 'data' / 'formats.py'
  [added] = re.findall(r'```python\n(def third_field.*?)```', (REPOSITORY / 'docs' / 'guide.md').read_text(), re.DOTALL)
  table.write_text(table.read_text().replace('FORMATS = {\n', added))
  texts = [f'the memory reads row {n} of its bank and writes 知识' for n in range(60)]
  lines = ''.join(f'{n};x;{text}\r\n' for n, text in enumerate(texts))
  (tmp_path / 'known.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  (tmp_path / 'new.semicolons').write_text(lines)
  (tmp_path / 'NEW.Semicolons.gz').write_bytes(gzip.compress(lines.encode()))
  (tmp_path / 'bad.semicolons').write_text(lines + 'no;text\n')
  files = ['known.jsonl', 'new.semicolons', 'NEW.Semicolons.gz', 'bad.semicolons']
  done = subprocess.run(
    [sys.executable, '-c', USE, str(run), *files],
    cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['known.jsonl'][1]['text_bytes'] == sum(len(text.encode()) for text in texts)
  assert found['new.semicolons'] == found['NEW.Semicolons.gz'] == found['known.jsonl']
  assert found['bad.semicolons'].startswith('bad.semicolons:61: 2 fields, must be 3 (byte ')
