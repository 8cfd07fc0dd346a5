"""Prints every setting with its default and its meaning, as configs/base.py lists them:   python -m mmjax.config"""

import argparse
import itertools

from mmjax.config.schema import SETTINGS
from mmjax.errors import run_command


def list_settings() -> str:
  """Writes a line for each setting, and an empty one between sections."""
  lines = []
  for _, rows in itertools.groupby(SETTINGS.items(), key=lambda row: row[0].rpartition('.')[0]):
    for name, setting in rows:
      lines.append(f'{name} = {setting.default!r}' + (f'  # {setting.meaning}' if setting.meaning else ''))
    lines.append('')
  return '\n'.join(lines[:-1])


def main() -> None:
  """Prints the list; takes no arguments but --help."""
  argparse.ArgumentParser(prog='python -m mmjax.config', description=__doc__).parse_args()
  print(list_settings())


if __name__ == '__main__':
  run_command(main)
