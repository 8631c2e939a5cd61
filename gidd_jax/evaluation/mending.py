"""How planted errors are mended by self-correction: rule by rule, by time and temperature."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import CorpusRows
from gidd_jax.evaluation.planting import KINDS, classes_of, judged_rows, ordinary_ids, planted
from gidd_jax.evaluation.repair import RATES, repaired
from gidd_jax.evaluation.text_metrics import Estimate, ratio_estimate
from gidd_jax.inference.gidd import Gidd
from gidd_jax.sampling.correction import check_correction
from gidd_jax.sampling.options import CorrectionOptions
from gidd_jax.sampling.suspicion import expected_share


class Mended(NamedTuple):
    """What one way of correcting did: its figures, ready for JSON, and for each document int [D]
    the tokens that are wrong afterwards and all that count."""

    options: CorrectionOptions
    figures: dict[str, Any]
    wrong: np.ndarray
    tokens: np.ndarray

    @property
    def name(self) -> str:
        """Score, time and temperature in words."""
        score, t, temperature = self.options.score, self.options.t, self.options.temperature
        return f"{score} at t = {t:g} and temperature {temperature:g}"


def check_ways(model: Gidd, ways: Sequence[CorrectionOptions]) -> None:
    """Raise InputError for an autoregressive model, and a score that its process does not have."""
    if model.process is None:
        raise InputError("self-correction needs a diffusion model: this one is autoregressive")
    for options in ways:
        check_correction(model.process, options)


def mend(
    model: Gidd,
    corpus: CorpusRows,
    share: float,
    ways: Sequence[CorrectionOptions],
    *,
    batch_size: int,
    num_resamples: int,
    seed: int,
) -> Iterator[Mended]:
    """Yield what each way of correcting makes of the same planted errors, half random and half
    confusable; `gidd_jax.self_correct` says what the figures mean.

    Raises InputError like `check_ways`, and where there is no token to judge.
    """
    check_ways(model, ways)
    assert model.process is not None
    ordinary = ordinary_ids(model)
    clean = judged_rows(corpus, ordinary, model.tokenizer.pad_id)
    classes = classes_of(model.tokenizer, ordinary)
    noisy = planted(clean, ordinary, share, seed, classes)
    documents = np.unique(corpus.documents, return_inverse=True)[1]
    for options in ways:
        # Rows of a corpus hold the token that ends a text where one ends.
        result = model.correct(
            noisy.rows, batch_size=batch_size, seed=seed, ends=False, options=options
        )
        figures = {
            "score": options.score,
            "t": options.t,
            "temperature": options.temperature,
            "expected_share": expected_share(model.process, options.t),
            "network_calls": result.network_calls,
        }
        parts = {"": clean.free}
        for number, kind in enumerate(KINDS, start=1):  # each beside the same right tokens
            parts[kind] = clean.free & ((noisy.kinds == 0) | (noisy.kinds == number))
        for kind, counted in parts.items():
            found = repaired(
                noisy.rows.ids,
                result.ids,
                clean.ids,
                counted,
                groups=documents,
                num_resamples=num_resamples,
                seed=seed,
            ).figures()
            figures |= {kind: found} if kind else found
        wrong = np.sum(clean.free & (result.ids != clean.ids), axis=-1)
        by_document = (np.bincount(documents, v) for v in (wrong, clean.free.sum(axis=-1)))
        yield Mended(options, figures, *by_document)


def best_of(mended: Sequence[Mended], score: str) -> Mended | None:
    """Return the way of this score that leaves the fewest wrong tokens; None: there is none."""
    own = [one for one in mended if one.options.score == score]
    return min(own, key=lambda one: one.wrong.sum(), default=None)


def fewer_wrong(one: Mended, other: Mended, num_resamples: int, seed: int) -> Estimate:
    """Return how many fewer tokens `one` leaves wrong than `other`, as a share of all tokens.

    By the paired bootstrap over documents.
    """
    return ratio_estimate(other.wrong - one.wrong, one.tokens, num_resamples, seed)


def comparison(mended: Sequence[Mended], num_resamples: int, seed: int) -> dict[str, Any] | None:
    """Return how the best way by suspicion compares with the best by proposal, ready for JSON.

    None where one of them was not measured.
    """
    suspicion, proposal = (best_of(mended, score) for score in ("suspicion", "proposal"))
    if suspicion is None or proposal is None:
        return None
    value, error, interval = fewer_wrong(suspicion, proposal, num_resamples, seed)
    return {
        "suspicion": suspicion.name,
        "proposal": proposal.name,
        "fewer_wrong": value,
        "fewer_wrong_standard_error": error,
        "fewer_wrong_interval": interval,
    }


def verdict(found: dict[str, Any]) -> str:
    """Return a comparison in one line, which names the better corrector where one is shown."""
    interval = found["fewer_wrong_interval"]
    if interval is None or interval[0] <= 0 <= interval[1]:
        words = "neither score is shown to be the better corrector"
    else:
        words = f"score {'suspicion' if interval[0] > 0 else 'proposal'} is the better corrector"
    difference = _percent(found["fewer_wrong"], interval, 2)
    return (
        f"{words}: {found['suspicion']} leaves {difference} of all tokens fewer wrong than "
        f"{found['proposal']}"
    )


TABLE_HEADER = (
    "score          t  temp.  touch                  recover                damage               "
    "  wrong after  random        confusable"
)


def table_line(figures: dict[str, Any]) -> str:
    """Return the figures of one way as a line below TABLE_HEADER, with 95% intervals; of each kind
    of error touch and recover."""
    cells = [
        _percent(figures[name], figures[f"{name}_interval"], 2 if name == "damage" else 1)
        for name in RATES
    ]
    kinds = [
        " / ".join(_percent(figures[kind][name], None, 1) for name in ("touch", "recover"))
        for kind in KINDS
    ]
    return (
        f"{figures['score']:<10} {figures['t']:>5g} {figures['temperature']:>6g}  "
        + "  ".join(f"{cell:<21}" for cell in cells)
        + f"  {_percent(figures['wrong_after'], None, 2):>11}  {kinds[0]:<13} {kinds[1]}"
    )


def _percent(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    """A share in percent with its interval, a dash where there is none."""
    if value is None:
        return "-"
    words = f"{100 * value:.{digits}f}%"
    if interval is None:
        return words
    low, high = (100 * bound for bound in interval)
    return f"{words} ({low:.{digits}f} to {high:.{digits}f})"
