"""NVIDIA cards, as the compiler needs them described and as time is counted by.

Memory, bandwidth and rates are from the makers' datasheets, dense and summed in float32; the H100's are what large
copies and products were reported to reach on one, 10 and 19 % below its datasheet. Shared memory and threads are those
of the CUDA programming guide's table by compute capability. A description is facts in the form that XLA reads.
"""

import contextlib
import dataclasses
import math
import re

from mmjax.config import user_path
from mmjax.errors import UserError
from mmjax.run.nvidia import BF16_PEAKS as PEAK

# By compute capability: shared memory of a multiprocessor in KiB, its threads, its float32 units.
CORES = {
  '7.5': (64, 1024, 64),
  '8.0': (164, 2048, 64),
  '8.6': (100, 1536, 128),
  '8.9': (100, 1536, 128),
  '9.0': (228, 2048, 128),
  '10.0': (228, 2048, 128),
  '12.0': (100, 1536, 128),
}


@dataclasses.dataclass(frozen=True)
class Card:
  """What is known of a card.

  Attributes:
    name: what JAX calls it.
    capability: compute capability, '8.9'.
    cores: multiprocessors.
    clock_ghz: of them, boosted.
    memory_bytes: of the device.
    bandwidth: of its memory, bytes a second.
    bf16_rate: of bfloat16 products summed in float32, FLOP/s, dense; 0: it has none.
    l2_bytes: cache that all multiprocessors share.
    link: what it can send to others like it, bytes a second, in one direction.
    text: a description for the compiler that is used as it is; '': made from the other fields.
  """

  name: str
  capability: str
  cores: int
  clock_ghz: float
  memory_bytes: int
  bandwidth: float
  bf16_rate: float
  l2_bytes: int
  link: float
  text: str = ''

  @property
  def peak_rate(self) -> float:
    """The rate that shares of peak are of: that of bfloat16 products, where there is none of float32's."""
    return self.bf16_rate or self.rate('f32')

  def rate(self, dtype: str) -> float:
    """Returns the rate of products in 'bf16', 'tf32' (half of it) or 'f32' (without tensor cores), FLOP/s."""
    if dtype == 'f32' or not self.bf16_rate:
      return 2e9 * self.cores * CORES[self.capability][2] * self.clock_ghz
    return self.bf16_rate / (2 if dtype == 'tf32' else 1)

  def description(self) -> str:
    """Returns the GpuTargetConfigProto, in text form, that the compiler is told."""
    if self.text:
      return self.text
    major, minor = self.capability.split('.')
    shared_kib, threads, units = CORES[self.capability]
    return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {(shared_kib - (1 if major != '7' else 0)) << 10}
  shared_memory_per_core: {shared_kib << 10}
  threads_per_core_limit: {threads}
  core_count: {self.cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.name}"
"""


MIB = 1 << 20
CARDS = {
  'rtx3060': Card('NVIDIA GeForce RTX 3060', '8.6', 28, 1.777, 12042 * MIB, 360e9, PEAK['RTX 3060'], 3 * MIB, 16e9),
  'rtx3090': Card('NVIDIA GeForce RTX 3090', '8.6', 82, 1.695, 25438126080, 936e9, PEAK['RTX 3090'], 6 * MIB, 56e9),
  'rtx4070': Card('NVIDIA GeForce RTX 4070', '8.9', 46, 2.475, 12001 * MIB, 504e9, PEAK['RTX 4070'], 36 * MIB, 32e9),
  'rtx4090': Card('NVIDIA GeForce RTX 4090', '8.9', 128, 2.52, 25393692672, 1.008e12, PEAK['RTX 4090'], 72 * MIB, 32e9),
  'rtx5090': Card(
    'NVIDIA GeForce RTX 5090', '12.0', 170, 2.407, 33666564096, 1.792e12, PEAK['RTX 5090'], 96 * MIB, 64e9
  ),
  'a100_40': Card('NVIDIA A100-SXM4-40GB', '8.0', 108, 1.41, 42331013120, 1.555e12, PEAK['A100'], 40 * MIB, 300e9),
  'a100_80': Card('NVIDIA A100-SXM4-80GB', '8.0', 108, 1.41, 85100068864, 2.039e12, PEAK['A100'], 40 * MIB, 300e9),
  'l4': Card('NVIDIA L4', '8.9', 58, 2.04, 23609475072, 300e9, PEAK['L4'], 48 * MIB, 32e9),
  't4': Card('Tesla T4', '7.5', 40, 1.59, 15109 * MIB, 320e9, 0.0, 4 * MIB, 16e9),
  'h100': Card('NVIDIA H100 80GB HBM3', '9.0', 132, 1.98, 84942979072, 3.0e12, 798e12, 50 * MIB, 450e9),
  'h200': Card('NVIDIA H200', '9.0', 132, 1.98, 150754820096, 4.8e12, PEAK['H200'], 60 * MIB, 450e9),
  'b200': Card('NVIDIA B200', '10.0', 148, 1.965, 191514411008, 7.672e12, PEAK['B200'], 126 * MIB, 900e9),
}


def find_card(name: str) -> Card:
  """Returns the card of this name, or the one that a file describes.

  Raises:
    UserError: if there is no such card or file, or the file does not say what is needed.
  """
  key = re.sub(r'[^a-z0-9]', '', name.lower())  # 'RTX 4090' is rtx4090, 'A100-80' a100_80
  if found := next((card for known, card in CARDS.items() if known.replace('_', '') == key), None):
    return found
  path = user_path(name)
  if not path.is_file():
    several = '; several at once need --markdown' if ',' in name else ''
    raise UserError(f'--gpu={name} must be one of {", ".join(CARDS)}, or a file that describes a card{several}')
  try:
    text = path.read_text(encoding='utf-8')
  except ValueError:
    raise UserError(f'--gpu={name}: the file is not UTF-8 text') from None

  def number(field: str) -> float:
    found = re.search(rf'\b{field}: *([^\s}}]+)', text)
    if not found:
      raise UserError(f'--gpu={name}: the file does not say {field}')
    with contextlib.suppress(ValueError):
      if 0 < (value := float(found[1])) < math.inf:
        return value
    raise UserError(f'--gpu={name}: {field}: {found[1][:40]} must be a number above 0')

  major = int(number('major'))
  minor = re.search(r'cuda_compute_capability *\{[^}]*minor: *(\d+)', text)
  capability, cores = f'{major}.{minor[1] if minor else 0}', int(number('core_count'))
  clock = number('clock_rate_ghz')
  like = next((card for card in CARDS.values() if card.capability == capability), None)
  if not like:
    raise UserError(f'--gpu={name}: compute capability {capability} is none of {", ".join(CORES)}')
  return Card(
    (re.search(r'device_description_str: *"([^"]*)"', text) or ['', path.stem])[1],
    capability,
    cores,
    clock,
    int(number('device_memory_size')),
    number('memory_bandwidth'),
    like.bf16_rate * cores * clock / like.cores / like.clock_ghz,
    int(number('l2_cache_size')),
    like.link,
    text,
  )
