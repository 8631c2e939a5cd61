"""A corpus scored by an estimator of log p, and two models compared on it.

The plain bound with its three terms is `scoring`; here are the estimates of `sampling.estimators`,
and the difference of two models on the same rows, whatever scored them.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.evaluation import scoring
from gidd_jax.evaluation.corpora import CorpusRows
from gidd_jax.evaluation.text_metrics import ratio_estimate
from gidd_jax.inference import scores
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.prompts import Rows
from gidd_jax.likelihood import perplexity
from gidd_jax.sampling.estimators import calls_per_row, log_mean_exp, quantities
from gidd_jax.sampling.options import EstimatorOptions


class Estimates(NamedTuple):
    """Draws of log w of the rows, float64 [K, N] in nats; tokens [N]; how long it took."""

    draws: np.ndarray
    tokens: np.ndarray
    seconds: float

    @property
    def nats(self) -> np.ndarray:
        """-log p of each row by the tightest figure, [N]."""
        return -log_mean_exp(self.draws)


def estimate_rows(
    model: Gidd, corpus: CorpusRows, options: EstimatorOptions, *, batch_size: int, seed: int
) -> Estimates:
    """Estimate log p of every row as it stands, with its padding and what it marks given."""
    start = time.perf_counter()
    parts = [
        corpus.padded(number, model.max_seq_len, model.tokenizer.pad_id)
        for number in range(len(corpus.ids))
    ]
    names = ("tokens", "mask", "given")
    ids, mask, given = (np.stack([part[name] for part in parts]) for name in names)
    mask &= ~given
    whole = Rows(ids, mask, np.full(len(ids), ids.shape[1], np.int32))
    by_token, _ = scores.log_likelihood_draws(model, whole, options, batch_size, seed)
    draws = by_token.sum(axis=-1, dtype=np.float64)
    if np.isnan(draws).any():
        raise InputError(
            "the network's output is not a number: its parameters are damaged, use an older "
            "checkpoint"
        )
    return Estimates(draws, mask.sum(axis=-1), time.perf_counter() - start)


def estimate_figures(
    options: EstimatorOptions,
    corpus: CorpusRows,
    found: Estimates,
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of an estimated corpus, ready for JSON; `evaluate` says what they mean."""
    documents = np.unique(corpus.documents, return_inverse=True)[1]
    tokens = np.bincount(documents, found.tokens)
    calls = [calls_per_row(options, int(count)) for count in found.tokens]
    figures, why_none = [], corpus.why_no_bits
    for quantity in quantities(options):
        nats = -found.draws.mean(axis=0) if quantity.is_mean else found.nats
        by_document = np.bincount(documents, nats)
        value = ratio_estimate(by_document, tokens, num_resamples, seed)
        bits = ratio_estimate(
            by_document / np.log(2),
            np.bincount(documents, corpus.text_bytes),
            num_resamples,
            seed,
        )
        figures.append(
            {
                "quantity": quantity.name,
                "says": quantity.says,
                "nats_per_token": value.value,
                "standard_error": value.standard_error,
                "perplexity": perplexity(value.value),
                "bits_per_byte": bits.value,
                "calls_per_token": sum(calls) / int(found.tokens.sum()),
                **({"notes": {"bits_per_byte": why_none}} if why_none else {}),
            }
        )
    return {
        "documents": corpus.num_documents,
        "rows": len(found.tokens),
        "tokens": int(found.tokens.sum()),
        "bytes": int(corpus.text_bytes.sum()),
        "options": dataclasses.asdict(options),
        "quantities": figures,
        "seconds": round(found.seconds, 3),
    }


def score_corpus(
    model: Gidd,
    corpus: CorpusRows,
    options: EstimatorOptions,
    *,
    batch_size: int,
    seed: int,
    num_resamples: int,
    label: str,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return the figures of a corpus, and of its rows -log p by the tightest one and tokens [N]."""
    bootstrap: Any = {"num_resamples": num_resamples, "seed": seed}
    if options.estimator == "bound":
        found = scoring.score_rows(
            model,
            corpus,
            num_samples_t=options.num_samples_t,
            batch_size=batch_size,
            seed=seed,
            label=label,
        )
        figures = scoring.corpus_figures(model.process, corpus, found, **bootstrap)
        nats, tokens = np.asarray(found.bounds.total, np.float64), np.asarray(found.bounds.tokens)
        return figures, nats, tokens
    estimates = estimate_rows(model, corpus, options, batch_size=batch_size, seed=seed)
    figures = estimate_figures(options, corpus, estimates, **bootstrap)
    return figures, estimates.nats, estimates.tokens


def check_comparable(model: Gidd, other: Gidd) -> None:
    """Raise InputError unless both models score the same rows of the same tokens."""
    if not model.tokenizer.has_fingerprint(other.tokenizer.fingerprint):
        raise InputError("--against has another tokenizer: two models are compared on one's tokens")
    if (model.process is None) != (other.process is None):
        raise InputError(
            "--against is autoregressive and the model is not, or the other way round: the first "
            "token of a row counts for one of them only"
        )
    if model.max_seq_len != other.max_seq_len:
        raise InputError(
            f"--against has a context of {other.max_seq_len} tokens, not {model.max_seq_len}: the "
            "rows of a corpus would differ"
        )


def comparison(
    corpus: CorpusRows,
    nats: np.ndarray,
    other: np.ndarray,
    tokens: np.ndarray,
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the difference of two models, by the paired bootstrap over documents.

    nats, other [N]: -log p of each row by both; tokens [N]. difference: nats per token, negative
    where the first model is better, with its 95% interval; share_better: of the documents that the
    first model predicts better.
    """
    documents = np.unique(corpus.documents, return_inverse=True)[1]
    by_document = np.bincount(documents, nats - other)
    counts = np.bincount(documents, tokens)
    found = ratio_estimate(by_document, counts, num_resamples, seed)
    return {
        "difference": found.value,
        "difference_standard_error": found.standard_error,
        "difference_interval": found.interval,
        "share_better": float(np.mean(by_document < 0)),
    }
