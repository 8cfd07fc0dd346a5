"""The old name of configs/quickstart_ngram_rows.py.

Its experiment keeps that name, so that runs in out/quickstart_plus go on.
"""

from ml_collections import ConfigDict

from configs import quickstart_ngram_rows


def get_config() -> ConfigDict:
  config = quickstart_ngram_rows.get_config()
  config.experiment = 'quickstart_plus'
  return config
