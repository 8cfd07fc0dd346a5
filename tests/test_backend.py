"""No Triton and no Pallas in a step lowered for CUDA, which needs no GPU; compiler options by device."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from mmjax.config.sublayers import SUBLAYERS
from mmjax.kernels.forms import traced_for
from mmjax.run.nvidia import TRITON, count_triton
from mmjax.run.placement import compiler_options
from tests.helpers import make_step, random_batch, rarely, tiny_config


def lowered_for_cuda(function, *inputs) -> str:
  with traced_for('cuda'):
    return jax.jit(function).trace(*inputs).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize(
  'sublayer',
  rarely(SUBLAYERS, 'gated_fusion'),
)
def test_step_lowered_for_cuda_has_no_triton_and_no_pallas(sublayer):
  config = tiny_config(model__sublayer=sublayer, model__n_layers=1, train__dtype='bfloat16')
  step, first = make_step(config)  # with attention by XLA, because cuDNN cannot be lowered where there is none
  text = lowered_for_cuda(step, jax.eval_shape(first), random_batch(config))
  assert 'stablehlo.dot_general' in text and not TRITON.search(text)


def test_pallas_kernel_lowered_for_cuda_is_found():
  def double(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2

  x = jnp.ones((128, 128))
  card = AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')  # JAX 0.11.2 asks what it lowers for
  with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
    text = lowered_for_cuda(lambda x: pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x), x)
  assert TRITON.search(text)


@pytest.mark.parametrize(
  'line',
  [
    '%r = stablehlo.custom_call @__gpu$xla.gpu.triton(%0)',
    'ROOT %f = f32[8] fusion(%p), kind=kCustom, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}',
  ],
)
def test_triton_call_is_found(line):
  assert TRITON.search(line)


def test_calls_of_triton_are_counted_by_lines_whatever_the_source_is_called():
  fusion = 'fusion(%p), calls=%triton_softmax, backend_config={"kind":"__triton"}'
  named = '1 "test_step_calls_no_triton"\n  %g = f32[8] add(%f, %f), metadata={op_name="jit(no_triton)/add"}'
  assert count_triton(f'HloModule step\n{named}\n  %f = f32[8] {fusion}\n  %h = {fusion}') == 2


@pytest.mark.parametrize('platform', ['gpu', 'cuda'])
@pytest.mark.parametrize('wanted', [True, False])
def test_triton_gemm_sets_the_compiler_option_on_nvidia(platform, wanted):
  config = tiny_config(runtime__triton_gemm=wanted)
  options = compiler_options(config, platform)
  assert options['xla_gpu_enable_triton_gemm'] == wanted
  assert ('triton' in options.get('xla_disable_hlo_passes', '')) != wanted
  # XLA refuses names that it does not know, on every platform.
  jax.jit(lambda x: x + 1).lower(1).compile(options)


@pytest.mark.parametrize('platform', ['cpu', 'tpu', 'rocm'])
def test_triton_gemm_sets_nothing_elsewhere(platform):
  assert compiler_options(tiny_config(), platform) == {}
