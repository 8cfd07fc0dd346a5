"""Settings: what is accepted, and that what is refused is refused by name with a way out."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.config import CHOICES, Config, check_learning, config_from_dict, flatten, load_config
from mmjax.config.__main__ import list_settings, main
from mmjax.config.schema import SETTINGS
from mmjax.config.sublayers import SUBLAYERS, layer_kinds
from mmjax.errors import UserError
from tests.helpers import TINY, TINY_CONFIG, tiny_config


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
      return st.sampled_from(list(CHOICES[name]))
    if isinstance(value, bool):
      return st.booleans()
    if isinstance(value, int):
      return st.integers(1, 5).map(lambda n: n * value or n)
    if isinstance(value, float):
      return st.floats(SETTINGS[name].least, SETTINGS[name].most)
    text = st.text(st.characters(exclude_categories=['Cs']), max_size=20)
    return text.filter(lambda text: not text.startswith('~'))  # a home, which is another text afterwards

  flat = {name: value for name, value in flatten(config.to_dict()).items() if name != 'memory.layers'}
  return st.fixed_dictionaries({}, optional={name: values(value, name) for name, value in flat.items()})


@settings(max_examples=20, deadline=None)
@given(values_of(tiny_config()))
def test_config_survives_flags_and_json_or_is_refused_both_ways(changes):
  while True:
    flags = [f'--config.{name}={value}' for name, value in changes.items()]
    try:
      config = load_config(TINY_CONFIG, flags)
      break
    except UserError as error:
      assert any(name.rpartition('.')[2] in str(error) for name in TINY | changes)
      idle = re.match(r'([a-z_.]+)=.* does nothing ', str(error), re.DOTALL)
      if not idle:
        return
      del changes[idle[1]]  # what does nothing can be left out
  assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert {name: flatten(config.to_dict())[name] for name in changes} == changes


@pytest.mark.parametrize(
  ('override', 'said'),
  [
    ('--config.train.learning_rate=1' + '0' * 400, '0... (401 characters) must be a finite number'),
    ('--config.' + 'x' * 9000, 'xx... (9011 characters) is not understood'),
    ('--config.model.dim=1' + '0' * 400, 'dim=1' + '0' * 29 + '... (401 characters) must be at most 2147483647'),
    (
      '--config.seed=-1' + '0' * 400,
      'seed=-1' + '0' * 28 + '... (402 characters) must be a finite number of at least 0',
    ),
    ('--config.model.dim=2147483647', 'dim=2147483647 must be divisible by model.n_heads=32'),
    ('--config.model.n_layers=2000000000', 'n_layers=2000000000 must be at most 10000'),
    ('--config.memory.layers=' + '1' * 5000, "must be 'all', 'middle' or different layers"),
    ('--config.model.value_embeddings=8', "model.value_embeddings='8' must be 'all', 'alternate' or different layers"),
    ('--config.model.knowledge_num=65535', 'knowledge_num=65535 must be a square; nearest: 65025 and 65536'),
    ('--config.model.num_selected=257', 'num_selected=257 must be at most the 256 sub-keys'),
    ('--config.model.dim=500', 'dim=500 must be divisible by model.n_heads=32; nearest: model.dim=512'),
    ('--config.model.n_heads=24', 'divisible by model.n_heads=24; nearest: model.dim=528 or 16 heads'),  # of 8 for keys
    ('--config.model.n_kv_heads=5', 'n_heads=32 must be divisible by model.n_kv_heads=5; nearest: 4 kv heads'),
    ('--config.model.n_heads=512', 'must be even: RoPE rotates pairs; nearest: model.dim=1024'),
    ('--config.model.knowledge_dim=127', 'knowledge_dim=127 must be even'),
    ('--config.model.knowlege_num=4', "no setting 'model.knowlege_num'; did you mean 'model.knowledge_num'?"),
    ('--config.knowledge_num=4', "did you mean 'model.knowledge_num'?"),
    ('--config.train.steps=4', "did you mean 'train.max_steps'?"),
    ('--config.train.n_steps=4', "did you mean 'train.max_steps'?"),
    ('--config.data.files=a', "did you mean 'data.train_files'?"),
    ('--config.train.dtype=bf16', "must be one of float32, bfloat16; did you mean 'bfloat16'?"),
    ('--config.train.batch_size=0', 'batch_size=0 must be a finite number of at least 1'),
    ('--config.train.batch_size=2.5', "'2.5' must be a whole number"),
    ('--config.train.batch_size=1e999', 'must be a whole number'),
    ('--config.train.learning_rate=nan', 'must be a number'),
    ('--config.train.learning_rate=1e999', 'must be a finite number'),
    ('--config.train.learning_rate=1e-400', "'1e-400' is too close to 0 for a float"),
    ('--config.train.learning_rate=1e-3 # less', "'1e-3 # less' must be a number"),
    ('--config.train.max_steps=5#0', "'5#0' must be a whole number"),
    ('--config.train.beta1=1', 'beta1=1.0 must be at most 0.999999'),
    ('--config.train.beta2=0.99999999', 'beta2=0.99999999 must be at most 0.999999'),
    ('--config.train.eps=0', 'eps=0.0 must be a finite number of at least 1e-30'),
    ('--config.train.eps=1e-46', 'eps=1e-46 must be a finite number of at least 1e-30'),
    ('--config.train.eps=10', 'eps=10.0 must be at most 1'),
    ('--config.train.weight_decay=-0.01', 'weight_decay=-0.01 must be a finite number of at least 0'),
    ('--config.train.weight_decay=1e4', 'weight_decay=10000.0 must be at most 100'),
    ('--config.train.learning_rate=1e39', 'learning_rate=1e+39 must be at most 10'),
    ('--config.memory.bank_lr_multiplier=1e300', 'bank_lr_multiplier=1e+300 must be at most 10000'),
    ('--config.train.grad_clip=1e-12', 'grad_clip=1e-12 must be at least 1e-06, or 0 for no clipping'),
    ('--config.train.epochs=0', 'epochs=0.0 and train.max_steps=0 would train nothing'),
    ('--config.model.norm_eps=0', 'norm_eps=0.0 must be a finite number of at least 1e-20'),
    ('--config.data.workers=100000', 'workers=100000 must be at most 4096'),
    ('--config.data.isolate_documents=maybe', 'must be True or False'),
    ('--config.data.train_files=a\0b', r"data.train_files='a\x00b' must not hold the character NUL"),
    ('--config.experiment=../up', 'must be a plain folder name'),
    ('--config.experiment= ', 'must be a plain folder name'),
    ('--config.experiment=a\nb', 'must be a plain folder name'),
    ('--config.train.max_loss_factor=1', 'max_loss_factor=1.0 must be above 1, or 0'),
    ('--config.runtime.coordinator=node0', "coordinator='node0' must be host:port, such as 'node0:1234', with a port"),
    *(
      (f'--config.runtime.coordinator={address}', f'coordinator={address!r} must be host:port')
      for address in ('node0:99999', ':1234', 'node 0:1234', '::1')
    ),
    ('--config.runtime.num_processes=2', 'num_processes=2 needs runtime.coordinator'),
    ('--config.runtime.process_id=1', 'process_id=1 must be below runtime.num_processes=1'),
    ('--config.train.batch_size', 'is not understood'),
    ('--batch=3', 'is not understood'),
  ],
)
def test_bad_override_is_refused_by_name(override, said):
  with pytest.raises(UserError, match=re.escape(said)):
    load_config('configs/base.py', [override])


@pytest.mark.parametrize(
  ('overrides', 'said'),
  [
    (['train.weight_decay=1', 'train.learning_rate=1'], 'train.learning_rate (1) times its weight decay (1) must be'),
    (['train.learning_rate=1e-3', 'train.embedding_lr_multiplier=1e4', 'train.weight_decay=1'], 'decay (1) must be'),
    (
      ['memory.bank_lr_multiplier=1e3', 'memory.bank_decay_multiplier=1e3'],
      'memory.bank_lr_multiplier (0.2) times its weight decay (10)',
    ),
    (
      ['train.learning_rate=0.01', 'memory.bank_lr_multiplier=64', 'train.parameters=memory_bank decay=200'],
      'memory.bank_lr_multiplier (0.64) times its weight decay (2)',
    ),
  ],
)
def test_decay_that_takes_more_than_there_is_is_refused(overrides, said):
  with pytest.raises(UserError, match=re.escape(said)):
    load_config('configs/base.py', [f'--config.{override}' for override in overrides])


@pytest.mark.parametrize(
  'overrides',
  [
    ['train.learning_rate=0.02', 'memory.bank_lr_multiplier=500', 'train.weight_decay=0.1',
     'train.parameters=memory_bank decay=0'],
    ['train.learning_rate=0.02', 'train.weight_decay=0.1', 'train.parameters=memory_bank lr=500; memory_bank decay=0'],
    ['train.optimizer=sgd', 'train.learning_rate=7', 'memory.teach_rows=256', 'train.embedding_lr_multiplier=16'],
    ['train.optimizer=sgd', 'train.learning_rate=5', 'memory.teach_rows=256', 'memory.bank_lr_multiplier=20'],
  ],
)  # fmt: skip
def test_decay_that_does_not_meet_a_rate_is_no_bound_of_it(overrides):
  load_config('configs/base.py', [f'--config.{override}' for override in overrides])


@pytest.mark.parametrize(
  ('file', 'overrides', 'said', 'instead'),
  [
    (
      'product_key_bag',
      ['memory.selection_bias=True', 'train.optimizer=sgd'],
      "memory.selection_bias=True needs a train.optimizer of Adam, not 'sgd'",
      'train.optimizer=muon',
    ),
    (
      'exp_moe',
      ['model.experts_per_token=1', 'model.aux_loss_weight=0'],
      'model.experts_per_token=1 must be at least 2 with model.aux_loss_weight=0',
      'model.aux_loss_weight=0.1',
    ),
  ],
)
def test_what_would_never_learn_is_refused(file, overrides, said, instead):
  with pytest.raises(UserError, match=re.escape(said)):
    check_learning(load_config(f'configs/{file}.py', [f'--config.{override}' for override in overrides]))
  check_learning(load_config(f'configs/{file}.py', [f'--config.{override}' for override in (*overrides, instead)]))


@pytest.mark.parametrize(
  'flags',
  [
    ['beta1=0.5', 'parameters=embedding beta1=0.7'],
    ['beta2=0.5', 'parameters=^(?!embedding) beta2=0.7'],  # which leaves the embedding to it
    ['weight_decay=0.5', 'parameters=.* decay=0.1'],
    ['weight_decay=0.5', 'parameters=norm decay=0.1; .* decay=0'],
    ['optimizer=muon', 'muon_lr_multiplier=2', 'parameters=layers/0 lr=0.7'],
  ],
)
def test_setting_of_which_rules_leave_something_is_not_refused(flags):
  load_config('configs/exp_1_4_2.py', [f'--config.train.{flag}' for flag in flags])


def test_rules_take_from_what_a_config_file_says():
  config = load_config('configs/quickstart.py', ['--config.train.parameters=.* beta2=0.9; norm decay=0'])
  assert config.train.parameters == '.* beta2=0.9; norm decay=0'


def test_every_number_has_a_range_and_its_default_and_no_nan_is_in_it():
  numbers = {n: v for n, v in flatten(tiny_config().to_dict()).items() if type(v) in (int, float)}
  for name, value in numbers.items():
    assert SETTINGS[name].least <= SETTINGS[name].default <= SETTINGS[name].most, name
    section, _, field = name.rpartition('.')
    for wrong in [float('nan'), float('inf'), -float('inf'), -1.0] if type(value) is float else [-1, 2**31]:
      settings = tiny_config().to_dict()
      (settings[section] if section else settings)[field] = wrong
      with pytest.raises(UserError, match=f'^{name}={wrong} must be'):
        config_from_dict(settings)


NEEDS_MEMORY = (
  "it belongs to model.sublayer 'cross_attention', 'gated_fusion', 'memory_bag', 'ngram_bag', 'ngram_bucket', "
  "'engram_bag'"
)
NEEDS_GATE = "it belongs to model.sublayer 'cross_attention', 'gated_fusion', 'memory_bag'"
KINDS = {'dense', 'cross_attention', 'gated_fusion', 'memory_bag', 'ngram_bag', 'ngram_bucket', 'engram_bag', 'moe'}
IDLE = [  # config, override, what is said
  ('exp_1_4_0', 'memory.ffn_dim=64', f'memory.ffn_dim=64 does nothing in a model of dense layers: {NEEDS_MEMORY}'),
  (
    'exp_1_4_0',
    'memory.bank_update=lazy',
    f"bank_update='lazy' does nothing in a model of dense layers: {NEEDS_MEMORY}",
  ),
  ('exp_1_4_0', 'memory.bank_moments=row', NEEDS_MEMORY),
  ('exp_1_4_0', 'memory.bank_lr_multiplier=2', NEEDS_MEMORY),
  ('exp_1_4_0', 'memory.bank_lr_final_multiplier=2', NEEDS_MEMORY),
  ('exp_1_4_0', 'memory.bank_decay_multiplier=0', NEEDS_MEMORY),
  ('exp_1_4_0', 'memory.layers=middle', NEEDS_MEMORY),
  ('exp_1_4_0', 'model.knowledge_num=64', NEEDS_MEMORY),
  (
    'exp_1_4_0',
    'model.n_experts=8',
    'model.n_experts=8 does nothing in a model of dense layers: it belongs to model.su',
  ),
  ('exp_moe', 'memory.n_heads=2', f'memory.n_heads=2 does nothing in a model of moe layers: {NEEDS_MEMORY}'),
  ('exp_1_4_2', 'model.aux_loss_weight=0', "it belongs to model.sublayer 'moe'"),
  (
    'exp_1_4_2',
    'model.hidden_dim=64',
    "does nothing in a model of gated_fusion layers: it belongs to model.sublayer 'de",
  ),
  ('exp_1_4_2', 'memory.bag_gate=False', "it belongs to model.sublayer 'memory_bag', 'ngram_bag', 'ngram_bucket'"),
  ('exp_1_4_2', 'memory.ngrams=2', "it belongs to model.sublayer 'ngram_bag', 'ngram_bucket'"),
  ('exp_1_4_2', 'memory.score_activation=relu', "score_activation='relu' does nothing without memory.scores='scale'"),
  ('exp_1_4_3', 'memory.bank_std=0.5', "memory.bank_std=0.5 does nothing when memory.bank_init='file' gives the rows"),
  ('exp_1_4_2', 'memory.bank_file=x', "memory.bank_file='x' does nothing without memory.bank_init='file'"),
  ('product_key_bag', 'memory.scores=scale', "it belongs to model.sublayer 'cross_attention', 'gated_fusion'"),
  ('ngram_rows', 'memory.scores=scale', 'does nothing in a model of dense and ngram_bag layers'),
  ('ngram_rows', 'memory.query_key_norm=l2', NEEDS_GATE),
  ('ngram_rows', 'memory.ngram_layers=3', NEEDS_GATE),
  ('base', 'data.isolate_documents=True --config.data.layout=padded', "does nothing without data.layout='packed'"),
  (
    'base',
    'data.valid_fraction=0.5 --config.data.train_files=a --config.data.valid_files=b',
    'when data.valid_files is set',
  ),
  ('base', 'data.text_key=body', "data.text_key='body' does nothing without data.train_files"),
  (
    'base',
    'train.beta2=0.9 --config.train.optimizer=sgd',
    "train.beta2=0.9 does nothing with a train.optimizer that is not Adam's",
  ),
  (
    'quickstart',
    'model.sublayer=ngram_bag --config.memory.bag_gate=False --config.memory.input=residual',
    "memory.input='residual' does nothing where no memory reads its input",
  ),
  *(
    ('exp_1_4_2', f'train.{given} --config.train.parameters=.* {rule}', said)
    for given, rule, said in (
      ('beta1=0.5', 'beta1=0.7', 'or when train.parameters gives every beta1'),
      ('beta2=0.5', 'beta2=0.7', 'or when train.parameters gives every beta2'),
      (
        'weight_decay=0.5',
        'decay=0',
        'weight_decay=0.5 does nothing when train.parameters sets every decay to 0',
      ),
      ('muon_lr_multiplier=2 --config.train.optimizer=muon', 'lr=0.7', 'or when train.parameters gives every rate'),
    )
  ),
  ('quickstart', 'train.epochs=1', 'train.epochs=1.0 does nothing when train.max_steps is set'),
  ('base', 'runtime.num_processes=2 --config.runtime.coordinator=auto', "nothing with runtime.coordinator='auto'"),
]


@pytest.mark.parametrize(('file', 'flags', 'said'), IDLE, ids=[f'{file}-{flags}' for file, flags, _ in IDLE])
def test_setting_that_does_nothing_is_refused_with_what_it_belongs_to(file, flags, said):
  with pytest.raises(UserError) as error:
    load_config(f'configs/{file}.py', [f'--config.{flag}' for flag in flags.split(' --config.')])
  message = str(error.value)
  for kind in set(SUBLAYERS) - KINDS:  # one that was added since
    message = message.replace(f"'{kind}', ", '').replace(f", '{kind}'", '')
  assert said in message


def test_settings_of_all_kinds_of_layers_count():
  gate_and_ngrams = ['memory.ngram_layers=1', 'memory.ngrams=2', 'memory.query_key_norm=l2']
  both = load_config('configs/product_key_bag.py', [f'--config.{setting}' for setting in gate_and_ngrams])
  assert {'memory_bag', 'ngram_bag'} <= set(layer_kinds(both.model, both.memory)) and both.memory.ngrams == '2'
  some = load_config('configs/exp_1_4_2.py', ['--config.memory.layers=0,3', '--config.model.hidden_dim=64'])
  assert layer_kinds(some.model, some.memory).count('dense') == 6 and some.model.dense_hidden_dim == 64
  as_it_is = load_config('configs/exp_1_4_0.py', ['--config.memory.ffn_dim=0', '--config.model.n_experts=4'])
  assert as_it_is == load_config('configs/exp_1_4_0.py')


def test_override_takes_with_it_what_the_file_says_of_what_it_takes_away(tmp_path):
  dense = load_config('configs/product_key_bag.py', ['--config.model.sublayer=dense', '--config.experiment=exp_1_4_0'])
  assert dense == load_config('configs/exp_1_4_0.py')
  mine = tmp_path / 'mine.py'
  text = 'from configs import base\n\n\ndef get_config():\n  config = base.get_config()\n'
  mine.write_text(f"{text}  config.model.sublayer = 'dense'\n  config.memory.ffn_dim = 64\n  return config\n")
  with pytest.raises(
    UserError, match=r"config file '.*mine.py': memory.ffn_dim=64 does nothing in a model of dense la"
  ):
    load_config(str(mine))
  with pytest.raises(UserError, match=r"config file '.*mine.py': memory.ffn_dim=64 does nothing"):
    load_config(str(mine), ['--config.train.max_steps=3'])
  assert load_config(str(mine), ['--config.model.sublayer=gated_fusion']).memory.ffn_dim == 64


def test_config_of_a_run_with_a_setting_that_does_nothing_stays_readable():
  saved = load_config('configs/exp_1_4_0.py').to_dict()
  saved['memory']['ffn_dim'] = 64
  assert config_from_dict(saved) == load_config('configs/exp_1_4_0.py')


def test_every_command_of_the_documents_is_accepted():
  docs = (f'docs/{name}.md' for name in ('guide', 'experiments', 'bank_experiments'))
  texts = [Path(page).read_text() for page in ('README.md', 'BENCHMARKS.md', 'quickstart.sh', *docs)]
  commands = re.findall(
    r'(?:train|cost|throughput|bank build|import)(?:\.py)? [^`#]*', '\n'.join(texts).replace('\\\n', ' ')
  )
  commands = [re.sub("='[^'\n]*'", lambda quoted: quoted[0].replace(' ', '\0'), command) for command in commands]
  checked = 0
  for words in map(str.split, commands):
    flags = [word.replace("'", '').replace('\0', ' ') for word in words if word.startswith('--config.')]
    if '--config' in words and (file := words[words.index('--config') + 1]).endswith('.py'):
      load_config(file.replace('1_4_X', '1_4_2'), [flag for flag in flags if 'num_processes=2' not in flag])
      checked += 1
  assert checked > 12


@pytest.mark.parametrize('name', ['memory.size', 'data.cache', 'model.length', 'train.zzz'])
def test_a_name_that_is_like_no_setting_gets_no_advice(name):
  with pytest.raises(UserError, match=f"no setting '{name}'$"):
    load_config('configs/base.py', [f'--config.{name}=1'])


def test_unknown_and_missing_fields_of_a_saved_config_are_refused():
  saved = tiny_config().to_dict()
  saved['model']['dimm'] = 3
  with pytest.raises(UserError, match="no setting 'model.dimm'; did you mean 'model.dim'?"):
    config_from_dict(saved)
  del saved['model']['dimm'], saved['model']['dim']
  with pytest.raises(UserError, match="'model.dim' is missing"):
    config_from_dict(saved)


def test_base_config_lists_every_setting_with_its_meaning():
  listed = f'\n\n{list_settings()}\n"""\n'
  assert listed in Path('configs/base.py').read_text(), 'paste what python -m mmjax.config prints'
  obvious = {'model.n_layers', 'model.norm_eps', 'model.rope_theta', 'train.beta1', 'train.beta2', 'train.eps'}
  assert {name for name, setting in SETTINGS.items() if not setting.meaning} == obvious
  assert load_config('configs/base.py') == Config()
  assert all(type(setting.default) in (str, bool, int, float) for setting in SETTINGS.values())


@pytest.mark.parametrize('layers', ['all', '0,1'])
def test_ngrams_in_every_layer_with_a_memory_stay_there(layers):
  config = tiny_config(model__sublayer='memory_bag', memory__ngram_layers=layers)
  assert layer_kinds(config.model, config.memory) == ('ngram_bag', 'ngram_bag')
  assert config_from_dict(config.to_dict()) == config
  with pytest.raises(UserError, match='memory.query_key_norm=.* does nothing in a model of ngram_bag layers'):
    tiny_config(model__sublayer='memory_bag', memory__ngram_layers=layers, memory__query_key_norm='l2')


def test_rules_of_a_gate_hold_for_models_that_have_one():
  odd = ['--config.model.knowledge_num=60', '--config.model.num_selected=9', '--config.model.knowledge_dim=33']
  for sublayer in ('ngram_bag', 'ngram_bucket', 'engram_bag'):
    more = [f'--config.model.sublayer={sublayer}', *(['--config.memory.key_dim=5'] if sublayer[6:] == 'bucket' else [])]
    assert load_config('configs/ngram_rows.py', [*odd, *more]).model.knowledge_num == 60
    with pytest.raises(UserError, match='num_selected=61 must be at most model.knowledge_num=60, all rows of the bank'):
      load_config('configs/ngram_rows.py', [*odd, *more, '--config.model.num_selected=61'])
  for flag, said in (
    (odd[0], 'knowledge_num=60 must be a square; nearest: 49 and 64'),
    (odd[2], 'knowledge_dim=33 must be even'),
    ('--config.model.num_selected=257', 'num_selected=257 must be at most the 256 sub-keys'),
    ('--config.model.num_selected=1', "num_selected=1 must be at least 2: the softmax of one score is 1.*'relu'"),
  ):
    with pytest.raises(UserError, match=said):
      load_config('configs/product_key_bag.py', [flag])


def test_list_of_settings_takes_no_arguments(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['mmjax.config'])
  main()
  assert capsys.readouterr().out == list_settings() + '\n'
  monkeypatch.setattr(sys, 'argv', ['mmjax.config', 'model'])
  with pytest.raises(SystemExit, match='2'):
    main()
