"""What a user should know of a schedule before the first update: each a sentence, or '' where nothing is to be said."""

from mmjax.config import Config, TrainConfig
from mmjax.config.parameters import first_rule, parameter_table
from mmjax.config.sublayers import SUBLAYERS, layer_kinds
from mmjax.model.params import BANK

# Passes over the text from which on dropping rows helped, see docs/lasting_experiments.md: of n-grams of several
# tokens, and of single tokens, with which it did harm at 3 passes. From the latter on any model may learn a text by
# heart.
PASSES_OF_PAIRS = 2
PASSES_OF_TOKENS = 5
LONG_EVALUATION = 2  # times the tokens of the updates before it: then it takes two thirds of their time
LEAST_LONG_TOKENS = 100_000  # less text never takes long


def warmup_remark(train: TrainConfig, steps: int) -> str:
  """Says of a run of so many updates that it ends in its warm-up; '' of others."""
  if train.warmup_steps < steps:
    return ''
  return (
    f'The learning rate only rises: train.warmup_steps={train.warmup_steps} is not less than the {steps} updates of '
    'the run'
  )


def evaluation_remark(train: TrainConfig, steps: int, valid_tokens: int, row_tokens: float) -> str:
  """Says of held-out text that evaluations of it take much of the run, of so many updates; '' of less text."""
  between = round(min(train.eval_interval, steps) * train.update_rows * row_tokens)
  if valid_tokens < max(LONG_EVALUATION * between, LEAST_LONG_TOKENS):
    return ''
  rarer = ', or evaluate less often (train.eval_interval)' if train.eval_interval < steps else ''
  return (
    f'Each evaluation reads {valid_tokens:,} tokens, and training only {between:,} before it: hold out less text '
    f'(data.valid_fraction, or a smaller data.valid_files){rarer}'
  )


def passes_remark(config: Config, passes: float) -> str:
  """Says of a text that it is read so often that it is learned by heart, by n-gram rows soonest; '' of others."""
  model, memory = config.model, config.memory
  table = parameter_table(config)
  if memory.teach_rows or not all(any(first_rule(table, name, 'lr').rates) for name in (BANK, 'embedding')):
    return ''  # the rows do not learn, or only they do, which is what they are taught for
  said = f'The run reads its text {passes:.1f} times'
  drops = memory.row_dropout or not any(SUBLAYERS[kind].reads_ngrams for kind in layer_kinds(model, memory))
  if not drops and passes >= (PASSES_OF_PAIRS if max(memory.ngram_of_heads()) > 1 else PASSES_OF_TOKENS):
    learned = 'rows that n-grams address learn such text by heart; memory.row_dropout=0.5 helped in tests'
    return f'{said}, and {learned} (docs/lasting_experiments.md)'
  if passes >= PASSES_OF_TOKENS:
    return f'{said}: its validation loss may rise before the end; the checkpoint with the lowest is kept'
  return ''
