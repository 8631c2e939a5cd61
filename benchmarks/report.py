"""Make the tables of docs/performance.md, and the plots, from the newest results.

Example:
  python -m benchmarks.report

Reads RESULTS/SUITE.jsonl and puts the tables between the two marks in the document; the rest of
it stays as it is.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.plots import plot
from benchmarks.tables import markdown
from gidd_jax.cli import run
from gidd_jax.errors import InputError

RESULTS = flags.DEFINE_string("results", "benchmarks/results", "Folder of the results.")
DOCUMENT = flags.DEFINE_string("document", "docs/performance.md", "Document to put tables into.")
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def main(argv: list[str]) -> None:
    del argv
    from gidd_jax.checkpoint import write_atomically

    folder, document = Path(RESULTS.value), Path(DOCUMENT.value)
    if not document.is_file():
        raise InputError(f"--document: no such file: {document}")
    lines = newest_lines(folder)
    write_atomically(document, replace_marked(document.read_text("utf-8"), markdown(lines)))
    for line in lines:
        plot(line, folder / f"{line['suite']}.png")
    print(f"wrote {document} from {len(lines)} suites in {folder}")


def newest_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the last line of every suite and machine; trials with small sizes do not count."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text("utf-8").splitlines():
            line = json.loads(text)
            if line["scale"] != "small":
                machine = line["machine"]
                found[line["suite"], machine["cpu"], machine["device"], line["dtype"]] = line
    if not found:
        raise InputError(f"--results={folder}: no results there; run python -m benchmarks.run")
    return list(found.values())


def replace_marked(text: str, tables: str) -> str:
    """Put the tables between the marks; raises InputError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the document has no lines {BEGIN} and {END}: put them in")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


if __name__ == "__main__":
    run(main)
