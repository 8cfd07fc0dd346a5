"""Cached generation against recomputing the whole sequence for every token, and what must not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.config.sublayers import SUBLAYERS
from mmjax.inference import generate
from mmjax.inference.generate import Decoder, padded_length
from mmjax.inference.settings import Sampling
from mmjax.run.placement import place_reader
from tests.helpers import build_model, rarely, tiny_config

EOS = 2
PROMPTS = [[5, 9, 200, 31, 7], [EOS, 17], [44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61]]


def make_decoder(sublayer: str = 'gated_fusion', eos_id: int = EOS):
  config = tiny_config(model__sublayer=sublayer)
  graphdef, params = build_model(config)
  return Decoder(config, params, eos_id=eos_id), nnx.merge(graphdef, params)


@pytest.fixture(scope='module')
def decoder():
  return make_decoder()[0]


@functools.cache
def whole_logits(model: nnx.Module):
  return jax.jit(lambda tokens_1T: model.logits(model(tokens_1T).hidden_BTD[0]))


def recompute(model: nnx.Module, prompt: list[int], new_tokens: int, penalty: float = 1.0) -> list[int]:
  """Greedy generation that runs the whole sequence for every token, one row at a time."""
  logits_of = whole_logits(model)
  tokens = np.zeros((1, 64), np.int32)
  tokens[0, : len(prompt)] = prompt
  for at in range(len(prompt), len(prompt) + new_tokens):
    logits_V = np.array(logits_of(jnp.asarray(tokens))[at - 1])
    for token in set(tokens[0, :at].tolist()) - {EOS}:
      logits_V[token] = logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
    tokens[0, at] = logits_V.argmax()
  return tokens[0, len(prompt) : len(prompt) + new_tokens].tolist()


@pytest.mark.parametrize('sublayer', rarely(SUBLAYERS, 'gated_fusion', 'memory_bag'))
@pytest.mark.thorough
def test_greedy_cached_decoding_equals_recomputing_everything(sublayer):
  decoder, model = make_decoder(sublayer)
  for penalty in (1.0, 1.5):
    sampling = Sampling(max_new_tokens=37, temperature=0, repetition_penalty=penalty)
    for prompt, new in zip(PROMPTS, decoder.generate(PROMPTS, sampling), strict=True):
      want = recompute(model, prompt, 37, penalty)
      assert new == (want[: want.index(EOS) + 1] if EOS in want else want)


@pytest.mark.thorough
def test_bfloat16_decoding_follows_float32():
  config = tiny_config()
  _, params = build_model(config)
  placement = place_reader(config, dtype='bfloat16')
  half = Decoder(config, params, eos_id=EOS, placement=placement).generate(PROMPTS, Sampling(8, temperature=0))
  assert [len(row) for row in half] == [8, 8, 8]
  # Rounding may turn the choice between close logits; the first tokens of this seed are not close.
  exact = Decoder(config, params, eos_id=EOS).generate(PROMPTS, Sampling(8, temperature=0))
  assert [row[0] for row in half] == [row[0] for row in exact]


@pytest.mark.thorough
def test_a_row_stops_at_its_eos_and_the_others_go_on(decoder):
  sampling = Sampling(max_new_tokens=40, temperature=0)
  free = decoder.generate(PROMPTS, sampling)
  eos = free[0][20]
  stopping, _ = make_decoder(eos_id=eos)
  for row, whole in zip(stopping.generate(PROMPTS, sampling), free, strict=True):
    assert row == (whole[: whole.index(eos) + 1] if eos in whole else whole)


@pytest.mark.parametrize('new_tokens', rarely([1, 2, 16, 17, 18], 17))
def test_as_many_tokens_as_asked_for_are_made(decoder, new_tokens):
  new = decoder.generate(PROMPTS, Sampling(max_new_tokens=new_tokens, temperature=0))
  assert [len(row) for row in new] == [new_tokens] * 3


@pytest.mark.thorough
def test_streamed_blocks_add_up_to_the_whole(decoder):
  sampling = Sampling(max_new_tokens=40, seed=3)
  blocks = list(decoder.stream(PROMPTS, sampling))
  assert [len(tokens) for tokens in blocks[0]] == [1, 1, 1]
  joined = [sum((block[row] for block in blocks), []) for row in range(len(PROMPTS))]
  assert joined == decoder.generate(PROMPTS, sampling)


def test_the_seed_decides_the_text(decoder):
  one, again, other = (decoder.generate(PROMPTS, Sampling(24, temperature=1, seed=s)) for s in (1, 1, 2))
  assert one == again
  assert one != other


@pytest.mark.thorough
def test_a_row_is_drawn_alike_alone_and_among_others(decoder, monkeypatch):
  sampling = Sampling(max_new_tokens=24, temperature=1)
  together = decoder.generate(PROMPTS, sampling)
  assert decoder.generate(PROMPTS[:1], sampling) == together[:1]
  monkeypatch.setattr(generate, 'MOST_ROWS', 2)  # the third prompt now waits for the first two
  assert decoder.generate(PROMPTS, sampling) == together
  same = decoder.generate([PROMPTS[0]] * 2, sampling)
  assert same[0] != same[1]


@pytest.mark.thorough
def test_penalty_and_seed_sampling_change_what_is_drawn(decoder):
  plain, penalised, seeds = (
    decoder.generate(PROMPTS, Sampling(40, temperature=1, repetition_penalty=p, seed_sampling=s))
    for p, s in ((1.0, False), (3.0, False), (3.0, True))
  )
  assert len({str(plain), str(penalised), str(seeds)}) == 3

  def repeats(rows):
    return sum(len(prompt + row) - len({*prompt, *row}) for prompt, row in zip(PROMPTS, rows, strict=True))

  assert repeats(penalised) < repeats(plain)


@pytest.mark.thorough
def test_new_lengths_and_settings_need_no_new_compilation(monkeypatch):
  traced = []
  original = generate._DecoderSteps.decode

  def decode(steps, params, rows, cache, sampler, n_steps):
    traced.append(1)
    return original(steps, params, rows, cache, sampler, n_steps)

  monkeypatch.setattr(generate._DecoderSteps, 'decode', decode)
  decoder, _ = make_decoder()
  for length, new_tokens, temperature in ((3, 20, 0.5), (9, 22, 0.7), (16, 24, 1.0)):
    decoder.generate([list(range(3, 3 + length))], Sampling(new_tokens, temperature=temperature, top_p=temperature))
  assert len(traced) == 1


@pytest.mark.thorough
def test_ids_without_a_piece_are_never_picked():
  config = tiny_config()
  _, params = build_model(config)
  for settings in ({'temperature': 0}, {'temperature': 5.0, 'top_p': 1.0}):
    sampling = Sampling(20, **settings)
    free, few = (Decoder(config, params, eos_id=EOS, n_ids=n).generate(PROMPTS, sampling) for n in (None, 40))
    assert max(map(max, free)) >= 40 > max(map(max, few))


@pytest.mark.parametrize('length', [1, 15, 16, 17, 100, 511, 512, 513, 5000])
def test_padding_is_at_most_a_fifth(length):
  padded = padded_length(length)
  assert padded >= length
  assert padded == 16 or padded - length < padded / 5


@pytest.mark.thorough
def test_the_eos_that_opens_a_prompt_is_not_penalised(decoder):
  once = decoder.generate([[token] for token in range(4, 24)], Sampling(1, temperature=0))
  token = next(row[0] for row, start in zip(once, range(4, 24), strict=True) if row == [start])  # repeats itself
  stopping, _ = make_decoder(eos_id=token)
  penalised = Sampling(1, temperature=0, repetition_penalty=10)
  assert stopping.generate([[token]], penalised) == [[token]]
  as_seeds = Sampling(1, temperature=0, repetition_penalty=10, seed_sampling=True)
  assert stopping.generate([[token]], as_seeds) != [[token]]
