"""The scaling paper's generate(), token by token with its stored draws, out of our parts.

Greedy runs go through the sampling loop as it is. Of random ones the draws are the reference's: its
inverse of the whole posterior at stored uniforms.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_SCALING
from scaling_models import model_of

from gidd_jax.draws import row_keys
from gidd_jax.loss import masked_logits
from gidd_jax.process import LogSnrProcess, expand_time
from gidd_jax.sampling import methods
from gidd_jax.sampling.filters import filter_log_probs, unnormalised
from gidd_jax.sampling.loop import Prompt, sample_diffusion
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.schedule import make_schedule, time_grid
from gidd_jax.sampling.steps import highest, mode_seeking_step
from gidd_jax.sampling.thinning import network_at
from gidd_jax.sampling.windows import View, prefix_windows

MASK, EOS, PAD = 3, 1, 2
CASES = json.loads((GOLDEN_SCALING / "s04_cases.json").read_text())
FILES = {"s03": "s03_sampler_steps", "s09": "s09_jax_sampler_likelihood"}
GRIDS = {"cosine": "cosine", "linear": "uniform"}


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN_SCALING / "s04_generate.npz", allow_pickle=False) as file:
        return dict(file)


def process_of(network_name):
    shift = {"published": 1000.0, "fanin": 0.0, "tied": -1000.0}[network_name]
    return LogSnrProcess(97, MASK, shift=shift)


def start_of(process, arrays, key):
    """Prior noise of all positions, of the stored draws; the prompt; its length."""
    mass = process.prior()
    share = float(mass.uniform) * process.num_noise_tokens
    is_uniform = arrays[f"{key}/prior_rand"] < share
    x = np.where(is_uniform, arrays[f"{key}/prior_randint"], MASK)
    length = 0
    if f"{key}/prompt" in arrays:
        prompt = arrays[f"{key}/prompt"]
        length = prompt.shape[1]
        x[:, :length] = prompt
    return jnp.asarray(x, jnp.int32), length


def by_inverse(probs, uniforms):
    """The number of entries of the cumulative distribution that are at most u."""
    cumulative = jnp.cumsum(probs, axis=-1)
    return jnp.sum(cumulative / cumulative[..., -1:] <= uniforms[..., None], axis=-1)


def steps_of(case, process):
    options = case["args"]
    grid = time_grid(process, options["steps"], GRIDS[options["noise_schedule"]])
    t, s = map(jnp.asarray, grid)
    filters = {"temperature": options["temperature"], "top_k": options.get("top_k") or 0}
    filters["top_p"] = options.get("top_p") or 1.0
    count = jnp.asarray(options.get("tokens_per_step", 1))

    def ancestral(logits, z, uniforms, number):
        x_hat = jnp.exp(filter_log_probs(jax.nn.log_softmax(logits), **filters))
        return by_inverse(process.posterior_probs(x_hat, z, t[number], s[number]), uniforms)

    def adaptive(logits, z, uniforms, number):
        p = jax.nn.softmax(logits)
        gain = jnp.max(p, axis=-1) - jnp.take_along_axis(p, z[..., None], axis=-1)[..., 0]
        noise = process.mass_at(process.beta_pi(expand_time(t[number], z)), z)
        chosen = highest(gain * noise, noise > 0, jnp.broadcast_to(count, z.shape[:1]))
        x_hat = jnp.exp(filter_log_probs(jax.nn.log_softmax(logits), **filters))
        return jnp.where(chosen, by_inverse(x_hat, uniforms), z)

    return {"ancestral": ancestral, "adaptive": adaptive}[options["sampling_method"]]


@pytest.mark.parametrize("case", CASES, ids=[case["key"] for case in CASES])
def test_runs_of_the_reference_token_by_token(arrays, case):
    key, options = case["key"], case["args"]
    network, params = model_of(f"s01_hf_{case['model']}")
    process = process_of(case["model"])
    x, prompt = start_of(process, arrays, key)
    rows, length = x.shape
    width = options["block_length"]
    windows = prefix_windows(network, params, length)
    step = jax.jit(steps_of(case, process))
    open_at = jax.jit(windows.open)

    @jax.jit
    def logits_of(view, x):
        h = windows.features(view, x)
        return masked_logits(process, network.apply({"params": params}, h, method="project"))

    number, calls = 0, 0
    for begin in range(prompt, prompt + options["max_length"], width):
        end = min(begin + width, length)
        if begin >= length:
            break
        start = jnp.full(rows, begin)
        view = View(open_at(None, x, start, jnp.array(True)), start)
        logits, changed = None, True
        for i in range(options["steps"]):
            if changed:  # the network is told no time: what saw the same says the same
                logits = logits_of(view, x)[:, begin:end]
                least = max(0, options.get("min_length", 0) + prompt - begin)
                is_early = jnp.arange(end - begin)[None, :, None] < least
                is_end = (jnp.arange(97) == EOS)[None, None]
                logits = jnp.where(is_early & is_end, -jnp.inf, logits)
                calls += 1
            u = arrays[f"{key}/uniforms"][number].reshape(rows, width)[:, : end - begin]
            z = step(logits, x[:, begin:end], jnp.asarray(u, jnp.float32), i)
            changed = bool(jnp.any(z != x[:, begin:end]))
            x = x.at[:, begin:end].set(z)
            wanted = arrays[f"{key}/trace_x"][number][:, : end - begin]
            np.testing.assert_array_equal(z, wanted, err_msg=f"step {number}")
            number += 1
        if jnp.all(jnp.any(x[:, prompt:end] == EOS, axis=-1)):
            break
    assert (number, calls) == (case["steps_run"], case["network_calls"])
    output = arrays[f"{key}/output"]
    kept = output != PAD  # from the first end token on the reference writes padding
    np.testing.assert_array_equal(np.asarray(x)[:, : output.shape[1]][kept], output[kept])


@dataclasses.dataclass(frozen=True)
class StoredPrior(LogSnrProcess):
    """A process whose prior noise is given."""

    noise: tuple[int, ...] = ()

    def sample_prior(self, key, shape):
        return jnp.broadcast_to(jnp.asarray(self.noise, jnp.int32), shape)


GREEDY = [c for c in CASES if c["args"]["temperature"] == 0.0]


@pytest.mark.parametrize("case", GREEDY, ids=[case["key"] for case in GREEDY])
def test_greedy_runs_through_the_loop_as_it_is(arrays, case):
    key, asked = case["key"], case["args"]
    network, params = model_of(f"s01_hf_{case['model']}")
    plain = process_of(case["model"])
    x, prompt = start_of(plain, arrays, key)
    options = SamplerOptions(
        num_steps=asked["steps"],
        method="mode_seeking",
        grid="uniform",
        temperature=0.0,
        block_length=asked["block_length"],
        tokens_per_step=1,
    )
    windows = prefix_windows(network, params, x.shape[1])
    for row in range(len(x)):
        process = StoredPrior(97, MASK, shift=plain.shift, noise=tuple(np.asarray(x[row]).tolist()))
        ids = x[row : row + 1]

        def run(keys, process=process, ids=ids):
            return sample_diffusion(
                process,
                None,
                options,
                keys,
                ids.shape[1],
                Prompt(ids, jnp.arange(ids.shape[1])[None] >= prompt),
                asked["max_length"],
                project=lambda h: network.apply({"params": params}, h, method="project"),
                windows=windows,
            )

        found = jax.jit(run)(row_keys(jax.random.key(0), jnp.arange(1))).ids[0]
        wanted = arrays[f"{key}/output"][row]
        kept = wanted != PAD
        np.testing.assert_array_equal(np.asarray(found)[: len(wanted)][kept], wanted[kept])


def saying(logits, process, temperature):
    """A network of these logits, for one step."""
    weights = functools.partial(unnormalised, temperature=temperature)
    return network_with(weights, logits, process)


def network_with(weights, logits, process):
    return network_at(process, lambda z, t: logits, lambda h: h, weights, logits[..., 0], None)


@pytest.mark.parametrize("split", ["s03", "s09"])
def test_the_adaptive_rule_takes_the_positions_and_tokens_of_the_reference(split):
    """s03: tokens are noise at the time of the step, as in the port; s09: as in the prior."""
    data = np.load(GOLDEN_SCALING / f"{FILES[split]}.npz")
    found = 0
    for case in json.loads((GOLDEN_SCALING / "adaptive_cases.json").read_text())[split]:
        z = jnp.asarray(data["z"])
        process = LogSnrProcess(97, MASK, shift=case["shift"])
        t = 1 / (1 + np.exp(case["log_snr"]))
        active = jnp.asarray(data["noise_mask"]) if split == "s09" else jnp.ones(z.shape, bool)
        logits = masked_logits(process, jnp.asarray(data["logits"]))
        taken = mode_seeking_step(
            process,
            row_keys(jax.random.key(0), jnp.arange(len(z))),
            saying(logits, process, case["temperature"]),
            z,
            active,
            t,
            jnp.full(len(z), case["count"]),
        )
        if case["temperature"] == 0:  # where others are put: the test below
            np.testing.assert_array_equal(taken.ids, data[case["key"]], err_msg=case["key"])
            found += 1
    assert found >= 6


UNSEEN = 50  # a token that no stored row holds


def adaptive_cases(split):
    """Those of the list; of s03 those between them, with more positions and all filters."""
    cases = json.loads((GOLDEN_SCALING / "adaptive_cases.json").read_text())[split]
    if split == "s09":
        return cases
    filters = {"temperature": 0.7, "top_k": 12, "top_p": 0.9}
    keys = (f"adaptive/{2 * place + 1}/z_next" for place in range(len(cases)))
    return [
        case | {"key": key, "count": 2} | filters for case, key in zip(cases, keys, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("shift", "count", "noise_at"))
def positions_taken(logits, z, active, t, *, shift, count, noise_at):
    """Where a call at time t draws, bool [B, L]: all that it draws is a token that was not there.

    What is drawn is random and may be what was there; where it is put is neither.
    """
    process = LogSnrProcess(97, MASK, shift=shift)
    options = SamplerOptions(method="mode_seeking", tokens_per_step=count, noise_at=noise_at)
    now = jax.tree.map(lambda a: a[0], make_schedule(process, options, z.shape[1]))._replace(t=t)
    keys = row_keys(jax.random.key(0), jnp.arange(len(z)))

    def always(logits):
        is_it = jnp.arange(logits.shape[-1]) == UNSEEN
        return jnp.broadcast_to(is_it, logits.shape).astype(logits.dtype)

    network = network_with(always, masked_logits(process, logits), process)
    call = methods.Call(process, options, keys, z, active, now)
    return methods.step(call, network, now.t[None], None)[0].ids != z


@pytest.mark.parametrize(("split", "noise_at"), [("s03", "step"), ("s09", "prior")])
def test_positions_are_those_of_the_references_scores(split, noise_at):
    """At any temperature, and by the reference's draws its tokens are put there."""
    data = np.load(GOLDEN_SCALING / f"{FILES[split]}.npz")
    z = data["z"]
    active = data["noise_mask"] if split == "s09" else np.ones(z.shape, bool)
    assert not np.any(z == UNSEEN)
    other = {"step": "prior", "prior": "step"}[noise_at]
    moved = 0
    for case in adaptive_cases(split):
        name = f"adaptive/{case['key'].split('/')[1]}"
        score = {"s03": f"{name}/score", "s09": f"{name.replace('/', '_score/')}/f64"}[split]
        scores = np.where(active, data[score], 0.0)
        rank = np.argsort(np.argsort(-scores, axis=-1, kind="stable"), axis=-1)
        wanted = (rank < case["count"]) & (scores > 0)
        # As in the prior: also at a time that is far from it.
        t = jnp.float32(1 / (1 + np.exp(case["log_snr"] if noise_at == "step" else 8.0)))
        chosen = functools.partial(positions_taken, data["logits"], z, active, t)
        kind = {"shift": case["shift"], "count": case["count"]}
        found = chosen(**kind, noise_at=noise_at)
        np.testing.assert_array_equal(found, wanted, err_msg=name)
        if case["shift"] == 0:  # with one kind of noise all times say the same
            moved += np.any(chosen(**kind, noise_at=other) != wanted)

        logits = masked_logits(LogSnrProcess(97, MASK), jnp.asarray(data["logits"]))
        filters = {name: case[name] for name in ("temperature", "top_k", "top_p") if name in case}
        x_hat = jnp.exp(filter_log_probs(jax.nn.log_softmax(logits), **filters))
        u = data[{"s03": f"{name}/uniforms", "s09": "uniforms"}[split]].reshape(z.shape)
        drawn = by_inverse(x_hat, jnp.asarray(u, jnp.float32))
        np.testing.assert_array_equal(np.where(found, drawn, z), data[case["key"]], err_msg=name)
    assert moved


def ancestral_step_by(data, uniforms, shift, log_snr):
    """The stored rows, without masks where the noise has none, before and after a step."""
    process = LogSnrProcess(97, MASK, shift=shift)
    z = np.where((shift == 1000) & (data["z"] == MASK), 7, data["z"])
    with jax.enable_x64(True):
        t, s = (jnp.full(len(z), 1 / (1 + np.exp(value))) for value in log_snr)
        x_hat = jax.nn.softmax(masked_logits(process, jnp.asarray(data["logits"], jnp.float64)))
        probs = process.posterior_probs(x_hat, jnp.asarray(z), t, s)
        return z, by_inverse(probs, jnp.asarray(uniforms, jnp.float64))


@pytest.mark.parametrize("case", range(9))
def test_ancestral_steps_of_the_port(case):
    """Masks, both and uniform noise (in that order), from the prior to clean text."""
    data = np.load(GOLDEN_SCALING / f"{FILES['s03']}.npz")
    uniforms = data[f"ancestral/{case}/uniforms"].reshape(data["z"].shape)
    log_snr = ((-9.0, -4.0), (-1.0, -0.5), (5.0, 9.0))[case % 3]
    _, found = ancestral_step_by(data, uniforms, (-1000.0, 0.0, 1000.0)[case // 3], log_snr)
    np.testing.assert_array_equal(found, data[f"ancestral/{case}/z_next"])


@pytest.mark.parametrize("case", range(6))
def test_ancestral_steps_of_the_references_own_sampler(case):
    """Masks, both and uniform noise (in that order), early and late; by its draws."""
    data = np.load(GOLDEN_SCALING / f"{FILES['s09']}.npz")
    shift, log_snr = (-1000.0, 0.0, 1000.0)[case // 2], ((-8.0, -3.0), (0.5, 1.5))[case % 2]
    z, drawn = ancestral_step_by(data, data["uniforms"][..., 0], shift, log_snr)
    found = np.where(data["noise_mask"], drawn, z)
    assert np.any(found != z) or case == 0  # so early hardly any mask is lifted
    np.testing.assert_array_equal(found, data[f"ancestral/{case}"])


@pytest.mark.parametrize("steps", [1, 5, 16])
def test_grids_are_the_references(steps):
    data = np.load(GOLDEN_SCALING / "s03_sampler_steps.npz")
    process = LogSnrProcess(97, MASK)
    for name, grid in GRIDS.items():
        times = 1 / (1 + np.exp(data[f"grid/{name}/{steps}"]))
        t, s = time_grid(process, steps, grid)
        np.testing.assert_allclose(t, times[:0:-1], rtol=2e-5)
        np.testing.assert_allclose(s, times[-2::-1], rtol=2e-5)
