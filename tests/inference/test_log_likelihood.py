"""Scores of texts through the public API: exact values, bounds by enumeration, greedy decoding."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import tiny_model

from gidd_jax import Gidd
from gidd_jax.errors import InputError
from gidd_jax.inference.prompts import by_width, scored_texts
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess

TEXTS, PROMPTS = ["ab cd", "x", "hello worl"], ["q", "", "ef"]  # one token a byte


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Gidd]:
    folder = tmp_path_factory.mktemp("data")
    changes = {"model.max_seq_len": 24}
    return {name: tiny_model(folder, name, **changes) for name in ("gidd", "ar")}


class Neighbours:
    """A denoiser whose logits at a position are a table's rows for all positions, summed.

    It does not look at the time, so that what masked diffusion generates can be enumerated; all
    but the first few ids are improbable, which keeps the estimates' errors small.
    """

    position_times = False

    max_seq_len, vocab_size = 8, 259

    def __init__(self):
        rng = np.random.default_rng(3)
        self.table = 1.5 * rng.normal(size=(3, self.vocab_size, self.vocab_size))
        self.table[..., 6:] -= 10.0

    def apply(self, variables, z_t, t, lengths):
        del variables, t, lengths
        left = jnp.pad(z_t, [(0, 0), (1, 0)])[:, :-1]
        right = jnp.pad(z_t, [(0, 0), (0, 1)])[:, 1:]
        rows = [
            jnp.asarray(self.table[i], jnp.float32)[z] for i, z in enumerate((z_t, left, right))
        ]
        return rows[0] + rows[1] + rows[2]

    def log_probs(self, ids: list[int], mask_id: int) -> np.ndarray:
        """log x_hat [L, V] of one row, float64."""
        z = np.array(ids)
        left, right = np.pad(z, (1, 0))[:-1], np.pad(z, (0, 1))[1:]
        logits = self.table[0][z] + self.table[1][left] + self.table[2][right]
        logits[:, mask_id] = -np.inf
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def with_network(model: Gidd, process) -> Gidd:
    network: Any = Neighbours()
    return dataclasses.replace(model, network=network, params={}, process=process)


def by_orders(model: Gidd, given: list[int], text: list[int]) -> tuple[float, float]:
    """log p of a text, and the mean of log p over the orders in which its tokens can be drawn."""
    mask_id, totals = model.tokenizer.mask_id, []
    for order in itertools.permutations(range(len(text))):
        row, total = given + [mask_id] * len(text), 0.0
        for i in order:
            position = len(given) + i
            total += model.network.log_probs(row, mask_id)[position, text[i]]
            row[position] = text[i]
        totals.append(total)
    return float(np.logaddexp.reduce(totals) - np.log(len(totals))), float(np.mean(totals))


@pytest.mark.parametrize("family", [MaskedProcess, functools.partial(HybridProcess, p_uniform=0)])
def test_masked_diffusion_is_bounded_by_its_orders(models, family):
    """p(x) is the mean over all orders of filling in; the bound is the mean of the logarithms."""
    model = models["gidd"]
    model = with_network(model, family(259, mask_id=model.tokenizer.mask_id, t_eps=1e-3))
    prompt, text = [2], [4, 4, 1]
    exact, bound = by_orders(model, [model.tokenizer.bos_id, *prompt], text)
    assert bound < exact - 4  # else the two could not be told apart below
    count = 1024
    scores = model.log_likelihood(
        [text] * count, prompts=[prompt] * count, num_samples_t=16, batch_size=count
    ).log_probs
    error = 4 * scores.std() / np.sqrt(count)
    assert error < 1
    assert abs(scores.mean() - bound) < error + 0.02  # the times end short of 0 and 1
    assert scores.mean() < exact


def test_other_estimators_of_the_same_text(models):
    """The decoder from left to right by hand; paths lie between the bound and the exact value."""
    model = models["gidd"]
    mask_id = model.tokenizer.mask_id
    model = with_network(model, MaskedProcess(259, mask_id, t_eps=1e-3))
    prompt, text = [2], [4, 4, 1]
    row, total = [model.tokenizer.bos_id, *prompt, *[mask_id] * 3], 0.0
    for i, token in enumerate(text, start=2):
        total += model.network.log_probs(row, mask_id)[i, token]
        row[i] = token
    chain = model.log_likelihood(
        [text], prompts=[prompt], estimator="chain", chain_order="left_to_right", num_orders=1
    )
    assert chain.log_probs[0] == pytest.approx(total, abs=1e-4)
    exact, bound = by_orders(model, [model.tokenizer.bos_id, *prompt], text)
    few, many = (
        model.log_likelihood(
            [text] * 64,
            prompts=[prompt] * 64,
            estimator="importance",
            num_paths=paths,
            path_steps=32,
            batch_size=64,
        ).log_probs
        for paths in (1, 16)
    )
    assert bound < few.mean() < many.mean() < exact + 4 * many.std() / 8


def test_hybrid_bound_of_one_token_is_its_probability(models):
    """A network that predicts the same whatever it sees: the bound has no gap."""
    process = HybridProcess(259, models["gidd"].tokenizer.mask_id, 0.2, t_eps=5e-3)
    model = with_network(models["gidd"], process)
    model.network.table[:] = model.network.table[0, 7]
    exact = model.network.log_probs([0, 0], process.mask_id)[1]
    count, token = 2048, 3
    scores = model.log_likelihood([[token]] * count, num_samples_t=16, batch_size=count).log_probs
    error = 4 * scores.std() / np.sqrt(count)
    assert error < -0.1 * exact[token]
    assert abs(scores.mean() - exact[token]) < error + 0.05  # p_T is not the noised prediction


def test_autoregressive_scores_are_exact(models):
    model = models["ar"]
    got = model.log_likelihood(TEXTS, prompts=PROMPTS)
    assert got.num_tokens.tolist() == [5, 1, 10]
    for row, (text, prompt) in enumerate(zip(TEXTS, PROMPTS, strict=True)):
        begin = 1 + len(prompt)
        ids = np.concatenate([[model.tokenizer.bos_id], *model.tokenizer.encode([prompt, text])])
        np.testing.assert_array_equal(got.ids[row, : len(ids)], ids)
        logits = model.network.apply({"params": model.params}, jnp.asarray(ids)[None])[0]
        logits = np.asarray(logits, np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.zeros(got.ids.shape[1])
        for i in range(begin, len(ids)):
            expected[i] = log_probs[i - 1, ids[i]]
        np.testing.assert_allclose(got.by_token[row], expected, rtol=2e-5, atol=1e-6)
        assert got.log_probs[row] == pytest.approx(expected.sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["gidd", "ar"])
def test_scores_do_not_depend_on_the_batch(models, name, monkeypatch):
    model = models[name]
    got = model.log_likelihood(TEXTS, prompts=PROMPTS, num_samples_t=3, seed=4)
    np.testing.assert_allclose(got.by_token.sum(1), got.log_probs, rtol=1e-5)
    free = scored_texts(model.tokenizer, TEXTS, PROMPTS, 24).free
    assert not np.any(got.by_token[~free])
    assert np.all(got.log_probs < 0)
    # A longer text beside them (another width), batches of one, one device, ids instead of texts
    monkeypatch.setattr("jax.local_devices", lambda: jax.devices()[:1])
    ids = model.tokenizer.encode(TEXTS)
    alone = model.log_likelihood(
        [*ids, "a text of twenty two b"],
        prompts=[*PROMPTS, ""],
        num_samples_t=3,
        seed=4,
        batch_size=1,
    )
    np.testing.assert_allclose(alone.by_token[:3, : free.shape[1]], got.by_token, rtol=1e-4)
    other = model.log_likelihood(TEXTS, prompts=PROMPTS, num_samples_t=3, seed=5)
    assert np.all(other.log_probs != got.log_probs) == (name != "ar")
    assert got.network_calls == (1 if name == "ar" else 4)


def test_groups_of_a_similar_width_keep_every_token(models):
    sizes = (3, 40, 15, 16, 70, 1)
    rows = scored_texts(models["ar"].tokenizer, ["a" * size for size in sizes], None, 80)
    widths = {}
    for numbers, part in by_width(rows):
        for number, ids, free, length in zip(numbers, *part, strict=True):
            assert length == rows.lengths[number] <= len(ids)
            np.testing.assert_array_equal(ids, rows.ids[number, : len(ids)])
            np.testing.assert_array_equal(free, rows.free[number, : len(ids)])
            assert widths.setdefault(number, len(ids)) == len(ids)
    assert [widths[number] for number in range(6)] == [16, 64, 16, 32, 71, 16]


@pytest.mark.parametrize("name", ["gidd", "ar"])
def test_greedy_is_what_temperature_0_generates(models, name):
    model, number = models[name], 6
    prompts = ["It", "a truth univ", "single"]
    diffusion = {"method": "confidence", "order": "drawn", "num_steps": number}
    options = {} if name == "ar" else diffusion
    made = model.generate(prompts=prompts, new_tokens=number, temperature=0.0, **options)
    texts = [row[1 + len(prompt) :][:number] for row, prompt in zip(made.ids, prompts, strict=True)]
    assert not np.isin(texts, [model.tokenizer.eos_id]).any()  # where generation would end
    assert model.is_greedy(texts, prompts=prompts).all()
    for place in (0, number - 1):  # one wrong token is enough
        wrong = [np.where(np.arange(number) == place, (ids + 1) % 250, ids) for ids in texts]
        mixed = [wrong[0], texts[1], wrong[2]]
        found = model.is_greedy(mixed, prompts=prompts, batch_size=2)
        assert found.tolist() == [False, True, False]


def test_greedy_decoding_needs_masks_to_start_from(models):
    process = LogSnrProcess(259, models["gidd"].tokenizer.mask_id, shift=1000.0)
    model = dataclasses.replace(models["gidd"], process=process)
    with pytest.raises(InputError, match="needs a process that starts from masks"):
        model.is_greedy(["a"])


def test_damaged_parameters_are_noticed(models):
    params = jax.tree.map(lambda a: a * jnp.nan, models["ar"].params)
    with pytest.raises(InputError, match="not a number"):
        dataclasses.replace(models["ar"], params=params).log_likelihood(["a"])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([""], {}, "text 1 has 0 tokens: give at least 1, and at most 23 with the prompt"),
        (["a", "b" * 24], {}, "text 2 has 24 tokens"),
        (["b" * 20], {"prompts": ["abcd"]}, "text 1 has 20 tokens after the 4 of its prompt"),
        (["a", "b"], {"prompts": ["c"]}, "1 prompts for 2 texts: give one each"),
        ([], {}, "texts is empty"),
        ("abc", {}, "texts must be a list of texts"),
        ([[3, 259]], {}, "text 1 is no list of token ids from 0 to 258"),
        ([[-1]], {}, "text 1 is no list of token ids"),
        (["a"], {"num_samples_t": 0}, "num_samples_t must be at least 1: 0"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1: 0"),
    ],
)
def test_bad_input_is_refused(models, texts, options, message):
    with pytest.raises(InputError, match=message) as error:
        models["ar"].log_likelihood(texts, **options)
    assert "\n" not in str(error.value)
