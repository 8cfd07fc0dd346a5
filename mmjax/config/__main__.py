"""Prints every setting with its default and its meaning, as configs/base.py lists them:   python -m mmjax.config"""

import itertools

from mmjax.config.schema import SETTINGS


def list_settings() -> str:
  """Writes a line for each setting, and an empty one between sections."""
  lines = []
  for _, rows in itertools.groupby(SETTINGS.items(), key=lambda row: row[0].rpartition('.')[0]):
    for name, setting in rows:
      lines.append(f'{name} = {setting.default!r}' + (f'  # {setting.meaning}' if setting.meaning else ''))
    lines.append('')
  return '\n'.join(lines[:-1])


if __name__ == '__main__':
  print(list_settings())
