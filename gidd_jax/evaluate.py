"""Measure how well a trained model predicts text: a bound on its loss, with error bars.

Examples:
  python -m gidd_jax.evaluate --checkpoint=outputs/quickstart
  python -m gidd_jax.evaluate --checkpoint=RUN --data=wiki.txt,books/,tfds:lm1b --split=test \\
      --num_samples_t=16 --out=metrics.json

Without --data: the run's own validation split, in the rows that training validates on. With it:
every document of each corpus, cut into windows so that nothing is dropped. Windows of a document
overlap at its end; what two windows share counts twice, in nats, tokens and bytes alike.

Prints a table, one line per corpus. --out is JSON, written after each corpus: `checkpoint`, `ema`,
`process`, `num_samples_t`, `seed`, `batch_size`, `max_seq_len` and `corpora`, a list with for each
of them:
  data, split, documents, rows, tokens, bytes   what was scored (bytes: UTF-8, of scored tokens;
      documents: null for shards that do not say where they begin, errors are then over rows)
  nelbo, nelbo_standard_error   upper bound of -log p in nats per token = reconstruction + middle +
      prior (exact for autoregressive models, which have no such terms); error by bootstrap over
      documents, the draws of t and noise included; null with fewer than two documents
  perplexity, perplexity_interval   exp(nelbo) and its 95% interval
  bits_per_byte, bits_per_byte_standard_error
  original   {elbo, perplexity}: the estimate of the original's evaluation script, for comparison
      with published figures: the middle term alone, one t per row, averaged over batch means
  profile   {edges, integrand, tokens}: mean integrand (nats per token) in bins of t, and how many
      tokens times draws are behind it
  seconds   of scoring, with compilation
"""

from typing import Any

from gidd_jax.cli import CommandFlags, checkpoint_flag, code_flags, run
from gidd_jax.errors import InputError
from gidd_jax.parallel.distributed import distributed_flags

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
DATA = flags.DEFINE_string(
    "data",
    None,
    "Corpora, separated by commas: files, folders or globs of texts, folders of shards, tfds:NAME, "
    "hf:OWNER/NAME, or 'embedded'. Default: that of the run.",
)
SPLIT = flags.DEFINE_string(
    "split",
    None,
    "Without --data: train or validation. With --data: the split of a tfds: or hf: dataset (files "
    "are read whole; of shards only validation). Default: validation.",
)
NUM_SAMPLES_T = flags.DEFINE_integer(
    "num_samples_t", 8, "Times drawn per row (diffusion only).", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows scored together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of times, noise and bootstrap.", lower_bound=0)
MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents",
    None,
    "Score a random sample of each corpus (of shards so many rows), always the same.",
    lower_bound=1,
)
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "Resamples of the documents.", lower_bound=2)
TEXT_KEY = flags.DEFINE_string(
    "text_key", None, "Field of the texts in .jsonl, .parquet, tfds and hf. Default: the run's."
)
TXT_DOCUMENTS = flags.DEFINE_enum(
    "txt_documents",
    None,
    ["file", "line", "blank_line"],
    "What counts as one document in a .txt file. Default: the run's.",
)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
CODE = code_flags(flags)
OUT = flags.DEFINE_string("out", None, "File to write, ending in .json.")
DISTRIBUTED = distributed_flags(flags)

HEADERS = (
    "data",
    "documents",
    "tokens",
    "nats/token",
    "+-",
    "perplexity",
    "bits/byte",
    "reconstr.",
    "middle",
    "prior",
    "original ppl",
    "seconds",
)


def main(argv: list[str]) -> None:
    del argv
    import dataclasses

    from gidd_jax.evaluation import corpora, scoring
    from gidd_jax.evaluation.reports import NOTES, finite, write_report
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.inference.samples import check_output
    from gidd_jax.mixture import split_list

    out = check_output(OUT.value, ".json") if OUT.value else None
    is_writer = DISTRIBUTED.start()
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    run_settings = corpora.run_data_settings(CHECKPOINT.value)
    if DATA.value:
        paths = split_list(DATA.value)
        settings = [corpora.zero_shot_settings(run_settings, path) for path in paths]
    elif run_settings is not None:
        settings = [run_settings]
    else:
        raise InputError(f"{CHECKPOINT.value} names no corpus of its own: give one with --data")
    changes = {"text_key": TEXT_KEY.value, "txt_documents": TXT_DOCUMENTS.value}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = [dataclasses.replace(one, **changes) for one in settings]
    splits = corpora.splits_of([one.path for one in settings], SPLIT.value, is_own=not DATA.value)
    # All corpora are opened first: a mistyped path shows before the first is scored.
    opened = [
        corpora.open_rows(
            one, split, model, is_own=not DATA.value, max_documents=MAX_DOCUMENTS.value
        )
        for one, split in zip(settings, splits, strict=True)
    ]
    results = []
    report = {
        "checkpoint": CHECKPOINT.value,
        "ema": EMA.value,
        "process": "autoregressive" if model.process is None else repr(model.process),
        "num_samples_t": 0 if model.process is None else NUM_SAMPLES_T.value,
        "seed": SEED.value,
        "batch_size": BATCH_SIZE.value,
        "max_seq_len": model.max_seq_len,
        "corpora": results,
    }
    for one, split, corpus in zip(settings, splits, opened, strict=True):
        scores = scoring.score_rows(
            model,
            corpus,
            num_samples_t=NUM_SAMPLES_T.value,
            batch_size=BATCH_SIZE.value,
            seed=SEED.value,
            label=f"Scoring {one.path}",
        )
        figures = scoring.corpus_figures(
            model.process, corpus, scores, num_resamples=BOOTSTRAP.value, seed=SEED.value
        )
        results.append(finite({"data": one.path, "split": split, **figures}))
        if out is not None and is_writer:
            write_report(out, report)  # what fails later does not take this corpus with it
    if not is_writer:
        return
    print(table(results))
    for result in results:
        for name, note in result.get(NOTES, {}).items():
            print(f"{result['data']}: {name}: {note}")
    if out is not None:
        print(f"wrote {out}")


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures as text, one line per corpus under a line of headers."""
    from gidd_jax.evaluation import reports
    from gidd_jax.evaluation.reports import written

    lines: list[list[str]] = [list(HEADERS)]
    for result in results:
        original = result.get("original", {})
        lines.append(
            [
                result["data"],
                "-" if result["documents"] is None else str(result["documents"]),
                str(result["tokens"]),
                written(result["nelbo"], 4),
                written(result["nelbo_standard_error"], 4),
                written(result["perplexity"], 2),
                written(result["bits_per_byte"], 4),
                *(written(result.get(k), 4) for k in ("reconstruction", "middle", "prior")),
                written(original.get("perplexity"), 2),
                written(result["seconds"], 1),
            ]
        )
    return reports.table(lines, num_names=1)


if __name__ == "__main__":
    run(main, flags)
