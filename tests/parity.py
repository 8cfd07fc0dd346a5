"""What the parity tests share: one set of weights in both models, and a fair comparison where selections tie.

Two correct float32 implementations may order rows differently whose scores differ by less than rounding. What
follows from such a flip (the same position in later layers, later positions of the row) is no longer comparable;
`clean_positions` finds the flips, insists that each was a near tie, and tells which positions none has reached.
"""

from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from mmjax.config import Config
from mmjax.interop import names
from mmjax.model.lm import model_graph
from tests.torch_reference import Sizes, TorchLM

# Scores are sums of 2 x 64 products near 6 in size; the two models' float32 scores were seen to differ by up to 3e-5.
SCORE_MARGIN = 1e-4


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
  """Returns the torch model's weights as mmjax parameters."""
  tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
  return names.to_params(names.canonical(tensors, 'torch'), config.model)


def random_tokens(config: Config, batch: int, length: int, seed: int = 0) -> np.ndarray:
  """Returns int32 tokens (B, T) of the vocabulary without its four special ones."""
  return np.random.default_rng(seed).integers(4, config.model.vocab_size, (batch, length), dtype=np.int32)


def torch_forward(model: TorchLM, tokens_BT: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
  """Returns logits_BTV, and for each memory layer the gate's input m_BTD and the rows_BTR it chose."""
  seen: list[tuple[np.ndarray, np.ndarray]] = []

  def record(_: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
    seen.append((inputs[0].float().numpy(), outputs[0].numpy()))

  hooks = [layer.memory_gate.register_forward_hook(record) for layer in model.layers if hasattr(layer, 'memory_gate')]
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()
  for hook in hooks:
    hook.remove()
  return logits, seen


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


def clean_positions(
  model: TorchLM, seen: list[tuple[np.ndarray, np.ndarray]], row_LBTR: np.ndarray | None, shape: tuple[int, int]
) -> tuple[np.ndarray, int]:
  """Compares the rows selected, and fails where they differ without a near tie.

  Args:
    model: the torch model.
    seen: from `torch_forward`.
    row_LBTR: the rows mmjax selected.
    shape: (B, T).

  Returns:
    clean_BT: True where no differing selection can have had an effect. The number of selections that differed.
  """
  clean_BT, flips = np.ones(shape, bool), 0
  for layer, (m_BTD, want_BTR) in enumerate(seen):
    differs_BT = (row_LBTR[layer] != want_BTR).any(-1) & clean_BT
    gate = model.layers[layer].memory_gate
    for b, t in np.argwhere(differs_BT):
      score_M = all_scores(gate, m_BTD[b, t])
      gap = np.abs(score_M[row_LBTR[layer, b, t]] - score_M[want_BTR[b, t]]).max()
      assert gap <= SCORE_MARGIN, f'layer {layer}, position {b, t}: rows differ although scores do by {gap}'
    flips += int(differs_BT.sum())
    clean_BT &= ~np.logical_or.accumulate(differs_BT, axis=1)
  return clean_BT, flips


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
