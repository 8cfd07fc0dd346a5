"""A feed-forward run as a directory that transformers' LlamaForCausalLM, and the tools built on it, load.

The two models differ in one thing: a Llama rotates the first half of a head's channels with the second half, mmjax each
channel with its neighbour. So the rows of the query and key matrices change places; the products of queries and keys
stay what they are. The tokenizer: mmjax/interop/llama_tokenizer.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.config import Config, ModelConfig, flatten
from mmjax.data.tokenizer import Tokenizer
from mmjax.errors import UserError
from mmjax.files import removed_unless_whole, storage_errors, write_file, write_json
from mmjax.interop.convert import read_weights
from mmjax.interop.files import write_tensors
from mmjax.interop.llama_tokenizer import as_tokenizer_json, tokenizer_settings
from mmjax.interop.names import not_in_pytorch
from mmjax.run.directory import open_run, refuse_used

ROOT = {'tok_embeddings': 'embed_tokens', 'norm': 'norm'}
BLOCK = {
  'attention_norm': 'input_layernorm',
  'attention.wq': 'self_attn.q_proj',
  'attention.wk': 'self_attn.k_proj',
  'attention.wv': 'self_attn.v_proj',
  'attention.wo': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'feed_forward.w1': 'mlp.gate_proj',
  'feed_forward.w3': 'mlp.up_proj',
  'feed_forward.w2': 'mlp.down_proj',
}
ROTATED = ('attention.wq', 'attention.wk')
USUAL = {  # settings that a Llama has, and what it does
  'model.sublayer': ('dense', 'has one SwiGLU layer after attention, and neither a memory nor experts'),
  'model.qk_norm': (False, 'does not norm queries and keys'),
  'model.value_embeddings': ('', 'takes the values of attention from the stream alone'),
  'memory.value_layers': ('', 'takes the values of attention from the stream alone'),
}
WEIGHTS = 'model.safetensors'  # written last


def export_llama(workdir: Path, target: Path, which: str, dtype: str | None) -> None:
  """Writes a feed-forward run as config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

  Args:
    workdir: run directory.
    target: new directory, or an empty one.
    which: 'best', 'last' or the number of a step.
    dtype: of the weights, one of EXPORT_DTYPES; None keeps float32.

  Raises:
    UserError: if there is no such run, its model is no Llama, no tokenizer.json cuts as its tokenizer does, a value
      is too large for `dtype`, or `target` is there already.
  """
  refuse_used(target, '--to', 'config.json', WEIGHTS)
  run = open_run(workdir, needs_tokenizer=False)
  config = run.read_config()
  _refuse_other_models(config)
  assert not not_in_pytorch(config), 'the names below are those of the PyTorch code'
  tokenizer = run.load_tokenizer(config.model.vocab_size) if run.tokenizer_path.exists() else None
  start_id = tokenizer.start_id(config.data.layout) if tokenizer else None
  backend = as_tokenizer_json(tokenizer, start_id) if tokenizer else None
  tensors, step, _ = read_weights(run, config, which, dtype)

  with storage_errors(target):
    target.mkdir(parents=True, exist_ok=True)
  with removed_unless_whole(target, WEIGHTS):
    write_json(target / 'config.json', llama_config(config.model, tokenizer, start_id, dtype or 'float32'))
    if backend:
      write_file(target / 'tokenizer.json', backend.to_str(pretty=True))
      settings = tokenizer_settings(tokenizer, backend, start_id, config.model.max_seq_len)
      write_json(target / 'tokenizer_config.json', settings)
    write_tensors(target / WEIGHTS, llama_tensors(tensors, config.model), {'format': 'pt'})
  print(f'{target}: a Llama of {dtype or "float32"} from step {step} of {workdir}')
  print(f"Load: transformers.AutoModelForCausalLM.from_pretrained('{target}')")
  if not tokenizer:
    print('The run has no tokenizer, so the directory holds none')


def llama_tensors(tensors: Mapping[str, np.ndarray], model: ModelConfig) -> dict[str, np.ndarray]:
  """Returns a feed-forward model's floating tensors, named as in the PyTorch code, as a Llama has them; dtypes stay."""
  found = {f'model.{theirs}.weight': tensors[f'{name}.weight'] for name, theirs in ROOT.items()}
  for layer in range(model.n_layers):
    for name, theirs in BLOCK.items():
      value = tensors[f'layers.{layer}.{name}.weight']
      if name in ROTATED:  # neighbours (x0, y0, x1, y1, ...) -> halves (x0, x1, ..., y0, y1, ...) of each head
        value = value.reshape(-1, model.head_dim // 2, 2, model.dim).swapaxes(1, 2).reshape(value.shape)
      found[f'model.layers.{layer}.{theirs}.weight'] = value
  return found


def llama_config(model: ModelConfig, tokenizer: Tokenizer | None, start_id: int | None, dtype: str) -> dict[str, Any]:
  """Returns what config.json holds; of two names of a setting the first is that of transformers before version 5."""
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': model.vocab_size,
    'hidden_size': model.dim,
    'intermediate_size': model.dense_hidden_dim,
    'num_hidden_layers': model.n_layers,
    'num_attention_heads': model.n_heads,
    'num_key_value_heads': model.n_kv_heads,
    'head_dim': model.head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': model.max_seq_len,
    'rms_norm_eps': model.norm_eps,
    'rope_theta': model.rope_theta,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': model.rope_theta},
    'attention_bias': False,
    'mlp_bias': False,
    'tie_word_embeddings': True,
    'torch_dtype': dtype,
    'dtype': dtype,
    'bos_token_id': start_id,
    'eos_token_id': tokenizer and tokenizer.eos_id,
    'pad_token_id': tokenizer and tokenizer.pad_id,
  }


def _refuse_other_models(config: Config) -> None:
  settings = flatten(config.to_dict())
  for name, (usual, does) in USUAL.items():
    if (value := settings[name]) != usual:
      raise UserError(f'{name}={value!r} cannot be written as a Llama, which {does}; leave --format llama out')
