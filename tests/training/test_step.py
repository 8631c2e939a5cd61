"""The train and evaluation steps: the original's traces, accumulation, averages, masks, bounds."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gidd_jax.cli import load_config
from gidd_jax.interchange.tensors import TorchTensors, dit_format, llama_format, params_from_torch
from gidd_jax.models.dit import DiT
from gidd_jax.models.llama import Llama
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess
from gidd_jax.settings import Settings
from gidd_jax.training.noising import Noised
from gidd_jax.training.objective import Objective
from gidd_jax.training.optimizer import make_optimizer
from gidd_jax.training.step import TrainState, evaluation_step, loss_and_grads, train_step, update

VOCAB, MASK, PAD = 67, 66, 65


class Toy(nn.Module):
    """The smallest network with the interface of the others: a table row plus the time."""

    vocab_size: int = VOCAB
    columns: int = VOCAB
    width: int = 8

    def setup(self) -> None:
        normal = nn.initializers.normal(1.0)
        self.table = self.param("table", normal, (self.vocab_size, self.width))
        self.slope = self.param("slope", normal, (1, 1, self.width))
        self.kernel = self.param("kernel", normal, (self.width, self.columns))

    def __call__(self, ids: jax.Array, t: jax.Array | None = None) -> jax.Array:
        return self.features(ids, t) @ self.kernel

    def features(self, ids: jax.Array, t: jax.Array | None = None) -> jax.Array:
        return self.table[ids] + (0.0 if t is None else t[:, None, None] * self.slope)

    @nn.nowrap
    def output_weights(self, params: Any) -> tuple[jax.Array, None]:
        return params["kernel"], None


def objective(name: str, model: nn.Module | None = None, **changes: Any) -> Objective:
    """What a run of `name` (gidd, mdlm or ar) optimises."""
    process = {"gidd": HybridProcess(VOCAB, MASK, 0.1), "mdlm": MaskedProcess(VOCAB, MASK)}
    values: dict[str, Any] = {
        "model": model or Toy(),
        "process": process.get(name),
        "weighting": "dynamic" if name == "gidd" else "elbo",
        "min_weight": 0.0,
        "max_weight": 2.0,
        "stratified": True,
        "mask_padding": False,
        "align_mask_to_input": False,
        "keep_padding_columns": False,
    }
    return Objective(**{**values, **changes})


def toy_batch(rows: int = 8, length: int = 12) -> dict[str, jax.Array]:
    """Random ids; each row has another number of padded positions, one row is padding alone."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, PAD, (rows, length)).astype(np.int32)
    lengths = np.arange(rows) * length // max(rows - 1, 1)
    mask = np.arange(length) < lengths[:, None]
    return {"tokens": jnp.asarray(np.where(mask, tokens, PAD)), "mask": jnp.asarray(mask)}


def toy_params() -> Any:
    return Toy().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


# Compiled: one operation at a time would compile each of them.
grads_of = jax.jit(loss_and_grads, static_argnums=(0, 4))
step_of = jax.jit(train_step, static_argnums=(0, 1, 2, 3))
update_of = jax.jit(update, static_argnums=(0, 1, 2, 3))
evaluation_of = jax.jit(evaluation_step, static_argnums=0)


def state_of(params: Any, optimizer: optax.GradientTransformation, ema: Any = None) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


# ---- the original's training traces

RUNS = {  # name: (objective, weighting, learning rate)
    "init": ("gidd", "dynamic_v1_1", 5e-4),
    "strong": ("gidd", "dynamic_v1_1", 3e-3),
    "clip": ("gidd", "clip", 5e-4),
    "mdlm": ("mdlm", "elbo", 5e-4),
    "ar": ("ar", "elbo", 1e-3),
}
STEPS = 20


def trace_start(run: str, golden: Callable[[str], dict[str, np.ndarray]]) -> Any:
    if run == "ar":
        return params_from_torch(
            golden("c06_llama_state_dict.safetensors"),
            llama_format(Llama(67, 64, 2, 4).shape, False),
            2,
        )
    if run in ("strong", "clip"):
        return params_from_torch(golden("c05_dit_strong_state_dict.safetensors"), dit_format(4), 3)
    return params_from_torch(of_prefix(golden("c11_init_states.npz"), "init/"), dit_format(4), 3)


def of_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def trace_batch(run: str, arrays: Mapping[str, np.ndarray], step: int) -> tuple[Any, Noised]:
    prefix = "ar/" if run == "ar" else ""
    tokens = jnp.asarray(arrays[f"{prefix}input_ids"][step], jnp.int32)
    mask = jnp.asarray(arrays[f"{prefix}attention_mask"][step], bool)
    batch = {"tokens": tokens, "mask": mask}
    if run == "ar":
        return batch, Noised(z_t=tokens, t=jnp.zeros(len(tokens)))
    z_t = jnp.asarray(arrays[f"{run}/z_t"][step], jnp.int32)
    return batch, Noised(z_t=z_t, t=jnp.asarray(arrays[f"{run}/t"][step]))


@pytest.mark.parametrize("run", RUNS)
def test_traces_of_the_original(golden, run):
    """Tolerances at which a missing rotary embedding or decay on matrices alone fails."""
    arrays = golden("c11_training_trace.npz")
    name, weighting, rate = RUNS[run]
    size = {"vocab_size": VOCAB, "hidden_size": 64, "num_heads": 4, "max_seq_len": 32}
    network = Llama(num_layers=2, **size) if run == "ar" else DiT(num_layers=3, cond_dim=32, **size)
    what = objective(
        name, network, weighting=weighting, keep_padding_columns=True, align_mask_to_input=True
    )
    base = Settings.from_config(load_config("base"))  # the original's values
    settings = dataclasses.replace(base.optimizer, learning_rate=rate, warmup_steps=5)
    optimizer = make_optimizer(settings, base.model, STEPS)
    state = state_of(jax.tree.map(jnp.asarray, trace_start(run, golden)), optimizer)
    found: dict[str, list[float]] = {key: [] for key in ("loss", "elbo", "grad_norm", "param_norm")}
    with jax.default_matmul_precision("highest"):
        for number in range(STEPS):
            batch, noised = trace_batch(run, arrays, number)
            state, metrics = update_of(what, optimizer, 0.0, 1, state, batch, noised)
            metrics["param_norm"] = optax.tree.norm(state.params)
            for key, values in found.items():
                values.append(float(metrics[key]))
    np.testing.assert_allclose(found["loss"], arrays[f"{run}/loss"], atol=5e-6, rtol=0)
    for key in ("grad_norm", "param_norm"):
        np.testing.assert_allclose(found[key], arrays[f"{run}/{key}"], rtol=2e-5)
    if run != "ar":
        elbo = arrays[f"{run}/metrics"][:, -1]
        np.testing.assert_allclose(found["elbo"], elbo, atol=2e-6, rtol=2e-6)
    if run == "init":
        assert_final_parameters(state.params, golden("c11_init_states.npz"))


def assert_final_parameters(params: Any, states: Mapping[str, np.ndarray]) -> None:
    """The change of every parameter over the run: up to 5e-3, kept in float16."""
    final, start = TorchTensors(params), of_prefix(states, "init/")
    changes = of_prefix(states, "change/")
    assert changes.keys() == final.keys()
    assert max(np.abs(change).max() for change in changes.values()) > 5e-3
    for name, change in changes.items():
        np.testing.assert_allclose(final[name] - start[name], change, atol=4e-6, rtol=0)


# ---- masks and metrics


def nll_by_hand(params: Any, ids: np.ndarray) -> np.ndarray:
    """-log p of each token but the first: the toy is a table of bigram logits."""
    table = np.asarray(params["table"], np.float64) @ np.asarray(params["kernel"], np.float64)
    logits = table[ids[:, :-1]]
    norm = np.log(np.exp(logits).sum(-1))
    return norm - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]


@pytest.mark.parametrize("align", [False, True])
def test_autoregressive_mask_is_of_the_target_or_of_the_input(align):
    params = toy_params()
    ids = np.array([[3, 1, 4, PAD], [1, 5, PAD, PAD]], np.int32)
    mask = ids != PAD
    nll = nll_by_hand(params, ids)
    # Targets: 1, 4 and 5. With the input's mask also the first pad of each row.
    chosen = [nll[0, 0], nll[0, 1], nll[1, 0]] + ([nll[0, 2], nll[1, 1]] if align else [])
    what = objective("ar", align_mask_to_input=align)
    batch = {"tokens": jnp.asarray(ids), "mask": jnp.asarray(mask)}
    noised = what.noise(jax.random.key(0), batch["tokens"])
    _, metrics = grads_of(what, params, batch, noised, 1)
    np.testing.assert_allclose(metrics["loss"], np.mean(chosen), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["elbo"], np.mean([nll[0, 0], nll[0, 1], nll[1, 0]]), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["gidd", "mdlm"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_padding_counts_in_the_loss_unless_masked(name, mask_padding):
    what, params, batch = objective(name, mask_padding=mask_padding), toy_params(), toy_batch()
    noised = what.noise(jax.random.key(1), batch["tokens"])
    terms = what.losses(params, batch["tokens"], noised)
    loss, elbo = np.asarray(terms.loss, np.float64), np.asarray(terms.elbo, np.float64)
    real = np.asarray(batch["mask"])
    _, metrics = grads_of(what, params, batch, noised, 1)
    expected = loss[real].mean() if mask_padding else loss.mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["elbo"], elbo[real].mean(), rtol=1e-5)
    # The two parts are those of the loss; their average is over the real tokens.
    both = float(metrics["kl"] + metrics["is_div"])
    np.testing.assert_allclose(both, loss[real].mean(), rtol=1e-5)
    assert float(metrics["is_div"]) > 0.01 if name == "gidd" else float(metrics["is_div"]) == 0.0


def test_a_batch_of_padding_alone_gives_zero_and_no_nan():
    what, params, batch = objective("gidd", mask_padding=True), toy_params(), toy_batch()
    batch["mask"] = jnp.zeros_like(batch["mask"])
    noised = what.noise(jax.random.key(1), batch["tokens"])
    grads, metrics = grads_of(what, params, batch, noised, 1)
    assert all(float(value) == 0.0 for value in metrics.values())
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


# ---- accumulation


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gidd", {"mask_padding": False}),
        ("gidd", {"mask_padding": True}),
        ("mdlm", {"mask_padding": False}),
        ("mdlm", {"mask_padding": True}),
        ("ar", {"align_mask_to_input": False}),
        ("ar", {"align_mask_to_input": True}),
    ],
)
def test_micro_batches_are_one_batch(name, changes):
    what, params, batch = objective(name, **changes), toy_params(), toy_batch()
    noised = what.noise(jax.random.key(2), batch["tokens"])
    whole = grads_of(what, params, batch, noised, 1)
    assert float(optax.tree.norm(whole[0])) > 0.01
    for count in (2, 4):
        parts = grads_of(what, params, batch, noised, count)
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            assert a.dtype == b.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_micro_batches_do_not_change_the_draws_of_a_step():
    what, optimizer = objective("gidd"), optax.sgd(0.1)
    state, batch = state_of(toy_params(), optimizer), toy_batch()
    one, two = (
        step_of(what, optimizer, 0.0, count, state, batch, jax.random.key(3))[0].params
        for count in (1, 4)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


# ---- the step


def test_a_step_draws_from_the_runs_key_and_its_number_alone():
    what, optimizer, batch = objective("gidd"), optax.sgd(0.1), toy_batch()
    key = jax.random.key(4)
    state = state_of(toy_params(), optimizer)
    for number in range(3):
        noised = what.noise(jax.random.fold_in(key, number), batch["tokens"])
        expected, _ = update_of(what, optimizer, 0.0, 1, state, batch, noised)
        other, _ = step_of(what, optimizer, 0.0, 1, state.replace(step=state.step + 7), batch, key)
        state, _ = step_of(what, optimizer, 0.0, 1, state, batch, key)
        assert int(state.step) == number + 1
        np.testing.assert_array_equal(state.params["table"], expected.params["table"])
        assert np.any(np.asarray(state.params["table"]) != np.asarray(other.params["table"]))


def test_the_step_is_gradient_descent():
    what, batch = objective("gidd"), toy_batch()
    optimizer = optax.sgd(0.5)
    params = toy_params()
    noised = what.noise(jax.random.key(5), batch["tokens"])

    def loss(params):
        return jnp.mean(what.losses(params, batch["tokens"], noised).loss)

    grads = jax.grad(loss)(params)
    state, metrics = update_of(what, optimizer, 0.0, 1, state_of(params, optimizer), batch, noised)
    norm = math.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for name in ("table", "slope"):
        np.testing.assert_allclose(state.params[name], params[name] - 0.5 * grads[name], atol=1e-6)


def test_times_are_stratified_over_the_whole_batch():
    what = objective("gidd")
    t = np.sort(what.noise(jax.random.key(6), jnp.zeros((64, 2), jnp.int32)).t)
    strata = (t - 1e-4) / (1 - 2e-4) * 64
    np.testing.assert_array_equal(np.floor(strata), np.arange(64))
    independent = dataclasses.replace(what, stratified=False)
    t = np.sort(independent.noise(jax.random.key(6), jnp.zeros((64, 2), jnp.int32)).t)
    assert np.any(np.floor((t - 1e-4) / (1 - 2e-4) * 64) != np.arange(64))


def test_moving_average_is_the_recursion():
    what, optimizer, batch = objective("mdlm"), optax.adam(0.1), toy_batch()
    params = toy_params()
    state = state_of(params, optimizer, ema=params)
    expected = np.asarray(params["table"], np.float64)
    for _ in range(5):
        state, _ = step_of(what, optimizer, 0.9, 1, state, batch, jax.random.key(7))
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["table"], np.float64)
    assert np.max(np.abs(expected - np.asarray(state.params["table"]))) > 0.1
    assert state.ema is not None
    np.testing.assert_allclose(state.ema["table"], expected, rtol=1e-6, atol=1e-6)
    off, _ = step_of(what, optimizer, 0.0, 1, state_of(params, optimizer), batch, jax.random.key(7))
    assert off.ema is None


# ---- evaluation

PROCESSES = {
    "masked": MaskedProcess(VOCAB, MASK),
    "mask_only": HybridProcess(VOCAB, MASK, 0.0),
    "hybrid": HybridProcess(VOCAB, MASK, 0.2),
    "log_snr": LogSnrProcess(VOCAB, MASK),
}
IGNORANT = Toy(columns=128)
ZEROS = {
    "table": jnp.zeros((VOCAB, 8)),
    "slope": jnp.zeros((1, 1, 8)),
    "kernel": jnp.zeros((8, 128)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_bound_of_a_network_that_knows_nothing_is_log_n(name):
    """x_hat is then uniform over the N = V - 1 tokens: the bound is the entropy, log N."""
    what = objective("gidd", IGNORANT, process=PROCESSES[name], weighting="elbo")
    x = jax.random.randint(jax.random.key(8), (2048, 32), 0, MASK)
    batch = {"tokens": x, "mask": jnp.ones_like(x, bool).at[:, 24:].set(False)}
    means, terms = [], []
    for number in range(16):
        sums = evaluation_of(what, ZEROS, batch, jax.random.fold_in(jax.random.key(9), number))
        assert int(sums["tokens"]) == 2048 * 24
        means.append(float(sums["nelbo"]) / (2048 * 24))
        terms.append(float(sums["middle"] + sums["reconstruction"] + sums["prior"]) / (2048 * 24))
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    assert error < 0.08  # two percent of log N
    assert abs(np.mean(means) - math.log(VOCAB - 1)) < 4 * error + 1e-4
    np.testing.assert_allclose(terms, means, rtol=1e-5)


def test_the_kept_padding_columns_cost_their_share_of_the_bound():
    """A uniform x_hat over 127 columns instead of 66: log 127 under masks alone."""
    what = objective("mdlm", IGNORANT, keep_padding_columns=True)
    x = jax.random.randint(jax.random.key(8), (4096, 32), 0, MASK)
    batch = {"tokens": x, "mask": jnp.ones_like(x, bool)}
    sums = evaluation_of(what, ZEROS, batch, jax.random.key(1))
    np.testing.assert_allclose(sums["nelbo"] / x.size, math.log(127), rtol=0.02)


def test_autoregressive_evaluation_is_exact_and_skips_the_first_token():
    what, params = objective("ar"), toy_params()
    batch = toy_batch()
    ids, real = np.asarray(batch["tokens"]), np.asarray(batch["mask"])[:, 1:]
    nll = nll_by_hand(params, ids)
    sums = evaluation_of(what, params, batch, jax.random.key(0))
    assert int(sums["tokens"]) == real.sum()
    for name in ("nelbo", "loss", "middle"):
        np.testing.assert_allclose(sums[name], nll[real].sum(), rtol=1e-5)
    assert float(sums["prior"]) == float(sums["reconstruction"]) == 0.0


def test_evaluation_loss_is_the_training_loss_of_the_real_tokens():
    what, batch = objective("gidd"), toy_batch()
    key = jax.random.key(3)
    noised = what.noise(jax.random.split(key)[0], batch["tokens"])
    loss = np.asarray(what.losses(toy_params(), batch["tokens"], noised).loss)
    sums = evaluation_of(what, toy_params(), batch, key)
    np.testing.assert_allclose(sums["loss"], loss[np.asarray(batch["mask"])].sum(), rtol=1e-5)
