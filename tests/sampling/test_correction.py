"""Self-correction: the original's steps and runs, and rows that stop by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.loss import masked_logits
from gidd_jax.process import HybridProcess
from gidd_jax.sampling import correction
from gidd_jax.sampling.correction import (
    CorrectionOptions,
    Proposals,
    correction_step,
    judge,
    proposals,
    self_correct,
)
from gidd_jax.sampling.filters import temper, unnormalised

PROCESS = HybridProcess(23, 22, p_uniform=0.1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1])
def test_steps_match_original(golden, temperature, count):
    data = golden("c07_self_correction.npz")
    name = f"temp{temperature}/k{count}"
    with jax.enable_x64(True):
        logits = masked_logits(PROCESS, jnp.asarray(data["logits"]))
        weights = unnormalised(temper(logits, temperature))
        probs = weights / jnp.sum(weights, axis=-1, keepdims=True)
        np.testing.assert_allclose(probs, data[f"{name}/p_t"], rtol=1e-10)
        z, proposal = jnp.asarray(data["z_t"]), jnp.asarray(data["proposal"])
        propose = Proposals(no_numbers, lambda weights, numbers: numbers)
        options = CorrectionOptions(temperature=temperature)
        judged = judge(PROCESS, data["logits"], proposal, z, propose, options)
        z_next = correction_step(judged, z, jnp.ones(z.shape, bool), count)
    np.testing.assert_array_equal(z_next, data[f"{name}/z_next"])
    accuracy = np.mean(np.asarray(z_next) == np.argmax(logits, -1))
    np.testing.assert_allclose(accuracy, data[f"{name}/acc"], rtol=1e-6)


def no_numbers(step, length, columns):
    raise AssertionError("the numbers are given")


def table_model(data):
    """logits = W[z] + P[position] + t D, in float64."""
    w, p, d = (jnp.asarray(data[f"main/{name}"]) for name in ("W", "P", "D"))
    return lambda z, t: w[z] + p[None] + t.astype(w.dtype)[..., None] * d[None, None]


@pytest.mark.parametrize(
    ("temperature", "patience", "count"), [(0.1, 4, 1), (1.0, 2, 3)], ids=["cold", "warm"]
)
def test_runs_match_original(golden, temperature, patience, count):
    """The original corrects one sample after the other; its uniforms follow each other."""
    data = golden("c07_self_correction.npz")
    name = f"main/temp{temperature:g}_pat{patience}_k{count}"
    options = CorrectionOptions(24, temperature, count, patience, t=0.01)
    used = 0
    with jax.enable_x64(True):
        uniforms = jnp.asarray(data[f"{name}/uniforms"])
        uniforms = jnp.concatenate([uniforms, jnp.zeros((24, 1, 6))])  # steps never taken

        def draw(weights, u):
            probs = weights / jnp.sum(weights, axis=-1, keepdims=True)
            cumulative = jnp.cumsum(probs, axis=-1).at[..., -1].set(1 + 1e-4)
            return jnp.argmax(cumulative > u, axis=-1).astype(jnp.int32)

        @jax.jit
        def run(z, start):
            return self_correct(
                PROCESS,
                table_model(data),
                options,
                z,
                jnp.ones(z.shape, bool),
                Proposals(
                    lambda step, *size: jax.lax.dynamic_slice_in_dim(uniforms, start + step, 1)[
                        0, ..., None
                    ],
                    draw,
                ),
            )

        for row, z in enumerate(data["main/samples_in"].astype(np.int32)):
            got = run(jnp.asarray(z[None]), used)
            np.testing.assert_array_equal(got.ids[0], data[f"{name}/samples_out"][row])
            for ours, theirs in (
                ("initial_accuracy", "init_acc"),
                ("final_accuracy", "final_acc"),
                ("num_changes", "num_changes"),
                ("converged", "converged"),
                ("stopped_early", "early_stopped"),
            ):
                want = data[f"{name}/{theirs}"][row]
                np.testing.assert_allclose(getattr(got, ours)[0], want, rtol=1e-6, err_msg=ours)
            used += int(got.num_steps[0])
    assert used == len(data[f"{name}/uniforms"])


def attracting(target: np.ndarray, sharpness: float = 9.0):
    """A denoiser that wants every row to become `target`, and is surest on the right."""
    logits = sharpness * jax.nn.one_hot(target, 23) * (1 + 0.1 * jnp.arange(len(target)))[:, None]
    return lambda z, t: jnp.broadcast_to(logits[None], (*z.shape, 23))


def test_rows_stop_by_themselves_and_do_not_depend_on_the_batch():
    target = np.array([1, 2, 3, 4, 5, 6])
    z = np.stack([target, np.r_[9, target[1:]], np.full(6, 9)]).astype(np.int32)
    keys = row_keys(jax.random.key(0), jnp.arange(3))
    options = CorrectionOptions(num_steps=20, temperature=0.1)
    free = jnp.ones(z.shape, bool)

    @jax.jit
    def run(z, free, keys):
        return self_correct(PROCESS, attracting(target), options, z, free, proposals(keys))

    got = run(z, free, keys)
    np.testing.assert_array_equal(got.ids, np.broadcast_to(target, (3, 6)))
    np.testing.assert_array_equal(got.converged, [True] * 3)
    np.testing.assert_array_equal(got.stopped_early, [False] * 3)
    np.testing.assert_array_equal(got.num_steps, [1, 2, 7])  # the last one finds nothing to do
    np.testing.assert_array_equal(got.num_changes, [0, 1, 6])
    np.testing.assert_allclose(got.initial_accuracy, [1, 5 / 6, 0], rtol=1e-6)
    np.testing.assert_allclose(got.final_accuracy, [1, 1, 1], rtol=1e-6)
    for row in range(3):
        part = np.s_[row : row + 1]
        alone = run(z[part], free[part], keys[part])
        for ours, theirs in zip(alone[:-1], got[:-1], strict=True):  # there are no frames
            np.testing.assert_array_equal(ours[0], theirs[row])


@pytest.mark.parametrize("tokens", [1, 6, 9])
def test_groups_of_positions_are_corrected_as_all_at_once(tokens, monkeypatch):
    """Groups of one, of two and of three positions of each of three rows of seven tokens."""
    table, bias = (jax.random.normal(jax.random.key(n), (23, 9)) for n in (5, 6))
    z = jax.random.randint(jax.random.key(7), (3, 7), 0, 22)
    free = jnp.ones(z.shape, bool).at[1, 2].set(False)
    options = CorrectionOptions(num_steps=5, temperature=0.5, tokens_per_step=2)

    def run():
        return self_correct(
            PROCESS,
            lambda z, t: table[z] + jnp.cumsum(table[z], axis=1),
            options,
            z,
            free,
            proposals(row_keys(jax.random.key(0), jnp.arange(3))),
            trace=True,
            project=lambda h: h @ bias.T,
        )

    whole = run()
    assert int(whole.num_changes.sum()) > 5
    monkeypatch.setattr(correction, "chunk_size", lambda *sizes: tokens)
    for ours, want in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5)


def test_given_positions_stay_and_do_not_count():
    target = np.array([1, 2, 3, 4, 5, 6])
    z = jnp.full((1, 6), 9, jnp.int32)
    free = jnp.array([[False, True, True, False, True, False]])
    keys = row_keys(jax.random.key(0), jnp.arange(1))
    options = CorrectionOptions(num_steps=20, temperature=0.1, tokens_per_step=2)
    got = self_correct(PROCESS, attracting(target), options, z, free, proposals(keys))
    np.testing.assert_array_equal(got.ids, [[9, 2, 3, 9, 5, 9]])
    assert float(got.final_accuracy[0]) == 1
    assert int(got.num_steps[0]) == 3


def flat(z, t):
    return jnp.zeros((*z.shape, 23))  # first choice: token 0


def test_patience_ends_a_row_that_does_not_improve():
    """Proposals of token 1 raise the accuracy of no row; those of token 0 do, once a step."""
    options = CorrectionOptions(num_steps=50, temperature=1.0, patience=3)
    z = jnp.full((2, 6), 9, jnp.int32)
    free = jnp.ones(z.shape, bool)

    def tokens(step, length, columns):
        token = jnp.stack([jnp.where(step % 2 == 0, 1, 2), jnp.where(step < 4, 0, 1 + step % 2)])
        return jnp.broadcast_to(token[:, None], z.shape)

    given = Proposals(tokens, lambda weights, tokens: tokens)
    got = self_correct(PROCESS, flat, options, z, free, given)
    np.testing.assert_array_equal(got.stopped_early, [True, True])
    np.testing.assert_array_equal(got.converged, [False, False])
    # The first step sets the best accuracy and 3 without a better one are forgiven; the second
    # row has 4 better ones first. The changes of the step that ends it are dropped.
    np.testing.assert_array_equal(got.num_steps, [5, 8])
    np.testing.assert_allclose(got.initial_accuracy, 0)
    keys = row_keys(jax.random.key(1), jnp.arange(2))
    short = CorrectionOptions(num_steps=2, temperature=1.0, patience=3)
    cut = self_correct(PROCESS, flat, short, z, free, proposals(keys))
    np.testing.assert_array_equal(cut.num_steps, 2)
    assert not np.any(cut.stopped_early)
    assert not np.any(cut.converged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0"),
        ({"t": 0.0}, r"t must lie in \(0, 1\)"),
        ({"score": "loss"}, "unknown score 'loss': use one of proposal, suspicion"),
        ({"score": "suspicion", "threshold": 1.0}, r"threshold must lie in \[0, 1\)"),
        ({"threshold": 0.9}, "threshold has no effect with score 'proposal'"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CorrectionOptions(**options)
