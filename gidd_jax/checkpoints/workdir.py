"""The folder of a run: whose it is, who is at work in it, what people read there."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax
from absl import logging
from etils import epath

from gidd_jax.checkpoints.checkpoint import find_checkpoint, tokenizer_files
from gidd_jax.checkpoints.storage import (
    check_reachable,
    is_remote,
    named_failures,
    run_folder,
    write_atomically,
)
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.own_process import Source, from_record, read_source
from gidd_jax.parallel.distributed import check_same, refused_together
from gidd_jax.sections import split_own_process
from gidd_jax.settings import (
    MAY_CHANGE_ON_RESUME,
    MAY_DIFFER_BETWEEN_HOSTS,
    ProcessSettings,
    Settings,
    difference,
    flatten,
)

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
    source of the user's own process, whose text must be that of the run, wherever its file is.
    """
    root = run_folder(workdir)
    check_reachable(root)
    path, above = root / CONFIG_FILE, [] if is_remote(root) else root.parents
    nearest = next((folder for folder in (root, *above) if folder.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise InputError(f"--workdir={workdir}: {nearest} is a file, name a folder")
    if not path.exists():
        return
    if allow_config_change:
        _warn_of_change(root, own)
        return
    try:
        old = Settings.from_saved(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:  # no JSON, or of another version
        raise InputError(
            f"{path} cannot be read ({error}): use another workdir, or --allow_config_change"
        ) from error
    if own is not None and _is_class(old.process, own.class_name):
        # Its text says whether it is the same, not how its path is spelled.
        process = dataclasses.replace(old.process, name=settings.process.name)
        old = dataclasses.replace(old, process=process)
    changes = difference(old, settings, ignore=MAY_CHANGE_ON_RESUME)
    if changes:
        raise InputError(
            f"{workdir} belongs to a run with another config ({'; '.join(changes)}): use another "
            "workdir, or --allow_config_change"
        )
    change = own and _change(root, own)
    if change:
        raise InputError(
            f"{change}: put that text back, use another workdir, or --allow_config_change"
        )


def agree(
    workdir: str | epath.PathLike,
    settings: Settings,
    *,
    allow_config_change: bool = False,
    allow_code: bool = False,
) -> Source | None:
    """Return the source of the user's own process, once all processes may train in `workdir`.

    Every process calls it. Raises InputError as `run_source` and `check_workdir` do, if one of the
    processes has reason to, or if they were given different settings or different code.
    """
    with refused_together():
        own = run_source(workdir, settings.process, allow_code=allow_code)
        check_workdir(workdir, settings, own, allow_config_change=allow_config_change)
    facts = {
        key: repr(value)
        for key, value in flatten(settings.to_dict()).items()
        if key not in MAY_DIFFER_BETWEEN_HOSTS
    }
    code = settings.process.name if own is None else f"{own.class_name} of {own.sha256}"
    check_same(facts | {"process.name": code})
    return own


def run_source(
    workdir: str | epath.PathLike, settings: ProcessSettings, *, allow_code: bool = False
) -> Source | None:
    """Return the source of the user's own process for a run; None if the process is built in.

    It is the text of the file that `settings` names. Where that is gone, allow_code takes the text
    that the run recorded. Raises InputError when there is no text, or it may not be run.
    """
    try:
        return read_source(settings.name)
    except InputError:
        split = split_own_process(settings.name)
        recorded = recorded_process(workdir)
        if split is None or recorded is None or Path(split[0]).exists():
            raise
    path, class_name = split
    short = recorded.sha256[:12]
    if not allow_code:
        raise InputError(
            f"{settings.name}: no such file: {path}; its text (sha256 {short}) is recorded in "
            f"{workdir}: put the file back, or pass --allow_code to gidd_jax.train to continue "
            "with what is recorded"
        )
    logging.warning(
        "%s is gone: continuing with the text recorded in %s (%s)", path, workdir, short
    )
    return Source(path, class_name, recorded.text)


def recorded_process(workdir: str | epath.PathLike) -> Source | None:
    """Return the source of the user's own process that a run recorded; None if it has none.

    The newest checkpoint decides; before there is one, the file that the run left to read. Raises
    InputError when the record is damaged.
    """
    root = run_folder(workdir)
    try:
        checkpoint = find_checkpoint(root)
    except InputError:  # no step was written yet
        return _readable_process(root)
    settings = Settings.from_saved(checkpoint.config()).process
    return from_record(checkpoint.process(), settings, checkpoint.folder)


def _readable_process(root: epath.Path) -> Source | None:
    try:
        name = json.loads((root / CONFIG_FILE).read_text())["process"]["name"]
        path, class_name = split_own_process(name) or ("", "")
        text = (root / PROCESS_FILE).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return Source(path, class_name, text) if path else None


def _is_class(settings: ProcessSettings, class_name: str) -> bool:
    split = split_own_process(settings.name)
    return split is not None and split[1] == class_name


def _change(root: epath.Path, own: Source) -> str | None:
    """Say how the text is another one than the run's, with the names of both; None if it is not."""
    recorded = recorded_process(root)
    if recorded is None or recorded.sha256 == own.sha256:
        return None
    copy = _readable_process(root)
    kept = copy is not None and copy.sha256 == recorded.sha256
    return (
        f"{own.path} has changed since the run in {root} began: its sha256 is {own.sha256[:12]}, "
        f"that of {recorded.path} was {recorded.sha256[:12]}"
        + (f" ({root / PROCESS_FILE} is a copy)" if kept else "")
    )


def _warn_of_change(root: epath.Path, own: Source | None) -> None:
    try:
        change = own and _change(root, own)
    except InputError as error:
        change = str(error)
    if change:
        logging.warning("%s: continuing with the file as it is", change)


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
