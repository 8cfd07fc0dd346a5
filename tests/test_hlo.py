"""What mmjax/ahead counts in compiled modules, against counts by hand; needs no CUDA plugin."""

from pathlib import Path

import pytest

from mmjax.ahead.cards import CARDS, find_card
from mmjax.ahead.count import bound_seconds, describe_kernels, least_seconds
from mmjax.ahead.estimate import largest_batch, same_update
from mmjax.ahead.kernels import kernels_of
from mmjax.ahead.memory import live_at_peak
from mmjax.errors import UserError
from mmjax.run.hlo import Module

TEXT = Path('tests/module.hlo').read_text()  # written by hand; sizes are small, the form is that of a compiled step


@pytest.fixture(scope='module')
def kernels():
  return {kernel.name: kernel for kernel in kernels_of(Module(TEXT))}


def test_kernels_are_those_started_and_as_often_as_their_loop_turns(kernels):
  in_loop = ['slice', 'cast', 'product', 'updated']
  after = ['gathered', 'narrow', 'scattered', 'attended', 'rare', 'summed', 'few', 'wide', 'out']
  assert list(kernels) == in_loop + after
  assert [kernels[name].runs for name in in_loop] == [10] * 4
  assert {kernels[name].runs for name in after} == {1}
  assert kernels['cast'].loops == ('jit(step)/while',)


@pytest.mark.parametrize(('scope', 'runs'), [('step', 1), ('step/seldom', 0), ('seldom_or_not', 1)])
def test_of_a_loop_of_unknown_length_one_turn_is_counted_or_none_where_it_is_seldom(scope, runs):
  text = TEXT.replace('"jit(step)/while"}, backend_config={"known_trip_count":{"n":"10"}}', f'"jit(f)/{scope}/while"}}')
  counted = {kernel.name: kernel.runs for kernel in kernels_of(Module(text))}
  assert (counted['cast'], counted['out']) == (runs, 1)


ROW = 64 * 32 * 4  # bytes of 64 x 32 float32


@pytest.mark.parametrize(
  ('name', 'kind', 'moved'),
  [
    ('slice', 'copy', 2 * ROW + 4),  # of ten slices one is read
    ('cast', 'cast', ROW + ROW // 2),
    ('product', 'product', 2 * ROW // 2 + 64 * 64 * 2),  # without scratch space
    ('updated', 'copy', 2 * ROW + 4),  # of ten slices one is written, none is read
    ('gathered', 'gather', 2 * ROW + 64 * 4),  # of 1,000 rows 64 are read
    ('scattered', 'scatter', 2 * ROW + ROW // 2 + 64 * 4),  # 64 rows are read and written
    ('attended', 'attention', 4 * 2 * 64 * 4 * 16 * 2 + 2 * 4 * 64 * 4),
    ('out', 'copy', 2 * 1000 * 32 * 4),
  ],
)
def test_bytes_and_kind_are_those_counted_by_hand(kernels, name, kind, moved):
  assert (kernels[name].kind, kernels[name].bytes) == (kind, moved)


def test_products_are_those_counted_by_hand(kernels):
  assert kernels['product'].flops == {'bf16': 2 * 64 * 64 * 32}
  assert kernels['attended'].flops == {'bf16': 4 * 2 * 4 * 64 * 64 * 16 / 2}  # causal
  assert kernels['cast'].flops == {}


def test_collectives_send_what_a_ring_sends(kernels):
  table = 1000 * 32 * 4
  assert kernels['summed'].sends == 2 * 7 / 8 * table
  assert kernels['few'].sends == 2 * 1 / 2 * table
  assert kernels['wide'].sends == 7 * ROW
  assert [kernels[name].target for name in ('summed', 'wide')] == ['all-reduce', 'all-gather']


def test_triton_is_told_from_metadata(kernels):
  assert kernels['rare'].kind == 'triton'
  text = TEXT.replace('metadata={op_name="jit(step)/while"}', 'metadata={op_name="jit(triton_step)/while"}')
  assert sum(kernel.kind == 'triton' for kernel in kernels_of(Module(text))) == 1


def test_line_is_that_of_the_package_that_called(kernels):
  assert kernels['cast'].source == 'mmjax/model/layers.py:45'
  assert kernels['product'].source == 'mmjax/model/layers.py:45'  # matmul.py multiplies for everybody
  assert kernels['gathered'].source == ''


def test_least_time_is_the_longest_of_bytes_products_and_sending(kernels):
  card = CARDS['rtx4090']
  assert least_seconds(kernels['cast'], card) == pytest.approx(10 * 1.5 * ROW / 1.008e12)
  assert least_seconds(kernels['summed'], card) == pytest.approx(2 * 7 / 8 * 128000 / card.link)
  assert bound_seconds(kernels.values(), card) == pytest.approx(
    sum(entry['seconds'] for entry in describe_kernels(list(kernels.values()), card, 1000)['costliest'])
  )


def test_memory_at_the_peak_is_what_lives_then():
  parts = live_at_peak(Module(TEXT))
  state = 10 * ROW + 128000 + 64 * 4 + 2 * 64 * 4 * 16 * 2
  assert parts['state'] == state
  # After the scatter, in its own table's place, nothing else is left but what was gathered, for the all-gather.
  assert sum(parts.values()) - state >= 8 * ROW


def test_largest_batch_is_found_where_memory_is_linear_and_tried_where_it_bends():
  tried = []

  def bent(batch):
    tried.append(batch)
    return 1000 + 10 * batch + max(0, batch - 100)

  batch, peaks = largest_batch(bent, {0: 1000, 64: 1640}, 4100, 8)
  assert batch == 288 and peaks[batch] <= 4100 < bent(296)  # 1000 + 11 * 288 - 100 = 4068
  assert len(tried) <= 5
  assert largest_batch(lambda batch: 5000, {0: 1000, 64: 5000}, 4100, 8)[0] == 0


@pytest.mark.parametrize(
  ('rows', 'most', 'step', 'found'),
  [(512, 328, 1, (256, 2)), (512, 1000, 8, (512, 1)), (96, 40, 8, (32, 3)), (512, 0, 1, None), (30, 7, 4, None)],
)
def test_same_update_divides_its_rows(rows, most, step, found):
  assert same_update(rows, most, step) == found


def test_card_of_a_file_is_the_one_described(tmp_path):
  file = tmp_path / 'card.txtpb'
  file.write_text(CARDS['rtx3090'].description())
  found, card = find_card(str(file)), CARDS['rtx3090']
  assert (found.name, found.memory_bytes, found.bandwidth) == (card.name, card.memory_bytes, card.bandwidth)
  assert found.bf16_rate == pytest.approx(card.bf16_rate, rel=0.02)  # by cores and clock
  assert found.description() == card.description()


@pytest.mark.parametrize('text', ['', 'gpu_device_info { core_count: 82 }', CARDS['l4'].description()[:300]])
def test_file_that_describes_no_card_is_refused(tmp_path, text):
  file = tmp_path / 'card.txtpb'
  file.write_text(text)
  with pytest.raises(UserError, match='card.txtpb'):
    find_card(str(file))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (('core_count: ', 'core_count: x'), 'core_count: x.* must be a number above 0'),
    (('clock_rate_ghz: ', 'clock_rate_ghz: 1.2.'), r'clock_rate_ghz: 1\.2\..* must be a number above 0'),
    (('memory_bandwidth: ', 'memory_bandwidth: -'), 'memory_bandwidth: -.* must be a number above 0'),
    (('major', 'é'), 'the file is not UTF-8 text'),
  ],
)
def test_description_with_a_bad_number_is_refused_in_a_sentence(change, said, tmp_path):
  file = tmp_path / 'card.txtpb'
  file.write_text(CARDS['h100'].description().replace(*change, 1), encoding='latin-1')
  with pytest.raises(UserError, match=said):
    find_card(str(file))


def test_card_is_found_however_its_name_is_spelt():
  assert find_card('RTX 4090') is CARDS['rtx4090'] and find_card('A100-80') is CARDS['a100_80']


def test_unknown_card_names_the_known():
  with pytest.raises(UserError, match='gtx1080.*rtx4090'):
    find_card('gtx1080')
