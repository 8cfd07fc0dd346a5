"""Generation parity with the PyTorch port: greedy continuations token for token, and the distribution drawn from.

`pytest -m slow tests/test_parity_generation.py -s` runs the full sizes of experiment 1.4.2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')

from mmjax.config import Config, load_config  # noqa: E402
from mmjax.inference.generate import Decoder  # noqa: E402
from mmjax.inference.sampling import Sampler, keep_top_p, penalise  # noqa: E402
from mmjax.inference.settings import Sampling  # noqa: E402
from mmjax.model.params import model_graph  # noqa: E402
from mmjax.run.placement import place_reader  # noqa: E402
from tests.helpers import rarely, tiny_config  # noqa: E402
from tests.parity import build_pair, jax_forward, same_selection, to_params, torch_logits  # noqa: E402
from tests.torch_reference import TorchLM, next_token_distribution  # noqa: E402

PAD, EOS = 0, 2
SUBLAYERS = ('dense', 'cross_attention', 'gated_fusion', 'moe')


def random_prompts(config: Config, lengths: list[int], seed: int = 0) -> list[list[int]]:
  rng = np.random.default_rng(seed)
  return [rng.integers(4, config.model.vocab_size, length).tolist() for length in lengths]


def torch_continuations(model: TorchLM, prompts: list[list[int]], n_tokens: int, penalty: float) -> list[list[int]]:
  """Returns the port's greedy continuations, up to and with EOS."""
  rows = [torch.tensor(prompt) for prompt in prompts]
  batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
  whole = model.eval().generate(batch, EOS, n_tokens, temperature=0.0, penalty=penalty)
  new = [row[len(prompt) :][:n_tokens].tolist() for row, prompt in zip(whole, prompts, strict=True)]
  return [row[: row.index(EOS) + 1] if EOS in row else row for row in new]


def lively_pair(config: Config) -> tuple[TorchLM, dict]:
  """Returns both models, with weights so large that they do not just repeat the last token, as fresh ones do."""
  model, _, _ = build_pair(config)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith(('wo.weight', 'down_proj.weight', 'w2.weight')):
        value.mul_(8.0)
  return model, to_params(model, config)


def compare_continuations(
  config: Config, lengths: list[int], n_tokens: int, penalty: float, forgive_ties: bool = False
) -> None:
  """Asserts the same tokens from both models, where wished except for what follows from rows whose scores tie."""
  model, params = lively_pair(config)
  prompts = random_prompts(config, lengths)
  want = torch_continuations(model, prompts, n_tokens, penalty)
  sampling = Sampling(n_tokens, temperature=0.0, repetition_penalty=penalty, seed_sampling=True)
  got = Decoder(config, params, eos_id=EOS).generate(prompts, sampling)
  same = [ours == theirs for ours, theirs in zip(got, want, strict=True)]
  n_compared, n_kinds = sum(map(len, want)), len(set(sum(want, [])))
  print(
    f'{config.model.sublayer}, penalty {penalty}: {n_compared} greedy tokens of {n_kinds} kinds; '
    f'{sum(same)} of {len(same)} rows are the same'
  )
  assert n_kinds > 5
  for prompt, row, is_same in zip(prompts, got, same, strict=True):
    if not is_same:
      assert forgive_ties and row == choices_after_ties(model, params, config, prompt, row, penalty)


def choices_after_ties(
  model: TorchLM, params: dict, config: Config, prompt: list[int], new: list[int], penalty: float
) -> list[int]:
  """Returns the port's choice at every position of a continuation, where it reads mmjax's rows in near ties.

  Fails if there is none.
  """
  tokens_BT = np.array([prompt + new[:-1]], np.int32)
  attention = place_reader(config, dtype='float32').attention  # the decoder's: another rounds otherwise
  _, row_LBTR = jax_forward(model_graph(config), params, tokens_BT, attention=attention)
  with same_selection(model, row_LBTR) as seen:
    logits_TV = torch.from_numpy(torch_logits(model, tokens_BT)[0])
  assert seen['flips'] > 0
  choices = []
  for position in range(len(prompt), len(prompt) + len(new)):
    seen_tokens = tokens_BT[0, :position].tolist()
    choices.append(int(next_token_distribution(logits_TV[position - 1], seen_tokens, 0.0, 1.0, penalty).argmax()))
  return choices


@pytest.mark.parametrize(
  'case', rarely([('gated_fusion', 1.0), *((name, 1.2) for name in SUBLAYERS)], ('gated_fusion', 1.2))
)
def test_greedy_continuations_equal_torch(case):
  sublayer, penalty = case
  compare_continuations(tiny_config(model__sublayer=sublayer), [1, 5, 9], 20, penalty)


@pytest.mark.thorough
def test_continuation_ends_where_torch_ends():
  """Takes a token that the model does make for the end of text."""
  config = tiny_config()
  model, params = lively_pair(config)
  [prompt] = random_prompts(config, [4])
  free = model.eval().generate(torch.tensor([prompt]), -1, 8, temperature=0.0)[0, 4:].tolist()
  eos = free[3]
  want = model.generate(torch.tensor([prompt]), eos, 8, temperature=0.0)[0, 4:].tolist()
  [got] = Decoder(config, params, eos_id=eos).generate([prompt], Sampling(8, temperature=0.0, seed_sampling=True))
  assert got == want == free[: free.index(eos) + 1]


@pytest.mark.parametrize('temperature', [0.5, 1.3])
@pytest.mark.parametrize('top_p', [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize('penalty', [1.0, 1.5])
def test_distribution_equals_torch(temperature, top_p, penalty):
  rng = np.random.default_rng(0)
  logits_BV = rng.normal(size=(4, 50)).astype(np.float32) * 3
  seen = [rng.integers(0, 50, 8).tolist() for _ in range(4)]
  seen_BV = np.zeros((4, 50), bool)
  for row, tokens in enumerate(seen):
    seen_BV[row, tokens] = True
  settings = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=penalty, seed_sampling=True)
  sampler = Sampler.of(settings)

  penalised = penalise(jnp.array(logits_BV), jnp.array(seen_BV), sampler.repetition_penalty, seed_sampling=True)
  got = jax.nn.softmax(keep_top_p(penalised / sampler.temperature, sampler.top_p), axis=-1)

  for row, tokens in enumerate(seen):
    want = next_token_distribution(torch.from_numpy(logits_BV[row]), tokens, temperature, top_p, penalty).numpy()
    np.testing.assert_array_equal(np.asarray(got[row]) > 0, want > 0)  # the same tokens stay
    np.testing.assert_allclose(got[row], want, atol=1e-6)


def test_draws_follow_the_torch_distribution():
  logits_V = np.random.default_rng(1).normal(size=12).astype(np.float32)
  sampling = Sampling(temperature=0.8, top_p=0.8, repetition_penalty=1.3, seed_sampling=True)
  want = next_token_distribution(torch.from_numpy(logits_V), [1, 5], 0.8, 0.8, 1.3).numpy()
  draws = 20_000
  tokens = Sampler.of(sampling).choose(
    jnp.broadcast_to(logits_V, (draws, 12)),
    jnp.zeros((draws, 12), bool).at[:, jnp.array([1, 5])].set(True),
    jax.random.split(jax.random.key(0), draws),
  )
  share = np.bincount(tokens, minlength=12) / draws
  deviation = np.sqrt(want * (1 - want) / draws)
  assert (np.abs(share - want) <= 4.5 * deviation).all()


@pytest.mark.slow
@pytest.mark.parametrize('experiment', ['exp_1_4_2', 'exp_1_4_0'])
def test_full_size_greedy_continuations_equal_torch(experiment):
  config = load_config(f'configs/{experiment}.py')
  compare_continuations(config, [1, 17, 100], 48, 1.0, forgive_ties=True)
  compare_continuations(config, [3, 40], 48, 1.2, forgive_ties=True)
