"""Experiment 1.4.3: 1.4.2 with 16 rows a token and a bank that starts from text embeddings.

python -m mmjax.tools.bank build --files 'my_text/*.jsonl.xz' --out out/bank.safetensors
python train.py --config configs/exp_1_4_3.py   -> BENCHMARKS.md, rows "1.4.3".
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.experiment = 'exp_1_4_3'
  config.model.num_selected = 16
  config.memory.bank_init = 'file'
  config.memory.bank_file = 'out/bank.safetensors'
  return config
