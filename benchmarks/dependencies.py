"""Says which packages of mmjax are not installed: python benchmarks/dependencies.py; exit code 2 if any."""

import importlib.util
import sys

# Module -> package, where these are not the same.
NAMES = {'orbax': 'orbax-checkpoint'}
MODULES = (
  'jax', 'flax', 'optax', 'orbax', 'grain', 'numpy', 'scipy', 'ml_collections', 'sentencepiece', 'tensorboardX', 'rich',
  'matplotlib', 'safetensors',
)  # fmt: skip

if __name__ == '__main__':
  missing = [NAMES.get(module, module) for module in MODULES if importlib.util.find_spec(module) is None]
  if missing:
    print(f'{sys.executable} lacks {", ".join(missing)}: install them or put them on PYTHONPATH.', file=sys.stderr)
    sys.exit(2)
