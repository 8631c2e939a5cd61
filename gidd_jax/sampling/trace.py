"""How texts came about: every token that a sampler put anywhere, call by call, and its file.

A trace holds only changes. The .npz file (no pickle) has N sequences of L tokens and M changes:

  start         int32 [N, L]  ids before the first network call
  num_calls     int32 [N]     network calls of each sequence, those that could change nothing too
  sample, call, position, token  int32 [M]  the sequence, the call from 1 on, where, and what
  log_prob      float32 [M]   log x_hat (before temperature and filters) of the token in that call;
                              0 for the mask
  given         bool [N, L]   tokens that were there before: of prompts, of texts to be corrected
  lengths       int32 [N]     from there on a sequence is padding
  texts         str [N]       the final texts
  token_ids, token_texts      the ids that occur, int32 [K], and what each writes, str [K]; a token
                              of incomplete UTF-8 has lone surrogates for its bytes (PEP 383)
  mask_id, special_ids        int32, [S]: the mask, and other tokens that write no text
  tokenizer     str           fingerprint of what the ids mean

Changes are sorted by sequence, call and position. A sequence after call c is `start` with the
changes of all calls up to c.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import pre_tokenizers

from gidd_jax.data.array_files import pack_texts, read_arrays, unpack_texts
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError

if TYPE_CHECKING:
    from gidd_jax.sampling.correction import Correction
    from gidd_jax.sampling.loop import Drawn


class Changes(NamedTuple):
    """The changes of N sequences, see the docstring of the module."""

    start: np.ndarray
    num_calls: np.ndarray
    sample: np.ndarray
    call: np.ndarray
    position: np.ndarray
    token: np.ndarray
    log_prob: np.ndarray


class Trace(NamedTuple):
    """Changes, and what it takes to show them without a tokenizer; as in the file."""

    changes: Changes
    given: np.ndarray
    lengths: np.ndarray
    texts: list[str]
    token_ids: np.ndarray
    token_texts: list[str]
    mask_id: int
    special_ids: np.ndarray
    tokenizer: str


class Played(NamedTuple):
    """One sequence after 0, 1, ... C calls: ids int32 and log_probs float32, each [C + 1, L]."""

    ids: np.ndarray
    log_probs: np.ndarray


def changes_of(drawn: "Drawn", mask_id: int) -> Changes:
    """Return what each call changed in a batch that was drawn with a trace, on the host.

    Autoregressive sequences come without frames: `drawn_at` says it all.
    """
    ids, log_probs, drawn_at, num_calls = (np.asarray(leaf) for leaf in drawn[:4])
    if drawn.frames is None:
        return changes_in_order(ids, log_probs, drawn_at, int(num_calls), mask_id)
    start, *after = (np.asarray(leaf) for leaf in drawn.frames)
    if num_calls > len(after[0]):  # one more call filled the masks that were left
        after = [np.concatenate([a, b[None]]) for a, b in zip(after, (ids, log_probs), strict=True)]
    return changes_between(start, *after)


def changes_of_correction(correction: "Correction") -> Changes:
    """Return what each step changed in a batch that was corrected with a trace, on the host."""
    assert correction.frames is not None
    num_steps = np.asarray(correction.num_steps, np.int32)
    start, *after = (np.asarray(leaf) for leaf in correction.frames)
    changes = changes_between(start, *(leaf[: num_steps.max()] for leaf in after))
    return changes._replace(num_calls=num_steps)


def changes_between(start: np.ndarray, ids: np.ndarray, log_probs: np.ndarray) -> Changes:
    """Return the changes from start [B, L] on, of ids and log_probs [C, B, L] after each call."""
    before = np.concatenate([start[None], ids[:-1]])
    sample, call, position = np.nonzero((ids != before).transpose(1, 0, 2))
    return _changes(
        start,
        len(ids),
        sample,
        call + 1,
        position,
        ids[call, sample, position],
        log_probs[call, sample, position],
    )


def changes_in_order(
    ids: np.ndarray, log_probs: np.ndarray, drawn_at: np.ndarray, num_calls: int, mask_id: int
) -> Changes:
    """Return the changes of sequences [B, L] written from left to right, in the calls drawn_at.

    What is still to come is shown as masks.
    """
    sample, position = np.nonzero(drawn_at)
    return _changes(
        np.where(drawn_at > 0, mask_id, ids),
        num_calls,
        sample,
        drawn_at[sample, position],
        position,
        ids[sample, position],
        log_probs[sample, position],
    )


def _changes(
    start: np.ndarray,
    num_calls: int,
    *columns: np.ndarray,  # sample to log_prob
) -> Changes:
    *integers, log_prob = columns
    calls = np.full(len(start), num_calls)
    start, calls, *integers = (np.asarray(a, np.int32) for a in (start, calls, *integers))
    return Changes(start, calls, *integers, np.asarray(log_prob, np.float32))


def join_changes(parts: Sequence[Changes], count: int) -> Changes:
    """Return the changes of the first `count` sequences of several batches."""
    first = np.cumsum([0, *(len(part.start) for part in parts[:-1])])
    moved = [p._replace(sample=p.sample + np.int32(n)) for p, n in zip(parts, first, strict=True)]
    joined = Changes(*(np.concatenate(columns) for columns in zip(*moved, strict=True)))
    kept = joined.sample < count
    return Changes(
        joined.start[:count], joined.num_calls[:count], *(column[kept] for column in joined[2:])
    )


def play(changes: Changes, sample: int) -> Played:
    """Return one sequence after every call."""
    start, num_calls = changes.start[sample], int(changes.num_calls[sample])
    ids = np.tile(start, (num_calls + 1, 1))
    log_probs = np.zeros(ids.shape, np.float32)
    low, high = np.searchsorted(changes.sample, [sample, sample + 1])
    for n in range(low, high):
        call, position = changes.call[n], changes.position[n]
        ids[call:, position] = changes.token[n]
        log_probs[call:, position] = changes.log_prob[n]
    return Played(ids, log_probs)


def make_trace(
    changes: Changes,
    given: np.ndarray,
    lengths: np.ndarray,
    texts: list[str],
    tokenizer: Tokenizer,
) -> Trace:
    """Return the trace with the texts of the tokens that occur in it."""
    roles = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    token_ids = np.unique([*changes.start.ravel(), *changes.token, tokenizer.mask_id])
    return Trace(
        changes=changes,
        given=given,
        lengths=np.asarray(lengths, np.int32),
        texts=texts,
        token_ids=token_ids.astype(np.int32),
        token_texts=written_by(tokenizer, token_ids),
        mask_id=tokenizer.mask_id,
        special_ids=np.array(sorted({i for i in roles if i is not None}), np.int32),
        tokenizer=tokenizer.fingerprint,
    )


def written_by(tokenizer: Tokenizer, token_ids: np.ndarray) -> list[str]:
    """Return what each token writes within a text, its blank included.

    Tokens of incomplete UTF-8 have lone surrogates for the bytes, as in PEP 383.
    """
    alphabet = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
    others = [byte for byte in range(256) if byte not in alphabet]  # written by characters from 256
    bytes_of = {chr(n): n if n < 256 else others[n - 256] for n in alphabet}

    def write(token_id: int) -> str:
        text = tokenizer.decode_within([token_id])
        token = tokenizer.backend.id_to_token(token_id) or ""
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            raw = bytes([int(token[3:5], 16)])
        elif all(character in bytes_of for character in token):
            raw = bytes(bytes_of[character] for character in token)
        else:
            return text
        return raw.decode("utf-8", "surrogateescape")

    return [write(int(token_id)) for token_id in token_ids]


def shown(texts: Sequence[str]) -> list[str]:
    """Return what to show for each of consecutive tokens: a character of several belongs to the
    first of them, and bytes of no character are shown as U+FFFD."""
    raw = [text.encode("utf-8", "surrogateescape") for text in texts]
    parts: list[list[str]] = [[] for _ in raw]
    ends = np.cumsum([len(part) for part in raw])
    at = 0
    for character in b"".join(raw).decode("utf-8", "surrogateescape"):
        is_byte = "\udc80" <= character <= "\udcff"
        owner = int(np.searchsorted(ends, at, side="right"))
        parts[owner].append("\N{REPLACEMENT CHARACTER}" if is_byte else character)
        at += 1 if is_byte else len(character.encode())
    return ["".join(part) for part in parts]


def save_trace(path: str | Path, trace: Trace) -> None:
    """Write a trace as compressed .npz, readable without pickle; never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {**trace.changes._asdict(), **trace._asdict()}
    del fields["changes"]
    for name in _TEXTS:
        fields |= pack_texts(name, fields[name])
    fields["tokenizer"] = np.array(trace.tokenizer)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **fields)
    os.replace(part, path)


_TEXTS = ("texts", "token_texts")
# Kind of dtype and number of axes of everything else in a file.
_KINDS = {
    **{name: ("i", 1) for name in ("num_calls", "sample", "call", "position", "token")},
    **{name: ("i", 1) for name in ("lengths", "token_ids", "special_ids")},
    "start": ("i", 2),
    "log_prob": ("f", 1),
    "given": ("b", 2),
    "mask_id": ("i", 0),
    "tokenizer": ("U", 0),
}


def load_trace(path: str | Path) -> Trace:
    """Read a trace; raises InputError when it is no such file, or its parts do not fit."""
    texts_at = [*_TEXTS, *(f"{name}_ends" for name in _TEXTS)]
    found = read_arrays(path, [*_KINDS, *texts_at], "trace")
    if missing := {*_KINDS, *_TEXTS} - found.keys():
        raise InputError(f"{path} is no trace, it lacks {', '.join(sorted(missing))}")
    data: dict[str, Any] = {name: found[name] for name in _KINDS}
    texts: dict[str, Any] = {name: unpack_texts(found, name) for name in _TEXTS}
    if None in texts.values() or any(
        (data[name].dtype.kind, data[name].ndim) != kind for name, kind in _KINDS.items()
    ):
        raise InputError(f"{path} is a damaged trace: its parts are of other kinds")
    changes = Changes(*(data.pop(name) for name in Changes._fields))
    trace = Trace(changes=changes, **(data | texts))._replace(
        mask_id=int(data["mask_id"]), tokenizer=str(data["tokenizer"])
    )
    if not _fits(trace):
        raise InputError(f"{path} is a damaged trace: its parts do not fit together")
    return trace


def _fits(trace: Trace) -> bool:
    """Tell whether shapes agree and all numbers point to something."""
    changes = trace.changes
    columns = changes[2:]
    if any(column.shape != columns[0].shape for column in columns):
        return False
    count, length = changes.start.shape
    if not (
        changes.num_calls.shape == trace.lengths.shape == (count,)
        and trace.given.shape == (count, length)
        and len(trace.texts) == count
        and len(trace.token_texts) == len(trace.token_ids)
    ):
        return False
    if not np.isin([trace.mask_id, *changes.start.ravel(), *changes.token], trace.token_ids).all():
        return False
    if np.any((trace.lengths < 0) | (trace.lengths > length)):
        return False
    inside = (changes.sample >= 0) & (changes.sample < count)
    inside &= (changes.position >= 0) & (changes.position < length) & (changes.call >= 1)
    if not inside.all() or np.any(changes.call > changes.num_calls[changes.sample]):
        return False
    if np.isnan(changes.log_prob).any():
        return False
    return bool(np.all(np.diff(changes.sample) >= 0))
