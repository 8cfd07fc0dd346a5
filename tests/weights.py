"""What tests of conversion share: state dicts of tiny torch models, and how they come in."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip('torch')

from mmjax.interop.convert import import_run  # noqa: E402
from tests.helpers import tiny_config  # noqa: E402
from tests.torch_reference import Sizes, TorchLM  # noqa: E402

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


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, torch.Tensor]) -> None:
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].dtype == value.numpy().dtype and got[name].shape == tuple(value.shape), name
    assert got[name].tobytes() == value.numpy().tobytes(), name
