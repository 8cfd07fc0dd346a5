"""Weight conversion: exact both ways, every tensor accounted for."""

import dataclasses
import functools
import io
import json
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

torch = pytest.importorskip('torch')

from mmjax.config import Config, load_config  # noqa: E402
from mmjax.errors import UserError, run_command  # noqa: E402
from mmjax.interop import names  # noqa: E402
from mmjax.interop.convert import export_run, import_run  # noqa: E402
from mmjax.interop.files import FORMATS, Format, read_metadata, read_tensors, write_tensors  # noqa: E402
from mmjax.model.params import abstract_params  # noqa: E402
from mmjax.run.checkpoint import Checkpoints  # noqa: E402
from mmjax.run.directory import RunDir  # noqa: E402
from mmjax.tools.convert import main  # noqa: E402
from mmjax.training.optimizer import make_optimizer  # noqa: E402
from mmjax.training.state import init_state  # noqa: E402
from tests.helpers import TINY, arrays_of, flags_for, rarely, tiny_config  # noqa: E402
from tests.torch_reference import Sizes, TorchLM  # noqa: E402
from tests.weights import BASE_CONFIG, SUBLAYERS, assert_same_bits, make_state, save, take  # noqa: E402

CONFIGS = sorted(Path('configs').glob('*.py'))
OWN_NAMES = ('product_key_bag', 'ngram_rows', 'ngram_rows_1m', 'ngram_rows_4m', 'quickstart_ngram_rows', 'mixed')
KINDS = [path.stem for path in CONFIGS if path.stem not in ('memory_bag', 'memory_plus', 'quickstart_plus')]


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


def edited(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
  state = make_state()
  state.pop(name, None)
  return state if value is None else state | {name: value}


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    (edited('layers.1.attention.wq.weight', None), r'missing layers.1.attention.wq.weight \(32, 32\)'),
    (edited('layers.1.feed_forward.bias', torch.ones(3)), r'unexpected layers.1.feed_forward.bias \(3,\)'),
    (
      edited('layers.0.attention.wk.weight', torch.ones(32, 16)),
      r'\(1\):\n  layers.0.attention.wk.weight is \(32, 16\), must be \(16, 32\)',
    ),
    (edited('layers.0.attention.wk.weight', torch.ones(16)), r'wk.weight is \(16,\), must be \(16, 32\)'),
    (
      dict.fromkeys(('tok_embeddings.weight', names.TIED), torch.ones(32, 300))
      | {name: value for name, value in make_state().items() if name not in ('tok_embeddings.weight', names.TIED)},
      r'tok_embeddings.weight is \(32, 300\), must be \(300, 32\)',
    ),
    (edited('norm.weight', torch.ones(31)), r'norm.weight is \(31,\), must be \(32,\)'),
    (edited('layers.7.attention_norm.weight', torch.ones(32)), r'unexpected layers.7.attention_norm.weight'),
    (edited('memory_bank', None), r'missing memory_bank'),
    (edited('memory_bank', torch.ones(63, 8)), 'rows of memory_bank=63 must be a square'),
    (edited('output.weight', torch.ones(300, 32)), 'tok_embeddings.weight and output.weight differ'),
    (edited('layers.0.attention.wk.weight', torch.ones(15, 32)), 'numbers of heads that fit'),
    (edited('norm.weight', torch.ones(32, dtype=torch.bfloat16)), 'holds tensors of bfloat16'),
    (edited('norm.weight', torch.full((32,), np.nan)), 'cannot be imported: values that are not finite: 32 in norm.w'),
    (edited('norm.weight', torch.ones(32, dtype=torch.int64)), "'norm.weight' is int64"),
    (edited('layers.0.feed_forward.w1.weight', torch.ones(4, 4)), 'exactly one sublayer'),
    (edited('../../norm', torch.ones(4)), r'unexpected ../../norm \(4,\)'),
    (edited('module.norm.weight', torch.ones(32)), 'two tensors are called'),
    (
      {'model.layers.0.self_attn.q_proj.weight': torch.ones(32, 32)},
      r"those of transformers \('model.layers.0.self_attn.q_proj.weight'\), which mmjax writes .* and does not read",
    ),
    ({'weight': torch.ones(3)}, "no tensor has a name that begins with 'layers.0.'; there are 'weight'"),
    (
      {f'model.{name}': value for name, value in make_state().items()},
      "there are 'model.memory_bank', .* more tensors",
    ),
    (
      edited('tok_embeddings.weight', torch.ones(3)) | {names.TIED: torch.ones(3)},
      'tok_embeddings.weight is missing, or',
    ),
    (
      edited('layers.0.gated_memory_fusion.up_proj.weight', torch.ones(96, 32)),
      r'layers.0.gated_memory_fusion.up_proj.weight is \(96, 32\), must be',
    ),
    ({}, 'no tensors'),
  ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(state, message, tmp_path):
  with pytest.raises(UserError, match=message):
    take(save(state, tmp_path / 'model.pth'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.thorough
def test_what_shapes_do_not_tell_is_said(tmp_path, capsys):
  source = save(make_state(), tmp_path / 'model.safetensors')
  take(source, tmp_path / 'run')
  said = capsys.readouterr().out
  assert 'Taken from the config: n_heads 4,' in said and 'Numbers of heads' not in said
  assert 'data.layout packed, data.isolate_documents False, train.dtype bfloat16' in said
  with pytest.raises(UserError, match='model.n_heads=32 does not fit .* model.dim is 32 .* that fit: 2, 4, 8, 16'):
    import_run(source, tmp_path / 'usual', 'configs/base.py', [], None, None)
  assert 'The tensors do not tell' not in said
  take(save(make_state('cross_attention'), tmp_path / 'attends.pth'), tmp_path / 'attends')
  assert 'The tensors do not tell how many rows a token reads: 8 are assumed' in capsys.readouterr().out
  four = tmp_path / 'four.json'
  four.write_text(json.dumps(RunDir(tmp_path / 'run').read_config().to_dict()))
  import_run(source, tmp_path / 'other', str(four), [], None, None)
  said = capsys.readouterr().out
  assert 'Numbers of heads that fit, too, and make another model: 2, 8, 16 (--config.model.n_heads)' in said
  with pytest.raises(UserError, match="no memory.input='residual', .*configs/product_key_bag.py says so: name another"):
    import_run(source, tmp_path / 'bag', 'configs/product_key_bag.py', ['--config.model.n_heads=4'], None, None)


def test_values_that_torch_keeps_negated_are_read(tmp_path):
  path = tmp_path / 'model.pth'
  torch.save(make_state() | {'norm.weight': torch._neg_view(torch.ones(32))}, path)
  assert (read_tensors(path)['norm.weight'] == -1).all()


def test_every_misfit_is_listed(tmp_path):
  state = make_state() | {'norm.weight': torch.ones(31), 'extra': torch.ones(1)}
  del state['layers.0.memory_gate.keys']
  with pytest.raises(UserError) as caught:
    take(save(state, tmp_path / 'model.safetensors'), tmp_path / 'run')
  lines = str(caught.value).splitlines()
  assert 'these tensors do not fit the model (3):' in lines[0] and len(lines) == 4


def test_one_layer_of_another_width_is_named_alone(tmp_path):
  torch.manual_seed(0)
  sizes = dataclasses.replace(Sizes.of(tiny_config(model__sublayer='dense').model), n_layers=3)
  state = dict(TorchLM(sizes).state_dict())
  wrong = 'layers.0.feed_forward.w1.weight'
  right = tuple(state[wrong].shape)
  state[wrong] = state[wrong].T.contiguous()
  with pytest.raises(UserError) as caught:
    take(save(state, tmp_path / 'model.safetensors'), tmp_path / 'run')
  assert str(caught.value).splitlines()[1:] == [f'  {wrong} is {right[::-1]}, must be {right}']


def test_one_missing_key_projection_is_one_misfit(tmp_path):
  state = make_state()
  del state['layers.0.attention.wk.weight']
  with pytest.raises(UserError) as caught:
    take(save(state, tmp_path / 'model.safetensors'), tmp_path / 'run')
  assert str(caught.value).splitlines()[1:] == ['  missing layers.0.attention.wk.weight (16, 32)']


def test_values_too_large_for_float32_are_refused_as_such(tmp_path):
  state = {name: value.double() for name, value in make_state().items()}
  state['norm.weight'] *= 1e300
  with pytest.raises(UserError, match=r'norm.weight has values up to 1e\+300, too large for float32$'):
    take(save(state, tmp_path / 'model.safetensors'), tmp_path / 'run', dtype='float32')


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
    ('--config.model.n_heads=3', 'n_heads=3 does not fit .* fit: 2, 4, 8, 16'),
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
  with pytest.raises(UserError, match=f"the PyTorch code has no memory.{name}='?{value}'?, and .* has its names"):
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
MIXED |= {'memory__query_key_norm': 'l2', 'memory__selection_bias': True, 'data__layout': 'padded'}
SMALL = {**TINY, 'model.num_selected': 2}  # what is left makes it this experiment


@pytest.mark.parametrize('name', rarely([*KINDS, 'mixed'], 'ngram_rows'))
def test_every_kind_of_model_goes_out_and_comes_back_bit_for_bit_without_a_config(name, tmp_path, capsys):
  if name == 'mixed':
    config = tiny_config(**MIXED)
  else:
    settings = SMALL | ({'model.knowledge_num': 2048} if name.startswith('ngram_rows_') else {})  # ranges of their own
    config = load_config(f'configs/{name}.py', flags_for(f'configs/{name}.py', settings))
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
  export_run(tmp_path / 'back', tmp_path / 'again.safetensors', 'best', None)
  with safe_open(file, 'numpy') as opened, safe_open(tmp_path / 'again.safetensors', 'numpy') as again:
    names = list(opened.keys())
    assert opened.metadata() == again.metadata() and names == list(again.keys())
    assert all(opened.get_tensor(key).tobytes() == again.get_tensor(key).tobytes() for key in names)
  if name in OWN_NAMES:
    with pytest.raises(UserError, match='the PyTorch code has no .* and could not read .*; use .safetensors'):
      export_run(tmp_path / 'run', tmp_path / 'model.pth', 'best', None)


def _npz_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
  np.savez(file := io.BytesIO(), **tensors, **{f'about:{key}': text for key, text in metadata.items()})
  return file.getvalue()


def _read_npz(path: Path, *, about: bool) -> dict[str, np.ndarray]:
  with np.load(path) as file:
    return {name.removeprefix('about:'): file[name] for name in file if name.startswith('about:') == about}


def test_new_format_of_weights_is_one_row(tmp_path, monkeypatch):
  def metadata(path: Path) -> dict[str, str]:
    return {key: str(text) for key, text in _read_npz(path, about=True).items()}

  monkeypatch.setitem(FORMATS, '.npz', Format(functools.partial(_read_npz, about=False), _npz_bytes, metadata))
  config = load_config('configs/ngram_rows.py', flags_for('configs/ngram_rows.py', SMALL))
  before = run_of(config, tmp_path / 'run')
  export_run(tmp_path / 'run', tmp_path / 'model.npz', 'best', None)
  assert (tmp_path / 'model.npz.sha256').exists()
  import_run(tmp_path / 'model.npz', tmp_path / 'back', BASE_CONFIG, [], None, None)
  after = arrays_of(tmp_path / 'back', 0)
  assert before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)
  assert RunDir(tmp_path / 'back').read_config().memory == config.memory


@pytest.mark.thorough
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
    ({**metadata, 'settings': {'runtime': {'coordinator': 'x:1'}}}, "sets 'runtime.coordinator', which is no setting"),
    ({**metadata, 'settings': metadata['settings'] | {'model': {'dimm': 3}}}, "no setting 'model.dimm'"),
    (
      {**metadata, 'settings': metadata['settings'] | {'model': {'dim': [3]}}},
      'header of .*: model.dim=.*must be of type int',
    ),
    ({**metadata, 'settings': metadata['settings'] | {'model': {'n_layers': 3}}}, 'tensors do not fit the model'),
    ({'settings': 3}, 'is damaged'),
    ([], 'is damaged'),
    ({'settings': {}, 'step': 'abc'}, 'is damaged: .*step=.abc. must be a whole number'),
    ({'settings': {}, 'step': -5}, 'is damaged: .*step=-5'),
  ):
    save_file(tensors, file, {'mmjax': json.dumps(changed)})
    with pytest.raises(UserError, match=match):
      import_run(file, tmp_path / 'other', BASE_CONFIG, [], None, None)
  save_file(tensors, file)  # a tool that drops the header
  import_run(file, tmp_path / 'other', f'{tmp_path}/run/config.json', [], None, None)
  assert arrays_of(tmp_path / 'other', 0).keys() == arrays_of(tmp_path / 'run', 7).keys()


@pytest.mark.thorough
def test_imported_model_goes_on_in_the_dtype_that_it_was_trained_in(tmp_path, capsys):
  run_of(tiny_config(train__dtype='float32'), tmp_path / 'run')
  file = tmp_path / 'model.safetensors'
  export_run(tmp_path / 'run', file, 'last', 'bfloat16')  # which is how the file holds the weights, and no more

  def trained_in(out: str, *overrides: str, cast: str | None = 'float32') -> str:
    import_run(file, tmp_path / out, BASE_CONFIG, overrides, None, cast)
    return RunDir(tmp_path / out).read_config().train.dtype

  assert trained_in('back') == 'float32'
  said = capsys.readouterr().out
  assert 'settings of the model, and train.dtype float32\n' in said and f'--config {tmp_path}/back/config.json' in said
  assert trained_in('other', '--config.train.dtype=bfloat16') == 'bfloat16'
  tensors, header = read_tensors(file), json.loads(read_metadata(file)['mmjax'])
  file.with_name(f'{file.name}.sha256').unlink()
  save_file(tensors, file, {'mmjax': json.dumps(header | {'train.dtype': ['float32']})})
  with pytest.raises(UserError, match='header of .*: train.dtype='):
    trained_in('wrong')
  del header['train.dtype']  # as an earlier version wrote it
  save_file(tensors, file, {'mmjax': json.dumps(header)})
  assert trained_in('earlier') == 'bfloat16'


def test_values_too_large_for_the_asked_dtype_are_refused(tmp_path):
  state = make_state() | {'norm.weight': torch.full((32,), 1e5)}
  take(save(state, tmp_path / 'model.safetensors'), tmp_path / 'run')
  with pytest.raises(UserError, match=r'norm.weight has values up to 1e\+05, too large for float16'):
    export_run(tmp_path / 'run', tmp_path / 'back.pth', 'last', 'float16')
  assert not (tmp_path / 'back.pth').exists()


def test_nothing_is_overwritten(tmp_path):
  path = save(make_state(), tmp_path / 'model.safetensors')
  with pytest.raises(UserError, match='already exists; choose another --out'):
    take(path, tmp_path)
  (tmp_path / 'stopped' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='what wrote it was stopped: remove it and repeat the command'):
    take(path, tmp_path / 'stopped')
  with pytest.raises(UserError, match='already exists'):
    write_tensors(path, {'a': np.ones(3, np.float32)})


def test_import_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  path = save(make_state(), tmp_path / 'model.safetensors')
  monkeypatch.setattr(RunDir, 'write_config', interrupted)
  with pytest.raises(KeyboardInterrupt):
    take(path, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


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
  assert no_run.count('\n') == 1 and 'no run directory' in no_run
