"""Errors planted into text whose truth is known: for finding wrong tokens, and for mending them.

A random error is a token drawn evenly from those that are not special, as uniform noise is. A
confusable one looks like what belongs there: of the same class (does it begin with a blank, and
then with a capital, a small letter, a digit, another sign), and one of the tokens of that class
that are nearest in frequency. Neither is ever the token that stood there. Special tokens are
neither replaced nor counted.
"""

from typing import NamedTuple

import numpy as np

from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import CorpusRows
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.prompts import Rows
from gidd_jax.sampling.trace import written_by

KINDS = ("random", "confusable")
NEAREST = 20  # tokens that one can be confused with


class Planted(NamedTuple):
    """Rows with errors; kinds int8 [N, L]: 0 where there is none, else 1 + its place in KINDS."""

    rows: Rows
    kinds: np.ndarray


def ordinary_ids(model: Gidd) -> np.ndarray:
    """Return the ids of the tokens that are not special, and that model and tokenizer share."""
    tokenizer: Tokenizer = model.tokenizer
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    special |= {tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.bos_id}
    known = set(tokenizer.backend.get_vocab(with_added_tokens=True).values()) - special
    return np.array(sorted(i for i in known if i < model.network.vocab_size), np.int32)


def judged_rows(corpus: CorpusRows, ordinary: np.ndarray, pad_id: int) -> Rows:
    """Return the rows of a corpus, in which tokens that are not special are judged.

    Raises InputError where there are none.
    """
    rows = [np.asarray(corpus.ids[i]) for i in range(len(corpus.ids))]
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.full((len(rows), int(lengths.max())), pad_id, np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    within = np.arange(ids.shape[1]) < lengths[:, None]
    if corpus.given is not None:
        within &= ~np.stack(
            [corpus.padded(n, ids.shape[1], pad_id)["given"] for n in range(len(ids))]
        )
    judged = within & np.isin(ids, ordinary)
    if not judged.any():
        raise InputError(
            "the texts hold no token but special ones: there is nothing to judge, give others"
        )
    return Rows(ids, judged, lengths)


def classes_of(tokenizer: Tokenizer, token_ids: np.ndarray) -> np.ndarray:
    """Return the class of each token by what it writes, int [n]: equal where they look alike."""

    def looks(text: str) -> tuple[bool, str]:
        first = text.lstrip()[:1]
        kinds = {"capital": str.isupper, "letter": str.isalpha, "digit": str.isdigit}
        kind = next((name for name, is_kind in kinds.items() if is_kind(first)), "sign")
        return text[:1].isspace(), kind if first else "blank"

    words = [looks(text) for text in written_by(tokenizer, token_ids)]
    numbers = {word: number for number, word in enumerate(sorted(set(words)))}
    return np.array([numbers[word] for word in words])


def planted(
    rows: Rows, ordinary: np.ndarray, share: float, seed: int, classes: np.ndarray | None = None
) -> Planted:
    """Replace each judged token with probability `share`; larger shares replace what smaller do.

    ordinary int [n]: the tokens that are not special, sorted; classes int [n] (`classes_of`): with
    them about half of the errors are confusable, else all are random. A token that is alone in its
    class is confused with none: its error is random. Raises InputError for fewer than two tokens.
    """
    if len(ordinary) < 2:
        raise InputError(
            f"errors need two tokens that are not special, the tokenizer has {len(ordinary)}: "
            "use another"
        )
    rng, shape = np.random.default_rng(seed), rows.ids.shape
    replaced = rows.free & (rng.random(shape) < share)
    place = np.searchsorted(ordinary, rows.ids[replaced])
    other = rng.integers(len(ordinary) - 1, size=shape)[replaced]
    other += other >= place
    kinds = np.where(replaced, np.int8(1), np.int8(0))
    if classes is not None:
        is_confusable, near = rng.random(shape)[replaced] < 0.5, rng.random(shape)[replaced]
        counts = np.bincount(np.searchsorted(ordinary, rows.ids[rows.free]), None, len(ordinary))
        alike = confused(place, near, classes, counts)
        is_confusable &= alike != place
        other = np.where(is_confusable, alike, other)
        kinds[replaced] += is_confusable
    ids = rows.ids.copy()
    ids[replaced] = ordinary[other]
    return Planted(rows._replace(ids=ids), kinds)


def confused(
    place: np.ndarray, u: np.ndarray, classes: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return for tokens place int [M] another of the same class and like frequency, int [M].

    u [M] in [0, 1) chooses one of the NEAREST in the order of counts [n] within the class; a token
    that is alone in its class stays.
    """
    order = np.lexsort((-counts, classes))  # by class, frequent ones first, then by number
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    sizes = np.bincount(classes)
    first = (np.cumsum(sizes) - sizes)[classes[place]]
    size, rank = sizes[classes[place]], position[place] - first
    choices = np.minimum(NEAREST, size - 1)
    low = np.clip(rank - choices // 2, 0, size - 1 - choices)
    chosen = low + (u * choices).astype(int)
    chosen += (chosen >= rank) & (choices > 0)
    return order[first + chosen]
