"""Improve texts by self-correction with a trained diffusion model, or measure how it mends errors.

Examples:
  python -m gidd_jax.self_correct --checkpoint=RUN --samples=samples.npz --out=corrected.npz
  python -m gidd_jax.self_correct --checkpoint=RUN --samples=texts.txt --out=corrected.npz \\
    --replay=replay.html
  python -m gidd_jax.self_correct --checkpoint=RUN --planted=0.05 --score=proposal,suspicion \\
    --t=0.01,0.1,0.3 --temperature=0.1,1 --out=mended.json

--samples: a file of gidd_jax.sample (.npz; all tokens of its sequences may change), or of texts:
.txt (one per line), .jsonl, .jsonl.gz, .jsonl.xz or .parquet (field "text"). In each step (arXiv
2503.04482, section 5.3) the network proposes a token for every position. With --score=proposal the
most probable changes are made; with --score=suspicion the tokens that are most probably wrong (as
in gidd_jax.highlight) are replaced, while one is above --threshold. Every text stops by itself.
Writes the corrected ids and texts, and beside them a .csv file with one line per text: initial and
final self-accuracy (share of tokens that are the network's first choice), number of changed tokens,
steps, whether it converged and whether it was stopped early by --patience. --replay writes a page
that plays the corrections, --trace the file behind it (see gidd_jax.replay).

--planted: of validation text (of the run, or --data) a share of the tokens is replaced, half by
random ones, half by ones of the same class and a like frequency, and corrected with every --score,
--t and --temperature. Prints a line for each; --out is JSON, written after each, with `figures`:
  touch, recover, damage  P(changed | wrong), P(right after | wrong before), P(changed | right)
  wrong_after             share of all tokens that is wrong after the correction
  random, confusable      the same figures of each kind of error alone
  expected_share          of noise among the tokens at that time: suspicion is meant for that share
with standard errors and 95% intervals by bootstrap over documents, counts, and network_calls.
`comparison`: the best settings of both scores on this text, by the paired bootstrap.
"""

from pathlib import Path

from gidd_jax.cli import CommandFlags, printable, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import checkpoint_flag, code_flags
from gidd_jax.sampling.options import CORRECTION_SCORES, CorrectionOptions, correction_grid

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
SAMPLES = flags.DEFINE_string("samples", None, "File of samples (.npz), or of texts.")
PLANTED = flags.DEFINE_float(
    "planted", None, "Measure instead, with this share of tokens replaced.", 0.0, 1.0
)
OUT = flags.DEFINE_string("out", None, "File to write: .npz, or .json with --planted.")
TRACE = flags.DEFINE_string("trace", None, "File for every change on the way, ending in .npz.")
REPLAY = flags.DEFINE_string("replay", None, "Page that plays the changes, ending in .html.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Texts corrected together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of proposals, errors, bootstrap.", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
CODE = code_flags(flags)
DATA = flags.DEFINE_string("data", None, "Corpus, as for gidd_jax.highlight. Default: the run's.")
SPLIT = flags.DEFINE_string("split", None, "Its split. Default: validation.")
MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", 200, "Take a random sample of them, always the same.", lower_bound=1
)
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "Resamples of the documents.", lower_bound=2)

# Fields of CorrectionOptions. With --planted the first three are lists.
SCORE = flags.DEFINE_list(
    "score", [CorrectionOptions.score], f"What goes first: {' or '.join(CORRECTION_SCORES)}."
)
T = flags.DEFINE_list("t", [str(CorrectionOptions.t)], "Time that the network is told.")
TEMPERATURE = flags.DEFINE_list(
    "temperature", [str(CorrectionOptions.temperature)], "Of the proposals."
)
# What is not given keeps the default there.
OPTIONS = {
    name: define(name, None, f"{words} Default: {getattr(CorrectionOptions, name)}.")
    for name, define, words in (
        ("num_steps", flags.DEFINE_integer, "Most steps."),
        ("tokens_per_step", flags.DEFINE_integer, "Most tokens changed in a step."),
        ("patience", flags.DEFINE_integer, "Steps without better self-accuracy before a stop."),
        ("threshold", flags.DEFINE_float, "suspicion: replace what is wrong more probably."),
    )
}
OF_SAMPLES, OF_PLANTED = (TRACE, REPLAY), (DATA, SPLIT, MAX_DOCUMENTS, BOOTSTRAP)
COLUMNS = (
    "initial_accuracy",
    "final_accuracy",
    "num_changes",
    "num_steps",
    "converged",
    "stopped_early",
)


def main(argv: list[str]) -> None:
    del argv
    if (PLANTED.value is None) == (SAMPLES.value is None):
        raise InputError("say what to do: --samples=FILE corrects it, --planted=SHARE measures")
    is_file = SAMPLES.value is not None
    mode, other = ("samples", "planted") if is_file else ("planted", "samples")
    idle = [flag.name for flag in (OF_PLANTED if is_file else OF_SAMPLES) if flag.present]
    if idle:
        raise InputError(f"--{idle[0]} has no effect with --{mode}: it belongs to --{other}")
    common = {name: flag.value for name, flag in OPTIONS.items() if flag.value is not None}
    ways = correction_grid(SCORE.value, T.value, TEMPERATURE.value, common)
    if PLANTED.value is not None:
        measure(PLANTED.value, ways)
    elif len(ways) > 1:
        raise InputError("--score, --t and --temperature take one value each without --planted")
    elif SAMPLES.value is not None:
        correct(SAMPLES.value, ways[0])


def correct(samples: str, options: CorrectionOptions) -> None:
    """Write and print the corrected texts of a file."""
    from gidd_jax.data.texts import read_texts
    from gidd_jax.inference.samples import check_apart, check_output, load_ids, save_samples

    if OUT.value is None:
        raise InputError("--out is required with --samples: name a file that ends in .npz")
    out, source = check_output(OUT.value, ".npz"), Path(samples).expanduser()
    trace_file = check_output(TRACE.value, ".npz", "--trace") if TRACE.value else None
    page = check_output(REPLAY.value, ".html", "--replay") if REPLAY.value else None
    table = check_output(out.with_suffix(".csv"), ".csv")
    check_apart(samples=source, out=out, trace=trace_file)
    # The ids of samples are checked against the model: texts are read before it is loaded.
    is_samples = source.suffix == ".npz" and source.is_file()
    texts = None if is_samples else read_texts(source, "--samples").texts

    from gidd_jax.evaluation.reports import write_csv
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.views.replay_page import write_files

    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    result = model.correct(
        load_ids(source, model.tokenizer) if texts is None else texts,
        batch_size=BATCH_SIZE.value,
        seed=SEED.value,
        trace=bool(trace_file or page),
        options=options,
    )
    columns = {name: getattr(result, name) for name in COLUMNS}
    rows = [
        {"text": number, **{name: f"{float(values[number]):g}" for name, values in columns.items()}}
        for number in range(len(result.texts))
    ]
    # Files first: nobody should lose them by what a terminal does to the texts.
    save_samples(out, result, model.tokenizer)
    write_csv(table, rows)
    if result.trace is not None:
        title = f"Corrections by {CHECKPOINT.value}"
        for path in write_files(result.trace, trace_file, page, title):
            print(f"wrote {path}")
    for number, text in enumerate(result.texts):
        print(f"--- text {number} ---\n{printable(text)}\n")
    for name, values in columns.items():
        print(f"{name:>18}: mean {values.mean():.4g}, from {values.min():g} to {values.max():g}")
    print(f"{result.network_calls} network calls; wrote {out} and {table}")


def measure(share: float, ways: list[CorrectionOptions]) -> None:
    """Print how each way of correcting mends planted errors, and write it where asked for."""
    from gidd_jax.evaluation import mending
    from gidd_jax.evaluation.corpora import open_corpus
    from gidd_jax.evaluation.reports import NOTES, write_report
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.inference.samples import check_output

    out = check_output(OUT.value, ".json") if OUT.value else None
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    mending.check_ways(model, ways)
    name, split, corpus = open_corpus(
        model, CHECKPOINT.value, DATA.value, SPLIT.value, max_documents=MAX_DOCUMENTS.value
    )
    report = {
        "checkpoint": CHECKPOINT.value,
        "ema": EMA.value,
        "process": repr(model.process),
        "data": name,
        "split": split,
        "planted": share,
        "seed": SEED.value,
        "documents": corpus.num_documents,
        "rows": len(corpus.ids),
        "figures": [],
        NOTES: corpus.notes,
    }
    resampling = {"num_resamples": BOOTSTRAP.value, "seed": SEED.value}
    found = []
    print(f"{name}: {len(corpus.ids)} rows\n{mending.TABLE_HEADER}")
    for one in mending.mend(model, corpus, share, ways, batch_size=BATCH_SIZE.value, **resampling):
        found.append(one)
        report["figures"].append(one.figures)
        report["comparison"] = mending.comparison(found, **resampling)
        if out is not None:
            write_report(out, report)  # what fails later does not take these figures with it
        print(mending.table_line(one.figures))
    if report["comparison"] is not None:
        print(mending.verdict(report["comparison"]))
    for figure, note in corpus.notes.items():
        print(f"{figure}: {note}")
    if out is not None:
        print(f"wrote {out}")


if __name__ == "__main__":
    run(main, flags)
