"""The names of every parameter: as the PyTorch code calls it, and where mmjax keeps it.

One table, read in both directions. A parameter that ends in `kernel` is a linear layer's: (in, out) here, (out, in)
there. Nothing else about the values differs, so a round trip is exact. A model that the PyTorch code does not have goes
into a file under mmjax's own names, 'layers/0/attention/wq/kernel', as it is.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from mmjax.config import Config, flatten
from mmjax.config.sublayers import SUBLAYERS
from mmjax.errors import UserError
from mmjax.files import named_leaves, path_name
from mmjax.model.params import BANK, Params, abstract_params


def _linear(name: str, path: str, **layers: str) -> dict[str, str]:
  """Returns the entries of linear layers: what PyTorch calls each, and what it is called here."""
  return {f'{name}.{theirs}.weight': f'{path}/{ours}/kernel' for theirs, ours in layers.items()}


ATTENTION = {'wq': 'wq', 'wk': 'wk', 'wv': 'wv', 'wo': 'wo'}
SWIGLU = {'w1': 'gate', 'w3': 'up', 'w2': 'down'}
FFN_NORM = {'ffn_norm.weight': 'sublayer/norm/scale'}
GATE = {
  'memory_norm.weight': 'sublayer/norm/scale',
  **_linear('memory_gate', 'sublayer/gate', gate_proj='query'),
  'memory_gate.keys': 'sublayer/gate/keys',
}
ROOT = {'tok_embeddings.weight': 'embedding', 'norm.weight': 'norm/scale'}
BLOCK = {'attention_norm.weight': 'attention_norm/scale', **_linear('attention', 'attention', **ATTENTION)}
FUSION = {'gate_proj': 'gate', 'up_proj': 'up', 'down_proj': 'down'}
SUBLAYER = {  # what every model with this sublayer has; the routed experts are added by their number
  'dense': FFN_NORM | _linear('feed_forward', 'sublayer', **SWIGLU),
  'gated_fusion': GATE | _linear('gated_memory_fusion', 'sublayer/fusion', **FUSION),
  'cross_attention': GATE | _linear('cross_attention_memory', 'sublayer/attention', **ATTENTION),
  'moe': FFN_NORM
  | _linear('feed_forward', 'sublayer', gate='router')
  | _linear('feed_forward.shared_experts', 'sublayer/shared_expert', **SWIGLU),
}
EXPERTS = {'moe': ('feed_forward.experts', 'sublayer/experts')}  # what is there for each of them, under its number
MODEL = {'model.qk_norm': False, 'model.value_embeddings': '', 'memory.value_layers': ''}  # what it does not have
MEMORY = {  # its only one
  'input': 'attention', 'n_heads': 1, 'scores': 'none', 'query_key_norm': 'none', 'key_dim': 0,
  'selection_bias': False, 'ffn_dim': 0, 'ngram_layers': '',
}  # fmt: skip
TIED = 'output.weight'  # the PyTorch code's second name of tok_embeddings.weight

_BUFFER = re.compile(r'pos_cis|freqs_(cis|cos|sin)|layers\.\d+\.attention\.mask')


def not_in_pytorch(config: Config) -> str:
  """Returns the setting, 'name=value', that makes a model which the PyTorch code does not have; '' for one it has."""
  model, memory = config.model, config.memory
  given = flatten(config.to_dict())
  if other := next((name for name, value in MODEL.items() if given[name] != value), ''):
    return f'{other}={given[other]!r}'
  if model.sublayer not in SUBLAYER:
    return f'model.sublayer={model.sublayer!r}'
  if not SUBLAYERS[model.sublayer].uses_bank:
    return ''
  if len(memory.layer_numbers(model.n_layers)) < model.n_layers:
    return f'memory.layers={memory.layers!r}'
  values = {name: getattr(memory, name) for name in MEMORY}
  return next((f'memory.{name}={value!r}' for name, value in values.items() if value != MEMORY[name]), '')


def paths(config: Config) -> dict[str, str]:
  """Returns name in a file -> path here ('layers/0/attention/wq/kernel') of every parameter of a model."""
  model = config.model
  if not_in_pytorch(config):
    return {path: path for path, _ in named_leaves(abstract_params(config))}
  table = ROOT | ({BANK: BANK} if SUBLAYERS[model.sublayer].uses_bank else {})
  block = BLOCK | SUBLAYER[model.sublayer]
  if model.sublayer in EXPERTS:
    name, path = EXPERTS[model.sublayer]
    for e in range(model.n_experts):
      block |= _linear(f'{name}.{e}', f'{path}/{e}', **SWIGLU)
  for layer in range(model.n_layers):
    for name, path in block.items():
      table[f'layers.{layer}.{name}'] = f'layers/{layer}/{path}'
  return table


def to_tensors(params: Params, config: Config) -> dict[str, np.ndarray]:
  """Turns parameters (or their gradients) into what a file holds; `output.weight` is left to the writer.

  Args:
    params: nested dict of arrays; any floating dtype, kept.
    config: the settings of their model.

  Returns:
    name -> array, in PyTorch's shape where the name is PyTorch's.
  """
  found = dict(named_leaves(params))
  return {name: _turned(name, path, np.asarray(found[path])) for name, path in paths(config).items()}


def to_params(tensors: Mapping[str, np.ndarray], config: Config) -> Params:
  """Turns checked tensors (see `check_accounted`) into parameters; dtypes are kept.

  Args:
    tensors: canonical name -> floating array, of the shape that `tensor_shapes` says.
    config: the settings of their model.

  Returns:
    Nested dict of numpy arrays, kernels as (in, out).
  """
  values = {path: _turned(name, path, tensors[name]) for name, path in paths(config).items()}
  return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], abstract_params(config))


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape that a file of this model has; computes no values."""
  shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(abstract_params(config))}
  return {name: shapes[path][:: -1 if _is_turned(name, path) else 1] for name, path in paths(config).items()}


def short_name(name: str) -> str:
  """Drops what wrappers put into names: `module.` (DataParallel) in front, `_orig_mod` (torch.compile) anywhere."""
  parts = [part for part in name.split('.') if part != '_orig_mod']
  while parts and parts[0] == 'module':
    parts = parts[1:]
  return '.'.join(parts)


def is_buffer(name: str) -> bool:
  """Tells whether a tensor is one that the PyTorch code may have saved but computes anew: rotations or a mask."""
  return bool(_BUFFER.fullmatch(short_name(name)))


def canonical(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
  """Drops wrappers' prefixes, the known buffers and the second name of the tied embedding.

  Args:
    tensors: name -> floating array of any shape, as read from a file.
    source: the file, for messages.

  Returns:
    Canonical name -> the same array.

  Raises:
    UserError: if two names become one, or the tied weights differ.
  """
  found: dict[str, np.ndarray] = {}
  for name, value in tensors.items():
    short = short_name(name)
    if short in found:
      raise UserError(f'{source}: two tensors are called {short!r} without their prefixes; remove one of them')
    if not is_buffer(short):
      found[short] = value
  if TIED in found:
    head = found.pop(TIED)
    embedding = found.setdefault('tok_embeddings.weight', head)
    if embedding.shape != head.shape or embedding.dtype != head.dtype or embedding.tobytes() != head.tobytes():
      raise UserError(f'{source}: tok_embeddings.weight and output.weight differ; in mmjax they are one parameter')
  return found


def check_accounted(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
  """Compares the shapes a file has with those a model needs.

  Raises:
    UserError: listing every missing, unexpected and wrongly shaped tensor.
  """
  problems = [f'missing {name} {expected[name]}' for name in sorted(expected.keys() - found.keys())]
  problems += [f'unexpected {name[:80]} {found[name]}' for name in sorted(found.keys() - expected.keys())]
  for name in sorted(expected.keys() & found.keys()):
    if found[name] != expected[name]:
      problems.append(f'{name} is {found[name]}, must be {expected[name]}')
  if problems:
    raise UserError('\n  '.join([f'{source}: these tensors do not fit the model ({len(problems)}):', *problems]))


def _is_turned(name: str, path: str) -> bool:
  return path.endswith('kernel') and name != path


def _turned(name: str, path: str, value: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(value.T) if _is_turned(name, path) else value
