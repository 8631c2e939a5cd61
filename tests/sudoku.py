"""Small Sudokus as texts: a tokenizer, a run on them, and how many puzzles a model solves.

`python tests/sudoku.py WORKDIR` trains the model of `docs/sampling.md` (a quarter of an hour on two
cores; it goes on where it was stopped) and prints its table.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

sys.path.append(str(Path(__file__).parents[1] / "examples" / "sudoku"))
from grids import is_valid, random_grids

SIZE = 6
CELLS = SIZE * SIZE
PUZZLES, CALLS = 128, 36


def texts(found: np.ndarray) -> list[str]:
    return ["".join(str(digit + 1) for digit in row) for row in found]


def write_inputs(folder: Path, count: int) -> None:
    """Write a corpus of grids, one a line, and a tokenizer of digits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grids.txt").write_text("\n".join(texts(random_grids(SIZE, count, seed=0))) + "\n")
    vocab = {"[BOS]": 0, "[EOS]": 1, "[UNK]": 2} | {str(d + 1): d + 3 for d in range(SIZE)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.add_special_tokens(["[BOS]", "[EOS]", "[UNK]"])
    (folder / "tokenizer").mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "[BOS]"}
    config |= {"eos_token": "[EOS]", "unk_token": "[UNK]"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))


def train(workdir: Path, **changes: object) -> Path:
    """Train a model on grids in a process of its own, or go on; return the folder of the run."""
    if not (workdir / "inputs").exists():
        write_inputs(workdir / "inputs", 20_000)
    inputs, run = workdir / "inputs", workdir / "run"
    settings = {
        "model.hidden_size": 128,
        "model.num_layers": 4,
        "model.num_heads": 4,
        "model.cond_dim": 64,
        "model.max_seq_len": CELLS + 2,
        "model.dtype": "float32",
        "data.path": inputs / "grids.txt",
        "data.tokenizer": inputs / "tokenizer",
        "data.txt_documents": "line",
        "data.mode": "padded",
        "data.validation": "last:256",
        "process.p_uniform": 0.2,
        "train.num_steps": 2000,
        "train.batch_size": 64,
        "train.eval_every": 1000,
        "train.eval_batches": 4,
        "checkpoint.every": 500,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 100,
    } | changes
    command = [sys.executable, "-m", "gidd_jax.train", "--config=gidd", f"--workdir={run}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return run


def solved(model, num_given: int, **options: object) -> float:
    """Return the share of held-out puzzles with so many given cells that infilling solves."""
    wanted = random_grids(SIZE, PUZZLES, seed=1)
    rng = np.random.default_rng(2)
    puzzles = []
    for text in texts(wanted):
        given = np.sort(rng.permutation(CELLS)[:num_given])
        pieces: list[str | int] = []
        for cell in range(CELLS):
            piece = text[cell] if cell in given else 1
            if pieces and isinstance(pieces[-1], type(piece)):
                pieces[-1] += piece  # type: ignore[operator]
            else:
                pieces.append(piece)
        puzzles.append(pieces)
    rows = model.infill(puzzles, batch_size=64, num_steps=CALLS, **options).ids
    return float(is_valid(rows[:, 1 : CELLS + 1] - 3).mean())


METHODS = {
    "ancestral": {"method": "ancestral"},
    "adaptive": {"method": "adaptive"},
    "mode_seeking": {"method": "mode_seeking"},
    "entropy_bound": {"method": "entropy_bound", "epsilon": 0.0},
}
# Methods whose free tokens are all at the time of the schedule. Those of the others are at times of
# their own, the latest of which is no time that such a network would have been told.
ON_SCHEDULE = ("ancestral", "mode_seeking")


def table(model, methods: Iterable[str] = METHODS) -> dict[str, dict[int, float]]:
    """Return what each method solves of puzzles with 20 and with 14 given cells."""
    return {
        name: {given: solved(model, given, **METHODS[name]) for given in (20, 14)}
        for name in methods
    }


@dataclasses.dataclass(frozen=True)
class TimeOfTheSchedule:
    """A network that is told the time of a row's free tokens, whatever is given beside them.

    For methods that are `ON_SCHEDULE`.
    """

    network: Any
    position_times = True

    @property
    def max_seq_len(self) -> int:
        return self.network.max_seq_len

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    def apply(self, params, *inputs, method=None):
        if method != "project":  # which has no times
            z_t, times, *rest = inputs
            inputs = z_t, times if times.ndim == 1 else times.max(axis=-1), *rest
        return self.network.apply(params, *inputs, method=method)


def as_before(model):
    """Return the model as it was used before: rows end with the text, time is the schedule's."""
    network = TimeOfTheSchedule(model.network)
    return dataclasses.replace(model, network=network, row_mode="packed")


if __name__ == "__main__":
    from gidd_jax.inference.gidd import Gidd

    model = Gidd.from_pretrained(train(Path(sys.argv[1])))
    for title, one, methods in (("before", as_before(model), ON_SCHEDULE), ("now", model, METHODS)):
        for name, shares in table(one, methods).items():
            counts = (f"{given} given: {share:.2f}" for given, share in shares.items())
            print(f"{title:8}{name:14}", *counts, flush=True)
