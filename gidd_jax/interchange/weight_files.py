"""Files of named tensors: safetensors, whole or in shards, and those of torch.save."""

import json
from pathlib import Path

import numpy as np

from gidd_jax.data.files import stays_in_folder
from gidd_jax.errors import InputError, first_line
from gidd_jax.interchange.tensors import StateDict

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_safetensors(folder: Path) -> tuple[StateDict, Path]:
    """Return the tensors of a folder, in one file or in shards with an index, and the main file."""
    from safetensors.numpy import load_file

    index = folder / INDEX_FILE
    is_sharded = index.is_file() and not (folder / WEIGHTS_FILE).is_file()
    names = _shard_names(index) if is_sharded else [WEIGHTS_FILE]
    state_dict: StateDict = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file} is missing: weights are read from {WEIGHTS_FILE} alone")
        try:
            state_dict |= load_file(file)
        except Exception as error:  # safetensors' own, or a dtype that NumPy does not have
            raise InputError(f"{file} is damaged ({first_line(error)}): fetch it again") from error
    return state_dict, index if is_sharded else folder / WEIGHTS_FILE


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if all(map(stays_in_folder, names)):
            return names
        reason = "a file of another folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = first_line(error)
    raise InputError(f"{index} is no index of safetensors ({reason}): fetch it again")


def read_torch(file: Path) -> StateDict:
    """Return the tensors of a file of torch.save; objects other than tensors are refused."""
    if not file.is_file():
        raise InputError(f"{file} is missing: it holds the weights that config.yaml describes")
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{file}: PyTorch is needed to read it: pip install 'gidd-jax[eval]'"
        ) from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: np.asarray(tensor.float().numpy()) for name, tensor in tensors.items()}
    except Exception as error:  # the unpickler's own, zip errors, values that are no tensors
        raise InputError(
            f"{file} is damaged or holds more than tensors ({first_line(error)}): save the model's "
            "state_dict again"
        ) from error
