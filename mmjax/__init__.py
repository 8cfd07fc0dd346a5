"""Language models with an explicit memory, in JAX and Flax.

import mmjax
run = mmjax.train('configs/quickstart_ngram_rows.py', 'out/mine', {'data.train_files': 'my_text.txt'})
lm = mmjax.load(run)
lm.generate('The list of', max_new_tokens=40, temperature=0.7)
"""

__version__ = '0.1.0'
__all__ = ['LanguageModel', 'load', 'train']


def __getattr__(name: str):
  """Imports the API when it is first used: `import mmjax` alone does not wait for JAX.

  Raises:
    UserError: if a package that the API needs is missing.
  """
  if name in __all__:
    from mmjax.environment import missing_packages
    from mmjax.errors import UserError

    if sentence := missing_packages():
      raise UserError(sentence)
    if name == 'train':
      from mmjax.tools.api import train

      return train
    from mmjax.inference import api

    return getattr(api, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  """Names what `__getattr__` imports, too, so that a notebook offers it."""
  return sorted({*globals(), *__all__})
