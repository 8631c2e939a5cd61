"""Where a run can live: a folder, or a folder in a bucket of Google Cloud Storage."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator

from etils import epath

from gidd_jax.errors import InputError, StorageError, first_line

_BUCKETS = "gs://"  # the only store that Orbax 0.12 writes to without a mount


def run_folder(address: str | epath.PathLike) -> epath.Path:
    """Return the absolute folder of a path, file:///path or gs://bucket/folder.

    Asks no store. Raises InputError for other addresses, and for gs:// without the package gcsfs.
    """
    text = os.fspath(address)
    scheme = re.match(r"(\w[\w+.-]+):/(/?)", text)
    if scheme is None:
        return epath.Path(text).resolve()
    if not scheme[2]:  # what pathlib.Path makes of gs://bucket
        raise InputError(
            f"{text}: this takes a local folder; a run in a bucket is for gidd_jax.train and for "
            "commands with --checkpoint"
        )
    if text.startswith("file:///"):
        return epath.Path(text.removeprefix("file://")).resolve()
    if not re.match(rf"{_BUCKETS}[^/]", text):
        raise InputError(
            f"{text}: a run lives in a folder, file:///FOLDER or gs://BUCKET/FOLDER; mount another "
            "store and give the folder of the mount"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{text} needs the package gcsfs: pip install 'gidd-jax[gcs]'")
    return epath.Path(text)


def is_remote(folder: epath.PathLike) -> bool:
    """Tell whether a folder is in a bucket: no lock, no rename, no appending; writes are atomic."""
    return os.fspath(folder).startswith(_BUCKETS)


def check_reachable(folder: epath.Path) -> None:
    """Raise InputError unless the bucket of a remote folder answers; a local one passes."""
    if not is_remote(folder):
        return
    bucket = "/".join(str(folder).split("/")[:3])
    try:
        found = epath.Path(bucket).exists()
    except Exception as error:  # whatever gcsfs, aiohttp and google-auth raise
        raise InputError(
            f"{folder} cannot be reached ({first_line(error)}): check the network, the credentials "
            "(gcloud auth application-default login) and your rights in the bucket"
        ) from error
    if not found:
        raise InputError(f"{folder}: there is no bucket {bucket}, or you may not see it")


@contextlib.contextmanager
def named_failures(folder: epath.Path) -> Iterator[None]:
    """Make one StorageError of whatever a bucket's client raises; local errors stay as they are."""
    try:
        yield
    except Exception as error:
        if not is_remote(folder):
            raise
        raise StorageError(
            f"{folder} could not be written ({first_line(error)}): check the network and your "
            "rights in the bucket; the same command continues from the last checkpoint"
        ) from error


def write_atomically(path: str | epath.PathLike, text: str) -> None:
    """Write a text file so that readers see the old or the new content, never a part."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_text(text)  # an object appears when it is whole
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / (path.name + ".part")
    part.write_text(text)
    part.replace(path)
