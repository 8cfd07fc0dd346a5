"""The memory experiment: which memory beats the feed-forward layer at equal tokens and no more FLOPs a token?

python -m mmjax.tools.sweep sweeps/memory.py --config.data.train_files=... --config.data.valid_files=...
Add --set learning_rate=4e-3 when that has found the best rate, and --set winners=g42,g41 when that has found the best
models: docs/first_experiments.md.

Without a learning rate the runs are G0 at three of them. With one, they are every model at that rate. With winners,
they are also two more seeds of G0 and the winners, and the best winner at the other rates. The list only grows, so
what is done stays done. --set scale=gpu takes the record's sizes, scale=small those of a first look, and
--set tokens=300e6 another length.
"""

import contextlib
from pathlib import Path

from mmjax.config import Config, idle_settings, load_config
from mmjax.errors import UserError
from mmjax.model.cost import flops_per_token, matching_width
from mmjax.tools.sweep_file import Run

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
SEEDS = (1, 2)  # in addition to 0, for G0 and the winners

# Every size of a scale, once. P is dim / 4, and 4 query heads share a key head, as in the record.
SCALES = {
  'small': {
    'tokens': 3e6,
    'learning_rates': (2e-3, 4e-3, 8e-3),
    'evaluations': 1,  # each takes an eighth of the time of the training
    'settings': {
      'model.dim': 128, 'model.n_layers': 4, 'model.n_heads': 8, 'model.n_kv_heads': 2, 'model.max_seq_len': 256,
      'model.knowledge_dim': 32, 'train.batch_size': 8, 'train.accumulation_steps': 1, 'train.dtype': 'bfloat16',
      'train.log_interval': 20,
    },
  },
  'cpu': {
    'tokens': 10.5e6,
    'learning_rates': (2e-3, 4e-3, 8e-3),
    'evaluations': 2,
    'settings': {
      'model.dim': 192, 'model.n_layers': 4, 'model.n_heads': 12, 'model.n_kv_heads': 3, 'model.max_seq_len': 256,
      'model.knowledge_dim': 48, 'train.batch_size': 16, 'train.accumulation_steps': 1, 'train.dtype': 'bfloat16',
      'train.log_interval': 20,
    },
  },
  'gpu': {
    'tokens': 100e6,
    'learning_rates': (5e-4, 1e-3, 2e-3),
    'evaluations': 5,
    'settings': {
      'model.dim': 512, 'model.n_layers': 8, 'model.n_heads': 32, 'model.n_kv_heads': 8, 'model.max_seq_len': 512,
      'model.knowledge_dim': 128, 'train.batch_size': 64, 'train.accumulation_steps': 1, 'train.dtype': 'bfloat16',
      'train.log_interval': 20,
    },
  },
  'tiny': {  # tries the machinery in minutes; its numbers say nothing
    'tokens': 2560,
    'learning_rates': (1e-3, 2e-3, 4e-3),
    'evaluations': 5,
    'settings': {
      'model.vocab_size': 512, 'model.dim': 96, 'model.hidden_dim': 384, 'model.n_layers': 4, 'model.n_heads': 6,
      'model.n_kv_heads': 2, 'model.max_seq_len': 32, 'model.knowledge_dim': 24, 'train.batch_size': 4,
      'train.accumulation_steps': 1, 'train.dtype': 'float32', 'train.log_interval': 2,
    },
  },
}  # fmt: skip
# Runs this short need another warm-up and beta2 than the record: docs/first_experiments.md, "Tune the baseline first".
WARMUP_SHARE = 0.2  # of the updates
BETA2 = 0.99
CHECKPOINTS = 10

# G1 to G4: the fusion of 1.4.2. Each has the changes of the one before.
FAITHFUL = {'model.sublayer': 'gated_fusion'}
INPUT_AND_BANK = FAITHFUL | {
  'memory.input': 'residual',
  'memory.bank_std': 'knowledge_dim ** -0.5',
  'memory.bank_lr_multiplier': 4.0,
  'memory.bank_lr_final_multiplier': 1.0,
  'memory.bank_decay_multiplier': 0.0,
}
GATE_LEARNS = INPUT_AND_BANK | {'memory.scores': 'scale', 'memory.query_key_norm': 'l2'}
# G5 and its variants: the bag in the middle layers, next to a feed-forward layer that uses the rest of G0's FLOPs.
BAG = INPUT_AND_BANK | {
  'model.sublayer': 'memory_bag',
  'model.num_selected': 16,
  'memory.layers': 'middle',
  'memory.n_heads': 4,
  'memory.query_key_norm': 'l2',
  'memory.ffn_dim': 'what is left',
}
BALANCED = BAG | {'memory.selection_bias': True}
EVERYWHERE = BALANCED | {'memory.layers': 'all'}
FAST_BANK = EVERYWHERE | {'memory.bank_lr_multiplier': 16.0}
# Rows that the last tokens address. There is no gate to pay for, so the feed-forward layer keeps almost all its width.
NGRAMS = INPUT_AND_BANK | {
  'model.sublayer': 'ngram_bag',
  'model.num_selected': 1,
  'memory.layers': 'middle',
  'memory.n_heads': 4,
  'memory.ngrams': '2,3',
  'memory.bank_lr_multiplier': 16.0,
  'memory.ffn_dim': 'what is left',
}
MODELS = {  # models whose numbers are missing were dropped before they ran
  'g0': {'model.sublayer': 'dense'},
  'g1': FAITHFUL,
  'g2': INPUT_AND_BANK,
  'g3': GATE_LEARNS,
  'g4': GATE_LEARNS | {'memory.layers': 'middle'},
  'g5': BAG,
  'g6': BAG | {'model.knowledge_num': 256},  # is capacity the cause? All 16 sub-keys of a half are selected
  'g7': BAG | {'memory.score_activation': 'relu'},
  # A quarter of the rows, but as many values in the bank and as many read.
  'g8': BAG | {'model.knowledge_num': 16384, 'model.knowledge_dim': '4 * knowledge_dim', 'memory.n_heads': 1},
  'g13': EVERYWHERE,
  'g15': BALANCED,
  'g16': BALANCED | {'memory.n_heads': 2},
  # Adam's step for a row that is read once in a while is up to (1 - beta2)^-0.5 = 10 learning rates.
  'g18': BALANCED | {'memory.bank_lr_multiplier': 1.0},
  'g23': FAST_BANK,
  'g25': EVERYWHERE | {'memory.bank_lr_multiplier': 64.0},
  'g26': FAST_BANK | {'model.knowledge_num': 1048576, 'memory.n_heads': 3},
  # A cheaper memory leaves more to the feed-forward layer.
  'g28': FAST_BANK | {'memory.key_dim': 'knowledge_dim / 2', 'memory.bag_gate': False},
  'g30': {'model.sublayer': 'dense', 'model.hidden_dim': "g23's"},  # what is left of G23 without its memory
  'g34': NGRAMS,
  'g35': NGRAMS | {'memory.layers': 'all'},
  'g37': NGRAMS | {'memory.ngrams': '1'},  # a second embedding: how much needs no context?
  'g38': NGRAMS | {'model.knowledge_num': 1048576},
  # Both in one bank: one layer reads n-grams, another has a gate that learns.
  'g40': FAST_BANK | {'memory.ngram_layers': '1', 'memory.ngrams': '2,3', 'memory.layers': '1,2'},
  'g41': NGRAMS | {'model.knowledge_num': 1048576, 'memory.bank_update': 'lazy'},  # how much loss do lazy updates cost?
  # With rows for the token itself, which is all that G37 has.
  'g42': NGRAMS | {'memory.ngrams': '1,2'},
  'g43': NGRAMS | {'memory.ngrams': '1,2,3', 'memory.n_heads': 6},
  # How much of that is an embedding that learns too slowly?
  'g46': {'model.sublayer': 'dense', 'train.embedding_lr_multiplier': 4.0},
  'g47': NGRAMS | {'memory.ngrams': '1,2', 'train.embedding_lr_multiplier': 4.0},
  'g48': {'model.sublayer': 'dense', 'train.optimizer': 'muon'},
  # A bucket by hash, a row in it by context.
  'g51': NGRAMS
  | {'model.sublayer': 'ngram_bucket', 'model.num_selected': 8, 'memory.ngrams': '1,2', 'memory.key_dim': 16},
}


def get_runs(scale: str = 'cpu', learning_rate: str = '', winners: str = '', tokens: str = '') -> list[Run]:
  """Returns the runs that are due.

  Args:
    scale: 'small' for a first look, 'cpu', 'gpu', or 'tiny' to try the machinery.
    learning_rate: the best for G0, one of the scale's; '' to find it.
    winners: the best models, best first, comma-separated: 'g5,g4'; '' until they are known.
    tokens: to train each model on; '': the scale's.
  """
  if scale not in SCALES:
    raise UserError(f'scale={scale!r} must be one of {", ".join(SCALES)}')
  rates = SCALES[scale]['learning_rates']
  tuned = positive('learning_rate', learning_rate) if learning_rate else None
  best = [name.strip() for name in winners.split(',')] if winners else []
  unknown = [name for name in best if name not in MODELS]
  if unknown:
    raise UserError(f'winners={winners!r}: no model {unknown[0]!r}; there are {", ".join(MODELS)}')
  if best and tuned is None:
    raise UserError(f'winners={winners!r} need a learning_rate too, one of {rates}')
  wanted = [('g0', rate, 0) for rate in rates]
  if tuned is not None:
    wanted += [(name, tuned, 0) for name in MODELS]
  wanted += [(name, tuned, seed) for name in (['g0', *best] if best else []) for seed in SEEDS]
  wanted += [(name, rate, 0) for name in best[:1] for rate in rates]
  length = positive('tokens', tokens) if tokens else SCALES[scale]['tokens']
  return [make_run(name, scale, rate, seed, length) for name, rate, seed in dict.fromkeys(wanted)]


def positive(name: str, text: str) -> float:
  """Reads a number of the command line."""
  with contextlib.suppress(ValueError):
    if 0 < float(text) < float('inf'):
      return float(text)
  raise UserError(f'{name}={text!r} must be a number above 0')


def make_run(
  name: str, scale: str, learning_rate: float, seed: int = 0, tokens: float = 0.0, model: dict | None = None
) -> Run:
  """Returns one model of the grid, or another, at a scale; tokens=0: as many as the scale says."""
  settings = dict(SCALES[scale]['settings'])
  rows = settings['train.batch_size'] * settings['train.accumulation_steps']
  steps = max(1, int((tokens or SCALES[scale]['tokens']) / (rows * settings['model.max_seq_len'])))
  settings |= {
    'train.max_steps': steps,
    'train.learning_rate': learning_rate,
    'train.warmup_steps': int(WARMUP_SHARE * steps),
    'train.beta2': BETA2,
    'train.eval_interval': max(1, -(-steps // SCALES[scale]['evaluations'])),
    'train.checkpoint_interval': max(1, -(-steps // CHECKPOINTS)),
  }
  settings = without_idle_sizes(settings | sized(model or MODELS[name], settings))
  return Run(f'{name}-lr{learning_rate:g}', str(CONFIGS / 'exp_1_4_2.py'), settings, seed)


def sized(model: dict, settings: dict) -> dict:
  """Returns the settings of a model with the sizes that depend on a scale filled in."""
  model = dict(model)
  width = settings['model.knowledge_dim'] * (4 if 'model.knowledge_dim' in model else 1)
  if 'model.knowledge_dim' in model:
    model['model.knowledge_dim'] = width
  if 'memory.key_dim' in model:
    model['memory.key_dim'] = width // 4 * 2  # half of a row's width, and even
  if isinstance(model.get('memory.bank_std'), str):  # a number, such as 0, stays
    model['memory.bank_std'] = width**-0.5
  if 'memory.ffn_dim' in model:
    budget = flops_per_token(as_config(settings | MODELS['g0']))['total']
    model['memory.ffn_dim'] = matching_width(as_config(settings | model | {'memory.ffn_dim': 0}), budget)
  if model.get('model.hidden_dim') == 'what is left':
    budget = flops_per_token(as_config(settings | MODELS['g0']))['total']
    model['model.hidden_dim'] = matching_width(as_config(settings | model | {'model.hidden_dim': 8}), budget)
  elif 'model.hidden_dim' in model:
    model['model.hidden_dim'] = sized(FAST_BANK, settings)['memory.ffn_dim']
  return model


def without_idle_sizes(settings: dict) -> dict:
  """Leaves out those sizes of a scale that mean nothing in this model, such as those of a bank that it lacks."""
  deciding = ('model.sublayer', 'model.n_layers', 'memory.layers', 'memory.value_layers')
  kinds = {name: settings[name] for name in deciding if name in settings}
  idle = idle_settings(load(kinds)).keys() & SCALES['tiny']['settings']
  return {name: value for name, value in settings.items() if name not in idle}


def as_config(settings: dict) -> Config:
  """Returns the config of a model at a scale."""
  return load(without_idle_sizes(settings))


def load(settings: dict) -> Config:
  """Returns the config that has these settings."""
  return load_config(str(CONFIGS / 'exp_1_4_2.py'), [f'--config.{name}={value}' for name, value in settings.items()])
