"""How good are generated texts, by another language model: perplexity, entropy, n-grams, MAUVE."""

import importlib.util
from typing import Any

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.evaluation.reports import NOTES
from gidd_jax.evaluation.scorers import encode, score_sequences, sequence_features
from gidd_jax.evaluation.text_metrics import (
    distinct_n,
    mean_estimate,
    ratio_estimate,
    token_entropy,
)
from gidd_jax.likelihood import perplexity

# mauve-text sorts hidden states into clusters, one for ten texts and two at least: of fewer texts
# its figure is chance.
_MIN_TEXTS = 20


def figures(
    scorer: Any,
    texts: list[str],
    references: list[str] | None = None,
    *,
    max_length: int,
    batch_size: int,
    align_mask_to_input: bool = False,
    num_resamples: int,
    seed: int,
    name: str = "texts",
) -> dict[str, Any]:
    """Return the figures of texts by a `scorers.Scorer`, as `generative_ppl --help` lists them.

    Raises InputError, which calls the texts `name`, when there is no token to score.
    """
    resampling = {"num_resamples": num_resamples, "seed": seed}
    whole = encode(scorer, texts, 1 << 62)
    sequences = [ids[:max_length] for ids in whole]
    if all(len(ids) < 2 for ids in sequences):
        raise InputError(
            f"{name}: no text has two tokens of the scorer's tokenizer, and there is nothing to "
            "score: give longer texts"
        )
    scores = score_sequences(
        scorer,
        sequences,
        batch_size=batch_size,
        align_mask_to_input=align_mask_to_input,
    )
    nll = ratio_estimate(scores.nats, scores.tokens, **resampling)
    result: dict[str, Any] = {
        "num_samples": len(texts),
        "num_truncated": sum(len(ids) > max_length for ids in whole),
        "tokens": int(scores.tokens.sum()),
        "gen_ppl": perplexity(nll.value),
        "gen_ppl_interval": nll.interval and [perplexity(v) for v in nll.interval],
        "nll": nll.value,
        "nll_standard_error": nll.standard_error,
        "median_nll": float(np.median(scores.token_nats)),
        "accuracy": float(scores.correct.sum() / scores.tokens.sum()),
    }
    # Without the tokens that the scorer puts around a text.
    bare = [ids[:max_length] for ids in scorer.tokenizer.encode(texts) if len(ids)]
    per_sample = {"token_entropy": [token_entropy(ids) for ids in bare]}
    for n in (1, 2, 3):
        result[f"distinct_{n}"] = distinct_n(bare, n)
        shares = [distinct_n([ids], n) for ids in bare]
        per_sample[f"distinct_{n}_per_sample"] = [v for v in shares if v is not None]
    for name, values in per_sample.items():
        estimate = mean_estimate(np.array(values), **resampling) if values else None
        result[name] = estimate and estimate.value
        result[f"{name}_interval"] = estimate and estimate.interval
    human = None if references is None else encode(scorer, references, max_length)
    result["mauve"], result["mauve_note"] = _mauve(scorer, sequences, human, batch_size, seed)
    notes = _notes(result)
    return result | ({NOTES: notes} if notes else {})


def _notes(result: dict[str, Any]) -> dict[str, str]:
    """Why figures are None, by their names; errors and intervals of such figures have none."""
    notes = {}
    for n in (1, 2, 3):
        for name in (f"distinct_{n}", f"distinct_{n}_per_sample"):
            if result[name] is None:
                notes[name] = f"no sample has {n} tokens"
    for name, value in result.items():
        figure = name.removesuffix("_interval").removesuffix("_standard_error")
        if value is None and figure != name and result[figure] is not None:
            notes[name] = "one sample alone determines the figure: it has no error"
    return notes


def _mauve(
    scorer: Any, sequences: list[Any], references: list[Any] | None, batch_size: int, seed: int
) -> tuple[float | None, str]:
    """MAUVE of the scorer's hidden states, or None, and a note on it."""
    if references is None:
        return None, "not computed: it needs --references, texts by people"
    if importlib.util.find_spec("mauve") is None:
        return None, "not computed: it needs the library mauve-text"
    import mauve  # pyright: ignore[reportMissingImports]

    samples = sum(len(ids) > 0 for ids in sequences)
    different = len({ids.tobytes() for ids in references if len(ids)})
    if min(samples, different) < _MIN_TEXTS:
        return None, (
            f"not computed: it needs {_MIN_TEXTS} samples and {_MIN_TEXTS} different references "
            f"that are not empty, and there are {samples} and {different}"
        )
    p, q = (
        sequence_features(scorer, [ids for ids in part if len(ids)], batch_size=batch_size)
        for part in (references, sequences)
    )
    out = mauve.compute_mauve(p_features=p, q_features=q, seed=seed, verbose=False)
    return float(out.mauve), f"of hidden states of the scorer, with {len(p)} references"
