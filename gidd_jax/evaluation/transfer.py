"""Does the best learning rate keep as a network grows? A coordinate check answers without a search.

Small networks of several widths and depths make a few updates on rows of a Markov chain. Where a
parametrization is right, what an update changes in the activations has the same size in all of
them; where it is not, the changes grow with the network, and a rate that is good for a small one is
too large for a large one (arXiv 2203.03466, appendix D; in depth arXiv 2505.01618).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gidd_jax.cli import load_config
from gidd_jax.evaluation import oracle
from gidd_jax.models.gidd import Block
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.optimizer import make_optimizer
from gidd_jax.training.step import init_state, update

WIDTHS, DEPTHS = (64, 128, 256, 512), (2, 4, 8, 16)
HEAD_WIDTH = 32
NUM_TOKENS, LENGTH, ROWS, UPDATES = 31, 32, 16, 8
# Matrices of the narrowest network move by the same under both.
RATES = {"completep": 0.3, "standard": 0.3 / WIDTHS[0]}
FLAT = 2.0  # largest ratio of what is called flat; from 8 times the width, or the depth
PARTS = {  # of Sizes: what is compared between networks
    "block": "last block's output at the start",
    "block_change": "its change by the updates",
    "logits_change": "change of the logits",
}


class Sizes(NamedTuple):
    """Root mean squares of a network's activations at the start, and of their changes.

    blocks, block_changes: of each block's output; logits of CompleteP are 0 at the start.
    """

    parametrization: str
    width: int
    depth: int
    blocks: list[float]
    block_changes: list[float]
    logits: float
    logits_change: float

    def part(self, name: str) -> float:
        """Return one of PARTS."""
        parts = (self.blocks[-1], self.block_changes[-1], self.logits_change)
        return dict(zip(PARTS, parts, strict=True))[name]


class Growth(NamedTuple):
    """How a part of the activations goes with width or depth: largest network / smallest."""

    axis: str
    part: str
    ratio: float
    spread: float  # largest / smallest size of all networks along the axis

    @property
    def word(self) -> str:
        if self.spread <= FLAT:
            return "flat"
        return "grows" if self.ratio > 1 else "falls"


def networks() -> list[tuple[int, int]]:
    """Return the (width, depth) to measure: widths at the least depth, depths at least width."""
    return [(width, DEPTHS[0]) for width in WIDTHS] + [(WIDTHS[0], depth) for depth in DEPTHS[1:]]


def measure_all() -> Iterator[Sizes]:
    """Yield the sizes of all networks in each parametrization, as they are measured."""
    for name in RATES:
        for width, depth in networks():
            yield measure(name, width, depth)


def measure(parametrization: str, width: int, depth: int, num_updates: int = UPDATES) -> Sizes:
    """Return the sizes of a network of a parametrization; everything is drawn by one seed."""
    settings = _settings(parametrization, width, depth)
    objective = build_objective(settings, NUM_TOKENS + 1, NUM_TOKENS)
    optimizer = make_optimizer(settings.optimizer, settings.model, num_updates)
    chain = oracle.draw_chain(0, NUM_TOKENS)
    rows = oracle.draw_places(chain, (num_updates + 1) * ROWS, LENGTH, 0)
    rows = jnp.asarray(rows, jnp.int32).reshape(num_updates + 1, ROWS, LENGTH)
    init_key, seen_key, key = jax.random.split(jax.random.key(0), 3)

    def activations(params: Any, z_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen: Any = objective.model.apply(
            {"params": params},
            z_t,
            t,
            capture_intermediates=lambda part, name: isinstance(part, Block) and name == "__call__",
            mutable=["intermediates"],
        )
        logits, kept = seen
        outputs, _ = kept["intermediates"]["blocks"]["__call__"][0]
        return outputs, logits  # [depth, rows, length, width], [rows, length, columns]

    @jax.jit
    def run(rows: jax.Array) -> tuple[jax.Array, ...]:
        seen = objective.noise(seen_key, rows[0])
        state = nn.unbox(init_state(objective, optimizer, init_key, use_ema=False))
        start = activations(state.params, seen.z_t, seen.t)

        def one(state: Any, x: jax.Array) -> tuple[Any, None]:
            noised = objective.noise(jax.random.fold_in(key, state.step), x)
            batch = {"tokens": x, "mask": jnp.ones(x.shape, bool)}
            return update(objective, optimizer, 0.0, 1, state, batch, noised)[0], None

        state, _ = jax.lax.scan(one, state, rows[1:])
        end = activations(state.params, seen.z_t, seen.t)
        change = jax.tree.map(jnp.subtract, end, start)
        blocks, block_changes = (_rms(a[0], (1, 2, 3)) for a in (start, change))
        return blocks, block_changes, _rms(start[1]), _rms(change[1])

    blocks, block_changes, logits, logits_change = (a.tolist() for a in run(rows))
    return Sizes(parametrization, width, depth, blocks, block_changes, logits, logits_change)


def growths(sizes: Sequence[Sizes]) -> list[Growth]:
    """Return how each part goes with width and with depth, of the networks of a parametrization.

    Along an axis are those that share the other size with the smallest network.
    """
    small = min(sizes, key=lambda one: (one.width, one.depth))
    lines = {
        "width": sorted((s for s in sizes if s.depth == small.depth), key=lambda s: s.width),
        "depth": sorted((s for s in sizes if s.width == small.width), key=lambda s: s.depth),
    }
    found = []
    for axis, line in lines.items():
        for part in PARTS:
            values = [one.part(part) for one in line]
            spread = max(values) / min(values)
            found.append(Growth(axis, part, values[-1] / values[0], spread))
    return found


def transfers(found: Sequence[Growth]) -> bool:
    """Whether changes are flat, and no activation grows.

    At the start those of CompleteP fall with depth: a residual stream sums depth independent
    branches, each with the factor 4 / depth.
    """
    changes = [one for one in found if one.part != "block"]
    return all(one.word == "flat" for one in changes) and all(one.word != "grows" for one in found)


def report(sizes: Sequence[Sizes]) -> dict[str, Any]:
    """Return sizes and growths under their names, for JSON."""
    judged = {}
    for name in dict.fromkeys(one.parametrization for one in sizes):
        own = growths([one for one in sizes if one.parametrization == name])
        judged[name] = {
            "transfers": transfers(own),
            "growths": [one._asdict() | {"word": one.word} for one in own],
        }
    return {"networks": [one._asdict() for one in sizes], "parametrizations": judged}


def line(one: Sizes) -> str:
    """Return a network's sizes as a line under HEADER: those of its last block and its logits."""
    figures = (one.blocks[-1], one.block_changes[-1], one.logits, one.logits_change)
    return _columns(one.parametrization, one.width, one.depth, *(f"{x:.3g}" for x in figures))


def verdict(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines of what a report comes to: for each growth, and whether a rate keeps."""
    for name, judged in report["parametrizations"].items():
        yield f"{name}: the learning rate {'keeps' if judged['transfers'] else 'does not keep'}"
        for one in judged["growths"]:
            ratio = f"x {one['ratio']:.3g}"
            yield f"  {one['word']:5}  {ratio:7}  with {one['axis']}: {PARTS[one['part']]}"


def _columns(first: str, *cells: Any) -> str:
    return "  ".join([f"{first:11}", *(f"{cell:>8}" for cell in cells)])


HEADER = _columns("", "width", "depth", "block", "change", "logits", "change")


def _settings(parametrization: str, width: int, depth: int) -> Settings:
    config: Any = load_config("base")
    config.model.update(
        name="gidd",
        parametrization=parametrization,
        hidden_size=width,
        num_layers=depth,
        num_heads=width // HEAD_WIDTH,
        max_seq_len=LENGTH,
        dtype="float32",
    )
    config.process.update(name="log_snr")
    config.optimizer.update(
        name="laprop",
        learning_rate=RATES[parametrization],
        schedule="constant",
        weight_decay=0.0,
        eps=1e-8,
        clip_norm=0.0,
    )
    config.train.update(batch_size=ROWS, max_weight=1000.0)
    return Settings.from_config(config)


def _rms(a: jax.Array, axis: Any = None) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(a), axis))
