"""Self-correction by suspicion: which token goes first, what takes its place, and where it ends."""

import exact_chain
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from denoisers import MASK_ONLY, PROCESSES, SKEWED, chi_square, distribution

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.evaluation.oracle import draw_chain, draw_rows, leave_one_out
from gidd_jax.evaluation.repair import repaired
from gidd_jax.process import HybridProcess
from gidd_jax.sampling.correction import CorrectionOptions, proposals, self_correct


def corrected(process, denoise, z, free=None, score="suspicion", **options):
    """One run; rows draw from keys of seed 0."""
    z = jnp.asarray(z, jnp.int32)
    free = jnp.ones(z.shape, bool) if free is None else jnp.asarray(free)
    keys = row_keys(jax.random.key(0), jnp.arange(len(z)))
    given = CorrectionOptions(score=score, **options)
    return jax.jit(lambda z, free: self_correct(process, denoise, given, z, free, proposals(keys)))(
        z, free
    )


def says(x_hat: np.ndarray):
    """A denoiser with one x_hat for each position [L, V], whatever it sees."""
    logits = jnp.log(jnp.asarray(x_hat, jnp.float32))
    return lambda z, t: jnp.broadcast_to(logits[None], (*z.shape, logits.shape[-1]))


def probability_of_noise(process, x_hat: np.ndarray, z: np.ndarray, t: float) -> np.ndarray:
    """P(x_i != z_i | z) by Bayes over all x_i, from the float64 masses of the process; z [L]."""
    alpha, mass = (
        part(np.float64(t)) for part in (oracle.of(process).alpha, oracle.of(process).noise)
    )
    found = []
    for prior, token in zip(np.float64(x_hat), z, strict=True):
        joint = prior * mass[token]
        joint[token] += prior[token] * alpha
        found.append(1 - joint[token] / joint.sum())
    return np.array(found)


@pytest.mark.parametrize("name", ["hybrid", "hybrid-skewed", "log-snr"])
def test_what_exceeds_the_threshold_is_replaced_the_most_suspicious_first(name):
    process, t = PROCESSES[name], 0.3
    x_hat = np.stack([distribution(process, seed) for seed in range(40)])
    clean = [v for v in range(7) if v != process.mask_id]
    z = np.random.default_rng(1).choice(clean, 40).astype(np.int32)
    wrong = probability_of_noise(process, x_hat, z, t)
    threshold = float(np.median(wrong))  # between two of an even number
    options = {"t": t, "threshold": threshold, "num_steps": 1}
    got = corrected(process, says(x_hat), z[None], tokens_per_step=40, **options)
    np.testing.assert_array_equal(got.ids[0] != z, wrong > threshold)
    few = corrected(process, says(x_hat), z[None], tokens_per_step=3, **options)
    chosen = np.flatnonzero(few.ids[0] != z)
    assert len(chosen) == 3
    assert wrong[chosen].min() >= np.sort(wrong)[-3] - 1e-6
    free = np.ones((1, 40), bool)
    free[0, chosen] = False
    others = corrected(process, says(x_hat), z[None], free, tokens_per_step=3, **options)
    np.testing.assert_array_equal(np.asarray(others.ids[0])[chosen], z[chosen])
    assert int(others.num_changes[0]) == 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", ["hybrid-skewed", "log-snr-uniform"])
def test_replacements_follow_the_tempered_prior_without_the_token(name, temperature):
    process = PROCESSES[name]
    x_hat, length = distribution(process), 4000
    token = int(np.argsort(x_hat)[-2])
    z = np.full((4, length), token)
    got = corrected(
        process,
        says(np.broadcast_to(x_hat, (length, 7))),
        z,
        temperature=temperature,
        tokens_per_step=length,
        num_steps=1,
        threshold=0.0,
        t=0.5,
    )
    expected = np.float64(x_hat) ** (1 / temperature)
    expected[token] = 0
    assert chi_square(np.asarray(got.ids), expected / expected.sum()) > 1e-3


def knows(target: np.ndarray, sure: np.ndarray, vocab_size: int):
    """A denoiser that gives probability sure [L] to target [L], and the rest evenly."""
    x_hat = np.repeat((1 - sure)[:, None] / (vocab_size - 2), vocab_size, axis=1)
    x_hat[np.arange(len(target)), target] = sure
    return says(x_hat)


def test_a_row_ends_when_nothing_is_suspicious():
    """Deterministic: at temperature 0 each step restores the token that is surest to be wrong."""
    process = HybridProcess(23, 22, p_uniform=0.1)
    target = np.array([1, 2, 3, 4, 5, 6])
    sure = np.array([0.9, 0.99, 0.999, 0.9, 0.99, 0.999])
    z = np.stack([target, np.r_[9, target[1:]], np.full(6, 9)])
    options = {"temperature": 0.0, "t": 0.2}
    got = corrected(process, knows(target, sure, 23), z, num_steps=20, **options)
    np.testing.assert_array_equal(got.ids, np.broadcast_to(target, (3, 6)))
    np.testing.assert_array_equal(got.num_steps, [1, 2, 7])  # the last finds nothing to do
    np.testing.assert_array_equal(got.converged, [True] * 3)
    np.testing.assert_array_equal(got.num_changes, [0, 1, 6])
    np.testing.assert_allclose(got.initial_accuracy, [1, 5 / 6, 0], rtol=1e-6)
    np.testing.assert_allclose(got.final_accuracy, [1, 1, 1], rtol=1e-6)
    # The surest first, ties from left to right; a row that has no calls left keeps its errors.
    for steps, mended in ((1, [2]), (2, [2, 5]), (4, [2, 5, 1, 4])):
        cut = corrected(process, knows(target, sure, 23), z[2:], num_steps=steps, **options)
        want = np.full(6, 9)
        want[mended] = target[mended]
        np.testing.assert_array_equal(cut.ids[0], want)
        assert not cut.converged[0]


def test_the_proposal_rule_damages_what_suspicion_leaves():
    """A right token that is hard to guess: its best replacement is probable, noise it is not."""
    process = HybridProcess(23, 22, p_uniform=0.1)
    x_hat = np.full((1, 23), 0.02)
    x_hat[0, [3, 7]], x_hat[0, 22] = (0.4, 0.2), 0
    z = np.array([[7]])
    by_suspicion = corrected(process, says(x_hat), z, temperature=0.0, threshold=0.2)
    np.testing.assert_array_equal(by_suspicion.ids, [[7]])
    assert probability_of_noise(process, x_hat, z[0], 0.01)[0] < 0.2
    by_proposal = corrected(process, says(x_hat), z, score="proposal", temperature=0.0)
    np.testing.assert_array_equal(by_proposal.ids, [[3]])


def test_with_the_exact_network_most_changes_are_of_wrong_tokens():
    """Rows of a chain with the uniform noise of time t: what is above the threshold is wrong as
    often as is said, and fewer tokens are wrong afterwards."""
    process, t, threshold = exact_chain.PROCESSES["uniform"], 0.1, 0.5
    rng, chain = np.random.default_rng(0), draw_chain(seed=2, num_tokens=3, sharpness=3.0)
    clean = draw_rows(chain, process, 1500, 12, seed=1)
    is_noise = rng.random(clean.shape) < 1 - float(process.alpha(t))
    z = np.where(is_noise, rng.integers(0, 3, clean.shape), clean)
    denoise = leave_one_out(process, chain)
    got = corrected(process, denoise, z, t=t, threshold=threshold, num_steps=12)
    wrong, changed = z != clean, np.asarray(got.ids) != z
    assert changed.sum() > 100
    found = wrong[changed]
    # Each was wrong with more than the threshold; a standard error is below 0.5 / sqrt(n).
    assert found.mean() > threshold + 2 * 0.5 / np.sqrt(len(found))
    assert np.mean(np.asarray(got.ids) != clean) < wrong.mean()
    assert np.all(got.converged)


def test_with_the_exact_network_suspicion_mends_what_the_proposal_rule_damages():
    """Planted errors in rows of a chain. Rows of high entropy are far from the mode, to which the
    proposal rule takes them: with it more tokens are wrong than before."""
    process, chain = HybridProcess(7, 6, 0.2), draw_chain(seed=2, num_tokens=6, sharpness=3.0)
    rng = np.random.default_rng(0)
    clean = draw_rows(chain, process, 160, 24, seed=1)
    is_error = rng.random(clean.shape) < 0.05
    z = np.where(is_error, (clean + rng.integers(1, 6, clean.shape)) % 6, clean)
    denoise = leave_one_out(process, chain)
    by_suspicion, by_proposal = (
        repaired(
            z, np.asarray(corrected(process, denoise, z, score=score, num_steps=24).ids), clean
        )
        for score in ("suspicion", "proposal")
    )
    planted = is_error.mean()
    assert by_suspicion.wrong_after.interval[1] < planted < by_proposal.wrong_after.interval[0]
    assert by_suspicion.damage.interval[1] < 0.02 < 0.2 < by_proposal.damage.interval[0]
    assert by_suspicion.recover.interval[0] > 0.4
    assert by_proposal.touch.value > by_suspicion.touch.value  # it finds more, and far too much


@pytest.mark.parametrize("name", MASK_ONLY)
def test_masks_alone_have_no_suspicion(name):
    process = PROCESSES[name]
    with pytest.raises(InputError, match=r"score 'suspicion' needs .* use score 'proposal'"):
        corrected(process, says(np.full((2, 7), 1 / 6)), np.zeros((1, 2)))


def test_skewed_backgrounds_weigh_tokens_that_noise_prefers():
    """Of two tokens that the context finds equally probable, the likelier noise goes first."""
    process = HybridProcess(7, 2, p_uniform=0.4, background=SKEWED)
    x_hat = np.full((2, 7), 0.01)
    x_hat[:, 6], x_hat[:, 2] = 0.95, 0
    got = corrected(
        process, says(x_hat), [[4, 5]], temperature=0.0, num_steps=1, threshold=0.0, t=0.3
    )
    np.testing.assert_array_equal(got.ids, [[4, 6]])
