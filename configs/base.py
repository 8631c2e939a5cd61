"""Every key of a run, with its default and its legal values. Other configs change only what they
change. `gidd_jax/settings.py` checks the types and the values.

The defaults are those of the GIDD paper (arXiv 2503.04482, small model), apart from the data: they
name the small corpus and tokenizer that come with the package, so that every config runs anywhere.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the defaults of every section."""
    config = ConfigDict()
    config.seed = 0  # integer >= 0; the only source of randomness of a run

    config.model = model = ConfigDict()
    model.name = "dit"  # dit (diffusion) | gidd (diffusion, the scaling paper's network, which is
    # told no time) | llama (autoregressive, or with a diffusion process a denoiser)
    model.parametrization = "standard"  # standard | completep (gidd only): multipliers, and rates
    # by group of parameters, with which the best learning rate keeps as width and depth grow
    model.hidden_size = 768  # multiple of 2 * num_heads (rotary embedding turns pairs)
    model.num_layers = 12  # integer >= 1
    model.num_heads = 12  # integer >= 1
    model.cond_dim = 128  # width of the time embedding, integer >= 1 (dit), or >= 0 (llama that
    # denoises; 0: it is told no time)
    model.max_seq_len = 512  # context in tokens, integer >= 2
    model.dtype = "bfloat16"  # of the computation: bfloat16 | float32; parameters stay float32
    model.scan_layers = True  # one compiled layer in a loop (True) or unrolled (False)
    model.remat = "none"  # recompute in the backward pass: none | full | attention | dots
    model.attention = ""  # '' (automatic) | xla | cudnn | splash (TPU)
    model.keep_padding_columns = False  # True: softmax over the columns that pad the vocabulary to
    # a multiple of 128, as the original implementation does

    model.start = ""  # folder or hub name of a model to start from, which sets the keys of its
    # architecture, and data.tokenizer; '': from nothing
    # A Llama alone reads what follows; 0 is the usual: num_heads, hidden_size / num_heads, and
    # 4 * hidden_size.
    model.num_kv_heads = 0  # a divisor of num_heads
    model.head_dim = 0  # even
    model.intermediate_size = 0  # of the perceptron, integer >= 0
    model.qkv_bias = False  # biases of queries, keys and values (Qwen2)
    model.out_bias = False  # of the output of attention
    model.mlp_bias = False  # of the perceptron
    model.head_norms = False  # norms of each head's queries and keys (Qwen3)
    model.rope_theta = 10_000.0  # base of the rotary positions, > 1
    model.rope_scaling = ""  # linear:FACTOR | llama3:FACTOR,LOW,HIGH,LENGTH | yarn:FACTOR,LENGTH,
    # AMPLITUDE,FAST,SLOW,TRUNCATE | '' (none)
    model.rms_norm_eps = 1e-6  # > 0
    model.tie_embeddings = False  # the embedding is the output layer, too
    model.shift = False  # denoiser: the state at a token predicts the next one, as in the
    # autoregressive model that it starts from

    config.process = process = ConfigDict()
    process.name = "hybrid"  # hybrid | masked | log_snr | autoregressive | FILE.py:CLASS, your own
    process.options = ""  # FILE.py:CLASS: KEY=VALUE,... of its fields (t_eps among them); the keys
    # below are for the other processes
    process.p_uniform = 0.1  # hybrid: largest share of uniform noise, in [0, 1); 0 is mask-only
    process.gamma = 1.0  # hybrid: exponent of the uniform noise's schedule, in (0, 2]
    process.t_eps = 1e-4  # times are drawn in [t_eps, 1 - t_eps], in (0, 0.5)
    process.scale = 1.0  # log_snr: uniform share is sigmoid(scale * log-SNR + shift), >= 0; above 1
    # some rates are negative
    process.shift = 0.0  # log_snr: any number; -1000 is masking, 0 hybrid, 1000 uniform
    process.min_log_snr = -9.0  # log_snr: less than max_log_snr
    process.max_log_snr = 9.0  # log_snr: greater than min_log_snr
    process.stratified = True  # times spread over the global batch (True) or independent (False)
    # In training alone, validation has one time a row:
    process.by_position = 0.0  # share of rows in which each position has its own time, in [0, 1]
    process.ascending = 0.0  # share in which times rise along the row, clean to noisy, in [0, 1];
    # with by_position at most 1
    process.uniform_ids = "others"  # hybrid, log_snr: uniform noise is of all tokens but the mask
    # (others) | of the mask, too (all), as in the scaling paper's code

    config.data = data = ConfigDict()
    data.path = "embedded"  # embedded | file | folder | glob | comma list of them
    # | folder of shards made by gidd_jax.prepare_data | tfds:NAME/CONFIG
    # | hf:OWNER/NAME/CONFIG of the Hugging Face hub (pip install 'gidd-jax[datasets]')
    # | arrays of ids (frame none): .npy and .npz of rows, .uint16.bin and .uint32.bin of windows
    # | WEIGHT:PATH,WEIGHT:PATH,... a mixture, as 0.7:wiki/,0.3:books/*.txt; weights are shares of
    # the training rows, numbers in [1e-6, 1e6]; the validation split is that of all parts
    data.tokenizer = "embedded"  # embedded | local folder | name on the Hugging Face hub
    # | start, that of model.start | ids:VOCAB, symbols 0 to VOCAB - 1 | chars:FILE, one token a
    # character of FILE, which is written from the texts where it is missing
    data.validation = "hash:0.05"  # last:COUNT documents | hash:FRACTION of the documents
    # | path:FILES | split:NAME (tfds and hf)
    data.text_key = "text"  # field that holds the text in jsonl, parquet, tfds and hf records
    data.txt_documents = "blank_line"  # what is one document in a .txt: file | line | blank_line
    data.mode = "crop"  # crop (random window of a document, padded) | packed | padded | answers
    # (records of prompt and answer, or messages: the prompt is given, the answer learnt)
    data.frame = "ends"  # ends (texts begin and end with a token, as mode says) | none (not llama:
    # rows of max_seq_len tokens and nothing else, of arrays or of texts end to end; mode is unread)
    data.givens = 0.0  # share of the training rows in which some tokens are given, as in a prompt:
    # clean, at time 0, without loss; in [0, 1], not for llama
    data.givens_kind = "mixed"  # mixed (a third each: a beginning, all but a span, scattered; as
    # many as you like) | prompt (a beginning) | infilling (scattered), mostly about half of a row
    data.marked = False  # arrays mark given positions (`given` in a .npz); training sets it to what
    # they do, so that it is known of the model
    data.empty_tokens = 0.0  # largest share of a training row that is padding tokens, put between
    # the others at random places; in [0, 0.5], frame ends only; each row draws its share
    data.short_rows = 0.0  # packed: share of the training rows that end early, anywhere, as prompts
    # do; the network sees no further, nothing there counts; in [0, 1], not for llama
    data.num_workers = 0  # processes that prepare batches, integer >= 0; 0 uses threads

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | laprop | psgd | muon (completep: adamw | laprop)
    optimizer.learning_rate = 5e-4  # peak, > 0; completep: matrices of blocks move by this / width,
    # all else by 0.02 times it
    optimizer.b1 = 0.9  # first-moment decay, in [0, 1)
    optimizer.b2 = 0.99  # second-moment decay, in [0, 1)
    optimizer.eps = 1e-9  # > 0; completep: divided by width and depth
    optimizer.weight_decay = 0.02  # decoupled, on every parameter, >= 0; completep: on matrices of
    # blocks, by learning_rate * weight_decay a step at every width; never on embedding and output
    optimizer.norm_decay = 0.0  # completep: weight decay of the norms, >= 0
    optimizer.bias_decay = 0.0  # completep: of biases and of attention's learned keys, values, >= 0
    optimizer.clip_norm = 1.0  # largest global gradient norm, >= 0; 0 is off
    optimizer.skip_above = 0.0  # steps with a larger gradient norm change nothing, >= 0; 0 is never
    optimizer.warmup_steps = 10_000  # linear from 0, integer >= 0
    optimizer.schedule = "cosine"  # cosine | linear (to 0) | constant (without warm-up)
    # | wsd (constant after the warm-up, then a cooldown to 0)
    optimizer.cooldown_steps = 0  # wsd: the last steps, in which the rate falls, integer >= 0; 0:
    # it stays; warmup_steps + cooldown_steps are at most train.num_steps
    optimizer.final_lr_ratio = 0.1  # cosine: last learning rate / peak, in [0, 1]
    optimizer.ema_decay = 0.0  # moving average of the parameters, in [0, 1); 0 is off

    config.train = train = ConfigDict()
    train.num_steps = 500_000  # integer >= 1
    train.batch_size = 512  # sequences per step over all devices, integer >= 1
    train.micro_batches = 1  # gradient accumulation, a divisor of batch_size
    train.weighting = "dynamic"  # elbo | clip | dynamic | dynamic_v1_1 (the released code's)
    # | dynamic_unbiased (hybrid: dynamic, with the minimum where the bound has it)
    train.min_weight = 0.0  # loss weights are clipped to [min_weight, max_weight], >= 0
    train.max_weight = 2.0  # >= min_weight
    train.aggregation = "mean"  # gradients are of the mean of the losses of a batch's positions
    # (mean) | of their sum (sum): clip_norm and eps of the optimizer then are a sum's
    train.block_length = 0  # gidd only: a model by blocks of so many tokens, of which each sees the
    # clean ones before it; a divisor of model.max_seq_len; 0 is a model of whole rows
    train.mask_padding = False  # True: padding tokens do not count in the loss
    train.padding_weight = 1.0  # how much a padding token counts in the loss where it does, in
    # [0, 1]: with data.mode=answers rows are padded with the token that ends the answer
    train.align_mask_to_input = False  # autoregressive: True masks by the input token, not the
    # target, as the original does
    train.eval_every = 5_000  # steps between validations, integer >= 0; 0 is never
    train.eval_batches = 64  # batches of a validation, integer >= 1

    # What a start (model.start) gives up step by step, from its first step on.
    config.adapt = adapt = ConfigDict()
    adapt.attention_steps = 0  # steps in which a Llama's attention goes from causal to full, at
    # most train.num_steps; 0: full at once
    adapt.noise_steps = 0  # hybrid: steps in which the share of uniform noise goes from 0 to
    # process.p_uniform, at most train.num_steps; 0: at once

    adapt.lora_rank = 0  # rank of adapters beside the matrices of the blocks, which alone are
    # trained; 0: all parameters are, without adapters
    adapt.lora_alpha = 16.0  # their product counts this / lora_rank, > 0

    # data * fsdp * tensor is the number of devices; at most one may be -1, the rest.
    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # copies of the model, each on its share of the batch: integer >= 1 or -1
    mesh.fsdp = 1  # as data, with parameters and optimizer state split: integer >= 1 or -1
    mesh.tensor = 1  # splits heads, hidden units and vocabulary: integer >= 1 or -1

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 5_000  # steps, integer >= 1
    checkpoint.max_to_keep = 3  # newest checkpoints kept, integer >= 1

    config.logging = logging = ConfigDict()
    logging.every = 50  # steps, integer >= 1
    logging.wandb = False  # True needs the extra: pip install 'gidd-jax[wandb]'
    logging.wandb_project = "gidd_jax"  # not empty

    return config
