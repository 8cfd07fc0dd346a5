"""The parameters of a model, a nested dict from their first values to the disk, and the graph that runs with them."""

from flax import nnx

from mmjax.config import Config
from mmjax.memory.types import Params
from mmjax.model.lm import LM

BANK = 'memory_bank'  # the parameter that all layers with a memory read: the bank's name in this dict


def init_params(config: Config) -> Params:
  """Returns the first parameters, float32, a pure function of config.seed; may run under jax.jit."""
  model = LM(config.model, config.memory, rngs=nnx.Rngs(config.seed))
  return nnx.to_pure_dict(nnx.state(model))


def model_graph(config: Config) -> nnx.GraphDef:
  """Returns the graph definition that `nnx.merge` joins with parameters; computes nothing."""
  return build_abstract(config)[0]


def build_abstract(config: Config) -> tuple[nnx.GraphDef, Params]:
  """Returns the graph definition and the shapes of the parameters: all that decides what a model computes from them."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: LM(config.model, config.memory, rngs=nnx.Rngs(0))))
  return graphdef, nnx.to_pure_dict(state)


def abstract_params(config: Config) -> Params:
  """Returns the parameter dict with ShapeDtypeStructs for leaves."""
  return build_abstract(config)[1]


def without_bank(params: Params) -> Params:
  """Returns the dict without the bank."""
  return {name: value for name, value in params.items() if name != BANK}
