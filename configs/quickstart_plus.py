"""Quickstart with a memory that beats the feed-forward layer: memory_plus at small scale, with rows for the last token.

python train.py --config configs/quickstart_plus.py   -> BENCHMARKS.md, "Quickstart". This is the same without a memory:
python train.py --config configs/quickstart.py --config.model.sublayer=dense

Rows for longer n-grams would learn this text by heart, because it is read three times: docs/experiments.md.
"""

from configs import memory_plus, quickstart


def get_config():
  config = memory_plus.get_config()
  config.experiment = 'quickstart_plus'
  quickstart.make_small(config)
  config.memory.ngrams = '1'
  config.memory.ffn_dim = 296
  config.memory.bank_std = config.model.knowledge_dim**-0.5
  return config
