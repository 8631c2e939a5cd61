"""What a model makes of grids and puzzles, before and after self-correction.

Samplers that return to cells mend their own first answer: the first symbol that each cell got. Some
of these are noise that the sampler put there itself, which a trace cannot tell from its answers:
what it replaces of that counts as mended, too. Self-correction mends the sampler's final answer.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grids
import numpy as np
from puzzles import FREE, Puzzles

from gidd_jax.errors import InputError
from gidd_jax.evaluation.repair import repaired
from gidd_jax.evaluation.sampler_laws import parse_methods
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.prompts import Rows
from gidd_jax.inference.samples import Samples
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.options import (
    READ_BY,
    CorrectionOptions,
    SamplerOptions,
    changed_options,
)
from gidd_jax.sampling.schedule import check_options, prior_mask
from gidd_jax.sampling.trace import Trace

DEFAULT = "ancestral,remdm_cap,adaptive,mode_seeking,entropy_bound:epsilon=0:edit_above=0.5"
_AXES = {"num_steps": "given by --num_steps"}
WHILE_DRAWING, SELF_CORRECT = "while drawing", "self_correct"


def check_model(model: Gidd, name: str, form: grids.Layout) -> InterpolatingProcess:
    """Return the process of a model (of --checkpoint=name) that fills in grids of this layout.

    Raises InputError for other models.
    """
    if model.process is None:
        raise InputError(f"--checkpoint={name} is autoregressive: only diffusion fills in puzzles")
    symbols = model.tokenizer.mask_id
    if (symbols, model.max_seq_len) != (form.size, form.cells):
        raise InputError(
            f"--checkpoint={name} has rows of {model.max_seq_len} tokens and {symbols} symbols, "
            f"the puzzles {form.cells} and {form.size}: train with --config=sudoku:{form.size}"
        )
    return model.process


def process_name(process: InterpolatingProcess) -> str:
    """Return the name of a process with the fields that are not the default."""
    if not dataclasses.is_dataclass(process):
        return repr(process)
    changed = [
        f"{field.name}={getattr(process, field.name):g}"
        for field in dataclasses.fields(process)
        if field.name not in ("vocab_size", "mask_id")
        and getattr(process, field.name) != field.default
        and isinstance(getattr(process, field.name), float)
    ]
    return " ".join([type(process).__name__.removesuffix("Process"), *changed])


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score, which has a width at 0 and 1, too."""
    z, share = 1.959964, hits / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of(name: str, hits: np.ndarray) -> dict[str, Any]:
    """Return the share of hits bool [N] under a name, and its interval."""
    interval = wilson(int(hits.sum()), len(hits))
    return {name: float(hits.mean()), f"{name}_interval": interval}


def first_answers(trace: Trace) -> np.ndarray:
    """Return the first symbol that each cell got from a start of masks, int [N, L]."""
    changes = trace.changes
    drawn = np.flatnonzero(changes.token != trace.mask_id)
    cells = (
        changes.sample[drawn].astype(np.int64) * changes.start.shape[1] + changes.position[drawn]
    )
    cells, earliest = np.unique(cells, return_index=True)  # changes are sorted by call
    first = changes.start.copy()
    first.ravel()[cells] = changes.token[drawn[earliest]]
    return first


def picked(trace: Trace, samples: Sequence[int]) -> Trace:
    """Return the trace of some of its samples, with symbols written from 1 on."""
    rows = np.asarray(samples)
    changes = trace.changes
    number = np.full(len(changes.start), -1)
    number[rows] = np.arange(len(rows))
    kept = np.flatnonzero(number[changes.sample] >= 0)
    kept = kept[np.argsort(number[changes.sample[kept]], kind="stable")]
    columns = {
        name: getattr(changes, name)[kept] for name in ("call", "position", "token", "log_prob")
    }
    return trace._replace(
        changes=changes._replace(
            start=changes.start[rows],
            num_calls=changes.num_calls[rows],
            sample=number[changes.sample[kept]].astype(np.int32),
            **columns,
        ),
        given=trace.given[rows],
        lengths=trace.lengths[rows],
        texts=[trace.texts[row] for row in rows],
        token_texts=["" if i == trace.mask_id else str(i + 1) for i in trace.token_ids.tolist()],
    )


def corrected(
    model: Gidd, ids: np.ndarray, given: np.ndarray, batch_size: int, seed: int
) -> tuple[np.ndarray, float]:
    """Return answers [N, L] after self-correction of their free cells, and its calls a batch."""
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    options = CorrectionOptions(num_steps=2 * ids.shape[1])
    found = model.correct(
        Rows(ids.astype(np.int32), ~given, lengths),
        batch_size=batch_size,
        seed=seed,
        options=options,
    )
    return found.ids, found.network_calls / -(-len(ids) // batch_size)


def grid_figures(
    model: Gidd, name: str, options: SamplerOptions, count: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Return the shares of valid ones among `count` grids that are drawn without givens."""
    samples = model.generate(count, batch_size=batch_size, seed=seed, options=options)
    mended, calls = corrected(
        model, samples.ids, np.zeros(samples.ids.shape, bool), batch_size, seed
    )
    return {
        "method": name,
        "grids": count,
        **share_of("valid", grids.is_valid(samples.ids)),
        "calls": samples.network_calls / -(-count // batch_size),
        **share_of("corrected_valid", grids.is_valid(mended)),
        "correction_calls": calls,
    }


def solve(
    model: Gidd, puzzles: Puzzles, options: SamplerOptions, batch_size: int, seed: int
) -> Samples:
    """Return answers to puzzles, with their trace."""
    rows = np.where(puzzles.given, puzzles.ids, FREE)
    return model.infill(rows, batch_size=batch_size, seed=seed, trace=True, options=options)


def puzzle_figures(
    model: Gidd,
    name: str,
    options: SamplerOptions,
    puzzles: Puzzles,
    batch_size: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what is solved by number of givens, and how first answers are mended."""
    rows, before, after, fixed = [], [], [], []
    for givens, some in by_givens(puzzles):
        samples = solve(model, some, options, batch_size, seed)
        assert samples.trace is not None
        mended, calls = corrected(model, samples.ids, some.given, batch_size, seed)
        before.append(first_answers(samples.trace))
        after.append(samples.ids)
        fixed.append(mended)
        rows.append(
            {"method": name, "givens": givens, "puzzles": len(some.ids)}
            | _solved("", samples.ids, some)
            | {"calls": samples.network_calls / -(-len(some.ids) // batch_size)}
            | _solved("corrected_", mended, some)
            | {"correction_calls": calls}
        )
    parts = [some for _, some in by_givens(puzzles)]
    truth, given = (np.concatenate(leaves) for leaves in zip(*parts, strict=True))
    first, final, mended = (np.concatenate(part) for part in (before, after, fixed))
    # Puzzles of one grid, nested, depend on each other: they are resampled together.
    groups = np.unique(truth, axis=0, return_inverse=True)[1].reshape(-1)
    ways = {SELF_CORRECT: (final, mended)}
    assert model.process is not None
    if prior_mask(model.process) > 0.5:  # else there is noise everywhere before the first answer
        ways = {WHILE_DRAWING: (first, final), **ways}
    return rows, [
        {"method": name, "mended": how}
        | repaired(*answers, truth, ~given, groups=groups, seed=seed).figures()
        for how, answers in ways.items()
    ]


def _solved(prefix: str, answers: np.ndarray, puzzles: Puzzles) -> dict[str, Any]:
    is_right = grids.is_valid(answers) & grids.keeps_givens(answers, puzzles.ids, puzzles.given)
    wrong = grids.cells_wrong(answers, puzzles.ids)
    return share_of(f"{prefix}solved", is_right) | {f"{prefix}cells_wrong": float(wrong.mean())}


def by_givens(puzzles: Puzzles) -> Iterator[tuple[int, Puzzles]]:
    """Yield the puzzles with each number of givens, from the easiest on."""
    counts = puzzles.given.sum(axis=1)
    for count in np.unique(counts)[::-1].tolist():
        rows = counts == count
        yield count, Puzzles(puzzles.ids[rows], puzzles.given[rows])


def chosen(puzzles: Puzzles, givens: Sequence[int] | None, most: int | None) -> Puzzles:
    """Return the puzzles with some numbers of givens (None: all), at most so many of each.

    Raises InputError for a number of givens that no puzzle has.
    """
    parts = dict(by_givens(puzzles))
    for count in givens or []:
        if count not in parts:
            legal = ", ".join(map(str, parts))
            raise InputError(f"--givens={count}: no puzzle has so many, use some of {legal}")
    kept = [part for count, part in parts.items() if not givens or count in givens]
    return Puzzles(
        *(np.concatenate([leaf[:most] for leaf in leaves]) for leaves in zip(*kept, strict=True))
    )


def most_rewritten(samples: Samples, puzzles: Puzzles, count: int) -> Trace:
    """Return the trace of the solved puzzles in which most cells were rewritten, at most so many.

    Where none is solved, of all puzzles.
    """
    assert samples.trace is not None
    is_solved = grids.cells_wrong(samples.ids, puzzles.ids) == 0
    rewritten = (first_answers(samples.trace) != samples.ids).sum(axis=1)
    order = np.lexsort((-rewritten, ~is_solved))
    kept = order[: min(count, is_solved.sum() or count)]
    return picked(samples.trace, kept.tolist())


def methods_of(model: Gidd, text: str | None, num_steps: int) -> dict[str, SamplerOptions]:
    """Return the options of --methods by what was written; None: those of DEFAULT that are legal.

    Raises InputError for what is no method, or does nothing for the model's process.
    """
    assert model.process is not None
    found = {}
    for name, options in parse_methods(text or DEFAULT, _AXES).items():
        if options.method in READ_BY["num_steps"]:
            options = changed_options(options, {"num_steps": num_steps})
        try:
            check_options(model.process, options)
        except InputError:
            if text is not None:
                raise
            continue
        found[name] = options
    return found
