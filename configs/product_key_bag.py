"""The best memory found whose gate learns where to look, at the cost of 1.4.0: G23 of docs/first_experiments.md.

It was measured at small scale; at this size nobody has. configs/ngram_rows.py is ahead of it.

python train.py --config configs/product_key_bag.py

What differs from 1.4.2, and why (docs/memory.md explains the mechanisms and names the sources):
  input          the gate sees the whole residual stream instead of only what attention added
  sublayer       a bag of 4 heads x 16 rows: scores weigh the rows, so that the gate learns; more heads read more rows
  query_key_norm scores stay in range while queries and sub-keys both learn
  selection_bias evens out the use of the rows
  bank           starts at standard deviation P^-0.5; its rate is 16 times the common rate at first and the common rate
                 at the end; does not decay, because decay would shrink rows while nobody reads them
  layers         all have a memory, which gains more than memories in the middle half
  ffn_dim        the widest feed-forward layer that costs no more FLOPs a token than 1.4.0:
                 python -m mmjax.tools.cost --config configs/product_key_bag.py --match configs/exp_1_4_0.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'product_key_bag'
  config.model.sublayer = 'memory_bag'
  config.model.num_selected = 16
  config.memory.input = 'residual'
  config.memory.n_heads = 4
  config.memory.query_key_norm = 'l2'
  config.memory.selection_bias = True
  config.memory.ffn_dim = 800
  config.memory.bank_std = config.model.knowledge_dim**-0.5
  config.memory.bank_lr_multiplier = 16.0
  config.memory.bank_decay_multiplier = 0.0
  return config
