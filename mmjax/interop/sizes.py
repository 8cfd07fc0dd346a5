"""What a state dict tells of its model: the kind of sublayer and every size but those that leave no trace in shapes.

Those, above all the number of heads, come from a config.
"""

import re
from collections.abc import Mapping

from mmjax.config import ModelConfig
from mmjax.errors import UserError
from mmjax.interop.names import SUBLAYER

Shapes = Mapping[str, tuple[int, ...]]

UNTOLD = ('n_heads', 'max_seq_len', 'norm_eps', 'rope_theta')  # fields of ModelConfig that no shape depends on
UNTOLD_BY = {'cross_attention': ('num_selected',), 'moe': ('experts_per_token',)}  # more of them, by sublayer


def untold_sizes(model: ModelConfig) -> str:
  """Lists the fields that a state dict of this model cannot tell, with their values."""
  fields = UNTOLD + UNTOLD_BY.get(model.sublayer, ())
  return ', '.join(f'{field} {getattr(model, field)}' for field in fields)


def read_sizes(shapes: Shapes, source: str) -> dict[str, int | str]:
  """Reads the fields of ModelConfig that do not depend on the number of heads.

  Args:
    shapes: canonical PyTorch name -> shape. A tensor that is missing or not a matrix tells nothing here;
      `check_accounted` reports it later.
    source: the file, for messages.

  Returns:
    field -> value.

  Raises:
    UserError: if the names are of no known sublayer, or of several.
  """
  n_layers = len(_ids(r'layers\.(\d+)\.', shapes))
  sizes: dict[str, int | str] = {'sublayer': _sublayer(shapes, source), 'n_layers': n_layers}

  def matrix(name: str) -> tuple[int, int] | None:
    shape = shapes.get(name, ())
    return (shape[0], shape[1]) if len(shape) == 2 else None

  if embedding := matrix('tok_embeddings.weight'):
    sizes['vocab_size'], sizes['dim'] = embedding
  expand = matrix('layers.0.feed_forward.w1.weight') or matrix('layers.0.feed_forward.shared_experts.w1.weight')
  if expand:
    sizes['hidden_dim'] = expand[0]
  if expert_ids := _ids(r'layers\.0\.feed_forward\.experts\.(\d+)\.', shapes):
    sizes['n_experts'] = len(expert_ids)
  if bank := matrix('memory_bank'):
    sizes['knowledge_num'], sizes['knowledge_dim'] = bank
  if embedding and bank and bank[1] and (fusion := matrix('layers.0.gated_memory_fusion.up_proj.weight')):
    sizes['num_selected'] = (fusion[1] - embedding[1]) // bank[1]
  return sizes


def read_kv_heads(shapes: Shapes, dim: int, n_heads: int, source: str) -> int:
  """Returns the number of key and value heads, given that of query heads.

  Raises:
    UserError: if the key projection is no whole number of such heads.
  """
  shape = shapes.get('layers.0.attention.wk.weight', ())
  head_dim = dim // n_heads
  if not shape:
    return n_heads  # reported as missing later
  if not shape[0] or shape[0] % head_dim or n_heads % (shape[0] // head_dim):
    fitting = [n for n in range(1, dim + 1) if _fits(n, dim, shape[0])]
    raise UserError(
      f'model.n_heads={n_heads} makes heads {head_dim} wide, which does not fit {source}: '
      f'layers.0.attention.wk.weight is {shape}; numbers of heads that fit: {fitting or "none"}'
    )
  return shape[0] // head_dim


def _fits(n_heads: int, dim: int, kv_dim: int) -> bool:
  return (
    kv_dim > 0
    and dim % n_heads == 0
    and (dim // n_heads) % 2 == 0
    and kv_dim % (dim // n_heads) == 0
    and (n_heads % (kv_dim // (dim // n_heads)) == 0)
  )


def _ids(pattern: str, shapes: Shapes) -> set[str]:
  """Returns what the pattern's group matches at the start of names."""
  return {match[1] for name in shapes if (match := re.match(pattern, name))}


def _sublayer(shapes: Shapes, source: str) -> str:
  """Names the sublayer of which tensors that no other has are in the file."""
  inside = _ids(r'layers\.\d+\.(.+)', shapes)
  found = []
  for kind, table in SUBLAYER.items():
    shared = set().union(*(other for k, other in SUBLAYER.items() if k != kind))
    if inside & (table.keys() - shared):
      found.append(kind)
  if len(found) != 1:
    parts = sorted({name.split('.')[0] for name in inside})
    raise UserError(
      f'{source}: the layers hold {", ".join(parts) or "nothing"}; '
      f'expected the tensors of exactly one sublayer of {", ".join(SUBLAYER)}, found {" and ".join(found) or "none"}'
    )
  return found[0]
