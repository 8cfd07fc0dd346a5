"""Every experiment of the line, from its config file: train, resume, evaluate, sample, convert both ways, report."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax.config import Config, load_config
from mmjax.errors import StoppedError
from mmjax.inference.measure import measure_text
from mmjax.interop.convert import export_run, import_run
from mmjax.interop.files import read_tensors
from mmjax.report.write import write_report
from mmjax.run.directory import RunDir
from mmjax.run.log import read_metrics
from mmjax.tools.bank import build_bank
from mmjax.training import loop
from tests.helpers import TINY, StopAfter, flags_for

EXPERIMENTS = ('exp_1_4_0', 'exp_1_4_1', 'exp_1_4_2', 'exp_1_4_3', 'exp_moe')


def tiny_experiment(name: str, folder: Path) -> Config:
  """Returns a small version of the experiment; what makes it this experiment is its file's."""
  settings = {key: value for key, value in TINY.items() if key != 'model.num_selected' or name != 'exp_1_4_3'}
  if name == 'exp_1_4_3':
    settings |= {'model.knowledge_num': 256, 'memory.bank_file': folder / 'bank.safetensors'}
  settings |= {
    'data.train_files': folder / 'text.jsonl', 'data.valid_fraction': 0.1, 'data.prepared_dir': folder / 'data',
    'data.workers': 1, 'memory.knowledge_length': 8, 'train.max_steps': 4, 'train.log_interval': 1,
    'train.eval_interval': 2,
  }  # fmt: skip
  return load_config(f'configs/{name}.py', flags_for(f'configs/{name}.py', settings))


@pytest.mark.slow  # other tests cover the parts, for one or two of the experiments
@pytest.mark.parametrize('name', EXPERIMENTS)
def test_experiment_trains_resumes_evaluates_samples_converts_and_is_reported(name, text, tmp_path, monkeypatch):
  shutil.copy(text / 'text.jsonl', tmp_path)
  config, run, whole = tiny_experiment(name, tmp_path), tmp_path / 'run', tmp_path / 'whole'
  if name == 'exp_1_4_3':
    assert config.model.num_selected == 16
    build_bank(config, tmp_path / 'bank.safetensors', 'lsa')

  loop.fit(config, whole)
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'StopSignals', lambda: StopAfter(3))
    with pytest.raises(StoppedError):
      loop.fit(config, run)
  loop.fit(config, run)
  lm, straight = mmjax.load(run, 'last'), mmjax.load(whole, 'last')
  for workdir, back in ((run, 'resumed'), (whole, 'straight')):
    export_run(workdir, tmp_path / f'{back}.safetensors', 'last', None)
  tensors = read_tensors(tmp_path / 'resumed.safetensors')
  for tensor, value in read_tensors(tmp_path / 'straight.safetensors').items():
    np.testing.assert_array_equal(tensors[tensor], value, err_msg=tensor)

  logged = [line for line in read_metrics(run / 'metrics.jsonl') if line['kind'] == 'eval'][-1]
  measured = measure_text(lm, RunDir(run))
  assert measured.loss == pytest.approx(logged['loss'], rel=1e-6) and measured.loss < np.log(300)
  assert len(measured.bank) == (2 if 'memory_bank' in lm.params else 0)
  [text] = lm.generate('the memory', max_new_tokens=6, temperature=0)
  assert [text] == straight.generate('the memory', max_new_tokens=6, temperature=0)
  report = write_report(run).read_text()
  assert f'{logged["bits_per_byte"]:.4f}' in report and f"'{lm.config.model.sublayer}'" in report

  model = lm.config.model
  untold = ['n_heads', 'max_seq_len', 'num_selected', 'experts_per_token']
  flags = [f'--config.model.{field}={getattr(model, field)}' for field in untold]
  tokenizer = str(run / 'tokenizer.model')
  import_run(tmp_path / 'resumed.safetensors', tmp_path / 'back', f'configs/{name}.py', flags, tokenizer, None)
  back = mmjax.load(tmp_path / 'back', 'last')
  assert back.config.model.sublayer == model.sublayer and back.step == 0
  tokens = np.arange(4, 20)[None]
  np.testing.assert_array_equal(back.logits(tokens), lm.logits(tokens))
