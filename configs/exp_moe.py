"""The mixture-of-experts sibling: 4 routed SwiGLU experts, 2 for each token, one shared, and a load-balance loss.

python train.py --config configs/exp_moe.py   -> BENCHMARKS.md, rows "MoE".
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'exp_moe'
  config.model.sublayer = 'moe'
  return config
