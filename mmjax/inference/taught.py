"""Rows that a run taught to the model that it started from (memory.teach_rows): which they are, and who reads them."""

from typing import Any

import numpy as np

from mmjax.inference.api import LanguageModel, load
from mmjax.model.params import BANK
from mmjax.run.checkpoint import Checkpoints
from mmjax.run.directory import RunDir


def taught_rows(lm: LanguageModel, run: RunDir) -> list[dict[str, Any]]:
  """Returns the rows that are not what they were before the run, those that moved farthest first.

  Args:
    lm: a checkpoint of the run.
    run: its directory.

  Returns:
    For each its `row`; `moved`, the length of the change, and `length_before`, of its value before; `new` and `usual`:
    the share of the updates that read it, among those of this run and those of the background; `before` and `after`,
    its values.

  Raises:
    UserError: if the run taught no rows.
  """
  before_MP, after_MP = (np.asarray(x.params[BANK]) for x in (load(run.path, without_taught=True), lm))
  reads = {name: np.asarray(x) for name, x in Checkpoints(run.path, read_only=True).restore_reads(lm.step).items()}
  usual_M, usual = reads['background_M'], max(1, reads['background_updates'])
  new_M, new = reads['count_M'] - usual_M, max(1, reads['updates'] - reads['background_updates'])
  moved_M = np.linalg.norm(after_MP - before_MP, axis=1)
  return [
    {
      'row': int(row),
      'moved': float(moved_M[row]),
      'length_before': float(np.linalg.norm(before_MP[row])),
      'new': float(new_M[row] / new),
      'usual': float(usual_M[row] / usual),
      'before': before_MP[row].tolist(),
      'after': after_MP[row].tolist(),
    }
    for row in np.argsort(-moved_M, kind='stable')[: np.count_nonzero(moved_M)]
  ]
