"""The table of sublayers: a new experiment is one module, one row here and one config file."""

from mmjax.model.sublayers.cross_attention import CrossAttentionMemory
from mmjax.model.sublayers.dense import DenseFFN
from mmjax.model.sublayers.gated_fusion import GatedMemoryFusion
from mmjax.model.sublayers.moe import MoEFFN

SUBLAYERS = {
  'dense': DenseFFN,
  'cross_attention': CrossAttentionMemory,
  'gated_fusion': GatedMemoryFusion,
  'moe': MoEFFN,
}
