"""Weight conversion: exact both ways, every tensor accounted for."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

torch = pytest.importorskip('torch')

import mmjax  # noqa: E402
from mmjax.config import Config, config_from_dict, idle_settings, load_config  # noqa: E402
from mmjax.data.loader import PADDING, open_split, train_batches  # noqa: E402
from mmjax.data.spm_tokenizer import train_tokenizer  # noqa: E402
from mmjax.errors import UserError, run_command  # noqa: E402
from mmjax.interop import names  # noqa: E402
from mmjax.interop.files import read_metadata, read_tensors, write_tensors  # noqa: E402
from mmjax.model.lm import abstract_params, model_graph  # noqa: E402
from mmjax.run.checkpoint import Checkpoints  # noqa: E402
from mmjax.run.directory import RunDir, open_run  # noqa: E402
from mmjax.run.log import read_metrics  # noqa: E402
from mmjax.tools.convert import export_run, fitting_config, import_run, main  # noqa: E402
from mmjax.training.loop import fit  # noqa: E402
from mmjax.training.optimizer import make_optimizer  # noqa: E402
from mmjax.training.step import init_state  # noqa: E402
from tests.helpers import TINY, arrays_of, flags_for, rarely, tiny_config  # noqa: E402
from tests.parity import build_pair, jax_forward, random_tokens, torch_logits  # noqa: E402
from tests.torch_reference import Sizes, TorchLM  # noqa: E402

CONFIGS = sorted(Path('configs').glob('*.py'))
OWN_NAMES = ('memory_bag', 'memory_plus', 'quickstart_plus', 'mixed')
SUBLAYERS = ('dense', 'cross_attention', 'gated_fusion', 'moe')
BASE_CONFIG = 'configs/base.py'
HEADS = ['--config.model.n_heads=4', '--config.model.max_seq_len=16']


def make_state(sublayer: str = 'gated_fusion', **changes: object) -> dict[str, torch.Tensor]:
  """Returns the state dict of a fresh tiny torch model."""
  torch.manual_seed(0)
  sizes = Sizes.of(tiny_config(model__sublayer=sublayer).model)
  return dict(TorchLM(dataclasses.replace(sizes, **changes)).state_dict())


def save(state: dict, path: Path) -> Path:
  """Writes a state dict as someone else would."""
  if path.suffix == '.pth':
    torch.save(state, path)
  else:
    save_file({name: value.numpy() for name, value in state.items()}, path)
  return path


def take(source: Path, out: Path, *overrides: str, tokenizer: str | None = None, dtype: str | None = None) -> None:
  import_run(source, out, BASE_CONFIG, [*HEADS, *overrides], tokenizer, dtype)


def write_text(folder: Path) -> None:
  """Writes text.jsonl, to be trained on, and spm.model, its tokenizer."""
  words = 'the memory reads a row of its bank and writes what it learned into the stream again'.split()
  draw = random.Random(0)
  documents = [' '.join(draw.choices(words, k=20)) for _ in range(200)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in documents))
  (folder / 'spm.model').write_bytes(train_tokenizer(documents, 300))


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, torch.Tensor]) -> None:
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].dtype == value.numpy().dtype and got[name].shape == tuple(value.shape), name
    assert got[name].tobytes() == value.numpy().tobytes(), name


@pytest.mark.parametrize('sublayer', SUBLAYERS)
def test_torch_to_run_to_torch_is_bit_identical(sublayer, tmp_path):
  state = make_state(sublayer)
  suffixes = ('.pth', '.safetensors') if sublayer in ('gated_fusion', 'moe') else ('.safetensors', '.pth')
  take(save(state, tmp_path / f'model{suffixes[0]}'), tmp_path / 'run')
  back = tmp_path / f'back{suffixes[1]}'
  export_run(tmp_path / 'run', back, 'last', None)
  assert_same_bits(read_tensors(back), state)
  if back.suffix == '.pth':
    fresh = TorchLM(Sizes.of(tiny_config(model__sublayer=sublayer).model))
    fresh.load_state_dict(torch.load(back, weights_only=True))  # strict: the names and shapes are the original's


@st.composite
def model_settings(draw, layers):
  n_heads = draw(st.sampled_from([1, 2, 4, 6]))
  n_sub_keys = draw(st.integers(2, 5))
  return {
    'vocab_size': draw(st.integers(300, 310)),
    'n_layers': draw(st.sampled_from(layers)),
    'n_heads': n_heads,
    'n_kv_heads': draw(st.sampled_from([k for k in (1, 2, 3, 6) if n_heads % k == 0])),
    'dim': n_heads * 2 * draw(st.integers(1, 3)),
    'hidden_dim': draw(st.sampled_from([0, 5])),
    'knowledge_num': n_sub_keys**2,
    'knowledge_dim': 2 * draw(st.integers(1, 4)),
    'num_selected': draw(st.integers(1, n_sub_keys)),
    'n_experts': draw(st.sampled_from([2, 3, 11])),
  }


@pytest.mark.parametrize('sublayer', SUBLAYERS)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(0, 2**32 - 1))
def test_any_model_is_recognised_and_round_trips(sublayer, data, seed):
  # Two digits: 10 must not be taken for 1. Experts have them, too; so many in so many layers take seconds to build.
  sizes = {'sublayer': sublayer, **data.draw(model_settings([1, 2] if sublayer == 'moe' else [1, 2, 11]))}
  kind = [f'--config.model.sublayer={sublayer}']
  idle = idle_settings(load_config(BASE_CONFIG, kind))
  flags = [f'--config.model.{name}={value}' for name, value in sizes.items() if f'model.{name}' not in idle]
  config = load_config(BASE_CONFIG, flags)
  with torch.device('meta'):
    names_and_shapes = {name: value.shape for name, value in TorchLM(Sizes.of(config.model)).state_dict().items()}
  rng = np.random.default_rng(seed)
  state = {  # random bits: NaNs and denormals too
    name: np.frombuffer(rng.bytes(4 * shape.numel()), np.float32).reshape(shape)
    for name, shape in names_and_shapes.items()
  }
  state[names.TIED] = state['tok_embeddings.weight']
  tensors = names.canonical(state, 'file')
  found = {name: value.shape for name, value in tensors.items()}

  untold = ['n_heads'] + (['num_selected'] if sizes['sublayer'] == 'cross_attention' else [])
  overrides = [f'--config.model.{name}={sizes[name]}' for name in untold]
  read = fitting_config(found, 'file', BASE_CONFIG, overrides)
  told = {'dense': (), 'moe': ('n_experts',)}.get(sizes['sublayer'], ('knowledge_num', 'knowledge_dim', 'num_selected'))
  for name in ('sublayer', 'vocab_size', 'n_layers', 'n_heads', 'n_kv_heads', 'dim', *told):
    assert getattr(read.model, name) == sizes[name], name
  names.check_accounted(found, names.tensor_shapes(read), 'file')

  back = names.to_tensors(names.to_params(tensors, read), read)
  assert back.keys() == tensors.keys()
  assert all(back[name].tobytes() == value.tobytes() for name, value in tensors.items())


def test_imported_run_computes_what_torch_computes(tmp_path):
  model, _, _ = build_pair(tiny_config())
  take(save(dict(model.state_dict()), tmp_path / 'model.safetensors'), tmp_path / 'run')
  config = config_from_dict(json.loads((tmp_path / 'run' / 'config.json').read_text()))
  params, metadata, step = Checkpoints(tmp_path / 'run', read_only=True).restore_params(abstract_params(config), 'best')
  assert step == 0 and metadata == {'tokens': 0, 'seconds': 0.0}
  tokens_BT = random_tokens(config, 2, 16)
  got_BTV, _ = jax_forward(model_graph(config), params, tokens_BT)
  np.testing.assert_allclose(got_BTV, torch_logits(model, tokens_BT), atol=1e-5)


@pytest.mark.parametrize(
  'rename',
  [
    lambda name: f'module.{name}',
    lambda name: f'module._orig_mod.{name}',
    lambda name: name.replace('layers.0.', 'layers.0._orig_mod.'),
  ],
)
def test_prefixes_of_wrappers_are_dropped(rename, tmp_path):
  state = make_state()
  path = save({rename(name): value for name, value in state.items()}, tmp_path / 'model.pth')
  assert names.canonical(read_tensors(path), 'file').keys() == state.keys() - {names.TIED}


@pytest.mark.parametrize('key', ['model', 'state_dict'])
def test_nested_state_dict_is_found_and_neighbours_refused(key, tmp_path):
  state = make_state()
  assert_same_bits(read_tensors(save({key: state}, tmp_path / 'model.pth')), state)
  with pytest.raises(UserError, match=f"holds epoch beside '{key}'"):
    read_tensors(save({key: state, 'epoch': 3}, tmp_path / 'more.pth'))


@pytest.mark.parametrize('left_out', [names.TIED, 'tok_embeddings.weight'])
def test_tied_weights_may_stand_under_one_name_alone(left_out):
  tensors = {name: value.numpy() for name, value in make_state().items()}
  one = {name: value for name, value in tensors.items() if name != left_out}
  assert names.canonical(one, 'file').keys() == names.canonical(tensors, 'file').keys()


def test_known_buffers_are_tolerated_in_any_dtype(tmp_path):
  state = make_state()
  buffers = {
    'pos_cis': torch.zeros(8, 4, dtype=torch.complex64),
    'layers.0.attention.mask': torch.ones(1, 1, 3, 3).bool(),
  }
  assert_same_bits(read_tensors(save(state | buffers, tmp_path / 'model.pth')), state)


def edited(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
  state = make_state()
  state.pop(name, None)
  return state if value is None else state | {name: value}


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    (edited('layers.1.attention.wq.weight', None), r'missing layers.1.attention.wq.weight \(32, 32\)'),
    (edited('layers.1.feed_forward.bias', torch.ones(3)), r'unexpected layers.1.feed_forward.bias \(3,\)'),
    (edited('norm.weight', torch.ones(31)), r'norm.weight is \(31,\), must be \(32,\)'),
    (edited('layers.7.attention_norm.weight', torch.ones(32)), r'unexpected layers.7.attention_norm.weight'),
    (edited('memory_bank', None), r'missing memory_bank'),
    (edited('memory_bank', torch.ones(63, 8)), 'knowledge_num=63 must be a square'),
    (edited('output.weight', torch.ones(300, 32)), 'tok_embeddings.weight and output.weight differ'),
    (edited('layers.0.attention.wk.weight', torch.ones(15, 32)), 'numbers of heads that fit'),
    (edited('norm.weight', torch.ones(32, dtype=torch.bfloat16)), 'holds tensors of bfloat16'),
    (edited('norm.weight', torch.full((32,), np.nan)), 'cannot be imported: values that are not finite: 32 in norm.w'),
    (edited('norm.weight', torch.ones(32, dtype=torch.int64)), "'norm.weight' is int64"),
    (edited('layers.0.feed_forward.w1.weight', torch.ones(4, 4)), 'exactly one sublayer'),
    (edited('../../norm', torch.ones(4)), r'unexpected ../../norm \(4,\)'),
    (edited('module.norm.weight', torch.ones(32)), 'two tensors are called'),
    ({'weight': torch.ones(3)}, 'the layers hold nothing'),
    ({}, 'no tensors'),
  ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(state, message, tmp_path):
  with pytest.raises(UserError, match=message):
    take(save(state, tmp_path / 'model.pth'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_every_misfit_is_listed(tmp_path):
  state = make_state() | {'norm.weight': torch.ones(31), 'extra': torch.ones(1)}
  del state['layers.0.memory_gate.keys']
  with pytest.raises(UserError) as caught:
    take(save(state, tmp_path / 'model.safetensors'), tmp_path / 'run')
  lines = str(caught.value).splitlines()
  assert '3 tensors do not fit' in lines[0] and len(lines) == 4


def test_other_dtypes_are_cast_only_when_asked(tmp_path, capsys):
  state = {name: value.bfloat16() for name, value in make_state().items()}
  path = tmp_path / 'model.pth'
  torch.save(state, path)
  with pytest.raises(UserError, match='--dtype float32'):
    take(path, tmp_path / 'run')
  take(path, tmp_path / 'run', dtype='float32')
  assert 'Casting tensors of bfloat16 to float32' in capsys.readouterr().out
  export_run(tmp_path / 'run', tmp_path / 'back.safetensors', 'last', 'bfloat16')
  assert 'bfloat16' in capsys.readouterr().out
  back = read_tensors(tmp_path / 'back.safetensors')
  assert all(value.dtype == ml_dtypes.bfloat16 for value in back.values())
  assert all((back[name].astype(np.float32) == value.float().numpy()).all() for name, value in state.items())


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('--config.model.dim=64', 'model.dim=64 contradicts .*, whose tensors say 32'),
    ('--config.model.sublayer=dense', "model.sublayer='dense' contradicts"),
    ('--config.model.n_layers=3', 'model.n_layers=3 contradicts'),
    ('--config.model.n_kv_heads=4', 'model.n_kv_heads=4 contradicts'),
    ('--config.model.n_heads=3', 'must be divisible'),
    ('--config.model.n_headz=4', "did you mean 'model.n_heads'"),
  ],
)
def test_overrides_that_contradict_the_tensors_are_refused(override, message, tmp_path):
  with pytest.raises(UserError, match=message):
    take(save(make_state(), tmp_path / 'model.safetensors'), tmp_path / 'run', override)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'setting', ['input=residual', 'n_heads=2', 'scores=scale', 'query_key_norm=l2', 'ffn_dim=8', 'layers=1']
)
def test_memory_that_the_pytorch_code_does_not_have_is_refused(setting, tmp_path):
  source = save(make_state(), tmp_path / 'model.safetensors')
  name, _, value = setting.partition('=')
  with pytest.raises(UserError, match=f"memory.{name}='?{value}'? is not in the PyTorch code, whose names .* has"):
    take(source, tmp_path / 'run', f'--config.memory.{setting}')
  assert not (tmp_path / 'run').exists()
  config = tiny_config(**{f'memory__{name}': value})
  assert names.not_in_pytorch(config).startswith(f'memory.{name}=')
  assert not names.not_in_pytorch(dataclasses.replace(config, model=tiny_config(model__sublayer='dense').model))


def run_of(config: Config, path: Path) -> dict[str, np.ndarray]:
  """Makes a run of random bits, denormals too, in every parameter, and returns them by name; those of NaNs become 0."""
  rng, abstract = np.random.default_rng(0), abstract_params(config)
  params = jax.tree.map(lambda x: np.frombuffer(rng.bytes(4 * x.size), np.float32).reshape(x.shape), abstract)
  params = jax.tree.map(lambda x: np.where(np.isfinite(x), x, np.float32(0)), params)
  with RunDir(path) as run:
    Checkpoints(path).save(7, init_state(config, make_optimizer(config, 1), params), {'tokens': 1, 'seconds': 1.0})
    run.write_config(config)
  return arrays_of(path, 7)


MIXED = {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__ngram_layers': '1', 'memory__ffn_dim': 8}
MIXED |= {'memory__query_key_norm': 'layer_norm', 'memory__selection_bias': True, 'data__layout': 'padded'}
SMALL = {**TINY, 'model.num_selected': 1}  # what is left makes it this experiment


@pytest.mark.parametrize('name', rarely([*(path.stem for path in CONFIGS), 'mixed'], 'memory_bag', 'memory_plus'))
def test_every_kind_of_model_goes_out_and_comes_back_bit_for_bit_without_a_config(name, tmp_path, capsys):
  if name == 'mixed':
    config = tiny_config(**MIXED)
  else:
    config = load_config(f'configs/{name}.py', flags_for(f'configs/{name}.py', SMALL))
  before, file = run_of(config, tmp_path / 'run'), tmp_path / 'model.safetensors'
  export_run(tmp_path / 'run', file, 'best', None)
  import_run(file, tmp_path / 'back', BASE_CONFIG, [], None, None)
  after = arrays_of(tmp_path / 'back', 0)
  assert before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)
  back = RunDir(tmp_path / 'back').read_config()
  memory = dataclasses.replace(config.memory, bank_init='normal', bank_file='')
  assert (back.model, back.memory, back.data.layout) == (config.model, memory, config.data.layout)
  with safe_open(file, 'numpy') as opened:
    header, found = json.loads(opened.metadata()['mmjax']), set(opened.keys())
  assert header['step'] == 7 and header['names'] == ('mmjax' if name in OWN_NAMES else 'pytorch')
  assert ('layers/0/attention/wq/kernel' in found, 'layers.0.attention.wq.weight' in found) == (
    (True, False) if name in OWN_NAMES else (False, True)
  )
  if name in OWN_NAMES:
    with pytest.raises(UserError, match='is not in the PyTorch code, which could not read .*; use .safetensors'):
      export_run(tmp_path / 'run', tmp_path / 'model.pth', 'best', None)


def test_header_binds_what_it_says_and_no_more(tmp_path):
  run_of(tiny_config(**MIXED), tmp_path / 'run')
  file = tmp_path / 'model.safetensors'
  export_run(tmp_path / 'run', file, 'last', None)

  def bring(*overrides: str, tokenizer: str | None = None) -> None:
    import_run(file, tmp_path / 'back', BASE_CONFIG, overrides, tokenizer, None)

  said = 'the model in .*model.safetensors has other settings than the config: memory.ngrams 1 -> 2; type'
  with pytest.raises(UserError, match=said):
    bring('--config.memory.ngrams=2')
  bring('--config.model.dropout=0.1', '--config.train.batch_size=3')
  assert RunDir(tmp_path / 'back').read_config().model.dropout == 0.1

  tensors, metadata = read_tensors(file), json.loads(read_metadata(file)['mmjax'])
  file.with_name(f'{file.name}.sha256').unlink()
  for changed, match in (
    ({**metadata, 'settings': {'runtime': {'coordinator': 'x:1'}}}, "sets 'runtime.coordinator', which is not of a"),
    ({**metadata, 'settings': metadata['settings'] | {'model': {'dimm': 3}}}, "no setting 'model.dimm'"),
    (
      {**metadata, 'settings': metadata['settings'] | {'model': {'dim': [3]}}},
      'header: model.dim=.*must be of type int',
    ),
    ({**metadata, 'settings': metadata['settings'] | {'model': {'n_layers': 3}}}, 'tensors do not fit the model'),
    ({'settings': 3}, 'is damaged'),
    ([], 'is damaged'),
  ):
    save_file(tensors, file, {'mmjax': json.dumps(changed)})
    with pytest.raises(UserError, match=match):
      import_run(file, tmp_path / 'other', BASE_CONFIG, [], None, None)
  save_file(tensors, file)  # a tool that drops the header
  import_run(file, tmp_path / 'other', f'{tmp_path}/run/config.json', [], None, None)
  assert arrays_of(tmp_path / 'other', 0).keys() == arrays_of(tmp_path / 'run', 7).keys()


def test_another_tokenizer_than_the_one_in_the_header_is_refused(tiny_run, tmp_path):
  file, other = tmp_path / 'model.safetensors', tmp_path / 'other.model'
  export_run(tiny_run, file, 'best', 'bfloat16')
  other.write_bytes(train_tokenizer(['some other text of a few words'] * 9, 300))
  with pytest.raises(UserError, match='other.model. is not the one that .* was trained with'):
    import_run(file, tmp_path / 'back', BASE_CONFIG, [], str(other), 'float32')
  import_run(file, tmp_path / 'back', BASE_CONFIG, [], f'{tiny_run}/tokenizer.model', 'float32')
  assert mmjax.load(tmp_path / 'back').generate('the memory', max_new_tokens=3)


@pytest.mark.parametrize('width', [24, 0])
def test_hidden_width_may_be_given_as_number_or_as_usual(width, tmp_path):
  """24 is no usual width; the usual one of dim 32 is 128."""
  state = make_state('dense', hidden_dim=width)
  shapes = {name: tuple(value.shape) for name, value in state.items()}
  right, wrong = width or 128, 60
  config = fitting_config(shapes, 'file', BASE_CONFIG, [*HEADS, f'--config.model.hidden_dim={right}'])
  assert config.model.dense_hidden_dim == right
  assert fitting_config(shapes, 'file', BASE_CONFIG, HEADS).model.hidden_dim == width
  with pytest.raises(UserError, match=f'model.hidden_dim={wrong} contradicts'):
    fitting_config(shapes, 'file', BASE_CONFIG, [*HEADS, f'--config.model.hidden_dim={wrong}'])


def test_values_too_large_for_the_asked_dtype_are_refused(tmp_path):
  state = make_state() | {'norm.weight': torch.full((32,), 1e5)}
  take(save(state, tmp_path / 'model.safetensors'), tmp_path / 'run')
  with pytest.raises(UserError, match=r'norm.weight has values up to 1e\+05, too large for float16'):
    export_run(tmp_path / 'run', tmp_path / 'back.pth', 'last', 'float16')
  assert not (tmp_path / 'back.pth').exists()


def test_nothing_is_overwritten(tmp_path):
  path = save(make_state(), tmp_path / 'model.safetensors')
  with pytest.raises(UserError, match='is there already'):
    take(path, tmp_path)
  with pytest.raises(UserError, match='is there already'):
    write_tensors(path, {'a': np.ones(3, np.float32)})


def test_run_without_the_asked_checkpoint_is_refused(tmp_path):
  take(save(make_state(), tmp_path / 'model.safetensors'), tmp_path / 'run')
  with pytest.raises(UserError, match='no checkpoint 7'):
    export_run(tmp_path / 'run', tmp_path / 'back.pth', '7', None)
  with pytest.raises(UserError, match="'newest' must be"):
    export_run(tmp_path / 'run', tmp_path / 'back.pth', 'newest', None)
  assert not (tmp_path / 'back.pth').exists()


def test_commands_end_with_one_sentence_and_code_2(tmp_path, monkeypatch, capfd):
  def run(*flags: str) -> str:
    monkeypatch.setattr(sys, 'argv', ['convert', *flags])
    with pytest.raises(SystemExit) as stop:
      run_command(main)
    assert stop.value.code == 2
    return capfd.readouterr().err

  missing = run('import', '--from', f'{tmp_path}/no.pth', '--out', f'{tmp_path}/run')
  assert missing.count('\n') == 1 and 'no file' in missing
  no_run = run('export', '--workdir', f'{tmp_path}/no', '--to', f'{tmp_path}/a.pth')
  assert no_run.count('\n') == 1 and 'config.json' in no_run


@pytest.mark.thorough
def test_imported_run_is_trained_on_from_its_weights(tmp_path):
  """Fine-tuning at learning rate 0 reports the loss that torch has on the same rows."""
  write_text(tmp_path)
  model, _, _ = build_pair(tiny_config())
  data = {
    'data.train_files': tmp_path / 'text.jsonl', 'data.valid_fraction': 0.1, 'data.prepared_dir': tmp_path / 'prepared',
    'data.workers': 1, 'train.max_steps': 2, 'train.batch_size': 4, 'train.accumulation_steps': 1,
    'train.dtype': 'float32', 'train.learning_rate': 0.0, 'train.eval_interval': 2, 'train.log_interval': 1,
  }  # fmt: skip
  path, run = save(dict(model.state_dict()), tmp_path / 'model.safetensors'), tmp_path / 'run'
  overrides = [f'--config.{name}={value}' for name, value in data.items()]
  take(path, run, *overrides, tokenizer=str(tmp_path / 'spm.model'))
  config = config_from_dict(json.loads((run / 'config.json').read_text()))
  fit(config, run)

  split = open_split(
    next((tmp_path / 'prepared').glob('text*')), 'train', max_seq_len=16, layout='packed', isolate_documents=False
  )
  batch = next(iter(train_batches(split, global_batch_rows=4, seed=config.seed, start_step=0)))
  logits_BTV = torch.from_numpy(torch_logits(model, batch['input']))
  target = torch.from_numpy(batch['target']).long()
  want = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), target.flatten(), ignore_index=PADDING)
  first = next(line for line in read_metrics(run / 'metrics.jsonl') if line['kind'] == 'train')
  assert first['step'] == 1 and first['loss'] == pytest.approx(want.item(), rel=1e-5)


def test_tokenizer_of_another_size_is_refused(tmp_path):
  (tmp_path / 'spm.model').write_bytes(train_tokenizer([__doc__, *map(str, range(3000))], 301))
  with pytest.raises(UserError, match='has 301 pieces, the embedding 300 rows'):
    take(save(make_state(), tmp_path / 'model.pth'), tmp_path / 'run', tokenizer=str(tmp_path / 'spm.model'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.thorough
def test_spare_rows_of_an_embedding_are_imported_trained_on_and_never_sampled(tmp_path, capsys):
  write_text(tmp_path)
  (tmp_path / 'spm.model').write_bytes(train_tokenizer(['some text of a few words'] * 9, 280))
  state = make_state()
  state['tok_embeddings.weight'][280:] *= 100.0  # these would always win
  state['output.weight'] = state['tok_embeddings.weight']
  take(save(state, tmp_path / 'model.pth'), tmp_path / 'run', tokenizer=str(tmp_path / 'spm.model'))
  assert 'The tokenizer has 280 pieces: 20 rows of the embedding are spare' in capsys.readouterr().out
  lm = mmjax.load(tmp_path / 'run')
  best = np.asarray(lm.logits([[5, 6, 7]])[0]).argmax(-1)
  assert best.max() >= 280
  for knobs in ({'temperature': 0}, {'temperature': 2.0, 'top_p': 1}, {'seed_sampling': True}):
    assert max(lm.generate_tokens([[5, 6, 7]], max_new_tokens=40, **knobs)[0]) < 280
  data = {'data__train_files': tmp_path / 'text.jsonl', 'data__valid_fraction': 0.1, 'data__workers': 1,
          'data__prepared_dir': tmp_path / 'prepared', 'train__max_steps': 1}  # fmt: skip
  fit(tiny_config(**data), tmp_path / 'run')
  assert mmjax.load(tmp_path / 'run', 'last').step == 1


def test_import_without_a_tokenizer_takes_and_gives_token_ids(tmp_path):
  state = make_state()
  take(save(state, tmp_path / 'model.pth'), tmp_path / 'run')
  lm = mmjax.load(tmp_path / 'run')
  tokens = np.arange(24).reshape(2, 12)
  model = TorchLM(Sizes.of(lm.config.model))
  model.load_state_dict(state)
  np.testing.assert_allclose(lm.logits(tokens), torch_logits(model, tokens), atol=1e-4)
  assert [len(row) for row in lm.generate_tokens([[5, 6], [7]], max_new_tokens=20)] == [20, 20]
  for use in (lambda: lm.generate('text'), lambda: lm.stream('text'), lambda: lm.tokenizer,
              lambda: open_run(tmp_path / 'run')):  # fmt: skip
    with pytest.raises(UserError, match='imported without a tokenizer: it takes and gives token ids'):
      use()


def test_imported_run_trains_under_other_data_and_training_settings(tmp_path):
  """Nothing but the architecture is bound: not the clip, which changes the optimizer's state."""
  write_text(tmp_path)
  state = make_state()
  take(save(state, tmp_path / 'm.safetensors'), tmp_path / 'first', tokenizer=str(tmp_path / 'spm.model'))
  (tmp_path / 'first').rename(tmp_path / 'run')  # its tokenizer, which nothing names below, goes with it
  settings = {
    'data__train_files': tmp_path / 'text.jsonl', 'data__valid_fraction': 0.1, 'data__workers': 1,
    'data__prepared_dir': tmp_path / 'prepared', 'train__max_steps': 2, 'train__grad_clip': 0.0,
    'train__learning_rate': 0.0, 'seed': 3,
  }  # fmt: skip
  with pytest.raises(UserError, match='memory.bank_std=0.5 does nothing where parameters come from'):
    fit(tiny_config(**settings, memory__bank_std=0.5), tmp_path / 'run')
  with pytest.raises(UserError, match='model.num_selected 3 -> 4; type --config.model.num_selected=3'):
    fit(tiny_config(**settings, model__num_selected=4), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'run.json').exists()
  fit(tiny_config(**settings), tmp_path / 'run')
  export_run(tmp_path / 'run', tmp_path / 'back.safetensors', 'last', None)
  assert_same_bits(read_tensors(tmp_path / 'back.safetensors'), state)
  assert (tmp_path / 'run' / 'tokenizer.model').read_bytes() == (tmp_path / 'spm.model').read_bytes()
  with pytest.raises(UserError, match='seed 3 -> 4'):  # from here on it is a run like any other
    fit(tiny_config(**settings | {'seed': 4}), tmp_path / 'run')
