"""Measure how well a trained model predicts text: a bound on its loss, with error bars.

Examples:
  python -m gidd_jax.evaluate --checkpoint=outputs/quickstart
  python -m gidd_jax.evaluate --checkpoint=RUN --data=wiki.txt,books/,tfds:lm1b --split=test \\
      --num_samples_t=16 --out=metrics.json
  python -m gidd_jax.evaluate --checkpoint=RUN --estimator=importance --num_paths=16
  python -m gidd_jax.evaluate --checkpoint=RUN --against=OTHER

Without --data: the run's own validation split, in the rows that training validates on. With it:
every document of each corpus, cut into windows so that nothing is dropped. Windows of a document
overlap at its end; what two windows share counts twice, in nats, tokens and bytes alike.

Prints a table, one line per corpus. --out is JSON, written after each corpus: `checkpoint`,
`against`, `ema`, `process`, `estimator`, `num_samples_t`, `seed`, `batch_size`, `max_seq_len` and
`corpora`, a list with for each of them:
  data, split, documents, rows, tokens, bytes   what was scored (bytes: UTF-8, of scored tokens;
      documents: null for shards that do not say where they begin, errors are then over rows)
  quantity, says, calls_per_token   its name, what it is to log p, and network calls for a token
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
Another --estimator gives `options` and `quantities` in place of the bound and its terms, from the
loosest on: quantity, says, nats_per_token, standard_error (by document), perplexity, bits_per_byte
and calls_per_token. --against adds
  against   {difference, difference_standard_error, difference_interval, share_better}: nats per
      token less than the other model needs, by the paired bootstrap, and the share of documents
      that the first model predicts better
"""

from gidd_jax.cli import CommandFlags, run
from gidd_jax.model_flags import checkpoint_flag, code_flags
from gidd_jax.parallel.distributed import distributed_flags
from gidd_jax.sampling.options import (
    CHAIN_ORDERS,
    ESTIMATORS,
    EstimatorOptions,
    changed_options,
)

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

AGAINST = flags.DEFINE_string(
    "against", None, "Another model, given as --checkpoint, to compare with on the same rows."
)
# Fields of EstimatorOptions; what is not given keeps the default there.
OPTIONS = {
    "estimator": flags.DEFINE_enum(
        "estimator",
        None,
        ESTIMATORS,
        "Diffusion only: the diffusion bound; the chain of decoders that put in one token a call; "
        f"weighted paths of the ancestral sampler. Default: {EstimatorOptions.estimator}.",
    ),
    "num_samples_t": flags.DEFINE_integer(
        "num_samples_t",
        None,
        f"bound: times drawn per row. Default: {EstimatorOptions.num_samples_t}.",
    ),
    "num_orders": flags.DEFINE_integer(
        "num_orders", None, f"chain: orders per row. Default: {EstimatorOptions.num_orders}."
    ),
    "chain_order": flags.DEFINE_enum(
        "chain_order",
        None,
        CHAIN_ORDERS,
        f"chain: which orders. Default: {EstimatorOptions.chain_order}.",
    ),
    "num_paths": flags.DEFINE_integer(
        "num_paths", None, f"importance: paths per row. Default: {EstimatorOptions.num_paths}."
    ),
    "path_steps": flags.DEFINE_integer(
        "path_steps", None, f"importance: steps of a path. Default: {EstimatorOptions.path_steps}."
    ),
}


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.evaluation import corpora, likelihoods, tables
    from gidd_jax.evaluation.reports import NOTES, finite, write_report
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.inference.samples import check_output
    from gidd_jax.sampling.estimators import check_estimator

    out = check_output(OUT.value, ".json") if OUT.value else None
    given = {name: flag.value for name, flag in OPTIONS.items() if flag.value is not None}
    options = changed_options(EstimatorOptions(), given)
    is_bound = options.estimator == "bound"
    is_writer = DISTRIBUTED.start()
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    check_estimator(model.process, options)
    other = None
    if AGAINST.value:
        other = Gidd.from_pretrained(AGAINST.value, ema=EMA.value, **CODE.values)
        likelihoods.check_comparable(model, other)
        check_estimator(other.process, options)
    # All corpora are opened first: a mistyped path shows before the first is scored.
    opened = corpora.open_corpora(
        model,
        CHECKPOINT.value,
        DATA.value,
        SPLIT.value,
        max_documents=MAX_DOCUMENTS.value,
        text_key=TEXT_KEY.value,
        txt_documents=TXT_DOCUMENTS.value,
    )
    exact = model.process is None
    results = []
    report = {
        "checkpoint": CHECKPOINT.value,
        "against": AGAINST.value,
        "ema": EMA.value,
        "process": "autoregressive" if model.process is None else repr(model.process),
        "estimator": "exact" if exact else options.estimator,
        "num_samples_t": 0 if exact or not is_bound else options.num_samples_t,
        "seed": SEED.value,
        "batch_size": BATCH_SIZE.value,
        "max_seq_len": model.max_seq_len,
        "corpora": results,
    }
    common = {"batch_size": BATCH_SIZE.value, "seed": SEED.value, "num_resamples": BOOTSTRAP.value}
    for name, split, corpus in opened:
        label = f"Scoring {name}"
        figures, nats, tokens = likelihoods.score_corpus(
            model, corpus, options, label=label, **common
        )
        if other is not None:
            _, nats_of_other, _ = likelihoods.score_corpus(
                other, corpus, options, label=f"{label} with {AGAINST.value}", **common
            )
            figures["against"] = likelihoods.comparison(
                corpus, nats, nats_of_other, tokens, num_resamples=BOOTSTRAP.value, seed=SEED.value
            )
        results.append(finite({"data": name, "split": split, **figures}))
        if out is not None and is_writer:
            write_report(out, report)  # what fails later does not take this corpus with it
    if not is_writer:
        return
    print(tables.bounds_table(results) if is_bound else tables.estimates_table(results))
    if AGAINST.value:
        print(tables.comparisons_table(results, AGAINST.value))
    for result in results:
        notes = result.get(NOTES, {}) | result.get("against", {}).get(NOTES, {})
        for name, note in notes.items():
            print(f"{result['data']}: {name}: {note}")
    if out is not None:
        print(f"wrote {out}")


if __name__ == "__main__":
    run(main, flags)
