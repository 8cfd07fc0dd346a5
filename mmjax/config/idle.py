"""Settings that do nothing: those of sublayers that a model does not have, and those that another one switches off."""

from mmjax.config.schema import SETTINGS, Config
from mmjax.config.sublayers import SUBLAYERS, VALUE_ROWS, layer_kinds


def idle_settings(config: Config) -> dict[str, str]:
  """Returns the settings that change nothing in a run of this config, whatever their value, and for each why.

  Returns:
    By name, what follows 'memory.ffn_dim=64 does nothing '.
  """
  kinds = dict.fromkeys(layer_kinds(config.model, config.memory))
  own = {name for kind in kinds for name in SUBLAYERS[kind].settings}
  if SUBLAYERS[config.model.sublayer].has_gate:
    own.add('memory.ngram_layers')  # also where it leaves no layer with a gate
  if config.memory.value_layers:
    own.update(VALUE_ROWS.settings)
  idle = {
    name: setting.needs[1] for name, setting in SETTINGS.items() if setting.needs and not setting.needs[0](config)
  }
  if not any(SUBLAYERS[kind].scores_weigh(config.memory) for kind in kinds):
    idle['memory.score_activation'] = "without memory.scores='scale'"
  if not any(SUBLAYERS[kind].uses_bank and SUBLAYERS[kind].reads_input(config.memory) for kind in kinds):
    idle['memory.input'] = 'where no memory reads its input: a bag of n-grams does with memory.bag_gate'
  for name in dict.fromkeys(name for sublayer in SUBLAYERS.values() for name in sublayer.settings):
    if name not in own:
      owners = ', '.join(repr(kind) for kind, sublayer in SUBLAYERS.items() if name in sublayer.settings)
      values = ' and memory.value_layers' if name in VALUE_ROWS.settings else ''
      idle[name] = f'in a model of {" and ".join(kinds)} layers: it belongs to model.sublayer {owners}{values}'
  return idle
