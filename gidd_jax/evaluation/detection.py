"""Finding wrong tokens: long texts window by window, and how well it goes on corrupted text.

For the figures, random errors are planted into validation text (`planting`). Wrong is what differs
from the original.
"""

from typing import Any, NamedTuple

import numpy as np

from gidd_jax.data.rows import NO_FRAME
from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import CorpusRows
from gidd_jax.evaluation.planting import judged_rows, ordinary_ids, planted
from gidd_jax.evaluation.reports import NOTES
from gidd_jax.evaluation.text_metrics import Estimate, bootstrap_counts, estimate_from
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.prompts import scored_texts
from gidd_jax.sampling.options import SuspicionOptions
from gidd_jax.sampling.trace import shown, written_by


class JudgedText(NamedTuple):
    """The tokens of one text: what each stands for, which together is the text, the probability
    that it is wrong float32 [L], and what the best other token writes, with the probability that
    it belongs there float32 [L]."""

    tokens: list[str]
    wrong: np.ndarray
    proposals: list[str]
    proposal_probs: np.ndarray


class Calibration(NamedTuple):
    """Probabilities against frequencies: the expected calibration error (the mean difference over
    tokens), and by bins of suspicion of equal width, where there are tokens: the mean suspicion,
    the share that is wrong, and the number of tokens."""

    error: float
    suspicion: np.ndarray
    share_wrong: np.ndarray
    tokens: np.ndarray


def judge_text(model: Gidd, text: str, options: SuspicionOptions, batch_size: int) -> JudgedText:
    """Judge each token of a text of any length, in the window in which it is closest to the middle.

    Raises InputError for a text without tokens, and like `Gidd.suspicion`.
    """
    ids = model.tokenizer.encode([text])[0]
    if not len(ids):
        raise InputError("the text is empty: give one with at least one token")
    begin = model.row_mode != NO_FRAME
    size = model.max_seq_len - begin  # the first token of a row is the one that begins a text
    starts, owner = windows(len(ids), size)
    rows = scored_texts(
        model.tokenizer, [ids[a : a + size] for a in starts], None, model.max_seq_len, begin=begin
    )
    position = np.arange(len(ids))
    free = np.zeros_like(rows.free)
    free[owner, begin + position - starts[owner]] = True
    # Every token of a window may be wrong, also those that another window judges.
    found = model.suspicion(rows, batch_size=batch_size, options=options)
    proposals = found.proposals[free]  # windows follow each other: in order of the text
    known = np.unique(proposals)
    written = dict(zip(known.tolist(), written_by(model.tokenizer, known), strict=True))
    return JudgedText(
        model.tokenizer.pieces(text),
        found.wrong[free],
        ["".join(shown([written[i]])) for i in proposals.tolist()],
        found.proposal_probs[free],
    )


def windows(num_tokens: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where windows that overlap by half start, and for each token the window it is most
    central in, int [num_windows] and [num_tokens]; the windows' tokens follow each other."""
    step, last = max(1, size // 2), max(0, num_tokens - size)
    starts = np.minimum(np.arange(0, last + step, step), last)
    middles = 0.5 * (starts[1:] + starts[:-1] + size)  # between the centres of neighbours
    return starts, np.searchsorted(middles, np.arange(num_tokens) + 0.5)


def detection_figures(
    model: Gidd,
    corpus: CorpusRows,
    share: float,
    options: SuspicionOptions,
    *,
    batch_size: int,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return how well wrong tokens are found at one share, ready for JSON (`gidd_jax.highlight`).

    Figures that need wrong tokens, or right ones too, are NaN where there are none, with a note.
    Raises InputError when there is no token to judge.
    """
    ordinary = ordinary_ids(model)
    clean = judged_rows(corpus, ordinary, model.tokenizer.pad_id)
    noisy = planted(clean, ordinary, share, seed).rows
    # Rows of a corpus hold the token that ends a text where one ends.
    found = model.suspicion(noisy, batch_size=batch_size, ends=False, options=options)
    judged = clean.free
    wrong, scores = (noisy.ids != clean.ids)[judged], found.wrong[judged]
    restored = (found.proposals == clean.ids)[judged][wrong]
    documents = np.broadcast_to(corpus.documents[:, None], judged.shape)[judged]
    estimate = auroc_estimate(scores, wrong, documents, num_resamples, seed)
    calibration = calibration_of(scores, wrong)
    return {
        "corruption": share,
        "tokens": len(wrong),
        "share_wrong": float(wrong.mean()),
        "mean_suspicion": float(scores.mean(dtype=np.float64)),
        "auroc": estimate.value,
        "auroc_standard_error": estimate.standard_error,
        "auroc_interval": estimate.interval,
        "calibration_error": calibration.error,
        "restored": float(restored.mean()) if len(restored) else float("nan"),
        "calibration": {
            name: getattr(calibration, name).tolist()
            for name in ("suspicion", "share_wrong", "tokens")
        },
        **_notes(wrong),
    }


def _notes(wrong: np.ndarray) -> dict[str, Any]:
    """Why figures are not finite, by their names; nothing where tokens of both kinds are."""
    if wrong.any() and not wrong.all():
        return {}
    undetermined = ["auroc"] if wrong.any() else ["auroc", "restored"]
    cause = f"{int(wrong.sum())} of {len(wrong)} tokens are wrong: take another share, or more text"
    return {NOTES: dict.fromkeys(undetermined, cause)}


def auroc(scores: np.ndarray, wrong: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return P(score of a wrong token > score of a right one), ties counting half; NaN where there
    are not both. All [N]; weights count tokens several times."""
    return _auroc(np.unique(scores, return_inverse=True)[1], wrong, weights)


def _auroc(rank: np.ndarray, wrong: np.ndarray, weights: np.ndarray | None) -> float:
    weights = np.ones(len(rank)) if weights is None else weights
    bad, good = (np.bincount(rank, weights * kind) for kind in (wrong, ~wrong))
    pairs = bad.sum() * good.sum()
    return float(np.sum(bad * (np.cumsum(good) - 0.5 * good)) / pairs) if pairs else float("nan")


def auroc_estimate(
    scores: np.ndarray, wrong: np.ndarray, documents: np.ndarray, num_resamples: int, seed: int
) -> Estimate:
    """Return the AUROC with its bootstrap error over documents: int [N], the one of each token."""
    rank = np.unique(scores, return_inverse=True)[1]
    names, document = np.unique(documents, return_inverse=True)
    value = _auroc(rank, wrong, None)
    if len(names) < 2:
        return Estimate(value, None, None)
    resampled = [
        _auroc(rank, wrong, counts[document])
        for chunk in bootstrap_counts(len(names), num_resamples, seed)
        for counts in chunk
    ]
    return estimate_from(value, np.array(resampled))


def calibration_of(scores: np.ndarray, wrong: np.ndarray, num_bins: int = 15) -> Calibration:
    """Return the calibration of probabilities [N] (arXiv 1706.04599): the error is a difference of
    probabilities, 0 to 1."""
    index = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    tokens = np.bincount(index, minlength=num_bins)
    used = tokens > 0
    sums = (np.bincount(index, v, num_bins)[used] / tokens[used] for v in (scores, wrong))
    suspicion, share_wrong = sums
    error = np.sum(tokens[used] * np.abs(suspicion - share_wrong)) / len(scores)
    return Calibration(float(error), suspicion, share_wrong, tokens[used])


TABLE_HEADER = "corruption   tokens    wrong  suspicion  AUROC (95% interval)        ECE   restored"


def table_line(figures: dict) -> str:
    """Return the figures of one share as a line below TABLE_HEADER."""
    auroc, interval, restored = (figures[k] for k in ("auroc", "auroc_interval", "restored"))
    words = "-" if auroc is None else f"{auroc:.4f}"
    if interval:
        words += f" ({interval[0]:.4f} to {interval[1]:.4f})"
    elif auroc is not None:
        words += " (one document)"
    return (
        f"{figures['corruption']:>10g} {figures['tokens']:>8} {figures['share_wrong']:>8.2%}  "
        f"{figures['mean_suspicion']:>8.2%}  {words:<26} {figures['calibration_error']:>6.4f}  "
        f"{'-' if restored is None else format(restored, '.2%'):>8}"
    )
