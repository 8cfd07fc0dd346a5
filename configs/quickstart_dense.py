"""Quickstart with feed-forward layers: what to compare quickstart_ngram_rows.py with, at as many FLOPs a token.

python train.py --config configs/quickstart_dense.py   -> BENCHMARKS.md, "Quickstart".
"""

from ml_collections import ConfigDict

from configs import exp_1_4_0, quickstart


def get_config() -> ConfigDict:
  config = exp_1_4_0.get_config()
  config.experiment = 'quickstart_dense'
  quickstart.make_small(config)
  return config
