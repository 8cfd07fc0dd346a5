"""Prepares text for training: python -m mmjax.tools.prepare --train_files 'corpus/train-*.jsonl.xz' --valid_files ...

Trains a tokenizer (or takes one), tokenizes, and writes shards and an index. Training does the same by itself; this
does it ahead. Without --train_files it prepares the text that Python itself carries.
"""

import argparse
import shlex
import sys

from mmjax.config import load_config, own_config
from mmjax.config.schema import SETTINGS
from mmjax.console import command_parser
from mmjax.data.index import read_index
from mmjax.data.overlap import overlap_remark
from mmjax.data.prepare import prepare
from mmjax.data.tokenizer import load_tokenizer
from mmjax.errors import run_command

FOR_EXAMPLE = 'configs/exp_1_4_2.py'  # of a config to train with


def main() -> None:
  """Reads flags and prepares; prints the directory on stdout."""
  arguments, overrides = _parser().parse_known_args()
  given = vars(arguments)
  config_file, vocab_size = given.pop('config'), given.pop('vocab_size')
  overrides += [f'--config.data.{field}={value}' for field, value in given.items() if value is not None]
  if vocab_size is None and arguments.tokenizer:
    vocab_size = load_tokenizer(arguments.tokenizer).vocab_size
  if vocab_size is not None:
    overrides.append(f'--config.model.vocab_size={vocab_size}')
  config = load_config(config_file or str(own_config('base.py')), overrides)
  directory = prepare(config.data, config.model.vocab_size)
  if valid := read_index(directory)['splits'].get('valid'):
    if remark := overlap_remark(valid, valid.get('also_in_train'), config.data.layout):
      print(remark, file=sys.stderr)
    size = [flag for flag in overrides if flag.startswith('--config.model.vocab_size=')][-1:]
    command = ['--config', config_file or FOR_EXAMPLE, f'--config.data.prepared_dir={directory}', *size]
    print(f'Train on it: python train.py {shlex.join(command)}', file=sys.stderr)
  print(directory)


def _parser() -> argparse.ArgumentParser:
  parser = command_parser('prepare', __doc__)
  parser.add_argument('--config', help='config file that the defaults come from (default: configs/base.py)')
  for field in ('train_files', 'valid_files', 'valid_fraction', 'tokenizer', 'text_key', 'on_bad_line', 'workers'):
    parser.add_argument(f'--{field}', help=SETTINGS[f'data.{field}'].meaning)
  parser.add_argument('--out', dest='prepared_dir', metavar='OUT', help='folder for prepared directories')
  parser.add_argument('--vocab_size', help='pieces of the tokenizer; by default those of --tokenizer, or the config')
  return parser


if __name__ == '__main__':
  run_command(main)
