"""Writes the weights of a run into a file, makes a run of such a file, or of one of the PyTorch code, or a smaller run:

  python -m mmjax.tools.convert export --workdir out/run --to model.safetensors
  python -m mmjax.tools.convert export --workdir out/run --to llama --format llama
  python -m mmjax.tools.convert import --from model.safetensors --out out/imported --tokenizer out/run/tokenizer.model
  python -m mmjax.tools.convert import --from model.pth --out out/imported [--config FILE] [--tokenizer FILE]
  python -m mmjax.tools.convert compress --workdir out/run --bits 8 --out out/small

A model that the PyTorch code has goes under its names, any other under mmjax's own. The imported run can be evaluated,
sampled and trained on. A .safetensors that export wrote tells all settings of its model. What a state dict of the
PyTorch code cannot tell, above all the number of heads, comes from --config and --config.model.n_heads=... overrides.
--format llama writes a feed-forward model as a directory for LlamaForCausalLM and AutoTokenizer of transformers.
What compress makes has a bank of 8 or 4 bits a value. It is evaluated, sampled, served and inspected, but not trained.
"""

import argparse

from mmjax.choices import BANK_BITS, EXPORT_DTYPES
from mmjax.config import own_config, user_path
from mmjax.console import command_parser
from mmjax.errors import UserError, interrupt_ends_at_once, run_command
from mmjax.inference.settings import add_checkpoint_flag


def main() -> None:
  """Reads flags and converts."""
  arguments, overrides = _parser().parse_known_args()
  if overrides and arguments.command != 'import':
    raise UserError(f'argument {overrides[0]!r} is not understood; {arguments.command} uses the settings of the run')

  with interrupt_ends_at_once():  # only now: --help and bad flags need not wait for JAX
    from mmjax.interop.compress import compress_run
    from mmjax.interop.convert import export_run, import_run
    from mmjax.interop.llama import export_llama

  if arguments.command == 'import':
    source, out = user_path(arguments.source), user_path(arguments.out)
    import_run(source, out, arguments.config, overrides, arguments.tokenizer, arguments.dtype)
    return
  workdir = user_path(arguments.workdir)
  if arguments.command == 'compress':
    compress_run(workdir, user_path(arguments.out), arguments.bits, arguments.checkpoint)
    return
  export = export_llama if arguments.format == 'llama' else export_run
  export(workdir, user_path(arguments.to), arguments.checkpoint, arguments.dtype)


def _parser() -> argparse.ArgumentParser:
  parser = command_parser('convert', __doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  take = commands.add_parser('import', help='file of weights -> run directory')
  take.add_argument('--from', dest='source', required=True, help='.pth, .pt or .safetensors')
  take.add_argument('--out', required=True, help='new run directory')
  take.add_argument('--config', default=str(own_config('base.py')), help='config file for what the weights do not say')
  take.add_argument('--tokenizer', help='SentencePiece model or tokenizer.json that the weights were trained with')
  take.add_argument('--dtype', choices=['float32'], help='cast tensors of other dtypes')
  give = commands.add_parser('export', help='run directory -> file of weights, or directory of a Llama')
  give.add_argument('--workdir', required=True, help='run directory')
  give.add_argument('--to', required=True, help='new file: .pth, .pt or .safetensors; a new directory for llama')
  give.add_argument('--format', choices=['file', 'llama'], default='file', help='what is written')
  add_checkpoint_flag(give)
  give.add_argument('--dtype', choices=EXPORT_DTYPES, help='cast; by default float32 is kept')
  pack = commands.add_parser('compress', help='run directory -> run directory with a smaller bank')
  pack.add_argument('--workdir', required=True, help='run directory')
  pack.add_argument('--bits', type=int, choices=BANK_BITS, required=True, help='of a value of the bank')
  pack.add_argument('--out', required=True, help='new run directory')
  add_checkpoint_flag(pack)
  return parser


if __name__ == '__main__':
  run_command(main)
