"""Experiment 1.4.1: cross attention from the attention output to the rows of a product-key memory.

python train.py --config configs/exp_1_4_1.py   -> BENCHMARKS.md, rows "1.4.1"; docs/memory.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'exp_1_4_1'
  config.model.sublayer = 'cross_attention'
  return config
