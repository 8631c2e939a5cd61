"""Play how texts came about, from the trace that `gidd_jax.sample --trace` wrote.

Examples:
  python -m gidd_jax.replay --trace=trace.npz --out=replay.html
  python -m gidd_jax.replay --trace=trace.npz --watch
  python -m gidd_jax.replay --trace=trace.npz --out=replay.html --columns=9 --box=3x3

--out writes one page that any browser opens, without a network: masks fill in, tokens are
replaced, corrections are struck through and rewritten, each token shaded by its probability.
--columns sets the tokens of a sequence in a grid, row by row, as those of a picture or a puzzle.
"""

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError

flags = CommandFlags()
TRACE = flags.DEFINE_string("trace", None, "File of a trace (.npz).", required=True)
OUT = flags.DEFINE_string("out", None, "Page to write, ending in .html.")
COLUMNS = flags.DEFINE_integer("columns", None, "Break rows after so many tokens.", lower_bound=1)
BOX = flags.DEFINE_string("box", None, "--columns: a line after so many rows and columns, as 3x3.")
WATCH = flags.DEFINE_bool("watch", False, "Play in the terminal.")


def main(argv: list[str]) -> None:
    del argv
    if not OUT.value and not WATCH.value:
        raise InputError("say what to do with the trace: --out=replay.html, --watch or both")

    if (COLUMNS.value or BOX.value) and not OUT.value:
        raise InputError("--columns and --box are for the page: give --out=replay.html, too")
    if BOX.value and COLUMNS.value is None:
        raise InputError("--box needs --columns: say how many tokens a row has")

    from rich.console import Console

    from gidd_jax.inference.samples import check_output
    from gidd_jax.sampling.trace import load_trace
    from gidd_jax.views.replay_page import parse_grid, write_replay
    from gidd_jax.views.watch import check_terminal, watch

    out, console = check_output(OUT.value, ".html") if OUT.value else None, Console()
    grid = None if COLUMNS.value is None else parse_grid(COLUMNS.value, BOX.value)
    if WATCH.value:
        check_terminal(console)
    trace = load_trace(TRACE.value)
    if out is not None:
        write_replay(out, trace, TRACE.value, grid)
        print(f"wrote {out}")
    if WATCH.value:
        watch(trace, console)


if __name__ == "__main__":
    run(main, flags)
