"""Every setting of a run, with its default and its meaning. An experiment imports this and states only what differs.

A setting that would do nothing in a run is refused, unless it is at its default.

The defaults are those of experiment 1.4.2 in the record, the log of the original PyTorch experiments. Where the record
says nothing, they are the defaults of the code that it ran. Sizes are in tokens, rows or values unless the name says
otherwise. The list below is what `python -m mmjax.config` prints of mmjax/config/schema.py, which also has ranges and
choices.

experiment = 'base'  # the run's name; its work directory is out/<experiment> unless --workdir says otherwise
seed = 0  # initial weights, dropout and the order of rows

model.vocab_size = 6400  # V: pieces of a tokenizer that is trained; a given tokenizer may have fewer
model.dim = 512  # D: width of the residual stream
model.n_layers = 8
model.n_heads = 32  # N: query heads, each dim / n_heads wide
model.n_kv_heads = 8  # K: key and value heads; the record names none, and 8 gives its parameter count
model.max_seq_len = 512  # T: positions in a row
model.norm_eps = 1e-05
model.rope_theta = 1000000.0
model.dropout = 0.0  # drops values of the embedding and of what each sublayer adds, but no attention weights
model.qk_norm = False  # True: each head's queries and keys pass an RMSNorm with a learned scale
model.value_embeddings = ''  # layers whose values get an embedding of the token: '1,3', 'all', 'alternate'; '': none
model.sublayer = 'gated_fusion'  # what follows attention: a row of mmjax/config/sublayers.py
model.hidden_dim = 0  # F of the dense sublayer and of each expert; 0: 64 * ceil(int(8 * dim / 3) / 64)
model.knowledge_num = 65536  # M: rows of the bank; a square with product keys (sqrt(M) sub-keys in each half)
model.knowledge_dim = 128  # P: width of a row; even, if it is also that of queries
model.num_selected = 8  # rows that each head of a memory reads for a token
model.n_experts = 4  # E: routed experts of the 'moe' sublayer
model.experts_per_token = 2  # routed experts that a token uses; a shared one comes on top
model.aux_loss_weight = 0.1  # weight of the experts' load-balance loss

memory.layers = 'all'  # layers with a memory: also 'middle' (all but the first and last quarter), '2,3'; 0 is first
memory.ngram_layers = ''  # those of memory.layers with an 'ngram_bag' instead of a gate: '1,3'; '': none
memory.value_layers = ''  # layers whose values get rows of n-grams: '1,3', 'all', 'alternate'; '': none
memory.input = 'attention'  # the memory reads what attention added; 'residual': it reads the residual stream
memory.n_heads = 1  # 1 to 64; each has queries and sub-keys, or hashes, of its own; all read the one bank
memory.ngrams = '1'  # how many of the last tokens address a row or bucket; '2,3': heads take turns
memory.ngram_ranges = 'shared'  # 'own': each head has a range of rows to itself; single tokens need no hash in it
memory.ngram_signs = False  # True: a second hash of an n-gram flips signs in what its rows give
memory.row_dropout = 0.0  # probability that training drops what a head read; the rest is scaled up
memory.scores = 'none'  # 'scale' multiplies rows by their weights, so that the gate learns; a 'memory_bag' always does
memory.score_activation = 'softmax'  # makes weights of the scores of a head's rows; also 'relu'
memory.query_key_norm = 'none'  # 'l2': halves of queries and sub-keys have length 1, and scores have a learned scale
memory.key_dim = 0  # width of a query, which is two sub-keys, or in an 'ngram_bucket' one key; even; 0: knowledge_dim
memory.bag_gate = True  # multiplies a bag's sums by silu(m Wu) before their projection; False: does not
memory.ffn_dim = 0  # F of a feed-forward layer next to each memory; 0: none
memory.selection_bias = False  # True: learned biases, used only to choose rows, even out how often rows are read
memory.bank_init = 'normal'  # first values of the bank: 'normal' draws them with bank_std, 'file' reads bank_file
memory.bank_file = ''  # made by python -m mmjax.tools.bank build
memory.knowledge_length = 32  # tokens in a snippet of text that becomes a row of a bank file
memory.bank_std = 1.0  # standard deviation of the bank's first values; also of those in a bank file that is built
memory.bank_lr_multiplier = 1.0  # factor of the bank's learning rate at the first update
memory.bank_lr_final_multiplier = 1.0  # that factor at the last update; linear in between
memory.bank_decay_multiplier = 1.0  # factor of the bank's weight decay; 0: none
memory.bank_update = 'dense'  # Adam on all rows; 'lazy': on those that an update read; pays if they are few
memory.bank_moments = 'full'  # Adam's: 'full', mean and square of values; 'square', no mean; 'row', one square a row
memory.teach_rows = 0  # with --init_from: at most so many rows learn in an update, much read now, little before; 0: all

data.train_files = ''  # comma-separated paths, globs: .jsonl .txt .md .py (.gz .xz .zst) .parquet; '': embedded corpus
data.valid_files = ''  # the same, held out; '': a share of the training documents
data.valid_fraction = 0.01  # that share, by a hash of each text, or one of few; 0 (prepare only): none
data.text_key = 'text'  # key of the text in a jsonl line, or its column in a parquet file
data.on_bad_line = 'fail'  # 'fail' stops at the first bad line and names it; 'skip' counts and reports them
data.tokenizer = ''  # a SentencePiece model or a tokenizer.json; '': train one on the training text
data.layout = 'packed'  # 'packed': one stream cut into rows; 'padded': one document a row, as in the record
data.isolate_documents = False  # packed rows only: True keeps attention within a document
data.prepared_dir = 'out/data'  # where token shards are written and found; or, without train_files, prepared text
data.workers = 0  # tokenizer processes; 0: one for each CPU core, at most 16

train.batch_size = 64  # B: rows in a micro-batch, over all devices
train.accumulation_steps = 8  # micro-batches in an update; a run may go on with another split of the same product
train.epochs = 3.0  # passes over the training rows; max_steps takes their place
train.max_steps = 0  # optimizer updates; 0: as many as the epochs give
train.optimizer = 'adamw'  # also 'muon': matrices of layers by Muon, all else by AdamW; 'sgd': plain gradient descent
train.learning_rate = 0.0002  # peak
train.muon_lr_multiplier = 5.0  # factor of the learning rate of the matrices that Muon moves
train.embedding_lr_multiplier = 1.0  # factor of the embedding's learning rate; the embedding is also the output layer
train.parameters = ''  # rates, decays and betas by name: 'gate lr=0.5; norm decay=0'; '': none
train.schedule = 'cosine'  # after the warm-up; also 'warmdown': the peak, then linear to the final rate
train.warmdown_share = 0.4  # share of all updates, at the end, in which the rate falls
train.final_learning_rate = 0.0  # at the end of the schedule
train.warmup_steps = 0  # linear, before the schedule
train.beta1 = 0.9
train.beta2 = 0.999
train.eps = 1e-08
train.weight_decay = 0.01  # on every parameter that gets a gradient
train.grad_clip = 1.0  # largest global gradient norm; 0: no clipping
train.dtype = 'bfloat16'  # dtype of matrix products; parameters, optimizer and row selection stay float32
train.log_interval = 10  # updates between lines of metrics
train.eval_interval = 500  # updates between evaluations on the whole validation set
train.checkpoint_interval = 500  # updates between checkpoints
train.max_loss_factor = 0.0  # skips updates whose loss is above this many times its running average; 0: none
train.max_skipped_updates = 10  # this many skipped updates in a row end the run
train.profile_steps = 0  # updates to trace into <workdir>/profile, from the second of a start to a save; 0: off

runtime.data_devices = 0  # devices that divide the batch; 0: all that row_devices leaves
runtime.row_devices = 1  # devices over which the rows of the bank are divided; they share the batch, too
runtime.attention = 'auto'  # 'xla', 'xla_blocked', 'cudnn'; 'auto': cudnn on NVIDIA, blocked on a CPU
runtime.remat = 'none'  # 'block' recomputes each block in the backward pass: less memory, more time
runtime.triton_gemm = False  # True lets XLA use its Triton kernels on NVIDIA; False: cuBLAS and XLA's own fusions
runtime.coordinator = ''  # host:port of the first of several processes; 'auto': JAX detects it; '': one process
runtime.num_processes = 1  # processes of the run, if runtime.coordinator is a host:port
runtime.process_id = 0  # number of this process, from 0
runtime.compilation_cache_dir = ''  # keep compiled steps here, '': nowhere; XLA's warnings mean nothing on the same CPU
"""

from ml_collections import ConfigDict

from mmjax.config import base_config


def get_config() -> ConfigDict:
  """Returns a fresh config that an experiment may change."""
  return base_config()
