"""Says what a config costs:   python -m mmjax.tools.cost --config configs/ngram_rows.py [--match configs/exp_1_4_0.py]

Prints exact FLOPs, parameters and bytes for each token; of a mixture of experts, whose experts are all computed, the
FLOPs of those that a token uses. With --match it also prints the costs of a second config and the width of the
feed-forward layers (memory.ffn_dim beside a memory, else model.hidden_dim) with which the first costs at most as many
FLOPs a token. Overrides --config.section.field=value apply to the first. Exit codes: 0 done, 2 user error.
"""

from mmjax.config import load_config
from mmjax.console import command_parser, show
from mmjax.errors import interrupt_ends_at_once, run_command


def main() -> None:
  """Reads flags and prints the table."""
  parser = command_parser('cost', __doc__)
  parser.add_argument('--config', required=True, help='config file')
  parser.add_argument('--match', help='config file of the model that it should cost as much as')
  arguments, overrides = parser.parse_known_args()
  config = load_config(arguments.config, overrides)

  with interrupt_ends_at_once():  # only now: --help and bad settings need not wait for JAX
    from mmjax.model.cost import flops_per_token, matching_width, width_field, with_width
    from mmjax.report.numbers import cost_table, costs

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
  show(cost_table(columns))
  if said:
    print(said)


if __name__ == '__main__':
  run_command(main)
