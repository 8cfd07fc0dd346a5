"""A run's settings: read a config file, apply overrides, check every value, explain what is wrong.

mmjax/config/schema.py states every setting once. The dataclasses are frozen: after `load_config` nothing changes one.
"""

from mmjax.config.history import as_of_today, gone_settings
from mmjax.config.idle import idle_settings
from mmjax.config.paths import check_output, expand_home, user_path
from mmjax.config.python_files import call_python_file, own_config
from mmjax.config.reading import (
  base_config,
  config_from_dict,
  default_settings,
  load_config,
  override_config,
  overrides_of,
)
from mmjax.config.rules import CHOICES, check_learning
from mmjax.config.schema import Config, DataConfig, MemoryConfig, ModelConfig, RuntimeConfig, TrainConfig
from mmjax.config.setting import flatten
