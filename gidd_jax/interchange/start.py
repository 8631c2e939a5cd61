"""A run that begins with the weights of a model that is there, of this package or of others.

The model decides the architecture and, with data.tokenizer=start, the tokenizer. Of an
autoregressive model becomes a denoiser of the same blocks (`models.llama_denoiser`): its table gets
rows for the tokens that it lacks, each the mean of the others, and so does its output layer.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from gidd_jax.data.sources import run_tokenizer
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.data.tokenizer_files import EMBEDDED, SPEC_FILE, read_tokenizer_files
from gidd_jax.errors import InputError
from gidd_jax.interchange.gguf_file import SUFFIX
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.models.dit import DiT
from gidd_jax.models.gidd import HEAD_WIDTH, RESID_SCALE, TimeFreeTransformer
from gidd_jax.models.llama import Llama
from gidd_jax.models.llama_denoiser import LlamaDenoiser
from gidd_jax.models.rotary import scaling_text
from gidd_jax.parallel.sharding import unbox
from gidd_jax.settings import ModelSettings, Settings
from gidd_jax.training.build import build_model
from gidd_jax.training.objective import Network, Params

START = "start"  # data.tokenizer: that of the start
# Not of the architecture: how a run computes, and what the noise of its training asks for.
_OF_RUN = (
    "dtype",
    "scan_layers",
    "remat",
    "attention",
    "max_seq_len",
    "position_times",
    "block_length",
    "vocab_size",
    "init_std",
    "head_std",
    "parent",
    "name",
)


def from_start(
    settings: Settings, *, allow_code: bool = False
) -> tuple[Settings, Callable[[Mesh | None], Params] | None]:
    """Return the settings with the architecture of model.start, and what makes its parameters.

    Without a start the settings are as they were, and there is None. The parameters are read when
    they are asked for: a run that goes on needs none of them. They are read straight onto the mesh
    that is given; None: onto the first device. allow_code: of a process of the start's own. Raises
    InputError where the start cannot be loaded, or the run could not go on with it.
    """
    path = settings.model.start
    if not path:
        if settings.data.tokenizer == START:
            raise InputError(
                f"model.start = '': data.tokenizer = {START} is its: set model.start to the folder "
                "or hub name of a model"
            )
        return settings, None
    if path.endswith(SUFFIX):
        raise InputError(
            f"model.start = {path}: convert the file into a folder first, with python -m "
            f"gidd_jax.convert --checkpoint={path} --out=FOLDER, and start from that"
        )
    source = load_pretrained(path, allow_code=allow_code, weights=False)
    settings, data = _with_architecture(settings, source), settings.data
    if data.tokenizer == START:
        data = dataclasses.replace(data, tokenizer=_tokenizer_folder(path))
        settings = dataclasses.replace(settings, data=data)
    else:
        _check_tokenizer(settings, source.tokenizer)

    def begin(mesh: Mesh | None) -> Params:
        return _params(settings, load_pretrained(path, allow_code=allow_code, mesh=mesh))

    return settings, begin


def _check_tokenizer(settings: Settings, wanted: Tokenizer) -> None:
    tokenizer = run_tokenizer(settings.data, write=False)
    # What fills rows up differs by how they are framed.
    if not dataclasses.replace(tokenizer, pad_id=wanted.pad_id).gives_ids_of(wanted):
        raise InputError(
            f"data.tokenizer = {settings.data.tokenizer}: model.start = {settings.model.start} has "
            f"another tokenizer: set it to {START}"
        )


def _with_architecture(settings: Settings, source: Pretrained) -> Settings:
    network, model, adapt = source.network, settings.model, settings.adapt
    if settings.process.name == "autoregressive" and source.process is not None:
        raise InputError(
            f"model.start = {model.start}: is a diffusion model, and process.name = autoregressive "
            "is not: start from an autoregressive model"
        )
    if model.max_seq_len > network.max_seq_len:
        raise InputError(
            f"model.max_seq_len = {model.max_seq_len}: must be at most {network.max_seq_len}, the "
            f"context of model.start = {model.start}"
        )
    if adapt.lora_rank and isinstance(network, Llama) and model.cond_dim:
        raise InputError(
            f"adapt.lora_rank = {adapt.lora_rank}: adapters leave the time embedding as it begins, "
            "which is without effect: set model.cond_dim=0"
        )
    model = dataclasses.replace(model, **_architecture(network, settings, source))
    if source.process is not None:  # its attention is full already
        adapt = dataclasses.replace(adapt, attention_steps=0)
    settings = dataclasses.replace(settings, model=model, adapt=adapt)
    _check_same(build_model(settings, network.vocab_size), network, settings)
    return settings


def _architecture(network: Network, settings: Settings, source: Pretrained) -> dict[str, Any]:
    """Return the keys of the section model that say a network."""
    found: dict[str, Any] = {
        "hidden_size": network.hidden_size,
        "num_layers": network.num_layers,
        "num_heads": network.num_heads,
        "keep_padding_columns": source.keep_padding_columns,
    }
    if isinstance(network, DiT):
        return found | {"name": "dit", "cond_dim": network.cond_dim}
    if isinstance(network, TimeFreeTransformer):
        is_scaled = network.head_scale == HEAD_WIDTH / network.hidden_size
        is_scaled &= network.resid_scale == RESID_SCALE
        kind = "completep" if is_scaled else "standard"
        return found | {"name": "gidd", "parametrization": kind}
    names = {field.name for field in dataclasses.fields(ModelSettings)} & {
        field.name for field in dataclasses.fields(network)
    }
    values = {name: getattr(network, name) for name in names - set(_OF_RUN)}
    values = {name: value or 0 for name, value in values.items() if value is None} | {
        name: value for name, value in values.items() if value is not None
    }
    values |= {"name": "llama", "rope_scaling": scaling_text(network.rope_scaling)}
    if isinstance(network, Llama):
        values["shift"] = settings.process.name != "autoregressive"
    return found | values


def _check_same(made: Network, network: Network, settings: Settings) -> None:
    """Raise InputError where the settings cannot say what the network computes."""
    names = {field.name for field in dataclasses.fields(made)} & {
        field.name for field in dataclasses.fields(network)
    }
    for name in sorted(names - set(_OF_RUN)):
        ours, theirs = getattr(made, name), getattr(network, name)
        usual = {"num_kv_heads": network.num_heads, "intermediate_size": 4 * network.hidden_size}
        if (ours or usual.get(name)) != (theirs or usual.get(name)):
            raise InputError(
                f"model.start = {settings.model.start}: its {name} is {theirs}, which no run can "
                f"have here, only {ours}: start from another model"
            )


def _tokenizer_folder(path: str) -> str:
    """Return the folder of a start's tokenizer, or its name on the hub."""
    if "://" in path:
        raise InputError(
            f"model.start = {path}: with data.tokenizer={START} it must be a local folder, or a "
            "name on the hub: copy it, or name the tokenizer"
        )
    if path == EMBEDDED:
        return path
    folder = Path(path).expanduser()
    for place in (folder, folder / "tokenizer", folder.parent.parent / "tokenizer"):
        if (place / SPEC_FILE).is_file():
            return str(place)
    return path


def _params(settings: Settings, source: Pretrained) -> Params:
    """Return the start's parameters as those of the run's network."""
    tokenizer = run_tokenizer(settings.data)
    network, params = build_model(settings, tokenizer.vocab_size), source.params
    if isinstance(network, LlamaDenoiser) and isinstance(source.network, Llama):
        params = with_tokens(params, tokenizer, _is_new(tokenizer, source.network.vocab_size))
    return _completed(network, params, jax.random.key(settings.seed))


def _is_new(tokenizer: Tokenizer, rows: int) -> list[int]:
    """Return the ids that a model of so many rows was not trained on.

    Beside those beyond its rows: of [MASK] and [PAD] where the tokenizer's own files do not name
    them. They may have rows that only fill the table up.
    """
    files = read_tokenizer_files(tokenizer.name)
    named = {token["content"] for token in files.spec["added_tokens"]}
    named |= {token.content for token in files.further.values()}
    vocab = files.spec["model"]["vocab"]  # of a Unigram model pairs of a token and its score
    named |= set(vocab) if isinstance(vocab, dict) else {token for token, _ in vocab}
    roles = tokenizer.pad_id, tokenizer.mask_id
    added = [i for i in roles if tokenizer.backend.id_to_token(i) not in named]
    return sorted({*range(rows, tokenizer.vocab_size), *added})


def with_tokens(params: Params, tokenizer: Tokenizer, new: list[int]) -> Params:
    """Return parameters of a Llama with a row for each token of the tokenizer, none beyond.

    Rows (and columns of the output layer) of the ids `new` are the mean of the others.
    """
    count, others = tokenizer.vocab_size, [i for i in range(tokenizer.vocab_size) if i not in new]

    def grown(table: jax.Array) -> jax.Array:
        kept = table[jnp.asarray(others)]
        full = jnp.zeros((count, table.shape[1]), table.dtype).at[jnp.asarray(others)].set(kept)
        return full.at[jnp.asarray(new, jnp.int32)].set(jnp.mean(kept, axis=0))

    params = dict(params)
    params["vocab_embed"] = {"embedding": grown(params["vocab_embed"]["embedding"])}
    if "output" in params:
        params["output"] = {"kernel": grown(params["output"]["kernel"].T).T}
    return params


def _completed(network: Network, params: Params, key: jax.Array) -> Params:
    """Return the parameters with freshly drawn ones where the network has more (of the time)."""
    flat: dict[Any, Any] = dict(flatten_dict(params))
    inputs = (jnp.zeros((1, 2), jnp.int32),)
    if not isinstance(network, Llama):
        inputs += (jnp.zeros(1),)

    def fresh(key: jax.Array) -> dict[Any, Any]:
        made = unbox(network.init(key, *inputs)["params"])
        made = flatten_dict(made)
        return {path: leaf for path, leaf in made.items() if path not in flat}

    return unflatten_dict(flat | jax.jit(fresh)(key))
