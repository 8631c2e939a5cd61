"""Improve generated texts by self-correction with a trained diffusion model.

Examples:
  python -m gidd_jax.self_correct --checkpoint=RUN --samples=samples.npz --out=corrected.npz
  python -m gidd_jax.self_correct --checkpoint=RUN --samples=texts.txt --out=corrected.npz \\
    --replay=replay.html

--samples: a file of gidd_jax.sample (.npz; all tokens of its sequences may change), or of texts:
.txt (one per line), .jsonl, .jsonl.gz, .jsonl.xz or .parquet (field "text"). In each step (arXiv
2503.04482, section 5.3) the network proposes a token for every position and the most probable
changes are made; every text stops by itself. Writes the corrected ids and texts, and beside them a
.csv file with one line per text: initial and final self-accuracy (share of tokens that are the
network's first choice), number of changed tokens, steps, whether it converged and whether it was
stopped early by --patience. --replay writes a page that plays the corrections, --trace the file
behind it (see gidd_jax.replay).
"""

from pathlib import Path

from gidd_jax.cli import CommandFlags, checkpoint_flag, code_flags, printable, run
from gidd_jax.sampling.options import CorrectionOptions

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
SAMPLES = flags.DEFINE_string(
    "samples", None, "File of samples (.npz), or of texts.", required=True
)
OUT = flags.DEFINE_string("out", None, "File to write, ending in .npz.", required=True)
TRACE = flags.DEFINE_string("trace", None, "File for every change on the way, ending in .npz.")
REPLAY = flags.DEFINE_string("replay", None, "Page that plays the changes, ending in .html.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Texts corrected together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the proposals.", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
CODE = code_flags(flags)

# The rest are fields of CorrectionOptions; what is not given keeps the default there.
OPTIONS = {
    "num_steps": flags.DEFINE_integer(
        "num_steps", None, f"Most steps. Default: {CorrectionOptions.num_steps}."
    ),
    "temperature": flags.DEFINE_float(
        "temperature", None, f"Of the proposals. Default: {CorrectionOptions.temperature}."
    ),
    "tokens_per_step": flags.DEFINE_integer(
        "tokens_per_step",
        None,
        f"Most tokens changed in a step. Default: {CorrectionOptions.tokens_per_step}.",
    ),
    "patience": flags.DEFINE_integer(
        "patience",
        None,
        "Steps without better self-accuracy that a text may take before it stops. "
        f"Default: {CorrectionOptions.patience}.",
    ),
    "t": flags.DEFINE_float(
        "t", None, f"Time that the network is told. Default: {CorrectionOptions.t}."
    ),
}
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
    from gidd_jax.data.texts import read_texts
    from gidd_jax.inference.samples import check_apart, check_output, load_ids, save_samples

    out, source = check_output(OUT.value, ".npz"), Path(SAMPLES.value).expanduser()
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

    given = {name: flag.value for name, flag in OPTIONS.items() if flag.value is not None}
    options = CorrectionOptions(**given)
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


if __name__ == "__main__":
    run(main, flags)
