"""What a state dict tells of its model: the kind of sublayer and every size but those that leave no trace in shapes.

Those, above all the number of heads, come from a config.
"""

import re
from collections import Counter
from collections.abc import Mapping

from mmjax.config import Config, flatten
from mmjax.errors import UserError
from mmjax.files import first_three
from mmjax.interop.names import SUBLAYER
from mmjax.run.identity import CUT

Shapes = Mapping[str, tuple[int, ...]]

TOLD = (  # field, the matrices that tell it, if they are there, and on which axis; the first is meant
  ('vocab_size', 'tok_embeddings.weight', 0),
  ('dim', 'tok_embeddings.weight', 1),
  ('hidden_dim', r'layers\.\d+\.feed_forward\.w1\.weight', 0),
  ('hidden_dim', r'layers\.\d+\.feed_forward\.shared_experts\.w1\.weight', 0),
  ('knowledge_num', 'memory_bank', 0),
  ('knowledge_dim', 'memory_bank', 1),
)
KEYS = re.compile(r'layers\.\d+\.attention\.w[kv]\.weight')  # of equal shapes
UNTOLD = ('n_heads', 'max_seq_len', 'norm_eps', 'rope_theta')  # fields of ModelConfig that no shape depends on
UNTOLD_BY = {'cross_attention': ('num_selected',), 'moe': ('experts_per_token',)}  # more of them, by sublayer


def untold_settings(config: Config) -> str:
  """Lists the settings that a state dict of this model cannot tell, with their values."""
  names = [f'model.{field}' for field in UNTOLD + UNTOLD_BY.get(config.model.sublayer, ())]
  settings = flatten(config.to_dict())
  return ', '.join(f'{name.removeprefix("model.")} {settings[name]}' for name in (*names, *CUT, 'train.dtype'))


def read_sizes(shapes: Shapes, source: str) -> dict[str, int | str]:
  """Reads the fields of ModelConfig that do not depend on the number of heads.

  Args:
    shapes: canonical PyTorch name -> shape. A tensor that is missing or not a matrix tells nothing here;
      `check_accounted` reports it later.
    source: the file, for messages.

  Returns:
    field -> value.

  Raises:
    UserError: if the names are of no known sublayer, or of several, or the embedding is turned.
  """
  sizes: dict[str, int | str] = {'sublayer': _sublayer(shapes, source)}
  sizes['n_layers'] = len(_ids(r'layers\.(\d+)\.', shapes))
  embedding, width = shapes.get('tok_embeddings.weight', ()), shapes.get('norm.weight', ())
  if embedding[:-1] == width and len(set(embedding)) == 2:
    raise UserError(f'{source}: tok_embeddings.weight is {embedding}, must be {embedding[::-1]}')
  for field, name, axis in TOLD:
    found = Counter(shape[axis] for n, shape in shapes.items() if re.fullmatch(name, n) and len(shape) == 2)
    for size, _ in found.most_common(1):  # most layers decide, so that one which is wrong is named alone
      sizes.setdefault(field, size)
  if expert_ids := _ids(r'layers\.0\.feed_forward\.experts\.(\d+)\.', shapes):
    sizes['n_experts'] = len(expert_ids)
  fusion = shapes.get('layers.0.gated_memory_fusion.up_proj.weight', ())
  if len(fusion) == 2 and 'dim' in sizes and sizes.get('knowledge_dim'):
    selected, rest = divmod(fusion[1] - sizes['dim'], sizes['knowledge_dim'])
    if selected > 0 and not rest:
      sizes['num_selected'] = selected
  return sizes


def read_kv_heads(shapes: Shapes, dim: int, n_heads: int, source: str) -> int:
  """Returns the number of key and value heads, given that of query heads.

  Raises:
    UserError: if the key projection is no whole number of such heads.
  """
  shape = _keys_shape(shapes, dim)
  if not shape:
    return n_heads  # reported later, as missing or misshapen
  if n_heads not in (fitting := fitting_heads(shapes, dim)):
    raise UserError(
      f'model.n_heads={n_heads} does not fit {source}, where model.dim is {dim} and attention.wk.weight {shape}; '
      f'numbers of heads that fit: {", ".join(map(str, fitting)) or "none"}'
    )
  return _kv_heads(shape, dim, n_heads)


def fitting_heads(shapes: Shapes, dim: int) -> list[int]:
  """Returns the numbers of query heads that the key projection allows, in a model that is `dim` wide."""
  shape = _keys_shape(shapes, dim)
  counts = [n for n in range(1, dim + 1) if dim % n == 0 and (dim // n) % 2 == 0]
  return [n for n in counts if shape and _kv_heads(shape, dim, n)]


def _keys_shape(shapes: Shapes, dim: int) -> tuple[int, ...]:
  """Returns the shape of a projection to keys or values that reads a stream `dim` wide; () if there is none."""
  return next((shapes[name] for name in sorted(shapes) if KEYS.fullmatch(name) and shapes[name][1:] == (dim,)), ())


def _kv_heads(shape: tuple[int, ...], dim: int, n_heads: int) -> int:
  """Returns how many key heads of a projection's shape go with so many query heads; 0 for none."""
  found, rest = divmod(shape[0], dim // n_heads)
  return found if found and not (rest or n_heads % found) else 0


def _ids(pattern: str, shapes: Shapes) -> set[str]:
  """Returns what the pattern's group matches at the start of names."""
  return {match[1] for name in shapes if (match := re.match(pattern, name))}


def _sublayer(shapes: Shapes, source: str) -> str:
  """Names the sublayer of which tensors that no other has are in the file."""
  inside, found = _ids(r'layers\.\d+\.(.+)', shapes), []
  if not inside:
    names = first_three([repr(name[:80]) for name in shapes], 'tensors')
    if any('.self_attn.' in name for name in shapes):
      raise UserError(
        f'{source}: its names are those of transformers ({names}), which mmjax writes (convert export --format llama) '
        'and does not read; rows of queries and keys are in another order there, so do not rename them alone: '
        'export the run to a .safetensors without --format'
      )
    raise UserError(f"{source}: no tensor has a name that begins with 'layers.0.'; there are {names}")
  for kind, table in SUBLAYER.items():
    shared = set().union(*(other for k, other in SUBLAYER.items() if k != kind))
    found += [kind] if inside & (table.keys() - shared) else []
  if len(found) != 1:
    parts = sorted({name.split('.')[0] for name in inside})
    raise UserError(
      f'{source}: the layers hold {", ".join(parts)}; '
      f'expected the tensors of exactly one sublayer of {", ".join(SUBLAYER)}, found {" and ".join(found) or "none"}'
    )
  return found[0]
