"""A million rows that the last one, two or three tokens address, and training as strong as was found for 1.4.0.

G78 of docs/experiments.md at the record's size: configs/ngram_rows_4m.py with a quarter of its rows. Both were measured
at small scale; nobody has trained either at this size.
What differs from configs/ngram_rows.py:

  ngrams         six heads: two read a row for the token, two a row for it and the one before, two for the last three
  ngram_ranges   each head has rows of its own; those for the token alone are exact, the others are found by a hash
  ngram_signs    n-grams that meet in a row read it with signs of their own, so that they disturb each other less
  knowledge_num  1,048,576 rows: more n-grams have one to themselves, and the lead shrinks less as training goes on
  optimizer      Muon moves the matrices of the layers; the embedding learns 16 times, the bank 32 times as fast as the
                 other parameters of AdamW; the common rate is constant and falls over the second half
  bank_moments   Adam keeps no mean of the bank's gradients
  parameters     and averages their squares over about a thousand updates, so that rows that are read rarely take larger
                 steps
  value_embeddings  the values of every other layer get an embedding of the token, in the feed-forward model as well

python -m mmjax.tools.fit --config configs/ngram_rows_1m.py --gpu rtx4090
"""

from ml_collections import ConfigDict

from configs import ngram_rows


def get_config() -> ConfigDict:
  config = ngram_rows.get_config()
  config.experiment = 'ngram_rows_1m'
  config.model.knowledge_num = 1 << 20
  config.model.value_embeddings = 'alternate'
  config.memory.n_heads = 6
  config.memory.ngrams = '1,2,3'
  config.memory.ngram_ranges = 'own'
  config.memory.ngram_signs = True
  config.memory.ffn_dim = 888
  config.memory.bank_lr_multiplier = 32.0
  config.memory.bank_lr_final_multiplier = 32.0
  config.memory.bank_moments = 'square'
  config.train.optimizer = 'muon'
  config.train.learning_rate = 1e-3
  config.train.muon_lr_multiplier = 10.0
  config.train.embedding_lr_multiplier = 16.0
  config.train.schedule = 'warmdown'
  config.train.warmdown_share = 0.5
  config.train.warmup_steps = 300
  config.train.beta2 = 0.99
  config.train.parameters = 'memory_bank beta2=0.999'
  return config
