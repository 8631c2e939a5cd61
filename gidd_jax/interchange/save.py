"""Models as Hugging Face folders: GIDD in the published formats, Llamas and Qwens for others."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.checkpoints.numbers import not_numbers
from gidd_jax.checkpoints.workdir import CONFIG_FILE
from gidd_jax.errors import InputError
from gidd_jax.interchange.card import CARD_FILE
from gidd_jax.interchange.exported_code import code_config, exported_code
from gidd_jax.interchange.folders import PROCESSES, process_fields
from gidd_jax.interchange.gidd_config import gidd_config, gidd_noise
from gidd_jax.interchange.llama_config import denoiser_config, llama_config
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.interchange.tensors import TorchTensors, dit_rotary_buffers
from gidd_jax.interchange.weight_files import INDEX_FILE, WEIGHTS_FILE
from gidd_jax.models.dit import DiT, padded_vocab_size
from gidd_jax.models.gidd import TimeFreeTransformer
from gidd_jax.models.llama import Llama
from gidd_jax.models.llama_denoiser import LlamaDenoiser
from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess

MAX_SHARD_BYTES = 5_000_000_000  # of a file of weights, as the published ones have
PAPERS_GAMMA = 1.0  # the only one that the published format can mean


def check_new_folder(path: str | Path) -> Path:
    """Return the path of a folder to be written; InputError if something is there already."""
    folder = Path(path).expanduser()
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists: name a new folder, nothing is overwritten")
    if not folder.name:
        raise InputError(f"{path!r} names no folder: give one to write")
    return folder


def save_pretrained(
    model: Pretrained, path: str | Path, *, with_code: bool = False, card: str | None = None
) -> None:
    """Write config.json, the weights and the tokenizer into a new folder.

    Weights have the dtypes of the parameters, in files of at most 5 GB. Diffusion models get the
    tensor names and config keys of the published GIDD models of their paper (and a key `process`
    where the process is not the paper's), Llamas those of transformers. with_code: the folder holds
    PyTorch code with which transformers loads it (see `exported_code`). card: the text of its
    README.md. The folder appears when it is complete. Raises InputError if it exists, a parameter
    is not finite, the process is of the user's own making, or there is no code for the network.
    """
    folder = check_new_folder(path)
    bad = not_numbers(model.params)
    if bad is not None:
        raise InputError(f"the model is damaged ({bad}): nothing was written to {folder}")
    extra: dict[str, np.ndarray] = {}
    tensors = TorchTensors(model.params)
    if isinstance(model.network, DiT):
        rows = _rows(model, model.network)
        config, tensors = (
            _published_dit(model, model.network, rows),
            TorchTensors(model.params, rows),
        )
        head_dim = model.network.hidden_size // model.network.num_heads
        extra = dit_rotary_buffers(model.network.max_seq_len, head_dim)
    elif isinstance(model.network, TimeFreeTransformer):
        config = _published_gidd(model, model.network)
    elif isinstance(model.network, LlamaDenoiser):
        config = denoiser_config(model.network, model.tokenizer) | _process(model)
    else:
        config = llama_config(model.network, model.tokenizer)
    code = exported_code(model) if with_code else {}
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    try:
        config |= code_config(model) if with_code else {}
        _write(part, config, tensors, extra, model)
        for name, text in (code | ({} if card is None else {CARD_FILE: card})).items():
            (part / name).write_text(text, encoding="utf-8")
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write(
    folder: Path,
    config: dict[str, Any],
    tensors: TorchTensors,
    extra: dict[str, np.ndarray],
    model: Pretrained,
) -> None:
    import transformers

    is_half = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(model.params))
    dtype = "bfloat16" if is_half else "float32"
    config = {"dtype": dtype, "transformers_version": transformers.__version__, **config}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    _write_weights(folder, tensors, extra)
    rows = model.network.vocab_size if isinstance(model.network, Llama) else None
    model.tokenizer.save(folder, size=rows)  # of others, no more tokens than the model has


def _write_weights(folder: Path, tensors: TorchTensors, extra: dict[str, np.ndarray]) -> None:
    """Write the weights, a file at a time: no more than one is held in memory."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    sizes = {
        name: math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors
    }
    sizes |= {name: array.nbytes for name, array in extra.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern=WEIGHTS_FILE.replace(".", "{suffix}."),
        max_shard_size=MAX_SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        arrays = {name: extra[name] if name in extra else tensors[name] for name in names}
        # transformers asks for the framework that the layout of the weights belongs to.
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder / CONFIG_FILE).stat().st_mode)  # it lets nobody else read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8"
        )


def _rows(model: Pretrained, network: DiT) -> int:
    """Return the vocabulary rows that a published DiT has: those of its softmax."""
    rows = network.vocab_size
    return padded_vocab_size(rows) if model.keep_padding_columns else rows


def _published_dit(model: Pretrained, network: DiT, rows: int) -> dict[str, Any]:
    assert model.process is not None
    config = {
        "architectures": ["DIT"],
        "attention_dropout": 0.0,
        "hidden_size": network.hidden_size,
        "max_seq_len": network.max_seq_len,
        "model_type": "dit",
        "num_attention_heads": network.num_heads,
        "num_hidden_layers": network.num_layers,
        "timestep_cond_dim": network.cond_dim,
        "vocab_size": rows,
        **_process_config(model.process),
        **_row_mode(model),
    }
    if network.position_times:
        config["position_times"] = True
    return config


def _published_gidd(model: Pretrained, network: TimeFreeTransformer) -> dict[str, Any]:
    assert model.process is not None
    section = {"process": _process_section(model.process)}  # refuses what no format can hold
    noise = gidd_noise(model.process) if isinstance(model.process, LogSnrProcess) else None
    tokenizer = model.tokenizer
    return {
        **gidd_config(network),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        **(section if noise is None else noise),
        **_row_mode(model),
    }


def _process(model: Pretrained) -> dict[str, Any]:
    assert model.process is not None
    return {"process": _process_section(model.process), **_row_mode(model)}


def _row_mode(model: Pretrained) -> dict[str, str]:
    # What a folder that does not say is taken for.
    return {} if model.row_mode == "packed" else {"row_mode": model.row_mode}


def _process_config(process: InterpolatingProcess) -> dict[str, Any]:
    """Return the keys that say a process beside a DiT: the first paper's, or a section."""
    section = _process_section(process)
    if isinstance(process, HybridProcess) and process.gamma == PAPERS_GAMMA:
        return {"t_eps": process.t_eps, "p_uniform": process.p_uniform}
    return {"t_eps": process.t_eps, "process": section}


def _process_section(process: InterpolatingProcess) -> dict[str, Any]:
    names = {kind: name for name, kind in PROCESSES.items()}
    kind = type(process)
    if kind not in names or process.background is not None:
        raise InputError(
            f"the process {kind.__name__} cannot be exported: the format knows "
            f"{', '.join(PROCESSES)}, with uniform noise"
        )
    return {"name": names[kind]} | {name: getattr(process, name) for name in process_fields(kind)}
