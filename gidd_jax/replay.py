"""Play how texts came about, from the trace that `gidd_jax.sample --trace` wrote.

Examples:
  python -m gidd_jax.replay --trace=trace.npz --out=replay.html
  python -m gidd_jax.replay --trace=trace.npz --watch

--out writes one page that any browser opens, without a network: masks fill in, tokens are
replaced, corrections are struck through and rewritten, each token shaded by its probability.
"""

from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError

flags = CommandFlags()
TRACE = flags.DEFINE_string("trace", None, "File of a trace (.npz).", required=True)
OUT = flags.DEFINE_string("out", None, "Page to write, ending in .html.")
WATCH = flags.DEFINE_bool("watch", False, "Play in the terminal.")


def main(argv: list[str]) -> None:
    del argv
    if not OUT.value and not WATCH.value:
        raise InputError("say what to do with the trace: --out=replay.html, --watch or both")

    from rich.console import Console

    from gidd_jax.inference.samples import check_output
    from gidd_jax.sampling.trace import load_trace
    from gidd_jax.views.replay_page import write_replay
    from gidd_jax.views.watch import check_terminal, watch

    out, console = check_output(OUT.value, ".html") if OUT.value else None, Console()
    if WATCH.value:
        check_terminal(console)
    trace = load_trace(TRACE.value)
    if out is not None:
        write_replay(out, trace, TRACE.value)
        print(f"wrote {out}")
    if WATCH.value:
        watch(trace, console)


if __name__ == "__main__":
    run(main, flags)
