"""Experiment 1.4.2: a product-key memory whose rows are concatenated with the attention output, and a gated MLP.

python train.py --config configs/exp_1_4_2.py   -> BENCHMARKS.md, rows "1.4.2".
The base config is this experiment, with the sizes of the original PyTorch run: 64 x 512 x 8 tokens an update, bf16, 3
epochs. docs/memory.md explains the mechanism.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'exp_1_4_2'
  return config
