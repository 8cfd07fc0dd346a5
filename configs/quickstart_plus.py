"""Quickstart with a memory that beats a feed-forward layer: memory_plus in small, its rows for the last token alone.

python train.py --config configs/quickstart_plus.py   -> BENCHMARKS.md, "Quickstart": 1.85 bits per byte. Without a
memory (configs/quickstart.py --config.model.sublayer=dense), at as many FLOPs: 1.91.

Rows for longer n-grams learn a text that is read three times, as here, by heart: docs/experiments.md.
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
