"""Runs with a packed bank: rounding against NumPy, reading against the unpacked bank, and what is done with a run."""

import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax.errors import StorageError, UserError
from mmjax.inference.api import LanguageModel
from mmjax.inference.measure import measure_run, open_text
from mmjax.inference.memory_reads import MemoryReader
from mmjax.interop.compress import compress_run
from mmjax.interop.convert import export_run
from mmjax.kernels.bank import bank_bag, bank_lookup
from mmjax.kernels.packed_bank import PackedBank, pack_bank, unpack_bank
from mmjax.memory import GatedFusion, MemoryBag, init_bank
from mmjax.model.cost import count_params
from mmjax.model.params import BANK
from mmjax.report.compare import compare
from mmjax.run.directory import RunDir, open_run
from mmjax.run.log import read_metrics
from mmjax.serve.view import Change, RunView
from mmjax.tools import convert
from mmjax.training.setup import settle_config
from tests.helpers import arrays_of, build_model, rarely, seldom, tiny_config
from tests.serving import MODELS

KINDS = MODELS | {'fusion': {}, 'buckets': {'model__sublayer': 'ngram_bucket', 'model__num_selected': 4}}
KINDS |= {'engram': {'model__sublayer': 'engram_bag', 'memory__n_heads': 2}}
del KINDS['dense']


def make_bank(P: int, M: int = 6) -> np.ndarray:
  """Returns rows of very different sizes, one of them 0."""
  draw = np.random.default_rng(0)
  return (draw.normal(0, 1, (M, P)) * np.array([0, 1e-20, 1e-3, 1, 50, 1e20])[:, None]).astype(np.float32)


def codes_of(bank: PackedBank, bits: int) -> np.ndarray:
  """Reads the integers as the class describes them, value by value."""
  code, (M, P) = np.asarray(bank.code), bank.shape
  if bits == 8:
    return code.astype(int)
  half = -(-P // 2)
  return np.array([[(int(code[i, j % half]) >> (4 * (j // half)) & 15) - 8 for j in range(P)] for i in range(M)])


def test_other_numbers_of_bits_are_refused():
  with pytest.raises(ValueError, match='bits=16 must be one of 8, 4'):
    pack_bank(jnp.ones((4, 8)), 16)


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('P', [8, 48, 37])
def test_values_are_rounded_to_the_nearest_code(P, bits):
  bank_MP = make_bank(P) if bits == 4 else make_bank(P)[3:5]
  packed = pack_bank(jnp.asarray(bank_MP), bits)
  found_MP, scale = np.asarray(unpack_bank(packed)), np.asarray(packed.scale).astype(np.float64)
  if bits == 8:
    np.testing.assert_allclose(scale[0], np.abs(bank_MP).max(0) / 127, rtol=1e-6)
    expected, scale = np.round(bank_MP / scale), np.broadcast_to(scale, bank_MP.shape)
    assert packed.nbytes == bank_MP.size + 4 * P and (np.abs(found_MP - bank_MP) <= 0.5001 * scale).all()
  else:
    groups = [bank_MP[:, start : start + 32] for start in range(0, P, 32)]
    largest = [[part[i, np.abs(part[i]).argmax()] for part in groups] for i in range(len(bank_MP))]
    np.testing.assert_allclose(scale, np.array(largest) / -8, rtol=2**-8)
    scale = np.repeat(scale, 32, axis=1)[:, :P]
    expected = np.clip(np.round(bank_MP / np.where(scale, scale, 1)), -8, 7)
    off = np.abs(found_MP - bank_MP) / np.where(scale, np.abs(scale), 1)
    assert (off <= 1.04).all() and (off[np.abs(expected) < 7] <= 0.5001).all()
    assert packed.nbytes == len(bank_MP) * (-(-P // 2) + 2 * len(groups))
  np.testing.assert_array_equal(codes_of(packed, bits), expected)
  np.testing.assert_allclose(found_MP, expected * scale, rtol=1e-6)


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('kind', rarely([GatedFusion, MemoryBag], MemoryBag))
def test_gradients_through_a_packed_bank_are_those_through_the_unpacked_one(kind, bits):
  memory = kind(dim=8, n_rows=16, row_dim=40, n_heads=2, rows_per_head=2)
  packed = pack_bank(init_bank(jax.random.key(1), n_rows=16, row_dim=40), bits)
  x_BTD = jax.random.normal(jax.random.key(2), (2, 3, 8))

  def loss(params, x_BTD, bank_MP):
    out = memory.apply(params, x_BTD, bank_MP)
    return jnp.sum(out.delta_BTD**2) + out.aux_loss

  params = memory.init(jax.random.key(0))
  found = [jax.jit(jax.grad(loss, (0, 1)))(params, x_BTD, bank) for bank in (packed, unpack_bank(packed))]
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), *found)
  assert jnp.abs(found[0][0]['gate']['keys']).max() > 0


@pytest.mark.parametrize('bits', [8, 4])
def test_packed_rows_are_read_as_the_unpacked_ones(bits):
  packed, draw = pack_bank(jnp.asarray(make_bank(40)[:5]), bits), np.random.default_rng(1)
  row, weight = (jnp.asarray(x) for x in (draw.integers(0, 5, (2, 3, 2, 4)), draw.normal(size=(2, 3, 2, 4))))
  for bank in (packed, unpack_bank(packed)):
    assert bank.shape == (5, 40)
  read = [jax.jit(bank_lookup, static_argnums=2)(b, row, 'float32') for b in (packed, unpack_bank(packed))]
  np.testing.assert_array_equal(*read)
  sums = [jax.jit(bank_bag)(b, row, weight.astype('float32')) for b in (packed, unpack_bank(packed))]
  np.testing.assert_allclose(*sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', seldom(KINDS, 'mixed', 'fusion', 'buckets'))
def test_every_memory_computes_the_same_from_packed_and_unpacked_rows(name):
  config = tiny_config(**KINDS[name])
  params = build_model(config)[1]
  packed = pack_bank(params[BANK], 4)
  lms = [LanguageModel(config, None, params | {BANK: bank}) for bank in (packed, unpack_bank(packed), params[BANK])]
  tokens = np.random.default_rng(0).integers(0, 300, (2, 16))
  ours, same, other = (np.asarray(lm.logits(tokens)) for lm in lms)
  np.testing.assert_allclose(ours, same, atol=1e-5)
  assert np.abs(ours - other).max() > 1e-4
  prompt = [tokens[0].tolist()]
  assert lms[0].generate_tokens(prompt, max_new_tokens=20) == lms[1].generate_tokens(prompt, max_new_tokens=20)
  assert len({count_params(lm.params) for lm in lms}) == 1


@pytest.fixture(scope='module')
def small(tiny_run, tmp_path_factory):
  """A run of fewer bits; do not write into it."""
  out = tmp_path_factory.mktemp('small') / 'run'
  compress_run(tiny_run, out, 8, 'best')
  return out


@pytest.mark.thorough
def test_a_compressed_run_is_evaluated_sampled_and_looked_into(small, tiny_run):
  run, lm = open_run(small), mmjax.load(small)
  assert isinstance(lm.params[BANK], PackedBank)
  found = measure_run(lm, run, open_text(lm.config, run))
  expected = read_metrics(small / 'metrics.jsonl')[-1]
  assert expected['step'] == found['checkpoint']
  assert found['loss'] == pytest.approx(expected['loss'], abs=1e-3) and found['loss'] != expected['loss']
  for name in ('loss', 'loss_zeroed', 'loss_shuffled'):
    assert found['probes'][name] == pytest.approx(expected['probes'][name], abs=1e-3)
  assert all(reader['loss_zeroed'] != found['probes']['loss'] for reader in found['bank'])
  assert len(lm.generate('the memory', max_new_tokens=5)) == 1
  row = MemoryReader(lm).read_row(3, open_text(lm.config, run))
  assert len(row['layers']) == 2
  view, said = RunView(lm, run), f'The bank has 8 bits a value. It was compressed from step {lm.step} of {tiny_run};'
  assert view.remarks[0].startswith(said)
  assert view.describe()['parameters'] == sum(x.size for x in arrays_of(tiny_run, lm.step).values())
  without = view.changed([Change(3, 0.0)]).params[BANK]
  assert not without[3].any()
  np.testing.assert_array_equal(np.delete(without, 3, 0), np.delete(lm.bank_MP, 3, 0))


def test_what_a_compressed_run_is_not_for_is_refused(small, tiny_run, tmp_path):
  config = RunDir(small).read_config()
  for what, call in {
    'trained': lambda: settle_config(RunDir(small), config, False),
    'trained on': lambda: settle_config(RunDir(tmp_path / 'new'), config, False, str(small)),
    'exported': lambda: export_run(small, tmp_path / 'model.safetensors', 'best', None),
    'compressed again': lambda: compress_run(small, tmp_path / 'smaller', 4, 'best'),
    'compared': lambda: compare([small], tmp_path / 'compared'),
    'read without the rows that it taught': lambda: mmjax.load(small, without_taught=True),
  }.items():
    said = f'{small} cannot be {what}: its bank has 8 bits a value; use the run it was made from, {tiny_run}'
    with pytest.raises(UserError, match=f'^{said}$'):
      call()
  with pytest.raises(UserError, match='already exists'):
    compress_run(tiny_run, small, 4, 'best')
  assert not (tmp_path / 'smaller').exists()


@pytest.mark.parametrize('damage', ['codes', 'settings'])
def test_damage_of_a_compressed_run_is_refused(small, damage, tmp_path, capfd):
  run = shutil.copytree(small, tmp_path / 'run')
  if damage == 'settings':
    path = run / 'compressed.json'
    path.write_text(path.read_text().replace('8', '4'))
    with pytest.raises(UserError, match='compressed.json was changed after it was written'):
      mmjax.load(run)
    return
  path = max(run.glob('checkpoints/*/params/**/d/*'), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)
  with pytest.raises(StorageError, match='no whole checkpoint is left'):
    mmjax.load(run)
  assert 'corrupt' in capfd.readouterr().err


def test_command_says_what_was_saved(tiny_run, tmp_path, monkeypatch, capsys):
  out = str(tmp_path / 'run4')
  monkeypatch.setattr(sys, 'argv', ['convert', 'compress', '--workdir', str(tiny_run), '--bits', '4', '--out', out])
  convert.main()
  assert 'Bytes of the bank: 2,048 -> 384, 5.33 times smaller' in capsys.readouterr().out
  assert mmjax.load(out).params[BANK].code.dtype == jnp.uint8


@pytest.mark.parametrize('bits', [8, 4])
def test_reading_does_not_unpack_the_bank(bits):
  packed = pack_bank(jnp.ones((4096, 40)), bits)
  row, weight = jnp.zeros((2, 8, 2, 4), jnp.int32), jnp.ones((2, 8, 2, 4))
  for compiled in (
    jax.jit(bank_lookup, static_argnums=2).lower(packed, row, 'float32').compile(),
    jax.jit(bank_bag).lower(packed, row, weight).compile(),
  ):
    assert compiled.memory_analysis().temp_size_in_bytes < packed.nbytes / 2
