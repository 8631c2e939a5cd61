"""Generated and corrected texts, and the files that hold them."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gidd_jax.data.array_files import pack_texts, read_arrays
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.sampling.trace import Trace

# Stands in every file of samples: draws of low precision make texts look better by their
# generative perplexity and poorer by their entropy (arXiv 2409.02908).
SAMPLING_PRECISION = "float32 probabilities and draws"


class Samples(NamedTuple):
    """Generated sequences: ids int32 [N, L] (padded where rows are shorter) and their texts.

    log_probs float32 [N, L]: log-probability of each token in the network call that put it there,
    before temperature and filters; drawn_at int32 [N, L]: the number of that call; both are 0 for
    given tokens. network_calls: calls that were made, each on one batch: drawn_at counts those that
    could change nothing, too. stopped_at int32 [N]: calls after which a sequence was done, those
    of the whole schedule where its method stops none. trace: every change on the way, where it was
    asked for (saved by `sampling.trace.save_trace`, not with the samples).
    """

    ids: np.ndarray
    texts: list[str]
    log_probs: np.ndarray
    drawn_at: np.ndarray
    network_calls: int
    stopped_at: np.ndarray
    trace: Trace | None = None


class Likelihoods(NamedTuple):
    """Log-likelihoods of N texts, in nats: log_probs float64 [N].

    ids int32 [N, L]: the token that begins a text, the prompt, the text and padding; by_token
    float32 [N, L]: 0 but for the text, sums to log_probs, or, where an estimator averages the
    probabilities of several draws, to the mean of their logarithms, which is less; num_tokens int
    [N]: of the text; calls of the network.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    by_token: np.ndarray
    num_tokens: np.ndarray
    network_calls: int


class Corrected(NamedTuple):
    """Corrected sequences, and for each of the N how it went (see `sampling.correction`).

    network_calls: each on one batch; trace as in `Samples`.
    """

    ids: np.ndarray
    texts: list[str]
    initial_accuracy: np.ndarray
    final_accuracy: np.ndarray
    num_changes: np.ndarray
    converged: np.ndarray
    stopped_early: np.ndarray
    num_steps: np.ndarray
    network_calls: int
    trace: Trace | None = None


class Suspicions(NamedTuple):
    """N texts, each token judged by `sampling.suspicion`: all arrays [N, L], padded like ids int32.

    judged bool: the tokens of the text; wrong float32: probability that the token is wrong;
    proposals int32, proposal_probs float32: the best other token, and the probability that it is
    what belongs there; all 0 where nothing is judged. network_calls: each on one batch.
    """

    ids: np.ndarray
    texts: list[str]
    judged: np.ndarray
    wrong: np.ndarray
    proposals: np.ndarray
    proposal_probs: np.ndarray
    network_calls: int


def check_output(path: str | Path, suffix: str, flag: str = "--out") -> Path:
    """Return the path of a file to be written; InputError unless it ends in suffix, and is or will
    be in a folder that can be written to."""
    path = Path(path)
    if path.suffix != suffix:
        raise InputError(f"{flag} must end in {suffix}: {path}")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{flag}={path}: {parent} is not a folder")
    if path.is_dir():
        raise InputError(f"{flag}={path} is a folder: name a file")
    try:
        tempfile.TemporaryFile(dir=parent).close()  # rights alone do not say that a disk can
    except OSError as error:
        raise InputError(
            f"{flag}={path}: {parent} cannot be written to ({error.strerror}): name another folder"
        ) from error
    return path


def check_apart(**files: Path | None) -> None:
    """Raise InputError when two of the files, by the names of their flags, are one."""
    seen: dict[Path, str] = {}
    for flag, path in files.items():
        other = None if path is None else seen.setdefault(path.resolve(), flag)
        if other not in (None, flag):
            raise InputError(f"--{flag}={path} is the file of --{other}: name another")


def save_samples(path: str | Path, samples: Samples | Corrected, tokenizer: Tokenizer) -> None:
    """Write samples as .npz, readable without pickle; never half a file.

    Besides the fields of `samples` it holds `tokenizer`, the fingerprint of what the ids mean, and
    `sampling_precision`; the texts are read back by `gidd_jax.data.texts.read_texts`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = samples._asdict() | pack_texts("texts", samples.texts)
    fields.pop("trace", None)
    fields["tokenizer"] = np.array(tokenizer.fingerprint)
    fields["sampling_precision"] = np.array(SAMPLING_PRECISION)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, allow_pickle=False, **fields)
    os.replace(part, path)


def load_ids(path: str | Path, tokenizer: Tokenizer) -> np.ndarray:
    """Return the token ids int32 [N, L] of a file of samples.

    Raises InputError when it is no such file, or was made with another tokenizer.
    """
    data = read_arrays(path, ("ids", "tokenizer"), "file of samples")
    ids = data.get("ids")
    if ids is None or ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{path} holds no token ids [N, L]: write it with gidd_jax.sample --out")
    if not ids.size:
        raise InputError(f"{path} holds no token: draw samples with gidd_jax.sample --out")
    known = str(data.get("tokenizer", tokenizer.fingerprint))
    outside = ids.min() < 0 or ids.max() >= tokenizer.vocab_size
    if not tokenizer.has_fingerprint(known) or outside:
        raise InputError(
            f"{path} was made with another tokenizer than that of the checkpoint: "
            "sample with this checkpoint, or give the texts"
        )
    return ids.astype(np.int32)
