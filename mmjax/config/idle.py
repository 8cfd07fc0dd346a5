"""Settings that do nothing: those of sublayers that a model does not have, and those that another one switches off."""

from mmjax.config.schema import Config
from mmjax.config.sublayers import SUBLAYERS, layer_kinds


def _weighs(config: Config) -> bool:
  return any(SUBLAYERS[kind].scores_weigh(config.memory) for kind in layer_kinds(config.model, config.memory))


# What a setting needs beside its sublayer: whether a config has it, and how that is said after "does nothing".
NEEDS = {
  'memory.score_activation': (_weighs, "without memory.scores='scale'"),
  'memory.bank_file': (lambda c: c.memory.bank_init == 'file', "without memory.bank_init='file'"),
  'memory.bank_std': (lambda c: c.memory.bank_init != 'file', "where memory.bank_init='file' gives the rows"),
  'memory.knowledge_length': (lambda c: c.memory.bank_init == 'file', "without memory.bank_init='file'"),
  'memory.bank_decay_multiplier': (lambda c: c.train.weight_decay > 0, 'where train.weight_decay is 0'),
  'data.valid_fraction': (lambda c: not c.data.valid_files, 'beside data.valid_files'),
  'data.text_key': (lambda c: c.data.train_files, 'without data.train_files'),
  'data.on_bad_line': (lambda c: c.data.train_files, 'without data.train_files'),
  'data.isolate_documents': (lambda c: c.data.layout == 'packed', "without data.layout='packed'"),
  'train.epochs': (
    lambda c: not c.train.max_steps,
    'beside train.max_steps, which ends the run: 0 leaves it to epochs',
  ),
  'runtime.num_processes': (lambda c: c.runtime.coordinator != 'auto', "with runtime.coordinator='auto'"),
  'runtime.process_id': (lambda c: c.runtime.coordinator != 'auto', "with runtime.coordinator='auto'"),
}


def idle_settings(config: Config) -> dict[str, str]:
  """Returns the settings that change nothing in a run of this config, whatever their value, and for each why.

  Returns:
    By name, what follows 'memory.ffn_dim=64 does nothing '.
  """
  kinds = dict.fromkeys(layer_kinds(config.model, config.memory))
  own = {name for kind in kinds for name in SUBLAYERS[kind].settings}
  if SUBLAYERS[config.model.sublayer].has_gate:
    own.add('memory.ngram_layers')  # also where it leaves no layer with a gate
  idle = {}
  for name in dict.fromkeys(name for row in SUBLAYERS.values() for name in row.settings):
    owners = ', '.join(repr(kind) for kind, row in SUBLAYERS.items() if name in row.settings)
    idle[name] = f'in a model of {" and ".join(kinds)} layers: it belongs to model.sublayer {owners}'
  idle = {name: why for name, why in idle.items() if name not in own}
  return {name: why for name, (has, why) in NEEDS.items() if not has(config)} | idle
