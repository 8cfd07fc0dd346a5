"""The old name of configs/product_key_bag.py.

Its experiment keeps that name, so that runs in out/memory_bag go on.
"""

from ml_collections import ConfigDict

from configs import product_key_bag


def get_config() -> ConfigDict:
  config = product_key_bag.get_config()
  config.experiment = 'memory_bag'
  return config
