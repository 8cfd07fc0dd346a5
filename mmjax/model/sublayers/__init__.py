"""The table of sublayers: a new experiment is one module, one row here and one config file."""

from mmjax.model.sublayers.dense import DenseFFN
from mmjax.model.sublayers.gated_fusion import GatedMemoryFusion

SUBLAYERS = {'dense': DenseFFN, 'gated_fusion': GatedMemoryFusion}
