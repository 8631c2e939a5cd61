"""Files of named arrays (.npz): samples and traces."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from gidd_jax.errors import InputError


def read_arrays(path: str | Path, names: Collection[str], kind: str) -> dict[str, np.ndarray]:
    """Return those of the named arrays that a file holds; pickled objects are refused.

    Raises InputError when the file is missing or damaged; `kind` says what it should be.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except FileNotFoundError as error:
        raise InputError(f"no {kind} {path}: write one with gidd_jax.sample") from error
    except Exception as error:  # NumPy's, zipfile's and zlib's own, and sizes beyond the memory
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is no {kind} (.npz): {reason}") from error
