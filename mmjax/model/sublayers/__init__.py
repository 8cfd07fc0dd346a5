"""The table of sublayers: a new experiment is one module, one row here and one config file."""

from mmjax.config import MemoryConfig, ModelConfig
from mmjax.model.sublayers.cross_attention import CrossAttentionMemory
from mmjax.model.sublayers.dense import DenseFFN
from mmjax.model.sublayers.gated_fusion import GatedMemoryFusion
from mmjax.model.sublayers.memory_bag import MemoryBag
from mmjax.model.sublayers.moe import MoEFFN

SUBLAYERS = {
  'dense': DenseFFN,
  'cross_attention': CrossAttentionMemory,
  'gated_fusion': GatedMemoryFusion,
  'memory_bag': MemoryBag,
  'moe': MoEFFN,
}


def layer_kinds(model: ModelConfig, memory: MemoryConfig) -> tuple[str, ...]:
  """Names the sublayer of each layer: model.sublayer, or 'dense' in layers that memory.layers leaves without memory."""
  if not SUBLAYERS[model.sublayer].uses_bank:
    return (model.sublayer,) * model.n_layers
  chosen = memory.layer_numbers(model.n_layers)
  return tuple(model.sublayer if layer in chosen else 'dense' for layer in range(model.n_layers))
