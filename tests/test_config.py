"""Settings: what is accepted, and that what is refused is refused by name with a way out."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import BELOW_ONE, CHOICES, Config, config_from_dict, flatten, load_config, reading
from mmjax.errors import UserError
from tests.helpers import TINY, tiny_config


def test_record_settings_of_1_4_2_are_the_base():
  config = load_config('configs/exp_1_4_2.py')
  model, train = config.model, config.train
  assert (model.dim, model.n_layers, model.n_heads, model.max_seq_len) == (512, 8, 32, 512)
  assert (model.knowledge_num, model.knowledge_dim, model.num_selected) == (65536, 128, 8)
  assert (train.batch_size, train.accumulation_steps, train.epochs, train.dtype) == (64, 8, 3.0, 'bfloat16')
  assert (train.learning_rate, train.weight_decay, train.grad_clip, train.warmup_steps) == (
    2e-4,
    0.01,
    1.0,
    0,
  )


@pytest.mark.parametrize('path', sorted(Path('configs').glob('*.py')), ids=lambda p: p.stem)
def test_every_config_file_loads_and_names_its_experiment(path):
  assert load_config(str(path)).experiment == path.stem


def test_dense_hidden_dim_is_the_seeds_rounding():
  assert load_config('configs/exp_1_4_0.py').model.dense_hidden_dim == 1408


def test_overrides_take_the_type_of_the_field():
  config = load_config(
    'configs/base.py',
    ['--config.train.batch_size=4', '--config.train.learning_rate=1', '--config.data.isolate_documents=true'],
  )
  assert (config.train.batch_size, config.train.learning_rate, config.data.isolate_documents) == (
    4,
    1.0,
    True,
  )


def test_config_survives_json():
  config = tiny_config()
  assert config_from_dict(config.to_dict()) == config


def values_of(config: Config) -> st.SearchStrategy[dict[str, object]]:
  """Draws values of the right type for any settings, mostly within the rules."""

  def values(value: object, name: str) -> st.SearchStrategy:
    if name in CHOICES:
      return st.sampled_from(CHOICES[name])
    if isinstance(value, bool):
      return st.booleans()
    if isinstance(value, int):
      return st.integers(1, 5).map(lambda n: n * value or n)
    if isinstance(value, float):
      return st.floats(0, 0.99, exclude_max=True) if name in BELOW_ONE else st.floats(1, 1e300)
    return st.text(st.characters(exclude_categories=['Cs']), max_size=20)

  flat = {name: value for name, value in flatten(config.to_dict()).items() if name != 'memory.layers'}
  return st.fixed_dictionaries({}, optional={name: values(value, name) for name, value in flat.items()})


@settings(max_examples=60, deadline=None)
@given(values_of(tiny_config()))
def test_config_survives_flags_and_json_or_is_refused_both_ways(changes):
  flags = [f'--config.{name}={value}' for name, value in (TINY | changes).items()]
  try:
    config = load_config('configs/base.py', flags)
  except UserError as error:
    assert any(name.rpartition('.')[2] in str(error) for name in TINY | changes)
    return
  assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert {name: flatten(config.to_dict())[name] for name in changes} == changes


@pytest.mark.parametrize(
  ('override', 'said'),
  [
    ('--config.train.learning_rate=1' + '0' * 400, '0... (401 characters) must be a finite number'),
    ('--config.' + 'x' * 9000, 'xx... (9011 characters) is not understood'),
    ('--config.model.dim=1' + '0' * 400, 'dim=1' + '0' * 29 + '... (401 characters) must be at most 2147483647'),
    ('--config.model.dim=2147483647', 'dim=2147483647 must be divisible by model.n_heads=32; nearest: 1 heads'),
    ('--config.model.n_layers=2000000000', 'n_layers=2000000000 must be at most 10000'),
    ('--config.memory.layers=' + '1' * 5000, "must be 'all', 'middle' or different layers"),
    ('--config.model.knowledge_num=65535', 'knowledge_num=65535 must be a square; nearest: 65025 and 65536'),
    ('--config.model.num_selected=257', 'num_selected=257 must be at most the 256 sub-keys'),
    ('--config.model.dim=500', 'dim=500 must be divisible by model.n_heads=32; nearest: 25 heads'),
    ('--config.model.n_kv_heads=5', 'n_heads=32 must be divisible by model.n_kv_heads=5'),
    ('--config.model.n_heads=512', 'must be even: RoPE'),
    ('--config.model.knowledge_dim=127', 'knowledge_dim=127 must be even'),
    ('--config.model.knowlege_num=4', "no setting 'model.knowlege_num'; did you mean 'model.knowledge_num'?"),
    ('--config.knowledge_num=4', "did you mean 'model.knowledge_num'?"),
    ('--config.train.dtype=bf16', "must be one of float32, bfloat16; did you mean 'bfloat16'?"),
    ('--config.train.batch_size=0', 'batch_size=0 must be a finite number of at least 1'),
    ('--config.train.batch_size=2.5', "'2.5' must be a whole number"),
    ('--config.train.batch_size=1e999', 'must be a whole number'),
    ('--config.train.learning_rate=nan', 'must be a number'),
    ('--config.train.learning_rate=1e999', 'must be a finite number'),
    ('--config.train.beta1=1', 'beta1=1.0 must be at least 0 and below 1'),
    ('--config.data.isolate_documents=maybe', 'must be True or False'),
    ('--config.experiment=../up', 'must be a plain folder name'),
    ('--config.train.max_loss_factor=1', 'max_loss_factor=1.0 must be above 1, or 0'),
    ('--config.runtime.coordinator=node0', "coordinator='node0' must be host:port, such as 'node0:1234', or 'auto'"),
    ('--config.runtime.num_processes=2', 'num_processes=2 needs runtime.coordinator'),
    ('--config.runtime.process_id=1', 'process_id=1 must be below runtime.num_processes=1'),
    ('--config.train.batch_size', 'is not understood'),
    ('--batch=3', 'is not understood'),
  ],
)
def test_bad_override_is_refused_by_name(override, said):
  with pytest.raises(UserError, match=re.escape(said)):
    load_config('configs/base.py', [override])


def test_missing_config_file_suggests_the_nearest():
  with pytest.raises(UserError, match=r"no config file.*did you mean 'configs/exp_1_4_2.py'"):
    load_config('configs/exp_142.py')


@pytest.mark.parametrize('installed', [True, False])
def test_configs_are_found_from_any_folder(tmp_path, monkeypatch, installed):
  there = tmp_path / 'share' / 'mmjax'
  if installed:
    shutil.copytree('configs', there / 'configs')
    monkeypatch.setattr(reading, 'ROOTS', (tmp_path / 'nothing', there))
  usual = load_config('configs/memory_plus.py')
  monkeypatch.chdir(tmp_path)
  assert load_config('configs/memory_plus.py') == usual
  with pytest.raises(UserError, match='no config file'):
    load_config('configs/nothing.py')


def test_broken_config_file_is_explained(tmp_path):
  file = tmp_path / 'broken.py'
  file.write_text('def get_config(:\n')
  with pytest.raises(UserError, match='SyntaxError'):
    load_config(str(file))


def test_unknown_and_missing_fields_of_a_saved_config_are_refused():
  saved = tiny_config().to_dict()
  saved['model']['dimm'] = 3
  with pytest.raises(UserError, match="no setting 'model.dimm'; did you mean 'model.dim'?"):
    config_from_dict(saved)
  del saved['model']['dimm'], saved['model']['dim']
  with pytest.raises(UserError, match="'model.dim' is missing"):
    config_from_dict(saved)


def test_every_setting_has_a_comment():
  lines = [line for line in Path('configs/base.py').read_text().splitlines() if re.match(r'\s+\w+\.\w+ = ', line)]
  names = {name for name in flatten(tiny_config().to_dict())}
  assert len(lines) == len(names)
  obvious = {
    'model.n_layers',
    'model.norm_eps',
    'model.rope_theta',
    'train.beta1',
    'train.beta2',
    'train.eps',
  }
  assert {line.split(' =')[0].strip() for line in lines if '#' not in line} == obvious
