"""Judge generated texts by another language model: generative perplexity, and what it hides.

Examples:
  python -m gidd_jax.generative_ppl --samples=samples.npz --scorer=gpt2-large --out=metrics.json
  python -m gidd_jax.generative_ppl --samples=texts.jsonl --scorer=LLAMA --references=val.txt

--samples: a file of gidd_jax.sample (.npz), or texts: .txt (one per line), .jsonl,
.jsonl.gz, .jsonl.xz or .parquet (field "text").
Scorers: any causal language model of Hugging Face through PyTorch (extra `eval`), or without it a
Llama folder or an autoregressive run in JAX. Repetitive text has a low perplexity: read it together
with entropy and distinct n-grams. Texts are scored without special tokens: what a sample wrote
after a token that ends a document counts as the same text. Samplers of low precision lower both
(arXiv 2409.02908).

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
      and 20 samples and different references at least; otherwise null, and why
  notes   why other figures are null, by their names
"""

from typing import Any

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import DTYPES

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
    "dtype", "float32", list(DTYPES), "Precision of the scorer's matrix products."
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
    from gidd_jax.evaluation.generated import figures
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
            name=f"--samples: {SAMPLES.value}",
        ),
    }
    report = finite(report)
    if out is not None:
        write_report(out, report)
    print("\n".join(f"{name:30} {_shown(value)}" for name, value in report.items()))
    if out is not None:
        print(f"wrote {out}")


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
