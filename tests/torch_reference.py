"""The PyTorch models that mmjax must reproduce: experiments 1.4.0 to 1.4.3 and the mixture of experts.

A compact port, for the tests only. It computes what the original PyTorch code computes, under the same
parameter names and with torch's default initialisation, so that a state dict of one loads into the other.
Three things differ in form alone: attention is always the fused one, there are no `mask` and `pos_cis`
buffers, and `forward` returns a tuple.

Experiment 1.4.1 survives as a description ("cross attention; queries from the attention output, keys and
values projected from the selected rows"), not as code. `CrossAttentionMemory` is the plain reading of it: for
every token, multi-head attention with as many heads as self-attention has, over that token's R selected rows,
without positions; the gate's scores are not used, as in 1.4.2.   Axis letters: see mmjax/model.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a model, under the field names of mmjax's ModelConfig."""

  vocab_size: int = 6400
  dim: int = 512
  n_layers: int = 8
  n_heads: int = 32
  n_kv_heads: int = 8
  norm_eps: float = 1e-5
  rope_theta: float = 1e6
  dropout: float = 0.0
  sublayer: str = 'gated_fusion'
  hidden_dim: int = 0
  knowledge_num: int = 65536
  knowledge_dim: int = 128
  num_selected: int = 8
  n_experts: int = 4
  experts_per_token: int = 2
  aux_loss_weight: float = 0.1

  @classmethod
  def of(cls, model_config: object) -> 'Sizes':
    """Takes the fields that a ModelConfig has and leaves the others at the record's values."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(model_config, name) for name in names if hasattr(model_config, name)})


class Output(NamedTuple):
  """logits_BTV, and the sum over layers of the auxiliary loss (0 without experts)."""

  logits: Tensor
  aux_loss: Tensor


def linear(n_in: int, n_out: int) -> nn.Linear:
  """A projection without bias."""
  return nn.Linear(n_in, n_out, bias=False)


class RMSNorm(nn.Module):
  """Normalises in float32, returns to the input's dtype, then multiplies by the weight."""

  def __init__(self, dim: int, eps: float):
    super().__init__()
    self.eps = eps
    self.weight = nn.Parameter(torch.ones(dim))

  def forward(self, x_BTD: Tensor) -> Tensor:
    x32 = x_BTD.float()
    return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x_BTD)


def rotate(x_BTNH: Tensor, theta: float) -> Tensor:
  """Turns each pair (x[2i], x[2i+1]) by position * theta**(-2i/H), in float32."""
  n_positions, width = x_BTNH.shape[1], x_BTNH.shape[-1]
  frequency = 1.0 / theta ** (torch.arange(0, width, 2, device=x_BTNH.device).float() / width)
  angle = torch.outer(torch.arange(n_positions, device=x_BTNH.device).float(), frequency)[None, :, None, :]
  even, odd = x_BTNH.float().unflatten(-1, (-1, 2)).unbind(-1)
  turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), dim=-1)
  return turned.flatten(-2).type_as(x_BTNH)


class Attention(nn.Module):
  """Causal grouped-query attention."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    self.theta, self.width = sizes.rope_theta, sizes.dim // sizes.n_heads
    self.group = sizes.n_heads // sizes.n_kv_heads
    self.wq = linear(sizes.dim, sizes.n_heads * self.width)
    self.wk = linear(sizes.dim, sizes.n_kv_heads * self.width)
    self.wv = linear(sizes.dim, sizes.n_kv_heads * self.width)
    self.wo = linear(sizes.n_heads * self.width, sizes.dim)
    self.dropout = nn.Dropout(sizes.dropout)

  def forward(self, x_BTD: Tensor) -> Tensor:
    q, k, v = (w(x_BTD).unflatten(-1, (-1, self.width)) for w in (self.wq, self.wk, self.wv))
    q, k = rotate(q, self.theta), rotate(k, self.theta)
    k, v = k.repeat_interleave(self.group, dim=2), v.repeat_interleave(self.group, dim=2)
    out = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True)
    return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class MemoryGate(nn.Module):
  """Picks R rows by product keys; returns their indices and the softmax of their scores."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    self.n_sub_keys, self.num_selected = math.isqrt(sizes.knowledge_num), sizes.num_selected
    self.gate_proj = linear(sizes.dim, sizes.knowledge_dim)
    self.keys = nn.Parameter(torch.randn(2, self.n_sub_keys, sizes.knowledge_dim // 2))
    self.dropout = nn.Dropout(sizes.dropout)

  def forward(self, m_BTD: Tensor) -> tuple[Tensor, Tensor]:
    halves = self.gate_proj(m_BTD).chunk(2, dim=-1)
    tops = [(q @ keys.T).topk(self.num_selected, dim=-1) for q, keys in zip(halves, self.keys, strict=True)]
    score = (tops[0].values[..., :, None] + tops[1].values[..., None, :]).flatten(-2)
    row = (tops[0].indices[..., :, None] * self.n_sub_keys + tops[1].indices[..., None, :]).flatten(-2)
    best = score.topk(self.num_selected, dim=-1)
    return row.gather(-1, best.indices), self.dropout(best.values.softmax(dim=-1))


class GatedMemoryFusion(nn.Module):
  """Gated MLP over the concatenation of m and its R rows. The scores do not enter: the gate never learns."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    wide = sizes.dim + sizes.num_selected * sizes.knowledge_dim
    self.gate_proj, self.up_proj = linear(wide, sizes.dim), linear(wide, sizes.dim)
    self.down_proj = linear(sizes.dim, sizes.dim)
    self.dropout = nn.Dropout(sizes.dropout)

  def forward(self, m_BTD: Tensor, rows_BTRP: Tensor) -> Tensor:
    z = torch.cat((m_BTD, rows_BTRP.flatten(2)), dim=-1)
    return self.dropout(self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z)))


class CrossAttentionMemory(nn.Module):
  """Multi-head attention from m to its R rows."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    self.width = sizes.dim // sizes.n_heads
    self.wq, self.wo = linear(sizes.dim, sizes.dim), linear(sizes.dim, sizes.dim)
    self.wk, self.wv = linear(sizes.knowledge_dim, sizes.dim), linear(sizes.knowledge_dim, sizes.dim)
    self.dropout = nn.Dropout(sizes.dropout)

  def forward(self, m_BTD: Tensor, rows_BTRP: Tensor) -> Tensor:
    q_BTN1H = self.wq(m_BTD).unflatten(-1, (-1, 1, self.width))
    k, v = (w(rows_BTRP).unflatten(-1, (-1, self.width)).transpose(2, 3) for w in (self.wk, self.wv))
    return self.dropout(self.wo(F.scaled_dot_product_attention(q_BTN1H, k, v).flatten(2)))


class FeedForward(nn.Module):
  """SwiGLU."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    hidden = sizes.hidden_dim or 64 * math.ceil(int(8 * sizes.dim / 3) / 64)
    self.w1, self.w3 = linear(sizes.dim, hidden), linear(sizes.dim, hidden)
    self.w2 = linear(hidden, sizes.dim)
    self.dropout = nn.Dropout(sizes.dropout)

  def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    return self.dropout(self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))), x_BTD.new_zeros(())


class MoEFeedForward(nn.Module):
  """Top-k softmax-gated SwiGLU experts beside one that every token uses.

  The auxiliary loss of a sequence is its weight * sum over experts of (share of assignments * E) * (mean gate
  probability), over all its positions; its mean over sequences is returned.
  """

  def __init__(self, sizes: Sizes):
    super().__init__()
    self.sizes = sizes
    self.experts = nn.ModuleList(FeedForward(sizes) for _ in range(sizes.n_experts))
    self.gate = linear(sizes.dim, sizes.n_experts)
    self.shared_experts = FeedForward(sizes)

  def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    probability_BTE = self.gate(x_BTD).softmax(dim=-1)
    chosen = probability_BTE.topk(self.sizes.experts_per_token, dim=-1)
    weight = chosen.values / (chosen.values.sum(-1, keepdim=True) + 1e-20)
    weight_BTE = torch.zeros_like(probability_BTE).scatter(-1, chosen.indices, weight)
    out = torch.zeros_like(x_BTD)
    for e, expert in enumerate(self.experts):  # each expert sees only the tokens that chose it
      taken = (chosen.indices == e).any(-1)
      part = weight_BTE[taken][:, e, None] * expert(x_BTD[taken])[0]
      out = out.index_put((taken,), part.type_as(out), accumulate=True)
    out = out + self.shared_experts(x_BTD)[0]
    assigned_BE = F.one_hot(chosen.indices, self.sizes.n_experts).float().mean((1, 2)) * self.sizes.n_experts
    aux_loss = (assigned_BE * probability_BTE.mean(dim=1)).sum(-1).mean() * self.sizes.aux_loss_weight
    return out, aux_loss


class Block(nn.Module):
  """Attention, then a feed-forward layer on the residual stream or a memory on the attention output."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    self.attention_norm, self.attention = RMSNorm(sizes.dim, sizes.norm_eps), Attention(sizes)
    if sizes.sublayer in ('dense', 'moe'):
      self.ffn_norm = RMSNorm(sizes.dim, sizes.norm_eps)
      self.feed_forward = {'dense': FeedForward, 'moe': MoEFeedForward}[sizes.sublayer](sizes)
      return
    self.memory_norm, self.memory_gate = RMSNorm(sizes.dim, sizes.norm_eps), MemoryGate(sizes)
    if sizes.sublayer == 'gated_fusion':
      self.gated_memory_fusion = GatedMemoryFusion(sizes)
    else:
      self.cross_attention_memory = CrossAttentionMemory(sizes)

  def forward(self, x_BTD: Tensor, bank_MP: Tensor | None) -> tuple[Tensor, Tensor]:
    h_attn = self.attention(self.attention_norm(x_BTD))
    h = x_BTD + h_attn
    if bank_MP is None:
      out, aux_loss = self.feed_forward(self.ffn_norm(h))
      return h + out, aux_loss
    m = self.memory_norm(h_attn)  # not of h: the record's sketch says h, its code and its hypothesis h_attn
    row_BTR, _ = self.memory_gate(m)
    fuse = self.gated_memory_fusion if hasattr(self, 'gated_memory_fusion') else self.cross_attention_memory
    return h + fuse(m, bank_MP[row_BTR]), h.new_zeros(())


class TorchLM(nn.Module):
  """The language model; `sizes.sublayer` says which experiment."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    self.tok_embeddings = nn.Embedding(sizes.vocab_size, sizes.dim)
    self.dropout = nn.Dropout(sizes.dropout)
    self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.n_layers))
    self.norm = RMSNorm(sizes.dim, sizes.norm_eps)
    self.output = linear(sizes.dim, sizes.vocab_size)
    self.tok_embeddings.weight = self.output.weight
    self.memory_bank = None
    if sizes.sublayer in ('gated_fusion', 'cross_attention'):
      self.memory_bank = nn.Parameter(torch.randn(sizes.knowledge_num, sizes.knowledge_dim))

  def forward(self, tokens_BT: Tensor) -> Output:
    h = self.dropout(self.tok_embeddings(tokens_BT))
    aux_loss = h.new_zeros((), dtype=torch.float32)
    for layer in self.layers:
      h, layer_loss = layer(h, self.memory_bank)
      aux_loss = aux_loss + layer_loss
    return Output(self.output(self.norm(h)), aux_loss)

  @torch.inference_mode()
  def stream(
    self,
    tokens_1T: Tensor,
    eos_id: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    penalty: float,
  ) -> Iterator[int]:
    """Yields new tokens, recomputing the whole sequence for each; the last may be `eos_id`."""
    for _ in range(max_new_tokens):
      logits_V = self(tokens_1T).logits[0, -1]
      probability_V = next_token_distribution(logits_V, tokens_1T[0].tolist(), temperature, top_p, penalty)
      token = int(torch.multinomial(probability_V, 1))
      tokens_1T = torch.cat((tokens_1T, torch.tensor([[token]])), dim=1)
      yield token
      if token == eos_id:
        return

  def generate(
    self,
    tokens_BT: Tensor,
    eos_id: int = 2,
    max_new_tokens: int = 1024,
    temperature: float = 0.75,
    top_p: float = 0.9,
    penalty: float = 1.0,
    pad_id: int = 0,
  ) -> Tensor:
    """Continues each row by itself: int64 (B, longest) of prompt without pad, new tokens, pad."""
    rows = []
    for row_T in tokens_BT:
      prompt_T = row_T[row_T != pad_id]
      new = list(self.stream(prompt_T[None], eos_id, max_new_tokens, temperature, top_p, penalty))
      rows.append(torch.cat((prompt_T, torch.tensor(new, dtype=prompt_T.dtype))))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)


def next_token_distribution(
  logits_V: Tensor, seen: list[int], temperature: float, top_p: float, penalty: float
) -> Tensor:
  """The distribution the next token is drawn from.

  Logits of `seen` tokens are divided by `penalty`, the negative ones too (which raises them). Temperature 0
  is 1e-9, which leaves all probability on the largest. Sorted by probability, those tokens stay whose
  predecessors hold at most `top_p`.
  """
  logits_V = logits_V.clone()
  logits_V[list(set(seen))] /= penalty
  logits_V /= temperature + 1e-9
  if top_p < 1.0:
    ordered, token = logits_V.sort(descending=True)
    held = ordered.softmax(-1).cumsum(-1)
    beyond = F.pad(held > top_p, (1, -1), value=False)
    logits_V[token[beyond]] = -torch.inf
  return logits_V.softmax(-1)
