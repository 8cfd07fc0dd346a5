"""Names and sizes in a state dict: wrappers, buffers and tied weights; any model is recognised by its shapes."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip('torch')

from mmjax.config import idle_settings, load_config  # noqa: E402
from mmjax.errors import UserError  # noqa: E402
from mmjax.interop import names  # noqa: E402
from mmjax.interop.convert import fitting_config  # noqa: E402
from mmjax.interop.files import read_tensors  # noqa: E402
from tests.torch_reference import Sizes, TorchLM  # noqa: E402
from tests.weights import BASE_CONFIG, HEADS, SUBLAYERS, assert_same_bits, make_state, save  # noqa: E402


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


@pytest.mark.parametrize('left_out', [names.TIED, 'tok_embeddings.weight'])
def test_tied_weights_may_stand_under_one_name_alone(left_out):
  tensors = {name: value.numpy() for name, value in make_state().items()}
  one = {name: value for name, value in tensors.items() if name != left_out}
  assert names.canonical(one, 'file').keys() == names.canonical(tensors, 'file').keys()


@pytest.mark.parametrize('key', ['model', 'state_dict'])
def test_nested_state_dict_is_found_and_neighbours_refused(key, tmp_path):
  state = make_state()
  assert_same_bits(read_tensors(save({key: state}, tmp_path / 'model.pth')), state)
  with pytest.raises(UserError, match=f"holds epoch in addition to '{key}'"):
    read_tensors(save({key: state, 'epoch': 3}, tmp_path / 'more.pth'))


def test_known_buffers_are_tolerated_in_any_dtype(tmp_path):
  state = make_state()
  buffers = {
    'pos_cis': torch.zeros(8, 4, dtype=torch.complex64),
    'freqs_cos': torch.zeros(8, 4),
    'layers.0.attention.mask': torch.ones(1, 1, 3, 3).bool(),
  }
  assert_same_bits(read_tensors(save(state | buffers, tmp_path / 'model.pth')), state)


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
