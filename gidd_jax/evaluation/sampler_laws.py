"""Samplers measured against the exact network of a Markov chain: what law do they draw from?

A short chain, all of whose rows can be counted, gives the total variation between what a method
draws and the data; a long one the cross-entropy and the bigrams. `oracle` is the network. A method
that samples comes as close to the data as exact draws do, or its error falls with the number of
steps; another has a floor that no number of steps removes, or climbs to the most probable rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.evaluation import oracle
from gidd_jax.likelihood import Denoiser, row_bounds, sample_times
from gidd_jax.own_process import typed
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.loop import sample_diffusion
from gidd_jax.sampling.options import METHODS, SamplerOptions, changed_options
from gidd_jax.sampling.schedule import check_options, is_mask_only
from gidd_jax.sampling.times import row_times

STEPS = (5, 20, 80)
SHORT, LONG = 5, 32  # tokens of a row
SHORT_TOKENS, LONG_TOKENS = 3, 8  # of the chains, the mask apart
SHORT_ROWS, LONG_ROWS = 20_000, 1_000
SAMPLES, SEEKS = "samples the model", "seeks the mode"
DEFAULT = (  # every method, and what options make of it
    *(method for method in METHODS if method not in ("confidence", "entropy_bound")),
    "confidence",
    "confidence:order=drawn",
    "entropy_bound:epsilon=0",
    "entropy_bound",
    "entropy_bound:edit_above=0.5",
)
TOLD = ("row", "position")
AXES = {"num_steps": f"{', '.join(map(str, STEPS))} in turn"}


class Law(NamedTuple):
    """What a method drew at a number of steps: its network calls on the short and the long chain,
    total variation of the short rows, E[-log p] - H in nats a token and total variation of bigrams
    of the long rows; None where rows were left with noise that is no token."""

    steps: int
    calls: int
    total_variation: float
    long_calls: int
    excess: float | None
    bigrams: float


def parse_methods(text: str, axes: Mapping[str, str] = AXES) -> dict[str, SamplerOptions]:
    """Return the options of `NAME[:KEY=VALUE...],...` by what was written; InputError else.

    axes: the options that take values of their own in turn, and what says which.
    """
    found = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, *pairs = item.split(":")
        values: dict[str, Any] = {"method": name}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise InputError(f"--methods: {pair!r} must be KEY=VALUE, as in {name}:KEY=VALUE")
            if key in axes:
                raise InputError(f"--methods: {item}: {key} is {axes[key]}: leave it out")
            if key in values:
                raise InputError(f"--methods: {item}: {key} is there twice: leave one out")
            values[key] = _value(key, value)
        found[item] = changed_options(SamplerOptions(), values)
        if found[item].guidance != 1:
            raise InputError(
                f"--methods: {item}: guidance weighs prompts, and rows here have none: leave it out"
            )
    if not found:
        raise InputError(f"--methods is empty: name some of {', '.join(METHODS)}")
    return found


def _value(key: str, text: str) -> Any:
    default = getattr(SamplerOptions, key, None)  # an unknown name is refused where it is used
    return text if default is None else typed(f"--methods: {key}={text}", text, type(default))


def legal_methods(process: InterpolatingProcess) -> str:
    """Return those of DEFAULT that can sample the process, as `parse_methods` reads them."""

    def is_legal(item: str) -> bool:
        try:
            check_options(process, parse_methods(item)[item])
        except InputError:
            return False
        return True

    return ",".join(filter(is_legal, DEFAULT))


def claims_to_sample(process: InterpolatingProcess, told: str, options: SamplerOptions) -> bool:
    """Tell whether the method's error must fall to nothing with the number of steps.

    Not those that change x_hat, redraw a fixed share of positions at once, keep what is probable or
    draw dependent tokens together. A network that is told one time a row takes tokens that are
    clean for noisy ones, unless the mask is the only noise: then order and bound cost something.
    """
    changed = options.temperature != 1 or options.top_k or options.top_p < 1 or options.min_p > 0
    if changed or options.method in ("psi", "gibbs", "mode_seeking"):
        return False
    knows = told == "position" or is_mask_only(process)
    if options.method == "confidence":
        return knows and options.order == "entropy"
    if options.method == "entropy_bound":
        return knows and options.epsilon == 0 and options.edit_above == 1 and not options.stop_after
    return True


def exact_network(process: InterpolatingProcess, chain: oracle.Chain, told: str) -> Denoiser:
    """Return the chain's network; told "row": it knows one time a row, as most networks do."""
    exact = oracle.leave_one_out(process, chain)
    if told == "position":
        return exact
    return lambda z, times: exact(z, row_times(process, times) if times.ndim > 1 else times)


def drawn_rows(
    process: InterpolatingProcess,
    denoise: Denoiser,
    options: SamplerOptions,
    count: int,
    length: int,
) -> tuple[np.ndarray, int]:
    """Return rows of chain numbers [count, length] (-1: a mask) that a method draws, and calls."""

    def draw(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = sample_diffusion(process, denoise, options, keys, length)
        return drawn.ids, drawn.network_calls

    ids, calls = jax.jit(draw)(row_keys(jax.random.key(0), jnp.arange(count)))
    return oracle.places_of(process, np.asarray(ids)), int(calls)


def measure(
    short: InterpolatingProcess,
    long: InterpolatingProcess,
    methods: dict[str, SamplerOptions],
    told: str,
    steps: Sequence[int] = STEPS,
) -> Iterator[tuple[str, list[Law]]]:
    """Yield, for each method, what it drew at each number of steps; two sizes of one process."""
    chains = [oracle.draw_chain(seed=0, num_tokens=n) for n in (SHORT_TOKENS, LONG_TOKENS)]
    pairs = zip((short, long), chains, strict=True)
    networks = [exact_network(process, chain, told) for process, chain in pairs]
    wanted, pair_law = oracle.law(chains[0], SHORT), oracle.bigram_law(chains[1], LONG)
    entropy = oracle.entropy(chains[1], LONG)
    for name, options in methods.items():
        laws = []
        reads = options.method != "first_hitting"
        for count in steps if reads else (SHORT,):
            now = changed_options(options, {"num_steps": count} if reads else {})
            rows, calls = drawn_rows(short, networks[0], now, SHORT_ROWS, SHORT)
            found = oracle.frequencies(chains[0], rows)
            longer, long_calls = drawn_rows(long, networks[1], now, LONG_ROWS, LONG)
            legal = longer[(longer >= 0).all(axis=-1)]
            surprise = -oracle.log_prob(chains[1], legal)
            excess = float((surprise.mean() - entropy) / LONG) if len(legal) else None
            bigrams = oracle.total_variation(oracle.bigrams(chains[1], longer), pair_law)
            total = oracle.total_variation(found, wanted)
            laws.append(Law(count, calls, total, long_calls, excess, bigrams))
        yield name, laws


def noise_floor() -> float:
    """Return the total variation that as many exact draws of the short chain have."""
    chain = oracle.draw_chain(seed=0, num_tokens=SHORT_TOKENS)
    return oracle.noise_floor(oracle.law(chain, SHORT), SHORT_ROWS)


def verdict(laws: Sequence[Law], floor: float) -> str:
    """Return in words what the numbers of steps say: SAMPLES, SEEKS or `floor X`.

    Beyond the floor of exact draws an error of 1/N falls to a quarter where steps are four times as
    many; it counts as falling where it is at most 0.45 of the one before. What is half as far again
    from the model as with fewer steps seeks the mode.
    """
    last = laws[-1].total_variation
    if last <= 1.5 * floor:
        return SAMPLES
    beyond = [np.sqrt(max(law.total_variation**2 - floor**2, 0.0)) for law in laws]
    if len(laws) > 1 and beyond[-1] <= 0.45 * beyond[-2]:
        return SAMPLES
    if beyond[-1] > 1.5 * min(beyond) and last > 5 * floor:
        return SEEKS
    return f"floor {last:.2f}"


def bounds(
    process: InterpolatingProcess, length: int = LONG, num_rows: int = 4000, num_times: int = 16
) -> dict[str, float]:
    """Return the bound of the exact network on its chain's own rows, in nats a row.

    `entropy`, what the full bound must be; `full` and `middle`, and the standard errors of both.
    The rows' own -log p, whose mean is the entropy, takes the chance of the rows out.
    """
    chain = oracle.draw_chain(seed=0, num_tokens=process.vocab_size - 1)
    denoise = oracle.leave_one_out(process, chain)
    x = oracle.draw_rows(chain, process, num_rows, length, seed=1)
    times = sample_times(process, jax.random.key(2), num_times, num_rows)
    keys = row_keys(jax.random.key(3), jnp.arange(num_rows))
    everywhere = jnp.ones(x.shape, bool)

    @jax.jit
    def of_rows(keys: jax.Array, times: jax.Array, x: jax.Array) -> Any:
        return row_bounds(process, denoise, keys, times, times[0], x, everywhere)

    found = of_rows(keys, times, jnp.asarray(x))
    surprise = -oracle.log_prob(chain, oracle.places_of(process, x))
    result = {"entropy": oracle.entropy(chain, length)}
    for name, values in (("full", found.total), ("middle", found.middle)):
        difference = np.asarray(values, np.float64) - surprise
        result[name] = float(result["entropy"] + difference.mean())
        result[f"{name}_standard_error"] = float(difference.std() / np.sqrt(num_rows))
    return result
