"""Quickstart with a memory that beats a feed-forward layer: memory_plus in small, its rows for the last token alone.

python train.py --config configs/quickstart_plus.py   -> BENCHMARKS.md, "Quickstart": 1.85 bits per byte. Without a
memory (configs/quickstart.py --config.model.sublayer=dense), at as many FLOPs: 1.91.

Rows for longer n-grams learn a text that is read three times, as here, by heart: docs/memory.md.
"""

from configs import quickstart


def get_config():
  config = quickstart.get_config()
  config.experiment = 'quickstart_plus'
  config.model.sublayer = 'ngram_bag'
  config.model.knowledge_num = 65536
  config.model.num_selected = 1
  config.memory.layers = 'middle'
  config.memory.input = 'residual'
  config.memory.n_heads = 4
  config.memory.ngrams = '1'
  config.memory.ffn_dim = 296
  config.memory.bank_std = config.model.knowledge_dim**-0.5
  config.memory.bank_lr_multiplier = 16.0
  config.memory.bank_decay_multiplier = 0.0
  return config
