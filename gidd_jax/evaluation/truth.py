"""Sources whose law is known: models trained on their rows are measured against the truth.

A source is a hidden Markov model; a Markov chain is one whose states are seen. log p of any row is
exact, so the excess of a model's bound over the source's own -log p is the model's own shortfall,
to the last digit that the rows give, and generated rows have an exact likelihood under the truth.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.evaluation import corpora, oracle, scoring
from gidd_jax.evaluation.oracle import Chain
from gidd_jax.evaluation.text_metrics import mean_estimate
from gidd_jax.inference.gidd import Gidd
from gidd_jax.sections import Section, at_least, check_keys, legal
from gidd_jax.settings import Settings, flatten

NUM_SAMPLES_T = 8  # times drawn for the bound of a row
NUM_RESAMPLES = 200
BATCH_SIZE = 128
ENTROPY_ROWS, ENTROPY_SEED = 100_000, 1_000_003
FLOOR_SETS = 16  # of exact rows, for what their number alone makes differ
SECTIONS = {"base", "grid", "source"}
MOST = 4096  # states and tokens: their moves are square matrices
SET_BY_SOURCE = ("data.path", "data.tokenizer", "data.frame", "model.max_seq_len")


DATA_FILE = "source.npy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings(Section):
    """Of a sweep on rows of a known law: the law, and how the runs are judged by it."""

    num_states: int = legal(lambda value: 0 <= value <= MOST, f"in [0, {MOST}]")
    num_tokens: int = legal(lambda value: 2 <= value <= MOST, f"in [2, {MOST}]")
    sharpness: float = legal(lambda value: 0 <= value <= 20, "in [0, 20]")
    seed: int = at_least(0)
    num_rows: int = at_least(2)
    num_samples: int = at_least(2)
    temperature: float = at_least(0)
    calls: tuple = legal(
        lambda value: value and all(type(n) is int and n > 0 for n in value),
        "a tuple of numbers of network calls",
    )


class Source(NamedTuple):
    """A hidden Markov model: `chain` over S states, `emissions` [S, V] whose rows sum to 1."""

    chain: Chain
    emissions: np.ndarray

    @property
    def num_tokens(self) -> int:
        return self.emissions.shape[1]


def draw_source(settings: SourceSettings) -> Source:
    """Return the source of the settings, drawn by its seed; num_states 0: a Markov chain."""
    hidden = settings.num_states > 0
    states = settings.num_states if hidden else settings.num_tokens
    chain = oracle.draw_chain(settings.seed, states, settings.sharpness)
    if not hidden:
        return Source(chain, np.eye(states))
    rng = np.random.default_rng([settings.seed, 1])
    weights = np.exp(settings.sharpness * rng.standard_normal((states, settings.num_tokens)))
    return Source(chain, weights / weights.sum(axis=-1, keepdims=True))


def draw_rows(source: Source, count: int, length: int, seed: int) -> np.ndarray:
    """Return rows of the source, int32 [count, length]."""
    rng = np.random.default_rng([seed, 2])
    places = oracle.draw_places(source.chain, count, length, seed)
    below = rng.random((count, length))[..., None] >= np.cumsum(source.emissions, -1)[places]
    return np.minimum(below.sum(axis=-1), source.num_tokens - 1).astype(np.int32)


def log_prob(source: Source, ids: np.ndarray) -> np.ndarray:
    """Return log p of rows of tokens int [N, L], float64 [N], by the forward algorithm; -inf for
    rows with an id that is no token of the source."""
    legal = (ids >= 0) & (ids < source.num_tokens)
    seen = np.where(legal, ids, 0)
    total, belief = np.zeros(len(ids)), np.asarray(source.chain.start)[None]
    for i in range(ids.shape[1]):
        joint = belief * source.emissions[:, seen[:, i]].T
        mass = joint.sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            total = total + np.log(mass)
            belief = np.where(mass[:, None] > 0, joint / mass[:, None], 0.0) @ source.chain.moves
    return np.where(legal.all(axis=-1), total, -np.inf)


def bigram_law(source: Source, length: int) -> np.ndarray:
    """Return the mean law of neighbouring tokens over a row, [V, V]."""
    states = oracle.bigram_law(source.chain, length)
    return source.emissions.T @ states @ source.emissions


def entropy(source: Source, length: int) -> tuple[float, float]:
    """Return the entropy of a row in nats a token, and its standard error.

    Exact for a chain whose states are seen; of a hidden one the mean of -log p of rows drawn for
    it.
    """
    if np.array_equal(source.emissions, np.eye(source.num_tokens)):
        return oracle.entropy(source.chain, length) / length, 0.0
    found = -log_prob(source, draw_rows(source, ENTROPY_ROWS, length, ENTROPY_SEED)) / length
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(ENTROPY_ROWS))


def bigrams(source: Source, ids: np.ndarray) -> float:
    """Return the total variation of neighbouring tokens in rows [N, L] from the source's."""
    tokens = Chain(np.zeros(source.num_tokens), np.zeros((source.num_tokens, source.num_tokens)))
    legal = np.where((ids >= 0) & (ids < source.num_tokens), ids, -1)
    found, wanted = oracle.bigrams(tokens, legal), bigram_law(source, ids.shape[1])
    return oracle.total_variation(found, wanted)


@dataclasses.dataclass(frozen=True)
class Opened:
    """The source of a sweep, where its rows lie, and their length."""

    settings: SourceSettings
    length: int
    path: Path

    def start(self) -> Callable[[Gidd, Settings], dict[str, Any]]:
        """Write the rows, and return what judges a finished run."""
        write_data(self.settings, self.length, self.path)
        source = draw_source(self.settings)
        return lambda model, run: judge(source, self.settings, model, run)


def open_source(config: Any, workdir: Path) -> Opened | None:
    """Return the source that a sweep's config names, and set its base to the source's rows; None
    where it names none. Raises InputError for an illegal value."""
    if not set(config) >= SECTIONS:
        return None
    for key in flatten(config.grid.to_dict()):
        if key in SET_BY_SOURCE:
            raise InputError(f"grid: {key} is the source's own: leave it out, or the source")
    values = config.source.to_dict()
    names = {item.name for item in dataclasses.fields(SourceSettings)}
    check_keys("source.", values, names)
    settings = SourceSettings(**values)
    config.base.data.update(
        path=str(workdir / DATA_FILE), tokenizer=f"ids:{settings.num_tokens}", frame="none"
    )
    return Opened(settings, config.base.model.max_seq_len, workdir / DATA_FILE)


def write_data(settings: SourceSettings, length: int, path: Path) -> None:
    """Write the rows of the source that runs are trained on, an int32 .npy; never half a file.

    A file that is there must hold the same rows; InputError otherwise.
    """
    rows = draw_rows(draw_source(settings), settings.num_rows, length, settings.seed)
    if path.is_file():
        if not np.array_equal(np.load(path, allow_pickle=False), rows):
            raise InputError(f"{path} holds rows of another source: use another --workdir")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, rows)
    part.replace(path)


def judge(source: Source, settings: SourceSettings, model: Gidd, run: Settings) -> dict[str, Any]:
    """Return what a finished run comes to against the truth, nats a token.

    excess: the bound of the model on the validation rows less their own -log p under the source,
    with its standard error over rows. Of generated rows by the number of calls, before and after
    self-correction (`corrected_`): surprise_N, -log p under the source less its `entropy`, negative
    for rows of its modes; bigrams_N, the total variation of neighbouring tokens. So many exact rows
    have a surprise of 0 give or take surprise_floor, and bigrams of bigrams_floor.
    """
    held_out = corpora.open_rows(run.data, "validation", model, is_own=True)
    ids = np.stack([np.asarray(held_out.ids[i]) for i in range(len(held_out.ids))])
    scores = scoring.score_rows(
        model,
        held_out,
        num_samples_t=NUM_SAMPLES_T,
        batch_size=BATCH_SIZE,
        seed=run.seed,
        label="Against the truth",
    )
    length, own = ids.shape[1], -log_prob(source, ids)
    excess = mean_estimate((scores.bounds.total - own) / length, NUM_RESAMPLES, run.seed)
    true_entropy, entropy_error = entropy(source, length)

    def surprise(drawn: np.ndarray) -> float:
        return float(-log_prob(source, drawn).mean() / length) - true_entropy

    exact = [
        draw_rows(source, settings.num_samples, length, ENTROPY_SEED + 1 + number)
        for number in range(FLOOR_SETS)
    ]
    figures = {
        "entropy": true_entropy,
        "entropy_standard_error": entropy_error,
        "excess": excess.value,
        "excess_standard_error": excess.standard_error,
        "surprise_floor": float(np.std([surprise(rows) for rows in exact])),
        "bigrams_floor": float(np.mean([bigrams(source, rows) for rows in exact])),
    }
    for calls in settings.calls:
        drawn = model.generate(
            settings.num_samples, num_steps=calls, batch_size=BATCH_SIZE, seed=run.seed
        ).ids
        mended = model.correct(
            drawn, batch_size=BATCH_SIZE, seed=run.seed, temperature=settings.temperature
        ).ids
        for name, found in (("", drawn), ("corrected_", mended)):
            figures[f"{name}surprise_{calls}"] = surprise(found)
            figures[f"{name}bigrams_{calls}"] = bigrams(source, found)
    return figures
