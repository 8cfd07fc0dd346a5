"""The page as one file that opens anywhere: all that it asks for a text, answered beforehand."""

import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

from mmjax.files import finite
from mmjax.inference.settings import Sampling
from mmjax.serve.view import RunView

ROWS = 24  # that can be opened: those of each layer that the text reads most
NEW_TOKENS = 60


def saved_page(views: Sequence[RunView], text: str) -> str:
  """Returns the page as it looks after reading a text, with the rows that the text reads most and one continuation."""
  answers = {}
  for run, view in enumerate(views):
    while view.corpus is not None and not view.corpus.done:
      view.corpus.grow()
    for question, fields in _questions(view, text):
      answers[_key(question, {'run': run, **fields})] = getattr(view, question)(**fields)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    answers[_key('stream', {'run': run, 'text': text, 'changes': []})] = ''.join(view.stream(text, [], sampling))
  saved = {'text': text, 'runs': [view.describe() for view in views], 'answers': answers}
  data = json.dumps(finite(saved), ensure_ascii=False, separators=(',', ':')).replace('<', '\\u003c')
  page = static('page.html').replace('<link rel="stylesheet" href="page.css">', f'<style>{static("page.css")}</style>')
  script = f'<script type="application/json" id="saved">{data}</script>\n<script>{static("page.js")}</script>'
  return page.replace('<script src="page.js"></script>', script)


def _questions(view: RunView, text: str) -> list[tuple[str, dict[str, Any]]]:
  asked = [('read', {'text': text}), ('next', {'text': text, 'changes': []}), ('health', {})]
  if view.corpus is None:
    return asked
  asked += [('map', {'layer': layer}) for layer in (None, *view.reader.layers)]
  taken = [Counter() for _ in view.reader.layers]
  for token in view.read(text)['tokens']:
    for counts, reads in zip(taken, token['layers'], strict=True):
      counts.update(row for row, *_ in reads)
  for layer, counts in zip(view.reader.layers, taken, strict=True):
    asked += [('row', {'row': row, 'layer': layer}) for row, _ in counts.most_common(ROWS)]
  return asked


def _key(question: str, fields: dict[str, Any]) -> str:
  """Returns what the page looks an answer up by: as `JSON.stringify` writes it."""
  return f'{question} {json.dumps(fields, ensure_ascii=False, separators=(",", ":"))}'


def static(name: str) -> str:
  """Returns a file of the page."""
  return resources.files('mmjax.serve').joinpath('static', name).read_text()
