"""What the parity tests share: one set of weights in both models, and a fair comparison where selections tie.

Two correct float32 implementations may order rows differently whose scores differ by less than rounding, and from
there on they compute different things. `same_selection` makes the torch model go on with the rows that mmjax read,
after it has insisted that each row in which they differ was a near tie, and counts those.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from mmjax.config import Config
from mmjax.interop import names
from mmjax.model.params import model_graph
from tests.torch_reference import Sizes, TorchLM

torch.set_num_threads(1)  # its waiting threads spin, on the cores that JAX works on

# At full size scores are sums of 2 x 64 products, about 10 at the top: 2e-5 is 20 units in their last place.
SCORE_MARGIN = 2e-5


def build_pair(config: Config, seed: int = 0) -> tuple[TorchLM, nnx.GraphDef, dict[str, Any]]:
  """Returns a torch model with random weights, and mmjax's graph definition and parameters with the same ones."""
  torch.manual_seed(seed)
  model = TorchLM(Sizes.of(config.model))
  with torch.no_grad():
    for name, value in model.named_parameters():
      if 'norm' in name:  # all ones at the start, which would hide a norm applied in the wrong place
        value.uniform_(0.5, 1.5)
  return model, model_graph(config), to_params(model, config)


def to_params(model: TorchLM, config: Config) -> dict[str, Any]:
  """Returns a copy of the torch model's weights as mmjax parameters."""
  tensors = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
  return names.to_params(names.canonical(tensors, 'torch'), config)


def random_tokens(config: Config, batch: int, length: int, seed: int = 0) -> np.ndarray:
  """Returns int32 tokens (B, T) of the vocabulary without its four special ones."""
  return np.random.default_rng(seed).integers(4, config.model.vocab_size, (batch, length), dtype=np.int32)


@contextlib.contextmanager
def same_selection(
  model: TorchLM, row_LBTR: np.ndarray | None, margin: float = SCORE_MARGIN
) -> Iterator[dict[str, float]]:
  """Within it the torch model reads the rows that mmjax read; fails where the scores do not allow that.

  Args:
    model: the torch model.
    row_LBTR: rows mmjax selected, for the same tokens; None in a model without a memory.
    margin: how far apart the scores of two rows may be, of which one took the other's place.

  Yields:
    Filled as the model runs: `selections` (one a token and layer), `flips` (those that differed) and `gap`, the
    largest difference of scores, in float64, between two such rows.
  """
  seen = {'selections': 0, 'flips': 0, 'gap': 0.0}

  def hook(layer: int, gate: torch.nn.Module, inputs: tuple, outputs: tuple) -> tuple:
    m_BTD, got_BTR, want_BTR = inputs[0].detach().numpy(), row_LBTR[layer], outputs[0].numpy()
    differs_BT = (got_BTR != want_BTR).any(-1)
    for b, t in np.argwhere(differs_BT):
      score_M = all_scores(gate, m_BTD[b, t])
      gap = float(np.abs(score_M[got_BTR[b, t]] - score_M[want_BTR[b, t]]).max())
      assert gap <= margin, f'layer {layer}, position {b, t}: rows differ although scores do by {gap}'
      seen['gap'] = max(seen['gap'], gap)
    seen['selections'] += differs_BT.size
    seen['flips'] += int(differs_BT.sum())
    return torch.tensor(got_BTR).long(), outputs[1]

  gates = [] if row_LBTR is None else [layer.memory_gate for layer in model.layers]
  handles = [gate.register_forward_hook(functools.partial(hook, layer)) for layer, gate in enumerate(gates)]
  try:
    yield seen
  finally:
    for handle in handles:
      handle.remove()


def torch_logits(model: TorchLM, tokens_BT: np.ndarray) -> np.ndarray:
  """Returns float32 logits_BTV of the torch model."""
  with torch.no_grad():
    return model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()


def jax_forward(
  graphdef: nnx.GraphDef, params: Any, tokens_BT: np.ndarray, **settings: Any
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns logits_BTV and row_LBTR of mmjax; `settings` go to the model's call."""

  @jax.jit
  def forward(params: Any, tokens_BT: jax.Array) -> tuple:
    model = nnx.merge(graphdef, params)
    out = model(tokens_BT, **settings)
    return model.logits(out.hidden_BTD), out.row_LBTR

  logits, rows = forward(params, tokens_BT)
  return np.asarray(logits), None if rows is None else np.asarray(rows)


def all_scores(gate: torch.nn.Module, m_D: np.ndarray) -> np.ndarray:
  """Returns the float64 score of every row of the bank for one token."""
  weight_PD = gate.gate_proj.weight.detach().numpy().astype(np.float64)
  first, second = np.split(weight_PD @ m_D.astype(np.float64), 2)
  keys_2Cp = gate.keys.detach().numpy().astype(np.float64)
  return ((keys_2Cp[0] @ first)[:, None] + (keys_2Cp[1] @ second)[None]).ravel()


def relative_l2(value: np.ndarray, truth: np.ndarray) -> float:
  """Returns |value - truth| / |truth| in float64."""
  value, truth = value.astype(np.float64), truth.astype(np.float64)
  return float(np.linalg.norm(value - truth) / max(np.linalg.norm(truth), 1e-300))
