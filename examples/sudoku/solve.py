"""Solve puzzles by infilling, and print what a model gets right, before and after self-correction.

Examples:
  python examples/sudoku/solve.py --checkpoint=RUN --puzzles=outputs/sudoku/6/test.npz
  python examples/sudoku/solve.py --checkpoint=RUN --puzzles=mine.txt --methods=adaptive \\
    --out=solved.json --replay=solved.html

--puzzles: test.npz of make_data.py, or text with one puzzle a line, row by row, `.` for a free cell
(several solutions, or none, are an error). Three tables, with 95% intervals:
  grids    drawn without givens: share that is valid
  puzzles  by number of givens: share that is solved, mean number of cells wrong
  mending  of wrong cells of a first answer: touch P(changed | wrong), recover P(right after | wrong
           before), damage P(changed | right before). `while drawing`: from the first symbol that a
           cell got (maybe noise) to the last, by the sampler; `self_correct`: of its final answer
--out writes the figures as JSON, which compare.py puts side by side. --replay writes a page that
plays the hardest puzzles as the first of --methods fills them in.
"""

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import checkpoint_flag, code_flags

flags = CommandFlags()
CHECKPOINT = checkpoint_flag(flags)
PUZZLES = flags.DEFINE_string("puzzles", None, "File of puzzles, .npz or text.", required=True)
METHODS = flags.DEFINE_string(
    "methods",
    None,
    "Samplers, separated by commas, each with options as in NAME:KEY=VALUE:KEY=VALUE. Default: "
    "some that the process has.",
)
GIVENS = flags.DEFINE_list("givens", None, "Only puzzles with these numbers of givens.")
NUM_PUZZLES = flags.DEFINE_integer("num_puzzles", None, "Most puzzles of each.", lower_bound=1)
NUM_GRIDS = flags.DEFINE_integer("num_grids", 256, "Grids without givens; 0: none.", lower_bound=0)
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", None, "Most network calls. Default: two a cell.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Rows drawn together.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of samples and bootstrap.", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")
OUT = flags.DEFINE_string("out", None, "File for the figures, ending in .json.")
REPLAY = flags.DEFINE_string("replay", None, "Page that plays puzzles, ending in .html.")
CODE = code_flags(flags)
PLAYED = 4  # puzzles on a page


def main(argv: list[str]) -> None:
    del argv
    import puzzles as files
    from grids import layout_of
    from tables import grid_table, mending_table, puzzle_table

    from gidd_jax.inference.samples import check_output

    out = check_output(OUT.value, ".json") if OUT.value else None
    page = check_output(REPLAY.value, ".html", "--replay") if REPLAY.value else None
    found = files.load_puzzles(PUZZLES.value)
    givens = None if GIVENS.value is None else _counts(GIVENS.value)

    import solving

    from gidd_jax.evaluation.reports import write_report
    from gidd_jax.inference.gidd import Gidd
    from gidd_jax.views.replay_page import Grid, write_replay

    found = solving.chosen(found, givens, NUM_PUZZLES.value)
    form = layout_of(found.ids.shape[1])
    model = Gidd.from_pretrained(CHECKPOINT.value, ema=EMA.value, **CODE.values)
    process = solving.check_model(model, CHECKPOINT.value, form)
    methods = solving.methods_of(model, METHODS.value, NUM_STEPS.value or 2 * form.cells)
    report = {
        "checkpoint": CHECKPOINT.value,
        "process": solving.process_name(process),
        "puzzles": PUZZLES.value,
        "size": form.size,
        "seed": SEED.value,
        "ema": EMA.value,
        "grids": [],
        "solved": [],
        "mending": [],
    }
    place = (BATCH_SIZE.value, SEED.value)
    for name, options in methods.items():
        if NUM_GRIDS.value:
            report["grids"].append(
                solving.grid_figures(model, name, options, NUM_GRIDS.value, *place)
            )
        solved, mending = solving.puzzle_figures(model, name, options, found, *place)
        report["solved"] += solved
        report["mending"] += mending
    if out is not None:
        write_report(out, report)
    if page is not None:
        _, hardest = list(solving.by_givens(found))[-1]
        samples = solving.solve(model, hardest, next(iter(methods.values())), *place)
        trace = solving.most_rewritten(samples, hardest, PLAYED)
        title = f"Puzzles of {PUZZLES.value}, by {next(iter(methods))}"
        write_replay(page, trace, title, Grid(form.size, (form.box_rows, form.box_columns)))
    if report["grids"]:
        print(f"grids without givens\n{grid_table(report['grids'])}\n")
    print(f"puzzles\n{puzzle_table(report['solved'])}\n")
    print(f"mending\n{mending_table(report['mending'])}")
    for path in filter(None, (out, page)):
        print(f"wrote {path}")


def _counts(words: list[str]) -> list[int]:
    for word in words:
        if not word.isdecimal():
            raise InputError(f"--givens={word}: give numbers, as 20,16")
    return [int(word) for word in words]


if __name__ == "__main__":
    run(main, flags)
