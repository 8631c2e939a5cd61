"""Folders of others: models of Hugging Face's formats and of the original's training."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gidd_jax.checkpoints.workdir import CONFIG_FILE
from gidd_jax.data.rows import check_mode
from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError, first_line
from gidd_jax.interchange.fields import Fields, checked
from gidd_jax.interchange.gguf_file import Gguf
from gidd_jax.interchange.gidd_config import gidd_network, gidd_process
from gidd_jax.interchange.llama_config import (
    DENOISER,
    KINDS,
    check_attention,
    denoiser_network,
    llama_network,
    rope,
)
from gidd_jax.interchange.placing import Target, place
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.interchange.tensors import dit_format, gidd_format, llama_format
from gidd_jax.interchange.weight_files import (
    WEIGHTS_FILE,
    read_safetensors,
    read_torch,
)
from gidd_jax.models.dit import ROTARY_BASE, DiT, padded_vocab_size
from gidd_jax.models.llama import Llama
from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess

PROCESSES = {"hybrid": HybridProcess, "masked": MaskedProcess, "log_snr": LogSnrProcess}


def from_hugging_face(folder: Path, target: Target) -> Pretrained:
    """Load a folder in a Hugging Face format: GIDD of either paper, a Llama or Qwen, a denoiser."""
    file = folder / CONFIG_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: it describes {WEIGHTS_FILE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({first_line(error)}): fetch it again") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{file} holds no keys: fetch it again")
    fields = Fields(file, values)
    kind = fields.text("model_type")
    if kind not in (known := ("dit", "gidd", *KINDS, DENOISER)):
        legal = ", ".join(known)
        raise fields.error(f"model_type = {kind!r}: only {legal} can be loaded")
    if kind in KINDS:
        llama = llama_network(fields)
        tensors, weights = read_safetensors(folder)
        return _llama(llama, tensors, load_tokenizer(folder), weights, target)
    if kind == DENOISER:
        return _framed(_denoiser(fields, folder, target), fields)
    if kind == "gidd":
        return _framed(_gidd(fields, folder, target), fields)
    tensors, weights = read_safetensors(folder)
    tokenizer = load_tokenizer(folder)
    rows = fields.size("vocab_size")
    _check_dit(fields)
    network = _dit_network(
        fields,
        _real_vocab_size(rows, tokenizer, file),
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "timestep_cond_dim"),
    )
    network = network.clone(position_times=fields.flag("position_times", False))
    if fields.has("process"):
        process = written_process(fields, tokenizer)
    else:
        ids = tokenizer.vocab_size, tokenizer.mask_id
        numbers = fields.number("p_uniform"), fields.number("t_eps")
        process = checked(file, lambda: HybridProcess(*ids, numbers[0], t_eps=numbers[1]))
    return _framed(_dit(network, rows, tensors, tokenizer, process, weights, target), fields)


def from_gguf(file: Path, target: Target) -> Pretrained:
    """Load a Llama, Qwen2 or Qwen3 from a file of llama.cpp, whose numbers may be quantised."""
    tensors = Gguf(file)
    network = llama_network(Fields(file, tensors.config()))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tensors.tokenizer(Path(folder))
    tokenizer = dataclasses.replace(tokenizer, name=str(file))
    return _llama(network, tensors, tokenizer, file, target)


def _gidd(fields: Fields, folder: Path, target: Target) -> Pretrained:
    network = gidd_network(fields)
    tensors, weights = read_safetensors(folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(network.vocab_size, (tokenizer.vocab_size,), tokenizer, fields.file)
    if fields.has("process"):
        process = written_process(fields, tokenizer)
    else:
        process = gidd_process(fields, tokenizer.vocab_size, tokenizer.mask_id)

    def put() -> Any:
        form = gidd_format(
            network.num_heads,
            normed_heads=network.normed_heads,
            sink=network.sink,
            mlp_bias=network.mlp_bias,
            tie_embeddings=network.tie_embeddings,
        )
        inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1)
        return place(network, inputs, tensors, form, target)

    return Pretrained(network, checked(weights, put), tokenizer, process, False)


def _denoiser(fields: Fields, folder: Path, target: Target) -> Pretrained:
    network = denoiser_network(fields)
    tensors, weights = read_safetensors(folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(network.vocab_size, (tokenizer.vocab_size,), tokenizer, fields.file)
    process = written_process(fields, tokenizer)

    def put() -> Any:
        form = llama_format(network.shape, network.tie_embeddings)
        inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1)
        return place(network, inputs, tensors, form, target)

    return Pretrained(network, checked(weights, put), tokenizer, process, False)


def _framed(model: Pretrained, fields: Fields) -> Pretrained:
    """Return the model with how its rows were framed, where the config says so."""
    if not fields.has("row_mode"):
        return model
    mode = fields.text("row_mode")
    checked(fields.file, lambda: check_mode(mode, "row_mode"))
    return model._replace(row_mode=mode)


def written_process(fields: Fields, tokenizer: Tokenizer) -> InterpolatingProcess:
    """Return the process that an export of ours wrote into a config."""
    ids = tokenizer.vocab_size, tokenizer.mask_id
    section = fields.section("process")
    name = section.text("name")
    if name not in PROCESSES:
        raise fields.error(f"process {name!r} is unknown: use one of {', '.join(PROCESSES)}")
    values = {key: section.number(key) for key in process_fields(PROCESSES[name])}
    return checked(fields.file, lambda: PROCESSES[name](*ids, **values))


def process_fields(kind: type[InterpolatingProcess]) -> list[str]:
    """Return the names of the numbers that define a process of this kind."""
    tokens = ("vocab_size", "mask_id", "background")
    return [field.name for field in dataclasses.fields(kind) if field.name not in tokens]


def _check_dit(fields: Fields) -> None:
    """Raise InputError where a config asks for what a DiT does not compute."""
    check_attention(fields)
    for key in ("attention_bias", "mlp_bias"):
        if fields.flag(key, False):
            raise fields.error(f"{key} must be false: biases are not supported")
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if fields.has("head_dim") and fields.size("head_dim") * num_heads != hidden_size:
        raise fields.error("head_dim must be hidden_size / num_attention_heads")
    if rope(fields) != (ROTARY_BASE, None):
        raise fields.error(f"rotary positions of a dit must have the base {ROTARY_BASE:g}")
    if fields.flag("tie_word_embeddings", False):
        raise fields.error("tie_word_embeddings must be false: a dit has its own output layer")


def from_original(folder: Path, target: Target) -> Pretrained:
    """Load a folder of the original's training: model.pt, config.yaml and tokenizer files."""
    import yaml

    file, weights = folder / "config.yaml", folder / "model.pt"
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except Exception as error:  # YAML's own, and those of the values that it makes
        raise InputError(
            f"{file} is no plain YAML ({first_line(error)}): fetch it again"
        ) from error
    if not isinstance(values, Mapping):
        raise InputError(f"{file} holds no keys: fetch it again")
    fields, row_mode = Fields(file, values).section("model"), _original_row_mode(file, values)
    kind = fields.text("type")
    if kind not in ("diffusion", "autoregressive"):
        raise fields.error(f"model.type = {kind!r}: must be diffusion or autoregressive")
    state_dict = read_torch(weights)
    tokenizer = load_tokenizer(folder)
    table = "vocab_embed.embedding" if kind == "diffusion" else "model.embed_tokens.weight"
    if table not in state_dict or state_dict[table].ndim != 2:
        raise InputError(f"{weights} holds no table {table}: it does not fit {file}")
    rows = len(state_dict[table])
    names = ("hidden_size", "n_blocks", "n_heads", "cond_dim")
    if kind == "diffusion":
        network = _dit_network(fields, _real_vocab_size(rows, tokenizer, weights), names)
        process = _original_process(fields, tokenizer)
        model = _dit(network, rows, state_dict, tokenizer, process, weights, target)
        return model._replace(row_mode=row_mode)
    hidden_size, num_layers, num_heads = (fields.size(name) for name in names[:3])
    llama = Llama(rows, hidden_size, num_layers, num_heads, max_seq_len=fields.size("max_seq_len"))
    return _llama(llama, state_dict, tokenizer, weights, target)._replace(row_mode=row_mode)


def _original_row_mode(file: Path, values: Mapping[str, Any]) -> str:
    """Return how the original made rows: of documents end to end, or crops where it did not pack.

    A config that does not say is taken for one of packed rows, as a published folder is.
    """
    fields = Fields(file, values)
    packs = not fields.has("data") or fields.section("data").flag("sequence_packing", True)
    return "packed" if packs else "crop"


def _original_process(fields: Fields, tokenizer: Tokenizer) -> InterpolatingProcess:
    ids, t_eps = (tokenizer.vocab_size, tokenizer.mask_id), fields.number("t_eps")
    kind = fields.text("diffusion_process")
    if kind == "mdlm":
        return checked(fields.file, lambda: MaskedProcess(*ids, t_eps=t_eps))
    if kind != "gidd":
        raise fields.error(f"model.diffusion_process = {kind!r}: must be gidd or mdlm")
    p_uniform = fields.number("p_uniform")
    return checked(fields.file, lambda: HybridProcess(*ids, p_uniform, t_eps=t_eps))


def _real_vocab_size(rows: int, tokenizer: Tokenizer, file: Path) -> int:
    """Return the tokenizer's size where the model's `rows` are that many, or padded to 128s."""
    size = tokenizer.vocab_size
    check_vocabulary(rows, (size, padded_vocab_size(size)), tokenizer, file)
    return size


def check_vocabulary(rows: int, legal: tuple[int, ...], tokenizer: Tokenizer, file: Path) -> None:
    """Raise InputError unless a model has as many tokens as its tokenizer makes legal."""
    if rows not in legal:
        raise InputError(
            f"{file}: the model has {rows} tokens and the tokenizer beside it "
            f"{tokenizer.vocab_size}, with its pad and mask tokens: put the model's own tokenizer "
            f"files into {file.parent}"
        )


def _dit_network(fields: Fields, vocab_size: int, names: tuple[str, str, str, str]) -> DiT:
    hidden_size, num_layers, num_heads, cond_dim = (fields.size(name) for name in names)
    max_seq_len = fields.size("max_seq_len")
    return DiT(vocab_size, hidden_size, num_layers, num_heads, cond_dim, max_seq_len)


def _dit(
    network: DiT,
    rows: int,
    tensors: Mapping[str, Any],
    tokenizer: Tokenizer,
    process: InterpolatingProcess,
    file: Path,
    target: Target,
) -> Pretrained:
    def put() -> Any:
        inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1)
        return place(network, inputs, tensors, dit_format(network.num_heads), target, rows)

    params = checked(file, put)
    # The published softmax runs over all the rows that the weights have.
    return Pretrained(network, params, tokenizer, process, rows > network.vocab_size)


def _llama(
    network: Llama, tensors: Mapping[str, Any], tokenizer: Tokenizer, file: Path, target: Target
) -> Pretrained:
    def put() -> Any:
        names = "lm_head.weight", "model.embed_tokens.weight"
        if network.tie_embeddings and all(name in tensors for name in names):
            head, table = (tensors[name] for name in names)
            if not np.array_equal(head, table):
                raise InputError(
                    "tie_word_embeddings is true, and lm_head.weight is not the embeddings: set it "
                    "to false in the config"
                )
        form = llama_format(network.shape, network.tie_embeddings)
        return place(network, (jnp.zeros((1, 1), jnp.int32),), tensors, form, target)

    params = checked(file, put)
    tokenizer = _within(tokenizer, network.vocab_size, file)
    return Pretrained(network, params, tokenizer, None, False)


def _within(tokenizer: Tokenizer, rows: int, file: Path) -> Tokenizer:
    """Return a tokenizer that pads with a token the model has: [PAD] may have been added to it."""
    known = tokenizer.backend.get_vocab(with_added_tokens=True).values()
    largest = max(set(known) - {tokenizer.pad_id, tokenizer.mask_id})
    if largest >= rows:
        raise InputError(
            f"{file}: the model has {rows} tokens and the tokenizer beside it ids up to {largest}: "
            f"put the model's own tokenizer files into {file.parent}"
        )
    if tokenizer.pad_id < rows:
        return tokenizer
    return dataclasses.replace(tokenizer, pad_id=tokenizer.eos_id)
