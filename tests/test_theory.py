"""The bound and the ancestral process by exact enumeration: one and two tokens, six token ids.

With x_hat = p_data a sequence of one token has no gap: the integral of the bound plus its boundary
terms is -log p(x), and the denoising steps carry marginals to marginals. Under x64, so that what
remains is the error of the quadrature.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gidd_jax.loss import gidd_loss, mdlm_loss
from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess

V = 6
NODES = 160  # of a quadrature
# Settings of c09_exact_elbo.npz: (p_uniform, gamma, mask_id).
SETTINGS = {
    "pu0.0": (0.0, 1.0, 5),
    "pu0.1": (0.1, 1.0, 5),
    "pu0.2": (0.2, 1.0, 5),
    "pu0.5": (0.5, 1.0, 5),
    "pu0.3_g2": (0.3, 2.0, 5),
    "pu0.2_mid": (0.2, 1.0, 2),
}
BACKGROUND = (0.1, 0.5, 0.0, 0.05, 0.05, 0.3)
PROCESSES: dict[str, InterpolatingProcess] = {
    "skewed": HybridProcess(V, 2, p_uniform=0.4, background=BACKGROUND),
    "masked": MaskedProcess(V, 5),
    "log-snr-masks": LogSnrProcess(V, 5, shift=-1000.0),
    "log-snr": LogSnrProcess(V, 5),
    "log-snr-uniform": LogSnrProcess(V, 2, shift=1000.0),
    "log-snr-scale2": LogSnrProcess(V, 2, scale=2.0, shift=0.5),
    "log-snr-skewed": LogSnrProcess(V, 2, scale=0.5, shift=1.0, background=BACKGROUND),
}
for tag, (p_uniform, gamma, mask_id) in SETTINGS.items():
    PROCESSES[tag] = HybridProcess(V, mask_id, p_uniform=p_uniform, gamma=gamma)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def clean_tokens(process: InterpolatingProcess) -> np.ndarray:
    return np.array([v for v in range(V) if v != process.mask_id])


def data_distribution(process: InterpolatingProcess) -> np.ndarray:
    p_data = np.zeros(V)
    p_data[clean_tokens(process)] = [0.02, 0.45, 0.3, 0.15, 0.08]
    return p_data


def nodes(t0: float, t1: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights in theta = arccos(1 - 2t), which tames both ends."""
    x, w = np.polynomial.legendre.leggauss(NODES)
    low, high = np.arccos(1 - 2 * t0), np.arccos(1 - 2 * t1)
    theta = 0.5 * (high - low) * x + 0.5 * (high + low)
    return (1 - np.cos(theta)) / 2, 0.25 * (high - low) * w * np.sin(theta)


def expected_elbo(process, x_hat, t, loss=gidd_loss):
    """sum_z q_t(z|x) * ELBO integrand, for every denoiser output and clean token x.

    x_hat [T, K, Z, V] may depend on z; t [T]; result [T, K, X].
    """
    times, count = x_hat.shape[:2]
    tokens = jnp.array([v for v in range(V) if v != process.mask_id])
    x, z = (m.ravel() for m in jnp.meshgrid(tokens, jnp.arange(V), indexing="ij"))
    x, z = (jnp.tile(m[None], (times * count, 1)) for m in (x, z))
    logits = jnp.tile(jnp.log(x_hat), (1, 1, V - 1, 1)).reshape(times * count, -1, V)
    t = jnp.repeat(t, count)
    options = {"weighting": "elbo"} if loss is gidd_loss else {}
    elbo = loss(process, logits, x, z, t, **options).elbo
    prob = process.marginal_probs(jax.nn.one_hot(x, V, dtype=t.dtype), t)
    prob = jnp.take_along_axis(prob, z[..., None], axis=-1)[..., 0]
    terms = jnp.where(prob > 0, prob * jnp.where(prob > 0, elbo, 0.0), 0.0)
    return terms.reshape(times, count, V - 1, V).sum(-1)


def constant(x_hat: np.ndarray, times: int) -> np.ndarray:
    """x_hat [V] for all times and z: [T, 1, Z, V]."""
    return np.broadcast_to(x_hat, (times, 1, V, V))


def reconstruction(process: InterpolatingProcess, x_hat: np.ndarray, t: float) -> np.ndarray:
    """E[-log p(x|z_t)] for every clean token, p(x|z) by Bayes from x_hat."""
    reference, tokens = oracle.of(process), clean_tokens(process)
    q = reference.marginal(np.eye(V)[tokens], np.full(V - 1, t))  # [X, Z]
    bayes = x_hat[tokens][:, None] * q / reference.marginal(x_hat, np.float64(t))
    return -np.sum(np.where(q > 0, q * np.log(np.where(q > 0, bayes, 1)), 0), axis=-1)


def marginal_kl(process: InterpolatingProcess, x_hat: np.ndarray, t: float) -> np.ndarray:
    """KL(q_t(.|x) || q_t(.|x_hat)) for every clean token."""
    reference, tokens = oracle.of(process), clean_tokens(process)
    q = reference.marginal(np.eye(V)[tokens], np.full(V - 1, t))
    ratio = np.where(q > 0, q, 1) / np.where(q > 0, reference.marginal(x_hat, np.float64(t)), 1)
    return np.sum(np.where(q > 0, q * np.log(ratio), 0), axis=-1)


@pytest.mark.parametrize("tag", SETTINGS)
def test_integrand_and_integrals_match_the_golden_numbers(golden, tag):
    data, process = golden("c09_exact_elbo.npz"), PROCESSES[tag]
    data = {k.removeprefix(tag + "/"): v for k, v in data.items()}
    grids = [nodes(*data["ranges"][i]) for i in (0, 1)]
    t = np.concatenate([data["t_grid"], grids[0][0], grids[1][0]])
    splits = [21, 21 + NODES]
    for name, x_hat in (
        ("const", constant(data["p_data"], 21 + 2 * NODES)),
        ("table", np.broadcast_to(data["xhat_table"], (21 + 2 * NODES, 1, V, V))),
    ):
        values = np.split(np.asarray(expected_elbo(process, x_hat, t))[:, 0], splits)
        np.testing.assert_allclose(values[0], data[f"integrand_{name}"], rtol=1e-9)
        for i in (0, 1):
            integral = grids[i][1] @ values[1 + i]
            want = data[f"integral_{name}_quadrature"][i]
            np.testing.assert_allclose(integral, want, rtol=1e-9)
            if name == "const":
                exact = data["integral_const_closed_form"][i]
                np.testing.assert_allclose(integral, exact, rtol=1e-9)


def test_bound_of_one_token_is_exact(process):
    p_data = data_distribution(process)
    t0, t1 = process.t_min, process.t_max
    t, weights = nodes(t0, t1)
    middle = weights @ np.asarray(expected_elbo(process, constant(p_data, NODES), t))[:, 0]
    total = reconstruction(process, p_data, t0) + middle + marginal_kl(process, p_data, t1)
    np.testing.assert_allclose(total, -np.log(p_data[clean_tokens(process)]), rtol=1e-9)
    # for any other constant x_hat the integral still is the difference of the end points
    other = np.roll(p_data[clean_tokens(process)], 2)
    x_hat = np.zeros(V)
    x_hat[clean_tokens(process)] = other
    middle = weights @ np.asarray(expected_elbo(process, constant(x_hat, NODES), t))[:, 0]
    want = marginal_kl(process, x_hat, t0) - marginal_kl(process, x_hat, t1)
    np.testing.assert_allclose(middle, want, rtol=1e-9)


def test_bound_of_one_token_in_float32():
    process = PROCESSES["pu0.2"]
    p_data = data_distribution(process)
    t, weights = nodes(process.t_min, process.t_max)
    with jax.enable_x64(False):
        compiled = jax.jit(expected_elbo, static_argnums=0)
        values = np.asarray(compiled(process, constant(p_data, NODES), np.float32(t)))[:, 0]
    assert values.dtype == np.float32
    total = reconstruction(process, p_data, process.t_min) + weights @ values.astype(np.float64)
    total += marginal_kl(process, p_data, process.t_max)
    np.testing.assert_allclose(total, -np.log(p_data[clean_tokens(process)]), rtol=2e-5)


def test_boundary_terms_of_hybrid_noise_are_not_small():
    # x_hat = p_data, five tokens: what the middle term alone leaves out at t_eps = 1e-4
    for tag, low, high in (("pu0.0", 0, 2e-3), ("pu0.1", 0.01, 0.03), ("pu0.5", 0.05, 0.15)):
        p_data = np.append(np.full(5, 0.2), 0.0)
        missing = p_data[:5] @ reconstruction(PROCESSES[tag], p_data, 1e-4)
        assert low < missing < high, tag


def test_mdlm_bound_of_one_token(golden):
    data, process = golden("c09_exact_elbo.npz"), MaskedProcess(V, 5)
    p_data = np.append(data["mdlm/p_data"], 0.0)
    for i, (t0, t1) in enumerate(data["ranges"]):
        t, weights = nodes(t0, t1)
        for loss in (mdlm_loss, gidd_loss):
            values = np.asarray(expected_elbo(process, constant(p_data, NODES), t, loss))[:, 0]
            want = data["mdlm/integral"][i] * (1 - process.eps)  # the mask mass is (1 - eps) t
            np.testing.assert_allclose(weights @ values, want, rtol=1e-9)


@pytest.mark.parametrize("tag", ["pu0.1", "pu0.5", "pu0.3_g2", "log-snr", "skewed"])
def test_the_posterior_is_not_the_optimal_denoiser(tag):
    process = PROCESSES[tag]
    p_data, reference = data_distribution(process), oracle.of(process)
    t, weights = nodes(process.t_min, process.t_max)
    likelihood = np.stack([reference.marginal(np.eye(V), np.full(V, u)) for u in t])  # [T, x, z]
    posterior = (p_data[:, None] * likelihood).transpose(0, 2, 1)
    posterior /= posterior.sum(-1, keepdims=True)
    values = np.asarray(expected_elbo(process, posterior[:, None], t))[:, 0]
    p = p_data[clean_tokens(process)]
    entropy = -p @ np.log(p)
    assert weights @ values @ p > entropy + 1e-3


P_DATA = np.array([0.3, 0.05, 0.25, 0.1, 0.3])


@pytest.mark.parametrize(
    ("weighting", "is_tilted"),
    [
        ("elbo", False),
        ("dynamic_unbiased", False),
        ("clip", True),
        ("dynamic", True),
        ("dynamic_v1_1", True),
    ],
)
@pytest.mark.parametrize("tag", ["pu0.2", "pu0.5", "pu0.3_g2", "skewed"])
@pytest.mark.parametrize("t", [0.003, 0.1, 0.6])
def test_weights_move_the_minimum_by_the_odds_that_they_change(tag, t, weighting, is_tilted):
    """The gradient of the expected loss of every z_t is 0 at p(x) q(z|x) w(x, z): without bias at
    p itself, else with the odds of x_hat(z_t) multiplied by a factor."""
    process = PROCESSES[tag]
    tokens, times = clean_tokens(process), jnp.full(5, t)
    x, tilts = tokens[:, None], []

    def expected_loss(logits, z_t, joint):
        rows = jnp.zeros((5, 1, V)).at[:, :, tokens].set(logits[None, None])
        loss = gidd_loss(process, rows, x, z_t, times, weighting=weighting).loss[:, 0]
        return jnp.sum(joint * loss)

    for z in range(V):
        z_t, is_z = jnp.full((5, 1), z), tokens == z
        weights = process.loss_weights(x, z_t, times, weighting=weighting)[:, 0]
        q = process.mass_at(process.beta_pi(times), z_t[:, 0])
        joint = P_DATA * (q + jnp.where(is_z, process.alpha(times), 0.0))
        if not np.any(joint * weights > 0):
            continue  # a token that no noise is
        m = np.asarray(joint * weights / jnp.sum(joint * weights))
        gradient = jax.grad(expected_loss)(jnp.log(m), z_t, joint)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-12 * float(np.max(weights)))
        ratio = m / P_DATA
        tilts.append(1.0 if z == process.mask_id else float(ratio[is_z][0] / ratio[~is_z].mean()))
        np.testing.assert_allclose(ratio[~is_z], ratio[~is_z][0], rtol=1e-12)
    if not is_tilted:
        np.testing.assert_allclose(tilts, 1.0, rtol=1e-12)
    elif t == 0.1:
        assert np.max(tilts) > 1.1


@pytest.mark.parametrize("tag", SETTINGS)
def test_two_tokens_with_the_leave_one_out_denoiser(golden, tag):
    data, process = golden("c09_exact_elbo.npz"), PROCESSES[tag]
    joint, tokens = data[f"{tag}/joint2"], clean_tokens(process)
    t, weights = nodes(*data["ranges"][1])
    reference = oracle.of(process)
    q = np.stack([reference.marginal(np.eye(V)[tokens], np.full(V - 1, u)) for u in t])  # [T, x, z]
    total = np.zeros((V - 1, V - 1))
    for pair in (joint, joint.T):  # rows: the token to predict, columns: the one that is seen
        seen = np.einsum("ab,tbz->tza", pair, q)
        x_hat = np.zeros((NODES, V, V))
        x_hat[..., tokens] = seen / seen.sum(-1, keepdims=True)
        own = np.asarray(expected_elbo(process, np.repeat(x_hat[:, :, None], V, axis=2), t))
        term = np.einsum("t,tza,tbz->ab", weights, own, q)
        total += term if pair is joint else term.T
    np.testing.assert_allclose(total, data[f"{tag}/integral2_closed_form"], rtol=1e-9)


# Denoising steps.


def step_kl(process, x_hat, t, s):
    """E_{z_t|x} KL(q(z_s|z_t, x) || q(z_s|z_t, x_hat[z_t])), [T, X], from dense posteriors."""
    tokens = jnp.array([v for v in range(V) if v != process.mask_id])
    x, z = (m.ravel() for m in jnp.meshgrid(tokens, jnp.arange(V), indexing="ij"))
    x, z = (jnp.tile(m[None], (len(t), 1)) for m in (x, z))
    onehot = jax.nn.one_hot(x, V, dtype=t.dtype)
    q = process.posterior_probs(onehot, z, t, s)
    p = process.posterior_probs(x_hat[z], z, t, s)
    positive = q > 0
    ratio = jnp.where(positive, q, 1.0) / jnp.where(positive, p, 1.0)
    kl = jnp.sum(jnp.where(positive, q * jnp.log(ratio), 0.0), axis=-1)
    prob = jnp.take_along_axis(process.marginal_probs(onehot, t), z[..., None], axis=-1)[..., 0]
    return (prob * kl).reshape(len(t), V - 1, V).sum(-1)


@pytest.mark.parametrize("tag", SETTINGS)
def test_discrete_bound_tends_to_the_integral(golden, tag):
    data, process = golden("c09_exact_elbo.npz"), PROCESSES[tag]
    low, high = data["ranges"][1]
    gaps = []
    for i, steps in enumerate(data["T"]):
        grid = np.linspace(low, high, steps + 1)
        got = np.zeros(V - 1)
        for part in np.split(np.arange(steps), steps // 64):
            terms = step_kl(process, data[f"{tag}/xhat_table"], grid[part + 1], grid[part])
            got += np.asarray(terms).sum(0)
        np.testing.assert_allclose(got, data[f"{tag}/discrete_nelbo_table"][i], rtol=1e-8)
        gaps.append(np.abs(got - data[f"{tag}/integral_table_quadrature"][1]).max())
    if tag == "pu0.0":
        assert max(gaps) < 1e-9  # masks alone leave no gap
    else:
        np.testing.assert_allclose(gaps[0] / gaps[1], 4, rtol=0.1)
        np.testing.assert_allclose(gaps[1] / gaps[2], 4, rtol=0.1)


def test_ancestral_steps_carry_marginals_to_marginals(process):
    p_data, reference = data_distribution(process), oracle.of(process)
    grid = np.linspace(process.t_max, process.t_min, 33)
    if not isinstance(process, LogSnrProcess):  # whose least noise is that of t_min
        grid = np.append(grid, 0.0)
    t, s = grid[:-1], grid[1:]
    x_hat = jnp.asarray(np.broadcast_to(p_data, (len(t), V, V)))
    z_t = jnp.tile(jnp.arange(V)[None], (len(t), 1))
    steps = np.asarray(process.posterior_probs(x_hat, z_t, t, s))
    probs = reference.marginal(p_data, np.float64(t[0]))
    for step, time in zip(steps, s, strict=True):
        possible = probs > 1e-200  # the oracle of shift = 1000 leaves e^-690
        probs = probs[possible] @ step[possible]
        want = reference.marginal(p_data, np.float64(time)) if time > 0 else p_data
        np.testing.assert_allclose(probs, want, rtol=1e-9, atol=1e-15)
    # within the noise that t_min leaves; exactly p_data where the last step goes to 0
    left = 1 - reference.alpha(s[-1]) if s[-1] > 0 else 0.0
    assert 0.5 * np.abs(probs - p_data).sum() <= left + 1e-12
