"""Blocks with a cache against whole rows: the same features, the same samples."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gidd_jax.draws import row_keys
from gidd_jax.errors import InputError
from gidd_jax.models.gidd import Cache, TimeFreeTransformer, sees_prompt
from gidd_jax.process import LogSnrProcess
from gidd_jax.sampling.loop import Prompt, sample_diffusion
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.schedule import make_schedule
from gidd_jax.sampling.windows import View, by_blocks, causal_windows, prefix_windows, windows_of

VOCAB, LENGTH, BLOCK = 17, 22, 4
NETWORK = TimeFreeTransformer(VOCAB, 16, 2, 2, max_seq_len=LENGTH, position_times=True)
PROCESS = LogSnrProcess(VOCAB, VOCAB - 1, shift=0.0)


@pytest.fixture(scope="module")
def params():
    inputs = jnp.zeros((1, 4), jnp.int32), jnp.zeros(1)
    params = nn.unbox(NETWORK.init(jax.random.key(0), *inputs))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [a + 0.3 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def rows(seed=0, count=3):
    return jax.random.randint(jax.random.key(seed), (count, LENGTH), 0, VOCAB)


def apply(network, params, *inputs, **kwargs):
    method = kwargs.pop("method", None)

    def run(params, inputs, kwargs):
        return network.apply({"params": params}, *inputs, **kwargs, method=method)

    return jax.jit(run)(params, inputs, kwargs)


def test_a_window_after_a_prefix_is_what_whole_rows_say(params):
    ids, start, lengths = rows(), jnp.array([3, 8, 0]), jnp.array([22, 20, 12])
    windows = prefix_windows(NETWORK, params, 20, lengths)
    cache = windows.open(None, ids, start, jnp.array(True))
    found = windows.features(View(cache, start), ids)
    place = jnp.arange(LENGTH)[None]
    mask = sees_prompt(place < start[:, None]) & (place < lengths[:, None])[:, None]
    wanted, _ = apply(NETWORK, params, ids, jnp.arange(LENGTH), mask[:, None], method="run")
    for row in range(3):
        part = slice(int(start[row]), int(lengths[row]))
        np.testing.assert_allclose(found[row, part], wanted[row, part], atol=1e-5, rtol=0)
        assert not np.any(found[row, : start[row]])


@pytest.mark.parametrize("block_length", [3, 5])
def test_blocks_with_a_cache_are_what_whole_rows_of_noisy_and_clean_tokens_say(
    params, block_length
):
    """Row by row at another block, each cache grown block by block."""
    network = NETWORK.clone(block_length=block_length)
    clean, noisy, lengths = rows(), rows(1), jnp.array([22, 20, 18])
    windows = causal_windows(network, params, block_length, lengths)
    first = jnp.array([0, 1, 2])
    start = first * block_length
    open_at, features = jax.jit(windows.open), jax.jit(windows.features)
    view = View(open_at(None, clean, start, jnp.array(True)), start)
    wanted = apply(network, params, noisy, jnp.zeros(1), lengths, clean, method="features")
    for number in range(-(-LENGTH // block_length) - 2):
        start = (first + number) * block_length
        if number:
            # What follows the block is not there yet: it must not matter.
            past = jnp.arange(LENGTH)[None] < start[:, None]
            seen = jnp.where(past, clean, 5)
            view = View(open_at(view.cache, seen, start, jnp.array(False)), start)
        z_t = jnp.where(jnp.arange(LENGTH)[None] < start[:, None], clean, noisy)
        found = features(view, z_t)
        for row in range(3):
            end = min(int(start[row]) + block_length, int(lengths[row]))
            part = slice(int(start[row]), end)
            np.testing.assert_allclose(found[row, part], wanted[row, part], atol=1e-5, rtol=0)


def test_devices_keep_the_caches_of_their_rows(params):
    """A block is opened and asked without a word between the devices that share a batch."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    network = NETWORK.clone(block_length=BLOCK)

    def call(params, ids, start, keys, values):
        windows = causal_windows(network, params, BLOCK)
        cache = windows.open(Cache(keys, values), ids, start, jnp.any(start < 0))
        return windows.features(View(cache, start), ids), cache

    layers = NamedSharding(mesh, PartitionSpec(None, "data"))
    of_cache = (2, 4, 2, LENGTH, 8), (2, 4, 2, 8, LENGTH)
    caches = (jnp.zeros(shape) for shape in of_cache)
    program = jax.jit(
        call,
        in_shardings=(whole, split, split, layers, layers),
        out_shardings=(split, Cache(layers, layers)),
    ).lower(params, rows(count=4), jnp.full(4, 2 * BLOCK), *caches)
    text = program.compile().as_text()
    exchanged = re.findall(r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-)", text)
    assert all(kind.startswith("pred[]") for kind in exchanged), exchanged


def test_one_token_a_block_is_autoregressive(params):
    """No noisy token says anything of another, and none of what follows."""
    network = NETWORK.clone(block_length=1)
    clean, noisy = rows(), rows(1)
    found = apply(network, params, noisy, jnp.zeros(1), clean=clean)
    changed = clean.at[:, 9].set((clean[:, 9] + 1) % VOCAB)
    again = apply(network, params, noisy, jnp.zeros(1), clean=changed)
    np.testing.assert_allclose(again[:, :10], found[:, :10], atol=1e-6)
    assert np.abs(again[:, 10:] - found[:, 10:]).max() > 1e-3
    other = apply(network, params, noisy.at[:, 9].set(3), jnp.zeros(1), clean=clean)
    np.testing.assert_allclose(np.delete(other, 9, 1), np.delete(found, 9, 1), atol=1e-6)
    whole = apply(NETWORK.clone(block_length=LENGTH), params, noisy, jnp.zeros(1), clean=clean)
    np.testing.assert_allclose(whole, apply(NETWORK, params, noisy, jnp.zeros(1)), atol=1e-5)


PROMPTS = jnp.array([[2], [7], [0]])


def drawn(params, options, network=NETWORK, use_windows=True, ids=None, **kwargs):
    free = jnp.arange(LENGTH)[None] >= PROMPTS
    ids = rows(3) if ids is None else ids

    def features(z_t, times):
        return apply(network, params, z_t, times, method="features")

    def project(h):
        return apply(network, params, h, method="project")

    windows = windows_of(network, params, options, LENGTH) if use_windows else None
    keys = row_keys(jax.random.key(5), jnp.arange(3))
    run = jax.jit(
        lambda keys: sample_diffusion(
            PROCESS,
            features,
            options,
            keys,
            LENGTH,
            Prompt(ids, free),
            project=project,
            windows=windows,
            **kwargs,
        )
    )
    return run(keys), ids, free


@pytest.mark.parametrize(
    ("method", "reopen"), [("ancestral", 0), ("ancestral", 2), ("psi", 0), ("mode_seeking", 0)]
)
def test_samples_with_a_cache_are_those_of_whole_rows(params, method, reopen):
    options = SamplerOptions(
        num_steps=4, block_length=BLOCK, method=method, fill_masks=False, reopen=reopen
    )
    found, ids, free = drawn(params, options)
    wanted, _, _ = drawn(params, options, use_windows=False)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)
    np.testing.assert_array_equal(jnp.where(free, 0, found.ids), jnp.where(free, 0, ids))


@pytest.mark.parametrize("method", ["ancestral", "entropy_bound", "adaptive"])
def test_blocks_close_without_masks(params, method):
    options = SamplerOptions(num_steps=2, block_length=BLOCK, method=method)
    found, _, _ = drawn(params, options, NETWORK.clone(block_length=BLOCK))
    assert not np.any(found.ids == PROCESS.mask_id)


def test_a_row_stops_at_the_block_with_its_end(params):
    options = SamplerOptions(num_steps=3, block_length=BLOCK, stop_at_end=True)
    never = dataclasses.replace(options, stop_at_end=False)
    end = int(drawn(params, never)[0].ids[0, 9])
    ids = rows(3).at[1, 1].set(end)  # in a prompt it ends nothing: row 1 has no other
    whole, _, free = drawn(params, never, ids=ids)
    found, _, _ = drawn(params, options, ids=ids, end_id=end)
    has_end = np.asarray((whole.ids == end) & free)
    assert has_end.any(axis=-1).tolist() == [True, False, True]
    assert whole.ids[1, 1] == end
    place = np.cumsum(np.asarray(free), axis=-1) - 1
    for row in range(3):
        if not has_end[row].any():
            np.testing.assert_array_equal(found.ids[row], whole.ids[row])
            continue
        block = place[row, has_end[row].argmax()] // BLOCK
        closed = place[row] < (block + 1) * BLOCK
        np.testing.assert_array_equal(found.ids[row, closed], whole.ids[row, closed])
        assert found.stopped_at[row] == 3 * (block + 1)


def test_gaps_in_several_blocks_are_filled_with_the_cache_of_what_lies_between(params):
    """Row by row another pattern, with blocks that have no gap: all that is asked of the windows is
    what the whole row says, whose clean tokens are those of the moment."""
    network = NETWORK.clone(block_length=BLOCK)
    free = jnp.zeros((3, LENGTH), bool).at[0, jnp.array([1, 13])].set(True)
    free = free.at[1, 5:7].set(True).at[2, jnp.array([3, 4, 20, 21])].set(True)
    ids = jnp.where(free, PROCESS.mask_id, rows(3) % (VOCAB - 1))
    differences = []

    @dataclasses.dataclass
    class Noting:
        windows: object
        block_length: int = BLOCK

        def empty(self, ids):
            return self.windows.empty(ids)

        def moved(self, *arguments):
            return self.windows.moved(*arguments)

        def denoiser(self, view):
            features = self.windows.denoiser(view)

            def both(z_t, times):
                found = features(z_t, times)
                whole = network.apply({"params": params}, z_t, times, method="features")
                inside = jnp.any(found != 0, axis=-1, keepdims=True)
                jax.debug.callback(differences.append, jnp.max(jnp.abs(found - whole) * inside))
                return found

            return both

    options = SamplerOptions(num_steps=2, block_length=BLOCK)
    windows = Noting(windows_of(network, params, options, LENGTH))

    def draw(keys):
        return sample_diffusion(
            PROCESS,
            None,
            options,
            keys,
            LENGTH,
            Prompt(ids, free),
            20,
            project=lambda h: network.apply({"params": params}, h, method="project"),
            windows=windows,
        )

    drawn = jax.jit(draw)(row_keys(jax.random.key(5), jnp.arange(3)))
    jax.effects_barrier()
    assert not np.any(drawn.ids == PROCESS.mask_id)
    np.testing.assert_array_equal(jnp.where(free, 0, drawn.ids), jnp.where(free, 0, ids))
    assert len(differences) >= 4
    assert np.max(differences) < 1e-4


@dataclasses.dataclass
class Uncached:
    """Windows of a model by blocks without a cache: whole rows, in which what lies before a window
    sees blocks before it and the window sees all up to its end."""

    params: object
    network: object
    block_length: int = BLOCK

    def empty(self, ids):
        zeros = jnp.zeros(len(ids), jnp.int32)
        return View(None, zeros, zeros)

    def moved(self, view, ids, place):
        first = jnp.argmax(place.free, axis=-1) // BLOCK
        start, end = (first + place.now.first) * BLOCK, (first + place.now.block + 1) * BLOCK
        return View(None, start.astype(jnp.int32), end.astype(jnp.int32))

    def denoiser(self, view):
        def features(z_t, times):
            place = jnp.arange(LENGTH)
            block, inside = place // BLOCK, place[None] >= view.start[:, None]
            mask = (block[:, None] >= block[None])[None] & ~inside[:, :, None]
            mask |= inside[:, :, None] & (place[None] < view.end[:, None])[:, None]
            h, _ = self.network.apply(
                {"params": self.params}, z_t, place, mask[:, None], method="run"
            )
            return h

        return features


@pytest.mark.parametrize("reopen", [1, 2])
def test_blocks_opened_again_see_each_other_with_a_cache_that_follows(params, reopen):
    network = NETWORK.clone(block_length=BLOCK)
    options = SamplerOptions(num_steps=3, block_length=BLOCK, reopen=reopen)

    def draw(windows):
        free = jnp.arange(LENGTH)[None] >= PROMPTS
        run = functools.partial(
            sample_diffusion,
            PROCESS,
            None,
            options,
            length=LENGTH,
            prompt=Prompt(rows(3), free),
            project=lambda h: network.apply({"params": params}, h, method="project"),
            windows=windows,
        )
        return jax.jit(lambda keys: run(keys=keys))(row_keys(jax.random.key(5), jnp.arange(3)))

    found = draw(windows_of(network, params, options, LENGTH))
    wanted = draw(Uncached(params, network))
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)
    assert not np.any(found.ids == PROCESS.mask_id)
    # Calls 1 to 3 are the first block's; with one opened again its last tokens may be later ones.
    drawn_at = np.asarray(found.drawn_at)[2]
    assert drawn_at[:BLOCK].max() > 3
    assert drawn_at.max() <= found.num_calls


def test_a_model_that_knows_no_prompts_sees_the_whole_row():
    network = NETWORK.clone(position_times=False)
    assert windows_of(network, {}, SamplerOptions(block_length=4), LENGTH) is None
    assert windows_of(NETWORK, {}, SamplerOptions(block_length=4), LENGTH) is not None
    assert windows_of(NETWORK, {}, SamplerOptions(block_length=4, guidance=2.0), LENGTH) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reopen": 1, "method": "adaptive"}, "reopen has no effect with method 'adaptive'"),
        ({"reopen": -1}, "reopen must be at least 0"),
        ({"reopen_at": 0.3}, "reopen_at has no effect without reopen"),
        ({"reopen": 1, "reopen_at": 1.0}, r"reopen_at must lie in \(0, 1\)"),
    ],
)
def test_bad_ways_to_reopen_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        SamplerOptions(**changes)


def test_the_steps_that_reopening_needs_are_enough():
    """A step must begin at the time that is noised to, or later."""
    options = SamplerOptions(block_length=2, reopen=1, reopen_at=0.25, num_steps=4)
    with pytest.raises(InputError, match=r"reopen_at = 0.25: .* set num_steps to at least 5"):
        make_schedule(PROCESS, options, 6)
    schedule = make_schedule(PROCESS, dataclasses.replace(options, num_steps=5), 6)
    np.testing.assert_array_equal(schedule.block, [0] * 5 + [1] * 6 + [2] * 6)
    np.testing.assert_array_equal(schedule.first, [0] * 5 + [1] * 5 + [0] + [2] * 5 + [1])
    np.testing.assert_array_equal(np.flatnonzero(schedule.closes), [4, 10, 16])
    assert np.all(schedule.t[[10, 16]] <= 0.25)


def test_what_blocks_cannot_do_is_said():
    network = NETWORK.clone(block_length=4)
    assert by_blocks(network, SamplerOptions()).block_length == 4
    with pytest.raises(InputError, match="block_length = 3: this model was trained by blocks of 4"):
        by_blocks(network, SamplerOptions(block_length=3))
    with pytest.raises(InputError, match="guidance needs a model of whole rows"):
        by_blocks(network, SamplerOptions(guidance=2.0))
    for change in ({"stop_at_end": True}, {"reopen": 1}):
        with pytest.raises(InputError, match="has no effect where all tokens are"):
            by_blocks(NETWORK, SamplerOptions(**change))
