"""Mark the tokens of a text that are probably wrong, or measure how well a model finds such tokens.

Examples:
  python -m gidd_jax.highlight --checkpoint=RUN --text=essay.txt --out=essay.html
  python -m gidd_jax.highlight --checkpoint=RUN --text=essay.txt --method=leave_one_out
  python -m gidd_jax.highlight --checkpoint=RUN --evaluate --corruption=0.1,0.3 --out=found.json

--text: a file that holds one text of any length. A token is wrong with the probability that it is
noise of the process at time --t (see gidd_jax.sampling.suspicion); --out writes a page.
Models whose only noise is the mask need --method=leave_one_out, one network call for each token.

--evaluate: of validation text (of the run, or --data) a share of the tokens is replaced by random
ones. Prints a line for each share; --out is JSON, written after each share, with the settings,
`expected_share` (of noise among the tokens at time --t: probabilities are meant for that share) and
`figures`, for each share
  corruption, tokens, share_wrong, mean_suspicion   share asked for; tokens judged (not special
      ones); of them those that differ from the original; the mean probability
  auroc, auroc_standard_error, auroc_interval   P(a wrong token is more suspicious than a right
      one); error and 95% interval by bootstrap over documents
  calibration_error   mean |probability - frequency| over 15 bins (expected calibration error)
  calibration   {suspicion, share_wrong, tokens}: the bins that hold tokens
  restored   share of the wrong tokens for which the model proposes the original
A figure that the tokens do not determine is null, and `notes` says why.
"""

from pathlib import Path

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import checkpoint_flag, code_flags
from gidd_jax.sampling.options import SUSPICION_METHODS, SuspicionOptions

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
TEXT = flags.DEFINE_string("text", None, "File of the text to mark.")
EVALUATE = flags.DEFINE_bool("evaluate", False, "Measure on corrupted validation text instead.")
OUT = flags.DEFINE_string("out", None, "File to write: .html, or .json with --evaluate.")
METHOD = flags.DEFINE_enum(
    "method", SuspicionOptions.method, SUSPICION_METHODS, "One network call, or one a token."
)
T = flags.DEFINE_float(
    "t", SuspicionOptions.t, "Time that the network is told: the later, the more is suspicious."
)
THRESHOLD = flags.DEFINE_float(
    "threshold", 0.5, "Probability from which a token is listed.", lower_bound=0, upper_bound=1
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows judged together.", lower_bound=1)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
CODE = code_flags(flags)
CORRUPTION = flags.DEFINE_list(
    "corruption", ["0.02", "0.1", "0.3"], "Shares of tokens to replace, separated by commas."
)
DATA = flags.DEFINE_string(
    "data",
    None,
    "Corpus to corrupt: files, a folder or glob of texts, a folder of shards, tfds:NAME, "
    "hf:OWNER/NAME or 'embedded'. Default: that of the run.",
)
SPLIT = flags.DEFINE_string(
    "split", None, "Split of the corpus, as for gidd_jax.evaluate. Default: validation."
)
MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", 200, "Corrupt a random sample of them, always the same.", lower_bound=1
)
BOOTSTRAP = flags.DEFINE_integer("bootstrap", 1000, "Resamples of the documents.", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 0, "Seed of corruption and bootstrap.", lower_bound=0)
OF_EVALUATION = (CORRUPTION, DATA, SPLIT, MAX_DOCUMENTS, BOOTSTRAP, SEED)


def main(argv: list[str]) -> None:
    del argv
    if EVALUATE.value == (TEXT.value is not None):
        raise InputError("say what to do: --text=FILE marks a text, --evaluate measures")
    options = SuspicionOptions(method=METHOD.value, t=T.value)
    if TEXT.value is None:
        evaluate(options, shares(CORRUPTION.value))
    else:
        given = [flag.name for flag in OF_EVALUATION if flag.present]
        if given:
            raise InputError(f"--{given[0]} has no effect with --text: it belongs to --evaluate")
        mark(TEXT.value, options)


def mark(file: str, options: SuspicionOptions) -> None:
    """Print the text of a file with its marks, and write the page where asked for."""
    from gidd_jax.data.texts import read_text

    text = read_text(file, "--text")

    from rich.console import Console

    from gidd_jax.checkpoints.storage import write_atomically
    from gidd_jax.evaluation.detection import judge_text
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.inference.samples import check_apart, check_output
    from gidd_jax.views.marked import marked_page, print_marked

    out = check_output(OUT.value, ".html") if OUT.value else None
    check_apart(text=Path(file), out=out)
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    judged = judge_text(model, text, options, BATCH_SIZE.value)
    if out is not None:
        title = f"{file} judged by {CHECKPOINT.value}"
        write_atomically(out, marked_page(judged, THRESHOLD.value, title))
    print_marked(judged, THRESHOLD.value, Console())
    if out is not None:
        print(f"wrote {out}")


def evaluate(options: SuspicionOptions, corruption: list[float]) -> None:
    """Print the figures of each share, and write them where asked for."""
    from gidd_jax.evaluation.corpora import open_corpus
    from gidd_jax.evaluation.detection import TABLE_HEADER, detection_figures, table_line
    from gidd_jax.evaluation.reports import NOTES, finite, write_report
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.inference.samples import check_output
    from gidd_jax.sampling.suspicion import check_suspicion, expected_share

    out = check_output(OUT.value, ".json") if OUT.value else None
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    if model.process is None:
        raise InputError("suspicion needs a diffusion model: this one is autoregressive")
    check_suspicion(model.process, options)
    name, split, corpus = open_corpus(
        model, CHECKPOINT.value, DATA.value, SPLIT.value, max_documents=MAX_DOCUMENTS.value
    )
    expected = expected_share(model.process, options.t)
    print(f"{name}: {len(corpus.ids)} rows; noise expected at t = {options.t:g}: ", end="")
    print(f"{expected:.2%} of the tokens\n{TABLE_HEADER}")
    figures = []
    report = {
        "checkpoint": CHECKPOINT.value,
        "ema": EMA.value,
        "process": repr(model.process),
        "data": name,
        "split": split,
        "method": options.method,
        "t": options.t,
        "seed": SEED.value,
        "expected_share": expected,
        "documents": corpus.num_documents,
        "rows": len(corpus.ids),
        "figures": figures,
        NOTES: corpus.notes,
    }
    for share in corruption:
        found = detection_figures(
            model,
            corpus,
            share,
            options,
            batch_size=BATCH_SIZE.value,
            num_resamples=BOOTSTRAP.value,
            seed=SEED.value,
        )
        figures.append(finite(found))
        if out is not None:
            write_report(out, report)  # what fails later does not take this share with it
        print(table_line(figures[-1]))
    notes = [(f"corruption {one['corruption']:g}: ", one.get(NOTES, {})) for one in figures]
    for where, named in [*notes, ("", corpus.notes)]:
        for figure, note in named.items():
            print(f"{where}{figure}: {note}")
    if out is not None:
        print(f"wrote {out}")


def shares(words: list[str]) -> list[float]:
    """Return the shares that were asked for; InputError unless all are between 0 and 1."""
    try:
        found = [float(word) for word in words]
    except ValueError:
        found = []
    if not found or not all(0 < share < 1 for share in found):
        raise InputError(
            f"--corruption must be numbers between 0 and 1, such as 0.02,0.1: {','.join(words)}"
        )
    return found


if __name__ == "__main__":
    run(main, flags)
