"""Experiment 1.4.2: product-key memory, rows concatenated with the attention output, gated MLP.

python train.py --config configs/exp_1_4_2.py   -> BENCHMARKS.md, rows "1.4.2".
The base config is this experiment: the record's sizes, 64 x 512 x 8 tokens an update, bf16, 3 epochs.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.experiment = 'exp_1_4_2'
  return config
