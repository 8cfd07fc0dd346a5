"""The PyTorch port itself, against the numbers known of the original code."""

import math

import pytest

torch = pytest.importorskip('torch')
from torch.nn import functional as F  # noqa: E402

from tests.torch_reference import Sizes, TorchLM, next_token_distribution  # noqa: E402

TINY = {
  'vocab_size': 64, 'dim': 16, 'n_layers': 2, 'n_heads': 4, 'n_kv_heads': 2, 'knowledge_num': 64,
  'knowledge_dim': 8, 'num_selected': 3, 'hidden_dim': 24,
}  # fmt: skip
SUBLAYERS = ('dense', 'moe', 'gated_fusion', 'cross_attention')


def count(model: torch.nn.Module) -> int:
  return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
  ('sizes', 'n_parameters'),
  [
    (Sizes(), 32_383_488),
    (Sizes(n_kv_heads=2), 31_597_056),
    (Sizes(sublayer='dense'), 25_829_888),
  ],
)
def test_parameter_counts_equal_the_originals(sizes, n_parameters):
  with torch.device('meta'):
    assert count(TorchLM(sizes)) == n_parameters


def test_state_dict_has_the_original_names():
  model = TorchLM(Sizes(**TINY))
  names = {name for name in model.state_dict() if not name.startswith('layers.1.')}
  assert names == {
    'memory_bank', 'tok_embeddings.weight', 'output.weight', 'norm.weight', 'layers.0.attention_norm.weight',
    'layers.0.memory_norm.weight', 'layers.0.memory_gate.keys', 'layers.0.memory_gate.gate_proj.weight',
    *(f'layers.0.attention.{w}.weight' for w in ('wq', 'wk', 'wv', 'wo')),
    *(f'layers.0.gated_memory_fusion.{w}_proj.weight' for w in ('gate', 'up', 'down')),
  }  # fmt: skip


def test_first_loss_is_a_little_above_uniform_at_full_size():
  torch.manual_seed(0)
  model = TorchLM(Sizes(knowledge_num=1024))  # the bank's size does not enter the loss
  tokens_BT = torch.randint(4, 6400, (2, 65))
  logits = model(tokens_BT[:, :-1]).logits
  loss = F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten()).item()
  assert math.log(6400) < loss < 9.1  # 8.76 if uniform; about 8.9 was measured on the original


@pytest.mark.parametrize('sublayer', SUBLAYERS)
def test_every_parameter_but_the_gate_gets_a_gradient(sublayer):
  torch.manual_seed(0)
  model = TorchLM(Sizes(**TINY, sublayer=sublayer))
  logits, aux_loss = model(torch.randint(0, 64, (4, 16)))
  (logits.square().mean() + aux_loss).backward()
  without = {name for name, p in model.named_parameters() if p.grad is None}
  assert without == {name for name, _ in model.named_parameters() if 'memory_gate' in name}


@pytest.mark.parametrize('sublayer', SUBLAYERS)
def test_future_tokens_leave_logits_unchanged(sublayer):
  torch.manual_seed(0)
  model = TorchLM(Sizes(**TINY, sublayer=sublayer)).eval()
  tokens_BT = torch.randint(0, 64, (2, 9))
  changed_BT = tokens_BT.clone()
  changed_BT[:, 5:] = (changed_BT[:, 5:] + 1) % 64
  with torch.no_grad():
    before, after = model(tokens_BT).logits, model(changed_BT).logits
  assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
  assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_moe_equals_each_token_alone():
  torch.manual_seed(0)
  feed_forward = TorchLM(Sizes(**TINY, sublayer='moe')).layers[0].feed_forward
  x_BTD = torch.randn(2, 3, 16)
  out, aux_loss = feed_forward(x_BTD)
  for b in range(2):
    for t in range(3):
      x = x_BTD[b, t]
      probability = (feed_forward.gate.weight @ x).softmax(0)
      first, second = probability.argsort(descending=True)[:2].tolist()
      total = probability[first] + probability[second]
      expected = feed_forward.shared_experts(x)[0]
      expected = expected + probability[first] / total * feed_forward.experts[first](x)[0]
      expected = expected + probability[second] / total * feed_forward.experts[second](x)[0]
      assert torch.allclose(out[b, t], expected, atol=1e-6)
  assert 0.05 < aux_loss.item() < 0.4  # weight 0.1 for each of the 1 that balance gives


def test_top_p_keeps_the_token_that_crosses_the_threshold():
  logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
  assert torch.allclose(
    next_token_distribution(logits, [], 1.0, 0.65, 1.0), torch.tensor([4.0, 0.0, 3.0, 0.0]) / 7, atol=1e-6
  )


def test_penalty_divides_negative_logits_too():
  logits = torch.tensor([-2.0, 1.0])
  expected = torch.tensor([-1.0, 0.5]).softmax(0)
  assert torch.allclose(next_token_distribution(logits, [0, 1, 1], 1.0, 1.0, 2.0), expected, atol=1e-6)


def test_generate_strips_padding_stops_at_eos_and_pads():
  torch.manual_seed(0)
  model = TorchLM(Sizes(**TINY)).eval()
  prompts = torch.tensor([[5, 6, 7], [0, 0, 9]])
  free = model.generate(prompts, eos_id=-1, max_new_tokens=4, temperature=0.0)
  assert free.shape == (2, 7) and free[1, 0] == 9 and free[1, 5:].tolist() == [0, 0]
  with torch.no_grad():
    assert free[0, 3] == model(prompts[:1]).logits[0, -1].argmax()
  stopped = model.generate(prompts[:1], eos_id=int(free[0, 3]), max_new_tokens=4, temperature=0.0)
  assert stopped.tolist() == free[:1, :4].tolist()
