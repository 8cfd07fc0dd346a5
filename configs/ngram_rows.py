"""Rows that the last one or two tokens address, at the cost of 1.4.0: G42, the best of docs/first_experiments.md.

It was measured at small scale; at this size nobody has. configs/ngram_rows_1m.py has more rows and trains better.

python train.py --config configs/ngram_rows.py                            # text that is read once or twice
python train.py --config configs/ngram_rows.py --config.memory.ngrams=1   # more often: n-grams learn it by heart,
python train.py --config configs/ngram_rows.py --config.memory.row_dropout=0.7   # unless training drops most rows

What differs from 1.4.2, and why (docs/memory.md explains the mechanisms and names the sources):
  sublayer       an n-gram bag of 4 heads: two read a row for the token, two a row for it and the one before, at hashes.
                 No gate must learn, nothing is searched, and every row is in reach from the first update on
  input          the whole residual stream, instead of only what attention added, gates what the rows say
  bank           starts at standard deviation P^-0.5; its rate is 16 times the common rate at first and the common rate
                 at the end; does not decay, because decay would shrink rows while nobody reads them
  layers         memories in the middle half gain more than memories in all layers
  ffn_dim        the widest feed-forward layer next to a memory that costs no more FLOPs a token than 1.4.0:
                 python -m mmjax.tools.cost --config configs/ngram_rows.py --match configs/exp_1_4_0.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'ngram_rows'
  config.model.sublayer = 'ngram_bag'
  config.model.num_selected = 1
  config.memory.layers = 'middle'
  config.memory.input = 'residual'
  config.memory.n_heads = 4
  config.memory.ngrams = '1,2'
  config.memory.ffn_dim = 1064
  config.memory.bank_std = config.model.knowledge_dim**-0.5
  config.memory.bank_lr_multiplier = 16.0
  config.memory.bank_decay_multiplier = 0.0
  return config
