"""What training minimises and evaluation measures of a batch; it runs the model of mmjax/model/lm.py, which is next."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from mmjax.config import Config
from mmjax.data.loader import PADDING
from mmjax.kernels.bank import BankShard, Reads, TappedBank, sum_by_row
from mmjax.kernels.cross_entropy import cross_entropy_sums, fitting_chunk
from mmjax.model.lm import LM, BankOfReader, Output
from mmjax.model.params import Params
from mmjax.run.sharding import ROW_AXIS


def make_loss(
  config: Config, graphdef: nnx.GraphDef, attention: str, probe: Callable | None = None, mesh: Mesh | None = None
) -> Callable[..., tuple[Array, dict[str, Array]]]:
  """Returns objective(params, rows, total_weight, key, taps=None) -> (what training minimises, parts).

  `rows` holds `input`, `target` and `segment`, int32 (B, T). The parts are `loss`, the sum of the negative
  log-likelihoods of the targets that are not PADDING, in nats, over `total_weight`; `accuracy`, their hits over
  `total_weight`; `aux_loss`, of the sublayers; and in memory models `usage_LM`, how often each reader of the bank read
  each row, and what `probe(output, weight_BT)` gives. Summed over an update's micro-batches they are those of one big
  batch. The objective is loss + aux_loss.

  With `taps`, from `no_taps`, which collect gradients of single reads, the bank itself gets no gradient, and the parts
  also hold the rows that were read, `row_LBTR`.

  With `mesh` it runs inside `jax.shard_map` on the rows of one device, and the sum over devices is that of all rows.
  """
  shares = config.train.accumulation_steps * (mesh.size if mesh else 1)

  def objective(
    params: Params, rows: dict[str, Array], total_weight: Array, key: Array | None, taps: list[Reads] | None = None
  ) -> tuple[Array, dict[str, Array]]:
    bank = _bank_of_reader(taps, mesh)
    model, out = run_model(config, graphdef, attention, params, rows, dropout_key=key, bank_of_reader=bank)
    weight_BT = (rows['target'] != PADDING).astype(jnp.float32)
    chunk = fitting_chunk(len(rows['target']), config.model.vocab_size, rows['target'].shape[1])
    with jax.named_scope('loss'):
      nll, correct = cross_entropy_sums(out.hidden_BTD, model.embedding[...], rows['target'], weight_BT, chunk)
    parts = {'loss': nll / total_weight, 'accuracy': correct / total_weight, 'aux_loss': out.aux_loss / shares}
    if out.row_LBTR is not None:
      read_LBTR = jnp.broadcast_to((weight_BT > 0)[None, :, :, None], out.row_LBTR.shape).astype(jnp.int32)
      parts['usage_LM'] = sum_by_row(out.row_LBTR, read_LBTR, config.model.knowledge_num)
      parts |= probe(out, weight_BT) if probe else {}
    if taps is not None:
      parts['row_LBTR'] = out.row_LBTR
    return parts['loss'] + parts['aux_loss'], parts

  return objective


def run_model(
  config: Config, graphdef: nnx.GraphDef, attention: str, params: Params, rows: dict[str, Array], **more
) -> tuple[LM, Output]:
  """Returns the model and what it makes of `input` and `segment`, int32 (B, T); `more` of the keywords of its call."""
  model = nnx.merge(graphdef, params)
  out = model(
    rows['input'],
    rows['segment'] if config.data.isolate_documents else None,
    dtype=jnp.dtype(config.train.dtype),
    attention=attention,
    remat=config.runtime.remat,
    **more,
  )
  return model, out


def _bank_of_reader(taps: list[Reads] | None, mesh: Mesh | None) -> BankOfReader | None:
  """Returns what is read instead of the whole bank: one whose reads are tapped, or a part of it."""
  if taps is not None:
    return lambda reader, bank_MP: TappedBank(bank_MP, taps[reader])
  return (lambda _, part_MP: BankShard(part_MP, ROW_AXIS)) if mesh and mesh.shape[ROW_AXIS] > 1 else None
