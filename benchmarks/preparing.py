"""Of suite data: turning texts into shards by gidd_jax.prepare_data, on 1 and 2 processes.

The command as a user starts it, with the start of its processes; the texts are several copies of
the corpus of the package. Memory is that of all its processes, and must not grow with the texts.
"""

import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import TreeMemory
from benchmarks.plan import Case, Check, Found, Subject

# Of one copy of the corpus, with an end of text after each document.
DOCUMENTS, TOKENS, TEXT_BYTES = 135, 437_047, 1_817_481
COPIES = (2, 8)
SHARD_SIZE = 30  # documents: several shards of one copy, as of a large corpus with the default
LARGEST_GROWTH = 1.1  # of the memory, when the texts grow fourfold
LENGTH = 512
FILE = "corpus.jsonl"


def cases(scale: str) -> list[Case]:
    """Return both numbers of processes, and two sizes of the texts on two."""
    if scale == "small":
        return [_case(1, 1, rounds=1)]
    few, many = COPIES
    return [_case(1, few), _case(2, few), _case(2, many)]


def _case(processes: int, copies: int, rounds: int = 2) -> Case:
    return Case(
        kind="prepare",
        name=_name(processes, copies),
        shape={"processes": processes, "copies": copies, "text_bytes": copies * TEXT_BYTES},
        tokens=copies * TOKENS,
        rounds=rounds,
    )


def _name(processes: int, copies: int) -> str:
    return f"prepare_p{processes}_{copies * TEXT_BYTES / 1e6:.0f}mb"


def ours(case: Case) -> Subject:
    """The command, on texts in a folder of its own."""
    from gidd_jax.data.corpus import list_files

    folder = Path(tempfile.mkdtemp(prefix="gidd_jax_texts_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (corpus,) = list_files("embedded")
    (folder / FILE).write_bytes(corpus.read_bytes() * case.shape["copies"])
    return Subject(lambda: _prepare(case, folder), memory=TreeMemory)


def _prepare(case: Case, folder: Path) -> None:
    from gidd_jax.data import shards

    out = folder / "shards"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "gidd_jax.prepare_data", "--tokenizer=embedded"]
    options = {
        "path": folder / FILE,
        "out": out,
        "seq_len": LENGTH,
        "validation": "last:1",
        "num_workers": case.shape["processes"],
        "shard_size": SHARD_SIZE,
    }
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"prepare_data: {done.stderr}")
    check_counts(case, [shards.Manifest.read(out).totals(split) for split in shards.SPLITS])


def check_counts(case: Case, totals: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the splits hold the tokens and bytes that the case says."""
    for name, wanted in (("tokens", case.tokens), ("bytes", case.shape["text_bytes"])):
        made = sum(total[name] for total in totals)
        if made != wanted:
            raise ValueError(f"{case.name}: {made} {name} instead of {wanted}")


def checks(found: Found) -> list[Check]:
    """Return the throughput, which is told, and the growth of the memory, which is judged."""
    few, many = COPIES
    told = []
    for name in (_name(1, few), _name(2, few), _name(2, many)):
        one = found.get(name)
        speed = one and one.tokens_per_second
        told.append(Check(f"{name}: tokens/s, with the start", speed, None))
        told.append(
            Check(f"{name}: MB/s", one and one.shape["text_bytes"] / one.seconds / 1e6, None)
        )
    peaks = [one and one.peak_bytes for one in (found.get(_name(2, n)) for n in COPIES)]
    growth = peaks[1] / peaks[0] if peaks[0] and peaks[1] else None
    name = f"prepare: memory of {_name(2, many)} / {_name(2, few)}"
    return [*told, Check(name, growth, LARGEST_GROWTH, at_most=True)]
