"""The table of parameters: learning rate, weight decay and Adam's betas by patterns of names; the first that fits wins.

train.parameters='embedding lr=4; layers/.*/gate lr=0.5; memory_bank lr=16..1 decay=0 beta1=0.75 beta2=0.95'

A rule is a regular expression, searched in names such as layers/0/attention/wq/kernel, and what it says: `lr`, over
everyone's learning rate, as a number or from the first update to the last; `decay`, over train.weight_decay; and
`beta1` and `beta2`, instead of those of train. For its rate a parameter follows the first rule that fits and says one,
and so for the others. Rules of a user come before those that other settings make. The form is that of big_vision
(https://github.com/google-research/big_vision).
mmjax/run/sharding.py says in a list of the same form where parameters lie.
"""

import dataclasses
import math
import re
from typing import Any

from mmjax.config.optimizers import OPTIMIZERS
from mmjax.config.wording import nearest, quote
from mmjax.errors import UserError

MOST = 1e4  # of a multiplier
NEAREST_ONE = 1 - 1e-6  # what is nearer to 1 may be 1 in float32
SAYS = {'lr': MOST, 'decay': MOST, 'beta1': NEAREST_ONE, 'beta2': NEAREST_ONE}  # what a rule may say, at most how much
OF_BANK, OF_EMBEDDING = '^memory_bank$', '^embedding$'  # to which settings give rates of their own
MATRIX = r'^layers/.*kernel$'  # what Muon moves, where it has two axes
FORM = 'a pattern and then lr=NUMBER, lr=FIRST..LAST, decay=NUMBER, beta1=NUMBER or beta2=NUMBER'


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is said of the parameters in whose name `pattern` is found.

  Attributes:
    pattern: a regular expression.
    lr: learning rate over everyone's; a pair goes linearly from the first update to the last; None: nothing is said.
    decay: weight decay over train.weight_decay.
    stated_in: the setting that says it.
    beta1, beta2: of Adam; None: nothing is said.
  """

  pattern: str
  lr: float | tuple[float, float] | None = None
  decay: float | None = None
  stated_in: str = 'train.parameters'
  beta1: float | None = None
  beta2: float | None = None

  @property
  def rates(self) -> tuple[float, float]:
    """At the first and the last update."""
    if isinstance(self.lr, tuple):
      return self.lr
    return (1.0, 1.0) if self.lr is None else (self.lr, self.lr)


def parameter_table(config: Any) -> tuple[Rule, ...]:
  """Returns all rules that a Config makes."""
  train, memory = config.train, config.memory
  rates = memory.bank_lr_multiplier, memory.bank_lr_final_multiplier
  of_matrices = OPTIMIZERS[train.optimizer].rate_of_matrices
  return (
    *read_rules(train.parameters),
    Rule(OF_BANK, rates, memory.bank_decay_multiplier, 'memory.bank_lr_multiplier'),
    Rule(OF_EMBEDDING, train.embedding_lr_multiplier, None, 'train.embedding_lr_multiplier'),
    *([Rule(MATRIX, getattr(train, of_matrices), None, f'train.{of_matrices}')] if of_matrices else []),
  )


def first_rule(table: tuple[Rule, ...], name: str, what: str) -> Rule | None:
  """Returns the rule that says `what`, one of SAYS, of a parameter."""
  return next((rule for rule in table if getattr(rule, what) is not None and re.search(rule.pattern, name)), None)


def betas_of(config: Any, name: str) -> tuple[float, float]:
  """Returns Adam's beta1 and beta2 of a parameter; beta1 is 0 where `moments_of` it hold no mean."""
  rules = read_rules(config.train.parameters)
  found = {what: first_rule(rules, name, what) for what in ('beta1', 'beta2')}
  beta1, beta2 = (getattr(rule or config.train, what) for what, rule in found.items())
  return (beta1 if moments_of(config, name) == 'full' else 0.0), beta2


def moments_of(config: Any, name: str) -> str:
  """Returns what Adam keeps of a parameter: of the bank memory.bank_moments, of all others 'full'."""
  return config.memory.bank_moments if re.search(OF_BANK, name) else 'full'


def read_rules(text: str) -> tuple[Rule, ...]:
  """Reads train.parameters.

  Raises:
    UserError: if a rule is not understood.
  """
  return tuple(_read_rule(rule.split()) for rule in text.split(';') if rule.strip())


def _read_rule(words: list[str]) -> Rule:
  pattern, *said = words
  try:
    re.compile(pattern)
  except re.error as error:
    raise UserError(f'train.parameters: {quote(pattern)} is not a regular expression: {error}') from None
  values = {}
  for word in said:
    what, _, value = word.partition('=')
    if what in values:
      raise UserError(f'train.parameters: {quote(" ".join(words))} says {what} twice')
    if what not in SAYS:
      raise UserError(f'train.parameters: {quote(" ".join(words))} must be {FORM}{nearest(what, SAYS)}')
    values[what] = tuple(_read_number(word, part, SAYS[what]) for part in value.split('..', 1 if what == 'lr' else 0))
  if not values:
    raise UserError(f'train.parameters: {quote(" ".join(words))} must be {FORM}')
  return Rule(pattern, **{what: pair if len(pair) > 1 else pair[0] for what, pair in values.items()})


def _read_number(word: str, text: str, most: float) -> float:
  try:
    number = float(text)
  except ValueError:
    number = math.nan
  if not number and re.search('[1-9]', text.lower().partition('e')[0]):
    raise UserError(f'train.parameters: {quote(word)} is too close to 0 for a float')
  if 0 <= number <= most:
    return number
  raise UserError(f'train.parameters: {quote(word)} must be a number from 0 to {most:g}')
