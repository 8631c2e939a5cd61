"""Files of named arrays (.npz), such as samples and traces, and texts among the arrays."""

from collections.abc import Collection, Mapping, Sequence
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


def pack_texts(name: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the arrays that stand for N texts: their bytes uint8 [num_bytes] and ends int64 [N].

    An array of strings would take N times the longest one, and drop the NULs that end a text.
    """
    # A token may write part of a character, which Python keeps as half of a surrogate pair.
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    return {
        name: np.frombuffer(b"".join(raw), np.uint8),
        f"{name}_ends": np.cumsum([len(r) for r in raw], dtype=np.int64),
    }


def unpack_texts(arrays: Mapping[str, np.ndarray], name: str) -> list[str] | None:
    """Return the texts of `pack_texts`, or of str [N] in older files; None if there are none."""
    packed, ends = arrays.get(name), arrays.get(f"{name}_ends")
    if packed is None or packed.ndim != 1:
        return None
    if packed.dtype.kind == "U":
        return [str(text) for text in packed]
    if packed.dtype != np.uint8 or ends is None or ends.ndim != 1 or ends.dtype.kind != "i":
        return None
    starts = np.concatenate([[0], ends])
    if np.any(np.diff(starts) < 0) or starts[-1] != packed.size:
        return None
    raw = packed.tobytes()
    try:
        return [
            raw[a:b].decode("utf-8", "surrogatepass")
            for a, b in zip(starts[:-1], ends, strict=True)
        ]
    except UnicodeDecodeError:
        return None
