"""Which lead lasts? The models of sweeps/memory.py with the largest lead, and rows that grow, at several lengths.

python -m mmjax.tools.sweep sweeps/lasting.py --set tokens=3e6,12e6,48e6 --config.data.train_files=... \\
  --config.data.valid_files=...

All of them, and G0 before all, train as well as was found for G0: docs/lasting_experiments.md, "A baseline that one
would train". --set scale=gpu takes the record's sizes, and --set seeds=0,1 more seeds. A run is called after its model
and its millions of tokens, so that mmjax.tools.compare fits the lead against tokens.
"""

import runpy
from pathlib import Path

from mmjax.errors import UserError
from mmjax.tools.sweep_file import Run

GRID = runpy.run_path(str(Path(__file__).with_name('memory.py')))
# Everything was tuned at scale small. At the others Muon's own rate is as high as there.
LEARNING_RATES = {'small': 4e-3, 'cpu': 4e-3, 'gpu': 1e-3, 'tiny': 4e-3}
MUON_RATE = 1e-2
STRONG = {
  'train.optimizer': 'muon',
  'train.schedule': 'warmdown',
  'train.warmdown_share': 0.5,
  'train.embedding_lr_multiplier': 16.0,
  'model.value_embeddings': 'alternate',
}
BANK = {'memory.bank_lr_multiplier': 64.0}
HOT = BANK | {'memory.bank_lr_final_multiplier': 64.0}  # to the end
# No mean, and mean squares over a thousand updates: rows that are read rarely take up to 32 times the steps of others.
SQUARES = {
  'memory.bank_moments': 'square',
  'train.parameters': 'memory_bank beta2=0.999',
  'memory.bank_lr_multiplier': 32.0,
  'memory.bank_lr_final_multiplier': 32.0,
}
# A range of rows for each of 6 heads, of which two read rows of the token alone, two of the last two, two of the last
# three; signs for n-grams that meet in a row.
GROWING = GRID['NGRAMS'] | {
  'memory.ngrams': '1,2,3',
  'memory.n_heads': 6,
  'memory.ngram_ranges': 'own',
  'memory.ngram_signs': True,
  'model.knowledge_num': 1048576,
  'memory.bank_update': 'lazy',
}
OF_A_SUBLAYER = ('memory.layers', 'memory.input', 'memory.ffn_dim')
IN_VALUES = {'memory.value_layers': 'alternate'}
NO_GATE = {'memory.bag_gate': False, 'memory.input': 'attention'}  # what its rows hold goes through one matrix
G42 = GRID['MODELS']['g42']
BUCKETS = GRID['MODELS']['g51'] | {'memory.ngram_ranges': 'own', 'model.knowledge_num': 1048576} | BANK
MODELS = {
  'g0': GRID['MODELS']['g0'],
  'g1': GRID['MODELS']['g1'],  # 1.4.2 as it is, for a GPU: here it never ran
  'g42': G42 | BANK,
  'g52': GROWING | BANK,
  # The same rows in the values of attention, instead of next to a feed-forward layer, and in both places.
  'g53': {name: value for name, value in GROWING.items() if name not in OF_A_SUBLAYER}
  | IN_VALUES
  | BANK
  | {'model.sublayer': 'dense', 'model.hidden_dim': 'what is left'},
  'g54': GROWING | IN_VALUES | BANK,
  # Does a choice by context add to the same rows? Buckets of 8 of them, one row, and one row for each bucket.
  'g55': BUCKETS,
  # A key is read as seldom as its row, and a rate of its own lets it learn.
  'g60': BUCKETS | {'train.parameters': 'gate/keys lr=16'},
  # No choice among the same rows: keys that stay 0 weigh the 8 of a bucket alike.
  'g61': BUCKETS | {'train.parameters': 'gate/keys lr=0'},
  # Buckets of other sizes, of as many rows in all.
  'g62': BUCKETS | {'train.parameters': 'gate/keys lr=16', 'model.num_selected': 4},
  'g63': BUCKETS | {'train.parameters': 'gate/keys lr=16', 'model.num_selected': 16},
  'g64': BUCKETS | {'train.parameters': 'gate/keys lr=16', 'model.num_selected': 32},
  'g56': G42 | {'memory.ngram_ranges': 'own', 'model.knowledge_num': 1048576} | BANK,
  'g59': G42 | {'memory.ngram_ranges': 'own', 'model.knowledge_num': 131072} | BANK,
  # Rows that grow with the tokens.
  'g57': GROWING | BANK | {'model.knowledge_num': 4194304},
  'g58': GROWING | IN_VALUES | BANK | {'model.knowledge_num': 4194304},
  'g65': GROWING | BANK | {'model.knowledge_num': 16777216},
  # A bank whose rate stays high.
  'g66': GROWING | HOT | {'model.knowledge_num': 4194304},
  # How much needs neither depth nor context? G52's rows once, after the first attention, through one matrix; once, but
  # with a gate; and where G52 reads them, without one.
  'g67': GROWING | BANK | NO_GATE | {'memory.layers': '0'},
  'g68': GROWING | BANK | {'memory.layers': '0'},
  'g69': GROWING | BANK | NO_GATE,
  # G66 read once so, and with twice the heads.
  'g70': GROWING | HOT | NO_GATE | {'model.knowledge_num': 4194304, 'memory.layers': '0'},
  'g71': GROWING | HOT | NO_GATE | {'model.knowledge_num': 4194304, 'memory.layers': '0', 'memory.n_heads': 12},
  # G66 with one mean square of each row of the bank, and of each value.
  'g72': GROWING | SQUARES | {'model.knowledge_num': 4194304, 'memory.bank_moments': 'row'},
  'g74': GROWING | SQUARES | {'model.knowledge_num': 4194304},
  # G74 with still more rows, and with a quarter of its rows.
  'g77': GROWING | SQUARES | {'model.knowledge_num': 16777216},
  'g78': GROWING | SQUARES,
  # G74 with the gate of Engram, one number a token.
  'g75': GROWING | SQUARES | {'model.knowledge_num': 4194304, 'model.sublayer': 'engram_bag'},
  # G74 with its rows in the values of attention, too.
  'g76': GROWING | SQUARES | IN_VALUES | {'model.knowledge_num': 4194304},
  # G71's rows in the values of attention, too.
  'g73': GROWING
  | HOT
  | NO_GATE
  | IN_VALUES
  | {'model.knowledge_num': 4194304, 'memory.layers': '0', 'memory.n_heads': 12},
}


def get_runs(scale: str = 'small', tokens: str = '3e6', seeds: str = '0') -> list[Run]:
  """Returns every model at every length with every seed; choose with --only.

  Args:
    scale: 'small', 'cpu' (192 x 4), 'gpu', or 'tiny' to try the machinery.
    tokens: lengths, comma-separated.
    seeds: comma-separated.
  """
  if scale not in LEARNING_RATES:
    raise UserError(f'scale={scale!r} must be one of {", ".join(LEARNING_RATES)}')
  if not all(seed.strip().isdecimal() for seed in seeds.split(',')):
    raise UserError(f'seeds={seeds!r} must be whole numbers, comma-separated')
  rate = LEARNING_RATES[scale]
  train = STRONG | {'train.muon_lr_multiplier': MUON_RATE / rate}
  runs = []
  for length in (GRID['positive']('tokens', text) for text in tokens.split(',')):
    for name, model in MODELS.items():
      if scale == 'gpu':  # where an update of all rows takes less time than finding those that were read
        model = {setting: value for setting, value in model.items() if setting != 'memory.bank_update'}
      made = GRID['make_run'](name, scale, rate, 0, length, model)
      called = f'{name}-{length / 1e6:g}M'
      runs += [Run(called, made.config, dict(made.overrides) | train, int(seed)) for seed in seeds.split(',')]
  return runs
