"""The folder of a run: whose it is, who is at work in it, what people read there."""

import contextlib
import json
from collections.abc import Iterator

import filelock
import jax
from absl import logging
from etils import epath

from gidd_jax.checkpoints.checkpoint import tokenizer_files
from gidd_jax.checkpoints.storage import (
    check_reachable,
    is_remote,
    named_failures,
    run_folder,
    write_atomically,
)
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.own_process import Source
from gidd_jax.settings import MAY_CHANGE_ON_RESUME, Settings, difference

CONFIG_FILE = "config.json"  # the settings of the run in a workdir
PROCESS_FILE = "process.py"  # the text of the user's own process, for people to read
LOCK_FILE = ".lock"  # held by the run that is at work in a workdir


def check_workdir(
    workdir: str | epath.PathLike,
    settings: Settings,
    own: Source | None = None,
    *,
    allow_config_change: bool = False,
) -> None:
    """Raise InputError that says what differs if `workdir` belongs to a run with other settings.

    Writes nothing. The run's length, logging, checkpoint cadence and mesh may differ. own: the
    source of the user's own process, whose text must be that of the run.
    """
    root = run_folder(workdir)
    check_reachable(root)
    path, above = root / CONFIG_FILE, [] if is_remote(root) else root.parents
    nearest = next((folder for folder in (root, *above) if folder.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise InputError(f"--workdir={workdir}: {nearest} is a file, name a folder")
    if not path.exists():
        return
    changed = own is not None and _changed(root, own)
    if allow_config_change:
        if own is not None and changed:
            logging.warning("%s is not what %s began with: going on with it", own.path, workdir)
        return
    try:
        old = Settings.from_saved(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:  # no JSON, or of another version
        raise InputError(
            f"{path} cannot be read ({error}): use another workdir, or --allow_config_change"
        ) from error
    changes = difference(old, settings, ignore=MAY_CHANGE_ON_RESUME)
    if changes:
        raise InputError(
            f"{workdir} belongs to a run with another config ({'; '.join(changes)}): use another "
            "workdir, or --allow_config_change"
        )
    if own is not None and changed:
        raise InputError(
            f"{own.path} has changed since the run in {workdir} began (its text is in "
            f"{root / PROCESS_FILE}): put that back, use another workdir, or --allow_config_change"
        )


def _changed(root: epath.Path, own: Source) -> bool:
    path = root / PROCESS_FILE
    return path.exists() and path.read_bytes() != own.text.encode()


@contextlib.contextmanager
def lock_workdir(workdir: str | epath.PathLike) -> Iterator[None]:
    """Keep other runs out of `workdir` (made if missing) until the block ends or the process dies.

    Process 0 holds the lock. Raises InputError when another run is at work there. A bucket has no
    lock that would end with its process: there, nothing is held.
    """
    folder = run_folder(workdir)
    if jax.process_index() != 0 or is_remote(folder):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(
            f"another run is at work in {workdir}: wait for it, stop it, or use another workdir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_workdir(
    workdir: str | epath.PathLike,
    settings: Settings,
    tokenizer: Tokenizer,
    own: Source | None = None,
) -> None:
    """Write settings, tokenizer and the user's own process into `workdir`, for people to read.

    The folder is made if missing. Only process 0 writes. Checkpoints carry their own copies.
    Raises StorageError when a bucket takes nothing.
    """
    if jax.process_index() != 0:
        return
    folder = run_folder(workdir)
    with named_failures(folder):
        write_atomically(folder / CONFIG_FILE, settings.to_json())
        if own is not None:
            write_atomically(folder / PROCESS_FILE, own.text)
        for name, text in tokenizer_files(tokenizer).items():
            write_atomically(folder / "tokenizer" / name, text)
