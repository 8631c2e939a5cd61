"""Judge generated texts by another language model: generative perplexity, and what it hides.

Examples:
  python -m gidd_jax.generative_ppl --samples=samples.npz --scorer=gpt2-large --out=metrics.json
  python -m gidd_jax.generative_ppl --samples=texts.jsonl --scorer=LLAMA --references=val.txt

--samples: a file of gidd_jax.sample (.npz), or texts: .txt (one a line), .jsonl,
.jsonl.gz, .jsonl.xz or .parquet (field "text").
Scorers: any causal language model of Hugging Face through PyTorch (extra `eval`), or without it a
Llama folder or an autoregressive run in JAX. Repetitive text has a low perplexity: read it together
with entropy and distinct n-grams. Samplers of low precision lower both (arXiv 2409.02908).

Prints the figures. --out is JSON with
  samples, scorer, backend, scorer_dtype, max_length, align_mask_to_input
  sampling_precision   what the samples were drawn with: the entry of that name in the .npz, or null
  num_samples, num_truncated   texts; those cut to max_length tokens
  tokens   scored ones, of the scorer's tokenizer; samples of fewer than two have none
  gen_ppl, gen_ppl_interval, nll, nll_standard_error   exp(nll), and nll: mean -log p in nats per
      token; intervals (95%) and errors by bootstrap over samples
  median_nll, accuracy   of tokens: median, and share that was the scorer's first choice
  token_entropy, token_entropy_interval   mean entropy of the tokens within a sample, in nats
  distinct_1, distinct_2, distinct_3   different n-grams among those of all samples
  distinct_N_per_sample, distinct_N_per_sample_interval   the same within each sample, averaged
  mauve, mauve_note   with --references and mauve-text installed, on the scorer's hidden states;
      otherwise null, and why
"""

from typing import Any

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError

flags = CommandFlags()
SAMPLES = flags.DEFINE_string("samples", None, "File of samples or texts.", required=True)
SCORER = flags.DEFINE_string(
    "scorer",
    None,
    "Hugging Face folder or name, or workdir of an autoregressive run.",
    required=True,
)
OUT = flags.DEFINE_string("out", None, "File to write, ending in .json.")
BACKEND = flags.DEFINE_enum(
    "backend", "auto", ["auto", "jax", "torch"], "What runs the scorer; auto: jax for Llamas."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the scorer's matrix products."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Samples scored together.", lower_bound=1)
MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens scored per sample. Default: 1024, or the scorer's context if less."
)
ALIGN_MASK_TO_INPUT = flags.DEFINE_bool(
    "align_mask_to_input",
    False,
    "Count the padding token after shorter samples of a batch, as the original's script does.",
)
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "Resamples of the samples.", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.", lower_bound=0)
REFERENCES = flags.DEFINE_string("references", None, "File of texts by people, for MAUVE.")


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.data.texts import read_texts
    from gidd_jax.evaluation import scorers
    from gidd_jax.evaluation.reports import finite, write_report
    from gidd_jax.inference.samples import check_output

    out = check_output(OUT.value, ".json") if OUT.value else None
    texts, precision = read_texts(SAMPLES.value, "--samples")
    references = read_texts(REFERENCES.value, "--references").texts if REFERENCES.value else None
    scorer = scorers.load_scorer(SCORER.value, BACKEND.value, DTYPE.value)
    max_length = min(1024, scorer.max_length) if MAX_LENGTH.value is None else MAX_LENGTH.value
    if not 2 <= max_length <= scorer.max_length:
        raise InputError(
            f"--max_length={max_length}: must lie in [2, {scorer.max_length}], the scorer's context"
        )
    report = {
        "samples": SAMPLES.value,
        "scorer": SCORER.value,
        "backend": scorer.backend,
        "scorer_dtype": DTYPE.value,
        "max_length": max_length,
        "align_mask_to_input": ALIGN_MASK_TO_INPUT.value,
        "sampling_precision": precision,
        **figures(
            scorer,
            texts,
            references,
            max_length=max_length,
            batch_size=BATCH_SIZE.value,
            align_mask_to_input=ALIGN_MASK_TO_INPUT.value,
            num_resamples=BOOTSTRAP.value,
            seed=SEED.value,
        ),
    }
    report = finite(report)
    print("\n".join(f"{name:30} {_shown(value)}" for name, value in report.items()))
    if out is not None:
        write_report(out, report)
        print(f"wrote {out}")


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
) -> dict[str, Any]:
    """Return the figures of texts by a `scorers.Scorer`, as this module's docstring lists them.

    Raises InputError when there is no token to score.
    """
    import numpy as np

    from gidd_jax.evaluation.scorers import encode, score_sequences
    from gidd_jax.evaluation.text_metrics import (
        distinct_n,
        mean_estimate,
        ratio_estimate,
        token_entropy,
    )
    from gidd_jax.likelihood import perplexity

    resampling = {"num_resamples": num_resamples, "seed": seed}
    whole = encode(scorer, texts, 1 << 62)
    sequences = [ids[:max_length] for ids in whole]
    scores = score_sequences(
        scorer,
        sequences,
        batch_size=batch_size,
        align_mask_to_input=align_mask_to_input,
    )
    if not scores.tokens.sum():
        raise InputError("no sample has two tokens: there is nothing to score")
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
    return result


def _mauve(
    scorer: Any, sequences: list[Any], references: list[Any] | None, batch_size: int, seed: int
) -> tuple[float | None, str]:
    """MAUVE of the scorer's hidden states, or None, and a note on it."""
    import importlib.util

    from gidd_jax.evaluation.scorers import sequence_features

    if references is None:
        return None, "not computed: it needs --references, texts by people"
    if importlib.util.find_spec("mauve") is None:
        return None, "not computed: it needs the library mauve-text"
    import mauve  # pyright: ignore[reportMissingImports]

    if min(sum(len(ids) > 0 for ids in part) for part in (references, sequences)) < 2:
        return None, "not computed: it needs two samples and two references that are not empty"
    p, q = (
        sequence_features(scorer, [ids for ids in part if len(ids)], batch_size=batch_size)
        for part in (references, sequences)
    )
    out = mauve.compute_mauve(p_features=p, q_features=q, seed=seed, verbose=False)
    return float(out.mauve), f"of hidden states of the scorer, with {len(p)} references"


def _shown(value: Any) -> str:
    from gidd_jax.evaluation.reports import written

    if isinstance(value, float):
        return written(value, 4)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_shown(part)}" for name, part in value.items())
    return "-" if value is None else str(value)


if __name__ == "__main__":
    run(main, flags)
