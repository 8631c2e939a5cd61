"""What a corpus was, so that a run that continues notices when it has changed.

A file is told by its size and its contents, under its name relative to the data path: a folder may
move. Shards are told by the hashes of their manifest, datasets by their version and size.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from gidd_jax.data import shards
from gidd_jax.data.corpus import DATASETS, dataset_of, named_files
from gidd_jax.errors import InputError
from gidd_jax.mixture import split_mixture

# The files of a larger corpus are told by their sizes and blocks, spread evenly from the first byte
# to the last: at every start a run hashes its corpus, which must not take longer than opening it.
MAX_HASHED_BYTES = 256 << 20
_BLOCK, _LEAST_BLOCKS = 64 << 10, 4  # of each file
_MAX_NAMED = 3  # changes that a message names


def fingerprint(path: str, validation: str, text_key: str) -> dict[str, Any]:
    """Return {path, validation, parts}, ready for JSON; parts: what each file is, by its name.

    A mixture has several parts; files that the rule `validation` names belong to each of them.
    Raises InputError when something is missing or cannot be read.
    """
    parts = [_part(part.path, validation, text_key) for part in split_mixture(path)]
    return {"path": path, "validation": validation, "parts": parts}


def check_same(old: Any, new: dict[str, Any]) -> None:
    """Raise InputError that names what has changed from one fingerprint to the next.

    With another path or rule it only warns: that is another config, on which someone insisted.
    """
    try:
        asked = [(old[key], new[key]) for key in ("path", "validation")]
        parts = [dict(part) for part in old["parts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the corpus in the data position is damaged: take an older step"
        ) from error
    if any(before != now for before, now in asked):
        if parts != new["parts"]:
            logging.warning("data.path=%s holds another corpus than before", new["path"])
        return
    changed = _changes(parts, new["parts"])
    if changed:
        raise InputError(
            f"the corpus data.path={new['path']} is not what it was when the checkpoint was "
            f"written: {changed}; restore it, or start in another workdir"
        )


def _changes(old: list[dict[str, str]], new: list[dict[str, str]]) -> str:
    """Which files differ, in words; '' where none does. One path has as many parts as before."""
    found = []
    for before, now in zip(old, new, strict=False):
        found += [f"{n} changed" for n in before if n in now and before[n] != now[n]]
        found += [f"{n} is gone" for n in before if n not in now]
        found += [f"{n} is new" for n in now if n not in before]
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return ", ".join(found[:_MAX_NAMED]) + more


def file_fingerprints(files: dict[str, Path]) -> dict[str, str]:
    """Return size and BLAKE2b of each file; above MAX_HASHED_BYTES in all, of blocks of it."""
    try:
        total = sum(file.stat().st_size for file in files.values())
        num_blocks = None
        if total > MAX_HASHED_BYTES:
            num_blocks = max(_LEAST_BLOCKS, MAX_HASHED_BYTES // _BLOCK // len(files))
        hashed = tqdm(files.items(), "Hashing files", disable=None, unit="file", leave=False)
        return {name: _file_fingerprint(file, num_blocks) for name, file in hashed}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error}") from error


def _file_fingerprint(file: Path, num_blocks: int | None) -> str:
    digest, size = hashlib.blake2b(digest_size=16), file.stat().st_size
    starts = range(0, size, _BLOCK)
    if num_blocks is not None and len(starts) > num_blocks:
        starts = np.linspace(0, size - _BLOCK, num_blocks).astype(np.int64)
    with open(file, "rb") as stream:
        for start in starts:
            stream.seek(int(start))
            digest.update(stream.read(_BLOCK))
    return f"{size} bytes {digest.hexdigest()}"


def _part(path: str, validation: str, text_key: str) -> dict[str, str]:
    if shards.is_shard_folder(path):
        manifest = shards.Manifest.read(Path(path).expanduser())
        return {s.file: s.sha256 for split in shards.SPLITS for s in manifest.splits[split]}
    rule, _, argument = validation.partition(":")
    dataset = dataset_of(path)
    if dataset is not None:
        kind, name = dataset
        splits = ["train", argument] if rule == "split" else ["train"]
        return {f"split {s}": DATASETS[kind](name, s, text_key).version for s in splits}
    files = named_files(path)
    if rule == "path":
        files |= {f"{name} (validation)": file for name, file in named_files(argument).items()}
    return file_fingerprints(files)
