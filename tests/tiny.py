"""A config file like those in configs/, of a model of a few thousand parameters."""

TINY = {
  'model.vocab_size': 300,
  'model.dim': 32,
  'model.n_layers': 2,
  'model.n_heads': 4,
  'model.n_kv_heads': 2,
  'model.max_seq_len': 16,
  'model.knowledge_num': 64,
  'model.knowledge_dim': 8,
  'model.num_selected': 3,
  'train.batch_size': 4,
  'train.accumulation_steps': 2,
  'train.max_steps': 10,
  'train.dtype': 'float32',
  'train.learning_rate': 1e-2,
}


def get_config():
  from configs import base

  config = base.get_config()
  config.update_from_flattened_dict(TINY)
  return config
