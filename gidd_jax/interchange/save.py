"""Models as Hugging Face folders: GIDD in the published format, Llamas for transformers."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gidd_jax.checkpoints.numbers import not_numbers
from gidd_jax.checkpoints.workdir import CONFIG_FILE
from gidd_jax.errors import InputError
from gidd_jax.interchange.folders import PROCESSES, process_fields
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.interchange.tensors import (
    StateDict,
    dit_params_to_torch,
    dit_rotary_buffers,
    llama_params_to_torch,
)
from gidd_jax.interchange.weight_files import WEIGHTS_FILE
from gidd_jax.models.dit import DiT, padded_vocab_size
from gidd_jax.models.llama import Llama
from gidd_jax.process import HybridProcess, InterpolatingProcess

PAPERS_GAMMA = 1.0  # the only one that the published format can mean


def check_new_folder(path: str | Path) -> Path:
    """Return the path of a folder to be written; InputError if something is there already."""
    folder = Path(path).expanduser()
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists: name a new folder, nothing is overwritten")
    if not folder.name:
        raise InputError(f"{path!r} names no folder: give one to write")
    return folder


def save_pretrained(model: Pretrained, path: str | Path) -> None:
    """Write config.json, float32 model.safetensors and the tokenizer into a new folder.

    Diffusion models get the tensor names and config keys of the published GIDD models (and a key
    `process` where the process is not the paper's), Llamas those of transformers. The folder
    appears when it is complete. Raises InputError if it exists, a parameter is not finite, or the
    process is of the user's own making.
    """
    folder = check_new_folder(path)
    bad = not_numbers(model.params)
    if bad is not None:
        raise InputError(f"the model is damaged ({bad}): nothing was written to {folder}")
    if isinstance(model.network, DiT):
        config, state_dict = _published_dit(model, model.network)
    else:
        config, state_dict = _hugging_face_llama(model, model.network)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    try:
        _write(part, config, state_dict, model)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write(folder: Path, config: dict[str, Any], state_dict: StateDict, model: Pretrained) -> None:
    import transformers
    from safetensors.numpy import save_file

    config = {"dtype": "float32", "transformers_version": transformers.__version__, **config}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    # transformers asks for the framework that the layout of the weights belongs to.
    contiguous = {name: np.ascontiguousarray(array) for name, array in state_dict.items()}
    save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.tokenizer.save(folder)


def _published_dit(model: Pretrained, network: DiT) -> tuple[dict[str, Any], StateDict]:
    assert model.process is not None
    rows = network.vocab_size
    if model.keep_padding_columns:
        rows = padded_vocab_size(rows)
    state_dict = dit_params_to_torch(jax.device_get(model.params), vocab_size=rows)
    head_dim = network.hidden_size // network.num_heads
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
    }
    if network.position_times:
        config["position_times"] = True
    if model.row_mode != "packed":  # what a folder that does not say is taken for
        config["row_mode"] = model.row_mode
    return config, state_dict | dit_rotary_buffers(network.max_seq_len, head_dim)


def _process_config(process: InterpolatingProcess) -> dict[str, Any]:
    names = {kind: name for name, kind in PROCESSES.items()}
    kind = type(process)
    if kind not in names or process.background is not None:
        raise InputError(
            f"the process {kind.__name__} cannot be exported: the format knows "
            f"{', '.join(PROCESSES)}, with uniform noise"
        )
    values = {"t_eps": process.t_eps}
    if isinstance(process, HybridProcess) and process.gamma == PAPERS_GAMMA:
        return values | {"p_uniform": process.p_uniform}
    numbers = {name: getattr(process, name) for name in process_fields(kind)}
    return values | {"process": {"name": names[kind], **numbers}}


def _hugging_face_llama(model: Pretrained, network: Llama) -> tuple[dict[str, Any], StateDict]:
    scaling = network.rope_scaling
    tokenizer = model.tokenizer
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "hidden_act": "silu",
        "hidden_size": network.hidden_size,
        "intermediate_size": network.intermediate_size or 4 * network.hidden_size,
        "max_position_embeddings": network.max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": network.num_heads,
        "num_hidden_layers": network.num_layers,
        "num_key_value_heads": network.num_kv_heads or network.num_heads,
        "pad_token_id": tokenizer.pad_id,
        "rms_norm_eps": network.rms_norm_eps,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_len,
        },
        "rope_theta": network.rope_theta,
        "tie_word_embeddings": network.tie_embeddings,
        "vocab_size": network.vocab_size,
    }
    return config, llama_params_to_torch(jax.device_get(model.params))
