"""Files of named tensors: safetensors, whole or in shards, and those of torch.save."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gidd_jax.data.files import stays_in_folder
from gidd_jax.errors import InputError, first_line
from gidd_jax.interchange.tensors import StateDict

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files, each read when it is asked for.

    Raises InputError for files that are damaged, or of a dtype that NumPy does not have.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: that of each tensor."""
        self._files = files
        self._open: dict[Path, Any] = {}

    def _slice(self, name: str) -> Any:
        return self._file(self._files[name]).get_slice(name)

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = _opened(file)
        return self._open[file]

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        try:
            return self._file(file).get_tensor(name)
        except InputError:
            raise
        except Exception as error:  # safetensors' own, or a dtype that NumPy does not have
            raise InputError(
                f"{file}: {name} cannot be read ({first_line(error)}): fetch the file again, or "
                "save it in float32 or bfloat16"
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._slice(name).get_shape())

    def __contains__(self, name: object) -> bool:  # without making it
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(file, framework="numpy")
    except Exception as error:  # safetensors' own
        raise InputError(f"{file} is damaged ({first_line(error)}): fetch it again") from error


def read_safetensors(folder: Path) -> tuple[SafeTensors, Path]:
    """Return the tensors of a folder, in one file or in shards with an index, and the main file.

    Raises InputError for a shard that is missing or damaged, and an index that names tensors which
    are not in their shard.
    """
    index, whole = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if not index.is_file() or whole.is_file():
        if not whole.is_file():
            raise InputError(f"{whole} is missing: weights are read from {WEIGHTS_FILE} alone")
        return SafeTensors(dict.fromkeys(_opened(whole).keys(), whole)), whole
    shards = _shards(index)
    for name in sorted(set(shards.values())):
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file} is missing, a shard that {INDEX_FILE} names: fetch it")
        absent = {t for t, shard in shards.items() if shard == name} - set(_opened(file).keys())
        if absent:
            raise InputError(
                f"{index} names {min(absent)} in {name}, where it is not: fetch both again"
            )
    return SafeTensors({tensor: folder / shard for tensor, shard in shards.items()}), index


def _shards(index: Path) -> dict[str, str]:
    try:
        shards = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        if all(map(stays_in_folder, shards.values())):
            return shards
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
