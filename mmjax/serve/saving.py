"""The page as one file that opens anywhere: all that it asks for a text, answered beforehand."""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

from mmjax.files import finite
from mmjax.inference.settings import Sampling
from mmjax.serve.view import RunView

SAVED_ROWS = 24  # that can be opened, for each layer with a memory
ROW_SECONDS = 60  # after so long no more rows are looked up
NEW_TOKENS = 60


def saved_page(views: Sequence[RunView], text: str) -> str:
  """Returns the page as it looks after reading a text, with the rows that the text reads most and one continuation."""
  answers, sampling = {}, Sampling(max_new_tokens=NEW_TOKENS)
  for run, view in enumerate(views):
    while view.corpus is not None and not view.corpus.done:
      view.corpus.grow()
    for question, fields in _questions(view, text):
      answers[_key(question, {'run': run, **fields})] = getattr(view, question)(**fields)
    start = time.monotonic()
    for fields in _rows(view, text):
      if time.monotonic() < start + ROW_SECONDS:
        answers[_key('row', {'run': run, **fields})] = view.row(**fields)
    answers[_key('stream', {'run': run, 'text': text, 'changes': []})] = ''.join(view.stream(text, [], sampling))
  saved = {'text': text, 'runs': [view.describe() for view in views], 'answers': answers}
  saved['sampling'] = dataclasses.asdict(sampling)
  data = json.dumps(finite(saved), ensure_ascii=False, separators=(',', ':')).replace('<', '\\u003c')
  page = static('page.html').replace('<link rel="stylesheet" href="page.css">', f'<style>{static("page.css")}</style>')
  script = f'<script type="application/json" id="saved">{data}</script>\n<script>{static("page.js")}</script>'
  return page.replace('<script src="page.js"></script>', script)


def _questions(view: RunView, text: str) -> list[tuple[str, dict[str, Any]]]:
  asked = [('read', {'text': text}), ('next', {'text': text, 'changes': []}), ('health', {})]
  layers = () if view.corpus is None else (None, *view.reader.layers)
  return asked + [('map', {'layer': layer}) for layer in layers]


def _rows(view: RunView, text: str) -> list[dict[str, Any]]:
  """Returns the rows of each layer that a text reads most, those that are read more first."""
  if view.corpus is None:
    return []
  taken = Counter()
  for token in view.read(text)['tokens']:
    for layer, reads in zip(view.reader.layers, token['layers'], strict=True):
      taken.update((layer, row) for row, *_ in reads)
  return [{'row': row, 'layer': layer} for (layer, row), _ in taken.most_common(SAVED_ROWS * len(view.reader.layers))]


def _key(question: str, fields: dict[str, Any]) -> str:
  """Returns what the page looks an answer up by: as `JSON.stringify` writes it."""
  return f'{question} {json.dumps(fields, ensure_ascii=False, separators=(",", ":"))}'


def static(name: str) -> str:
  """Returns a file of the page."""
  return resources.files('mmjax.serve').joinpath('static', name).read_text('utf-8')
