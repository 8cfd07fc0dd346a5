"""The old name of configs/ngram_rows.py; the published Memory+ (arXiv:2412.09764) is what product_key_bag.py follows.

Its experiment keeps that name, so that runs in out/memory_plus go on.
"""

from ml_collections import ConfigDict

from configs import ngram_rows


def get_config() -> ConfigDict:
  config = ngram_rows.get_config()
  config.experiment = 'memory_plus'
  return config
