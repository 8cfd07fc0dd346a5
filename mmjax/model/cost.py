"""What a token costs, counted from the sizes of the model: half of MFU; `run.nvidia.device_peak_flops` is the other.

And the other way round: the width of feed-forward layers that makes a model cost what another does.

Counted are the multiplications and additions of matrix products, 2 for each weight and token; norms, softmax, RoPE,
top-k, the gather of rows and their scaling are left out, as is recomputation (`runtime.remat`), so that MFU measures
useful work.
"""

import functools
import math
import re
from collections import Counter

import jax
from flax import nnx

from mmjax.config import Config, MemoryConfig, ModelConfig
from mmjax.config.sublayers import SUBLAYERS, VALUE_ROWS, layer_kinds, memory_layers
from mmjax.errors import UserError
from mmjax.files import named_leaves
from mmjax.kernels.matmul import TRAINED
from mmjax.model.lm import Block
from mmjax.model.params import BANK, Params, abstract_params, without_bank

VALUES_READ = (  # (parameter, how many of its values a token reads, given its shape and the rows of a layer)
  (r'value_embedding/table$', lambda shape, rows: shape[1]),
  # Keys of buckets have two axes, one key for each row; sub-keys have three, and all are read.
  (r'gate/keys$', lambda shape, rows: rows * shape[1] if len(shape) == 2 else math.prod(shape)),
  (r'', lambda shape, rows: math.prod(shape)),
)
WIDTH_STEP = 8  # widths that `matching_width` gives are multiples of this


def flops_per_token(config: Config) -> dict[str, float]:
  """Counts the FLOPs of one training step for each token position of a full row.

  docs/memory.md, "What it costs", has the formulas. The embedding lookup multiplies nothing.

  Args:
    config: every position counts, padding too: it is computed.

  Returns:
    FLOPs of each part over all layers, and their sum as 'total'.
  """
  model, memory = config.model, config.memory
  counts = Counter()
  if memory.value_layers:
    counts['bag_reads'] = VALUE_ROWS.build(model, memory, rngs=nnx.Rngs(0)).flops()['bag_reads']
  embeddings, rows, like = model.value_embedding_layers(), memory.value_layer_numbers(model.n_layers), {}
  for number, kind in enumerate(layer_kinds(model, memory)):
    first = like.setdefault((kind, number in embeddings, number in rows), number)  # of its kind: a block costs a trace
    counts.update(_block_flops(first, kind, model, memory))
  parts = {name: float(flops) for name, flops in counts.items()}
  parts['head'] = float(TRAINED * 2 * model.dim * model.vocab_size)
  return {**parts, 'total': sum(parts.values())}


@functools.cache
def _block_flops(number: int, kind: str, model: ModelConfig, memory: MemoryConfig) -> dict[str, int]:
  """Asks a block, without its values."""
  return nnx.eval_shape(lambda: Block(model, memory, number, kind, rngs=nnx.Rngs(0))).flops(model.max_seq_len)


def count_params(params: Params) -> tuple[int, int]:
  """Returns the number of parameters, and how many of them are not in the bank."""
  others = sum(leaf.size for leaf in jax.tree.leaves(without_bank(params)))
  return others + (math.prod(params[BANK].shape) if BANK in params else 0), others


def bytes_per_token(config: Config) -> dict[str, int]:
  """Counts the bytes of float32 parameters that the forward pass of a single token touches, as decoding does.

  Returns:
    'bank': the rows it reads, each as often as it is read. 'weights': everything else; of value embeddings the token's
    row, of the keys of buckets those of its rows, and all of the others, sub-keys and the embedding (as the head) among
    them. 'total': their sum.
  """
  model = config.model
  rows = config.memory.n_heads * model.num_selected
  bank = 4 * len(memory_layers(config)) * rows * model.knowledge_dim
  leaves = named_leaves(without_bank(abstract_params(config)))
  weights = 4 * sum(
    next(values(leaf.shape, rows) for pattern, values in VALUES_READ if re.search(pattern, name))
    for name, leaf in leaves
  )
  return {'bank': bank, 'weights': weights, 'total': bank + weights}


def width_field(config: Config) -> str:
  """Names the setting that `matching_width` solves for."""
  return 'memory.ffn_dim' if SUBLAYERS[config.model.sublayer].uses_bank else 'model.hidden_dim'


def with_width(config: Config, width: int) -> Config:
  """Returns the config with the setting that `width_field` names replaced."""
  return config.with_settings({width_field(config): width})


def matching_width(config: Config, flops: float) -> int:
  """Returns the widest feed-forward layers with which a model costs at most so many FLOPs a token.

  Args:
    config: its memory.ffn_dim is solved for (the dense sublayer beside each memory; dense layers without memory keep
      their width), or model.hidden_dim in a model without a bank.
    flops: budget of one training step, as `flops_per_token(other)['total']`.

  Returns:
    A multiple of 8; 0, no such sublayer, only for a memory.

  Raises:
    UserError: if the model costs more without it.
  """
  at_one_step = flops_per_token(with_width(config, WIDTH_STEP))['total']
  step = flops_per_token(with_width(config, 2 * WIDTH_STEP))['total'] - at_one_step  # the cost is linear in the width
  steps = int((flops - at_one_step + step) // step)
  if steps < (width_field(config) == 'model.hidden_dim'):
    raise UserError(
      f'{width_field(config)}: even without it a token costs {at_one_step - step:,.0f} FLOPs, '
      f'more than the budget of {flops:,.0f}; fewer heads, rows or layers with a memory cost less'
    )
  return steps * WIDTH_STEP
