"""The table of parameters: learning rate and weight decay of each, by patterns of its name; the first that fits wins.

train.parameters='embedding lr=4; layers/.*/gate lr=0.5; memory_bank lr=16..1 decay=0'

A rule is a regular expression, searched in names such as layers/0/attention/wq/kernel, and what it says: `lr`, over
everyone's learning rate, as a number or from the first update to the last, and `decay`, over train.weight_decay. For
its rate a parameter follows the first rule that fits and says one, and so for its decay. Rules of a user come before
those that other settings make. The form is that of big_vision (https://github.com/google-research/big_vision).
mmjax/run/sharding.py says in a list of the same form where parameters lie.
"""

import dataclasses
import re
from typing import Any

from mmjax.config.wording import nearest, quote
from mmjax.errors import UserError

MOST = 1e4  # of a multiplier
MATRIX = r'^layers/.*kernel$'  # what Muon moves, where it has two axes
FORM = 'a pattern and then lr=NUMBER, lr=FIRST..LAST or decay=NUMBER'


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is said of the parameters in whose name `pattern` is found.

  Attributes:
    pattern: a regular expression.
    lr: learning rate over everyone's; a pair goes linearly from the first update to the last; None: nothing is said.
    decay: weight decay over train.weight_decay.
    stated_in: the setting that says it.
  """

  pattern: str
  lr: float | tuple[float, float] | None = None
  decay: float | None = None
  stated_in: str = 'train.parameters'

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
  muon = Rule(MATRIX, train.muon_lr_multiplier, None, 'train.muon_lr_multiplier')
  return (
    *read_rules(train.parameters),
    Rule('^memory_bank$', rates, memory.bank_decay_multiplier, 'memory.bank_lr_multiplier'),
    Rule('^embedding$', train.embedding_lr_multiplier, None, 'train.embedding_lr_multiplier'),
    *([muon] if train.optimizer == 'muon' else []),
  )


def first_rule(table: tuple[Rule, ...], name: str, what: str) -> Rule | None:
  """Returns the rule that says `what`, 'lr' or 'decay', of a parameter."""
  return next((rule for rule in table if getattr(rule, what) is not None and re.search(rule.pattern, name)), None)


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
    if what not in ('lr', 'decay') or what in values:
      raise UserError(f'train.parameters: {quote(" ".join(words))} must be {FORM}{nearest(what, ("lr", "decay"))}')
    values[what] = tuple(_read_number(word, part) for part in value.split('..', 1 if what == 'lr' else 0))
  if not values:
    raise UserError(f'train.parameters: {quote(" ".join(words))} must be {FORM}')
  return Rule(pattern, **{what: pair if len(pair) > 1 else pair[0] for what, pair in values.items()})


def _read_number(word: str, text: str) -> float:
  try:
    if 0 <= float(text) <= MOST:
      return float(text)
  except ValueError:
    pass
  raise UserError(f'train.parameters: {quote(word)} must be a number from 0 to {MOST:g}')
