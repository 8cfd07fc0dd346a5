"""The table of sublayers: what follows attention, the one thing in which the experiments differ.

A new one is a module in mmjax/model/sublayers, a row here and a config file. The row says all that others must know of
it: what it reads, which settings are its own (set in a model that has no such layer they are refused), what no gradient
reaches. It names what makes it and does not import that: the table can be read without JAX.
"""

import dataclasses
import pkgutil
from collections.abc import Callable
from typing import Any

from mmjax.config.schema import Config, MemoryConfig, ModelConfig

BANK_SETTINGS = (
  'model.knowledge_num', 'model.knowledge_dim', 'model.num_selected', 'memory.n_heads', 'memory.bank_init',
  'memory.bank_file', 'memory.knowledge_length', 'memory.bank_std', 'memory.bank_lr_multiplier',
  'memory.bank_lr_final_multiplier', 'memory.bank_decay_multiplier', 'memory.bank_update',
  'memory.bank_moments', 'memory.teach_rows',
)  # fmt: skip
NGRAM_SETTINGS = (*BANK_SETTINGS, 'memory.ngrams', 'memory.ngram_ranges', 'memory.ngram_signs')
PLACE_SETTINGS = ('memory.layers', 'memory.input', 'memory.ffn_dim')
GATE_SETTINGS = (
  'memory.ngram_layers', 'memory.query_key_norm', 'memory.key_dim', 'memory.selection_bias',
)  # fmt: skip
SCORE_SETTINGS = ('memory.scores', 'memory.score_activation')
VALUES = 'values'  # stands among the numbers of layers with a memory for the rows that all of memory.value_layers read


@dataclasses.dataclass(frozen=True)
class Sublayer:
  """A row of the table.

  Attributes:
    path: what makes it, 'package.module:name'; mmjax.model.sublayers says how it is made and called.
    settings: those of model and memory that mean nothing unless some layer is of this or another kind that names them.
    uses_bank: whether it reads the bank.
    has_gate: whether queries pick the rows.
    reads_ngrams: whether the last tokens do.
    sums_rows: whether it reads the bank with `bank_bag`, or with `bank_lookup`.
    scores_weigh: of the memory section, whether rows count by their scores.
    gates_tokens: whether the score of all rows of a token is the share, from 0 to 1, of their mean that is added.
    reads_input: of the memory section, whether a memory looks at its input, and not at the last tokens alone.
    without_gradient: of the memory section, patterns of the parameters (paths below the sublayer) that no gradient
      reaches, so that weight decay leaves them alone.
  """

  path: str
  settings: tuple[str, ...]
  uses_bank: bool = False
  has_gate: bool = False
  reads_ngrams: bool = False
  sums_rows: bool = False
  scores_weigh: Callable[[MemoryConfig], bool] = lambda memory: False
  gates_tokens: bool = False
  reads_input: Callable[[MemoryConfig], bool] = lambda memory: True
  without_gradient: Callable[[MemoryConfig], tuple[str, ...]] = lambda memory: ()

  def build(self, model: ModelConfig, memory: MemoryConfig, *, rngs: Any) -> Any:
    """Returns a new module."""
    return pkgutil.resolve_name(self.path)(model, memory, rngs=rngs)


def layer_kinds(model: ModelConfig, memory: MemoryConfig) -> tuple[str, ...]:
  """Names the sublayer of each layer: model.sublayer; where only some layers have a memory, 'dense' in the others.

  Layers in memory.ngram_layers have an 'ngram_bag'.
  """
  sublayer = SUBLAYERS[model.sublayer]
  if not sublayer.uses_bank:
    return (model.sublayer,) * model.n_layers
  kinds = dict.fromkeys(range(model.n_layers), 'dense')
  kinds |= dict.fromkeys(memory.layer_numbers(model.n_layers), model.sublayer)
  kinds |= dict.fromkeys(memory.ngram_layer_numbers(model.n_layers) if sublayer.has_gate else (), 'ngram_bag')
  return tuple(kinds.values())


def uses_bank(model: ModelConfig, memory: MemoryConfig) -> bool:
  """Tells whether a model has a bank: for the sublayers of some layers, or for the values of attention."""
  return SUBLAYERS[model.sublayer].uses_bank or bool(memory.value_layers)


def memory_layers(config: Config) -> list[int | str]:
  """Returns what reads the bank, in the order of Output.row_LBTR: VALUES, if they do, and numbers of layers."""
  return list(bank_readers(config))


def bank_readers(config: Config) -> dict[int | str, Sublayer]:
  """Returns for each of `memory_layers` what reads the bank there: an entry of SUBLAYERS, or VALUE_ROWS."""
  readers = {VALUES: VALUE_ROWS} if config.memory.value_layers else {}
  readers |= {number: SUBLAYERS[kind] for number, kind in enumerate(layer_kinds(config.model, config.memory))}
  return {layer: reader for layer, reader in readers.items() if reader.uses_bank}


def layer_name(layer: int | str) -> str:
  """Returns what to call one of `memory_layers`."""
  return layer if layer == VALUES else f'layer {layer}'


def _scaled(memory: MemoryConfig) -> bool:
  return memory.scores != 'none'


def _frozen_gate(memory: MemoryConfig) -> tuple[str, ...]:
  """The gate's parameters, unless its scores reach the output."""
  return () if _scaled(memory) else (r'gate/keys$', r'gate/query/kernel$', r'gate/norm/scale$')


READS_ROWS = {  # one by one, and what becomes of them is not a bag
  'settings': (*BANK_SETTINGS, *PLACE_SETTINGS, *GATE_SETTINGS, *SCORE_SETTINGS),
  'uses_bank': True,
  'has_gate': True,
  'scores_weigh': _scaled,
  'without_gradient': _frozen_gate,
}
SUBLAYERS = {
  'dense': Sublayer('mmjax.model.sublayers.dense:dense', ('model.hidden_dim',)),
  'cross_attention': Sublayer('mmjax.model.sublayers.memory:cross_attention', **READS_ROWS),
  'gated_fusion': Sublayer('mmjax.model.sublayers.memory:gated_fusion', **READS_ROWS),
  'memory_bag': Sublayer(
    'mmjax.model.sublayers.memory:memory_bag',
    (*BANK_SETTINGS, *PLACE_SETTINGS, *GATE_SETTINGS, 'memory.score_activation', 'memory.bag_gate'),
    uses_bank=True,
    has_gate=True,
    sums_rows=True,
    scores_weigh=lambda memory: True,
  ),
  'ngram_bag': Sublayer(
    'mmjax.model.sublayers.ngram:ngram_bag',
    (*NGRAM_SETTINGS, *PLACE_SETTINGS, 'memory.row_dropout', 'memory.bag_gate'),
    uses_bank=True,
    reads_ngrams=True,
    sums_rows=True,
    reads_input=lambda memory: memory.bag_gate,
    without_gradient=lambda memory: () if memory.bag_gate else (r'norm/scale$',),
  ),
  'ngram_bucket': Sublayer(
    'mmjax.model.sublayers.ngram:ngram_bucket',
    (*NGRAM_SETTINGS, *PLACE_SETTINGS, 'memory.key_dim', 'memory.row_dropout', 'memory.bag_gate'),
    uses_bank=True,
    reads_ngrams=True,
    sums_rows=True,
    scores_weigh=lambda memory: True,
  ),
  'engram_bag': Sublayer(
    'mmjax.model.sublayers.ngram:engram_bag',
    (*NGRAM_SETTINGS, *PLACE_SETTINGS, 'memory.row_dropout'),
    uses_bank=True,
    reads_ngrams=True,
    sums_rows=True,
    gates_tokens=True,
  ),
  'moe': Sublayer(
    'mmjax.model.sublayers.moe:moe',
    ('model.hidden_dim', 'model.n_experts', 'model.experts_per_token', 'model.aux_loss_weight'),
  ),
}
VALUE_ROWS = Sublayer(  # no sublayer, but read as one: memory.value_layers get its rows into the values of attention
  'mmjax.model.sublayers.ngram:value_bag', NGRAM_SETTINGS, uses_bank=True, reads_ngrams=True, sums_rows=True
)
