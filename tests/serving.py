"""What tests of the server share: views of models with random weights."""

import mmjax
from mmjax.inference.api import LanguageModel
from mmjax.run.directory import open_run
from mmjax.serve.view import RunView
from tests.helpers import build_model, tiny_config

TEXT = 'the memory reads a row of its bank'
MODELS = {
  'bag': {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__layers': '1', 'memory__bank_std': 2.0},
  'ngrams': {'model__sublayer': 'ngram_bag', 'model__num_selected': 1, 'memory__n_heads': 2, 'memory__ngrams': '1,2'},
  'mixed': {'model__sublayer': 'memory_bag', 'memory__n_heads': 2, 'memory__ngram_layers': '1', 'memory__ngrams': '2'},
  'cross_attention': {'model__sublayer': 'cross_attention', 'memory__bank_std': 2.0},
  'dense': {'model__sublayer': 'dense'},
}


def make_view(tiny_run, name, **more):
  """The page's view of a model with random weights, with the tokenizer and the text of a run."""
  config = tiny_config(**MODELS[name], **more)
  view = RunView(LanguageModel(config, mmjax.load(tiny_run).tokenizer, build_model(config)[1]), open_run(tiny_run))
  while view.corpus and not view.corpus.done:
    view.corpus.grow()
  return view
