"""Make the tables of docs/performance.md, and the plots, from the newest results.

Example:
  python -m benchmarks.report

Reads RESULTS/SUITE.jsonl and puts the tables between the two marks in the document; the rest of
it stays as it is.
"""

from pathlib import Path

from benchmarks.plots import plot
from benchmarks.tables import markdown, newest_lines, replace_marked
from gidd_jax.cli import CommandFlags, run
from gidd_jax.errors import InputError

flags = CommandFlags()
RESULTS = flags.DEFINE_string("results", "benchmarks/results", "Folder of the results.")
DOCUMENT = flags.DEFINE_string("document", "docs/performance.md", "Document to put tables into.")


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.checkpoints.storage import write_atomically

    folder, document = Path(RESULTS.value), Path(DOCUMENT.value)
    if not document.is_file():
        raise InputError(f"--document: no such file: {document}")
    lines = newest_lines(folder)
    write_atomically(document, replace_marked(document.read_text("utf-8"), markdown(lines)))
    for line in lines:
        plot(line, folder / f"{line['suite']}.png")
    print(f"wrote {document} from {len(lines)} suites in {folder}")


if __name__ == "__main__":
    run(main, flags)
