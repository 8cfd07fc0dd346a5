"""Says what a config costs:   python -m mmjax.tools.cost --config configs/ngram_rows.py [--match configs/exp_1_4_0.py]

Prints exact FLOPs, parameters and bytes for each token. With --match it also prints the costs of a second config and
the width of the feed-forward layers (memory.ffn_dim beside a memory, else model.hidden_dim) with which the first costs
at most as many FLOPs a token. Overrides --config.section.field=value apply to the first. Exit codes: 0 done, 2 user
error.
"""

import argparse

from rich.console import Console
from rich.table import Table

from mmjax.config import Config, load_config
from mmjax.errors import run_command
from mmjax.model.cost import bytes_per_token, flops_per_token, matching_width, width_field, with_width
from mmjax.model.lm import abstract_params, count_params


def main() -> None:
  """Reads flags and prints the table."""
  parser = argparse.ArgumentParser(
    prog='python -m mmjax.tools.cost', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='config file')
  parser.add_argument('--match', help='config file of the model that it shall cost as much as')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)
  columns, said = {config.experiment: costs(config)}, ''
  if arguments.match:
    other = load_config(arguments.match)
    budget = flops_per_token(other)['total']
    width = matching_width(config, budget)
    setting = f'{width_field(config)}={width}'
    matched = costs(with_width(config, width))
    columns |= {f'with {setting}': matched, f'to match: {other.experiment}': costs(other)}
    share = matched['FLOPs a token, total'] / budget
    said = f'--config.{setting} costs {share:.2%} of the FLOPs a token of {arguments.match}'
  print_table(columns)
  if said:
    print(said)


def costs(config: Config) -> dict[str, float]:
  """Returns what the table shows of a config, by the label of its line."""
  flops = flops_per_token(config)
  touched = bytes_per_token(config)
  total, without_bank = count_params(abstract_params(config))
  return {
    **{f'FLOPs a token, {name.replace("_", " ")}': value for name, value in flops.items()},
    'parameters': total,
    'parameters not in the bank': without_bank,
    'bytes of parameters and optimizer state': 3 * 4 * total,
    'bytes of rows that a token reads': touched['bank'],
    'bytes of other parameters that a token reads': touched['weights'],
  }


def print_table(columns: dict[str, dict[str, float]]) -> None:
  """Prints one column for each config; a part that a config does not have is left empty."""
  table = Table('float32; FLOPs forward and backward')
  for name in columns:
    table.add_column(name, justify='right')
  labels = dict.fromkeys(label for column in columns.values() for label in column)
  order = sorted(labels, key=lambda label: (not label.startswith('FLOPs'), label.endswith('total')))
  for label in order:
    table.add_row(label, *(f'{column[label]:,.0f}' if label in column else '' for column in columns.values()))
  Console().print(table)


if __name__ == '__main__':
  run_command(main)
