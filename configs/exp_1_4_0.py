"""Experiment 1.4.0: the SwiGLU feed-forward baseline that every memory is compared with.

python train.py --config configs/exp_1_4_0.py   -> BENCHMARKS.md, rows "1.4.0"; docs/experiments.md, G0.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'exp_1_4_0'
  config.model.sublayer = 'dense'
  return config
