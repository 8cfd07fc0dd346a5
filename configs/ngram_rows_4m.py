"""Four million rows that the last one, two or three tokens address: the best memory at small scale.

configs/ngram_rows_1m.py with four times the rows: G74 of docs/experiments.md at the record's size. It was measured at
small scale, and nobody has trained it at this one. BENCHMARKS.md says what an update holds.

python -m mmjax.tools.fit --config configs/ngram_rows_4m.py --gpu rtx4090
"""

from ml_collections import ConfigDict

from configs import ngram_rows_1m


def get_config() -> ConfigDict:
  config = ngram_rows_1m.get_config()
  config.experiment = 'ngram_rows_4m'
  config.model.knowledge_num = 1 << 22
  return config
