"""Experiment 1.4.2 at small scale: minutes on two CPU cores, on the text that every CPython carries.

python train.py --config configs/quickstart.py   -> BENCHMARKS.md, "Quickstart".
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'quickstart'
  make_small(config)
  config.model.knowledge_num = 4096
  config.model.knowledge_dim = 32
  return config


def make_small(config: ConfigDict) -> None:
  """Sets sizes and training to those of the quickstart."""
  config.model.vocab_size = 4096
  config.model.dim = 128
  config.model.n_layers = 4
  config.model.n_heads = 8
  config.model.n_kv_heads = 4
  config.model.max_seq_len = 128
  config.data.valid_fraction = 0.05
  config.train.batch_size = 8
  config.train.accumulation_steps = 1
  config.train.max_steps = 2000
  config.train.learning_rate = 4e-3
  config.train.warmup_steps = 400
  config.train.beta2 = 0.99
  config.train.dtype = 'float32'
  config.train.log_interval = 20
  config.train.eval_interval = 500
  config.train.checkpoint_interval = 500
