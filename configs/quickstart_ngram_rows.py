"""Quickstart with a memory that beats the feed-forward layer: ngram_rows at small scale, for the last token alone.

python train.py --config configs/quickstart_ngram_rows.py   -> BENCHMARKS.md, "Quickstart"
python train.py --config configs/quickstart_dense.py        # the same without a memory

Rows for two tokens would learn this text by heart, because it is read three times. With memory.row_dropout=0.7 they do
as well as these: docs/lasting_experiments.md, "Text that is read several times".
"""

from ml_collections import ConfigDict

from configs import ngram_rows, quickstart


def get_config() -> ConfigDict:
  config = ngram_rows.get_config()
  config.experiment = 'quickstart_ngram_rows'
  quickstart.make_small(config)
  config.model.knowledge_dim = 32
  config.memory.ngrams = '1'
  config.memory.ffn_dim = 296
  config.memory.bank_std = config.model.knowledge_dim**-0.5
  return config
