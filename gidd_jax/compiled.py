"""Where JAX keeps the programs that it compiled, so that the next command need not compile them."""

import hashlib
import os
import platform
from pathlib import Path

MOST_BYTES = 2 << 30  # those unused the longest go first


def keep_compiled_programs(is_one_of_several: bool) -> None:
    """Let JAX keep what it compiles on disk, unless the user's environment says where.

    JAX reads these variables when it is imported, which is after this. Several processes keep
    nothing: JAX writes the programs of the first alone, which would then compile nothing while the
    others wait for its part of the autotuning that XLA shares out among GPUs.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # its size is the user's, too: a limit makes JAX refuse a folder without one
    if is_one_of_several:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return  # a user without a home
    folder = cache / "gidd_jax" / "compiled" / _processor()
    for file in folder.glob("*-cache"):
        # Left by a process that was killed: with it there JAX would keep nothing more.
        if not file.with_name(file.name.removesuffix("-cache") + "-atime").exists():
            file.unlink(missing_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MOST_BYTES))


def _processor() -> str:
    """Return a name of this kind of CPU: a program that is compiled for one is for its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = [platform.node()]
    features = [line for line in lines if line.lower().startswith(("flags", "features"))] or lines
    digest = hashlib.blake2b(features[0].encode(), digest_size=6)
    return f"{platform.machine()}-{digest.hexdigest()}"
