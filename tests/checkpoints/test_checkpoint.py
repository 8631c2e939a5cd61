"""Checkpoints: bitwise round trips, other meshes, partial reads, damage and sudden death."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gidd_jax.checkpoints.checkpoint import Checkpointer, find_checkpoint, load_params
from gidd_jax.checkpoints.checksums import array_checksums
from gidd_jax.checkpoints.storage import write_atomically
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError, StorageError

CONFIG = {"seed": 3, "process": {"name": "hybrid", "p_uniform": 0.1}}


class State(flax.struct.PyTreeNode):
    """Every kind of leaf that a training state may hold."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    key: jax.Array


def make_state(seed: int = 0, ema: bool = False, sharding: Any = None) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "params": {
            "w": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
        }
    }
    if sharding is not None:
        params = jax.device_put(params, sharding)
    tx = optax.adamw(1e-3)
    _, opt_state = tx.update(params, tx.init(params), params)
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=opt_state,
        ema=jax.tree.map(lambda p: p * 2, params) if ema else None,
        key=jax.random.key(seed),
    )


def abstract(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture
def open_in(tokenizer):
    def open_in(workdir: Path, every: int = 1, max_to_keep: int = 5) -> Checkpointer:
        return Checkpointer(
            workdir, every=every, max_to_keep=max_to_keep, config=CONFIG, tokenizer=tokenizer
        )

    return open_in


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_is_bitwise(tmp_path, open_in, ema):
    state, position = make_state(7, ema), {"next_index": 123, "epoch": [1, 2]}
    with open_in(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(7, state, position)
    with open_in(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 7
        restored, data = checkpointer.restore(abstract(state))
    assert_same(restored, state)
    assert data == position


def test_saves_every_so_often_and_keeps_the_newest(tmp_path, open_in):
    with open_in(tmp_path, every=2, max_to_keep=2) as checkpointer:
        saved = [step for step in range(8) if checkpointer.save(step, make_state(step), {})]
        assert saved == [0, 2, 4, 6]
        assert not checkpointer.save(7, make_state(7), {})
        assert checkpointer.save(7, make_state(7), {}, force=True)
        assert not checkpointer.save(7, make_state(7), {}, force=True)  # it is there
        checkpointer.wait()
        restored, _ = checkpointer.restore(abstract(make_state()), step=6)
        assert_same(restored, make_state(6))
        with pytest.raises(InputError, match="holds no checkpoint 4"):
            checkpointer.restore(abstract(make_state()), step=4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]


def test_the_caller_may_overwrite_the_arrays_at_once(tmp_path, open_in):
    state = {"x": jnp.arange(200_000, dtype=jnp.float32)}
    expected = np.asarray(state["x"]).copy()
    double = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    with open_in(tmp_path) as checkpointer:
        shape = abstract(state)
        checkpointer.save(1, state, {})
        x = double(double(state["x"]))
        checkpointer.wait()
        restored, _ = checkpointer.restore(shape)
    np.testing.assert_array_equal(restored["x"], expected)
    assert x[1] == 7


def test_restores_from_eight_devices_to_two_and_one(tmp_path, open_in):
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    state = make_state(1, sharding=spread)
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        checkpointer.wait()
        for count in (2, 1):
            mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
            target = abstract(state, NamedSharding(mesh, P()))
            target = target.replace(params=abstract(state.params, NamedSharding(mesh, P("data"))))
            restored, _ = checkpointer.restore(target)
            assert_same(restored, state)
            assert len(restored.params["params"]["w"].sharding.device_set) == count


def test_a_step_is_complete_in_itself(tmp_path, open_in, tokenizer):
    with open_in(tmp_path / "run") as checkpointer:
        checkpointer.save(5, make_state(5, ema=True), {"next_index": 1})
    alone = tmp_path / "elsewhere" / "5"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "5", alone)
    found = find_checkpoint(alone)
    assert found.step == 5
    assert found.config() == CONFIG
    again = found.tokenizer()
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(
        again.encode(["A [MASK] word"])[0], tokenizer.encode(["A [MASK] word"])[0]
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state().params)
    assert_same(load_params(found, shapes), make_state(5).params)
    assert_same(load_params(found, shapes, ema=True), make_state(5, ema=True).ema)


def test_finds_the_newest_step_of_a_workdir(tmp_path, open_in):
    with open_in(tmp_path) as checkpointer:
        for step in (9, 10, 100):
            checkpointer.save(step, make_state(step), {})
    steps = tmp_path / "checkpoints"
    assert find_checkpoint(tmp_path).folder == find_checkpoint(steps).folder
    assert [find_checkpoint(p).step for p in (tmp_path, steps, steps / "9")] == [100, 100, 9]


def test_paths_may_be_relative(tmp_path, open_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state(3)
    with open_in(Path("runs/a")) as checkpointer:
        checkpointer.save(3, state, {})
    with open_in("runs/a") as checkpointer:
        assert_same(checkpointer.restore(abstract(state))[0], state)
    found = find_checkpoint("runs/a")
    assert str(found.folder) == str(tmp_path / "runs/a/checkpoints/3")
    assert_same(load_params(found, abstract(state.params)), state.params)


def test_what_may_be_readable_later_is_not_called_damaged(tmp_path, open_in, monkeypatch):
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})

    def refuse(*_):
        raise PermissionError("Permission denied: 'config'")

    monkeypatch.setattr("orbax.checkpoint.JsonCheckpointHandler.restore", refuse)
    with pytest.raises(InputError, match=r"checkpoints/1 cannot be read now: Permission denied"):
        find_checkpoint(tmp_path).config()


def test_folders_without_checkpoint(tmp_path, open_in):
    with pytest.raises(InputError, match=r"no such folder: .*/nowhere"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no checkpoint: give the workdir"):
        find_checkpoint(tmp_path)
    with open_in(tmp_path) as checkpointer, pytest.raises(InputError, match="holds no checkpoint"):
        checkpointer.restore(abstract(make_state()))


def test_a_missing_moving_average_is_named(tmp_path, open_in):
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
    with pytest.raises(InputError, match=r"no moving average.*ema_decay = 0"):
        load_params(find_checkpoint(tmp_path), abstract(make_state().params), ema=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: jnp.zeros((8, 7)),
            r"params.params.w is float32\[8, 6\] there and float32\[8, 7\] here",
        ),
        (lambda w: w.astype(jnp.bfloat16), r"float32\[8, 6\] there and bfloat16\[8, 6\] here"),
        (lambda w: None, r"params.params.w is float32\[8, 6\] there and missing here"),
    ],
)
def test_a_state_of_another_shape_is_named(tmp_path, open_in, change, words):
    with open_in(tmp_path) as checkpointer:
        state = make_state(1)
        checkpointer.save(1, state, {})
        params = {"params": {**state.params["params"], "w": change(state.params["params"]["w"])}}
        with pytest.raises(InputError, match=words):
            checkpointer.restore(abstract(state.replace(params=params)))
    with pytest.raises(InputError, match=words):
        load_params(find_checkpoint(tmp_path), abstract(params))


def truncate_largest(folder: Path) -> None:
    file = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# A read that fails leaves another of orbax's reads without its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [
        lambda step: truncate_largest(step / "state"),
        lambda step: shutil.rmtree(step / "state" / "d"),
        lambda step: (step / "state" / "_METADATA").write_text("{"),
        lambda step: (step / "state" / "manifest.ocdbt").write_bytes(b""),
        lambda step: shutil.rmtree(step / "data"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_older_one(tmp_path, open_in, damage):
    state = make_state(2)
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.save(2, state, {})
    damage(tmp_path / "checkpoints" / "2")
    with open_in(tmp_path) as checkpointer:
        with pytest.raises(InputError) as caught:
            checkpointer.restore(abstract(state))
        message = str(caught.value)
        assert "checkpoints/2 is damaged" in message
        assert message.endswith("delete it to continue from step 1")
        assert "\n" not in message
        restored, _ = checkpointer.restore(abstract(state), step=1)
    assert_same(restored, make_state(1))


def flip(file: Path, where: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[where] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_is_noticed(tmp_path, open_in):
    """Wherever it is: either an error that names the step, or the state as it was."""
    state, position = make_state(5, ema=True), {"next_index": 3}
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(5, state, position)
    step = tmp_path / "checkpoints" / "5"
    arrays = max((step / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    rng, noticed = np.random.default_rng(0), 0
    size = arrays.stat().st_size
    places = [(arrays, int(where)) for where in rng.choice(size, 25, replace=False)]
    places += [(step / name / "metadata", 1) for name in ("data", "config", "checksums")]
    for file, where in places:
        whole = file.read_bytes()
        flip(file, where, int(rng.integers(8)))
        try:
            with open_in(tmp_path) as checkpointer:
                restored, data = checkpointer.restore(abstract(state))
                found = find_checkpoint(tmp_path)
                params = load_params(found, abstract(state.params))
                assert found.config() == CONFIG
        except InputError as error:
            assert "checkpoints/5 is damaged" in str(error)  # noqa: PT017
            noticed += 1
        else:
            assert_same(restored, state)
            assert_same(params, state.params)
            assert data == position
        file.write_bytes(whole)
    assert noticed > 15


def test_flipped_characters_of_the_tokenizer_are_noticed(tmp_path, open_in):
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
    file = tmp_path / "checkpoints" / "1" / "tokenizer" / "metadata"
    text = file.read_text()
    file.write_text(text.replace("the", "thf", 1))
    with pytest.raises(InputError, match="the checksum of its tokenizer is another"):
        find_checkpoint(tmp_path).tokenizer()


def test_checksums_see_every_bit_and_every_place(open_in):
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.uint8, np.bool_, jnp.bfloat16):
        array = np.asarray(jnp.asarray(rng.integers(0, 2, size=(6, 5)), dtype))
        whole = array_checksums({"a": jnp.asarray(array)})
        raw = array.view(np.uint8)
        for place in range(raw.size):
            for bit in range(1 if dtype is np.bool_ else 8):
                changed = raw.copy()
                changed.reshape(-1)[place] ^= 1 << bit
                other = jnp.asarray(changed.view(array.dtype).reshape(array.shape))
                if place % 7 == 0 or dtype is np.float32:  # a few of each are enough
                    assert array_checksums({"a": other}) != whole
        turned = np.roll(array, 1, axis=0)
        assert array_checksums({"a": jnp.asarray(turned)}) != whole
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    array = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    split = jax.device_put(array, NamedSharding(mesh, P("x", "y")))
    assert array_checksums({"a": split}) == array_checksums({"a": array})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_and_the_last_step_stays(tmp_path, open_in):
    """A limit on the size of files stands for the full disk."""

    def fill() -> None:
        with open_in(tmp_path) as checkpointer:
            checkpointer.save(1, state, {})
            checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, old[1]))
            checkpointer.save(2, make_state(2), {})
            checkpointer.wait()

    state, old = make_state(1), resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"a checkpoint could not be written to .*: make room .* continues from step 1"
    try:
        with pytest.raises(StorageError, match=message):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    with open_in(tmp_path) as checkpointer:
        assert_same(checkpointer.restore(abstract(state))[0], state)


def test_checkpoints_removed_under_the_run_are_made_again(tmp_path, open_in):
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        checkpointer.wait()
        shutil.rmtree(tmp_path / "checkpoints")
        checkpointer.save(2, make_state(2), {})
    with open_in(tmp_path) as checkpointer:
        assert_same(checkpointer.restore(abstract(make_state(2)))[0], make_state(2))


def test_damaged_context_is_one_line(tmp_path, open_in):
    with open_in(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2), {})
    (tmp_path / "checkpoints" / "2" / "config" / "metadata").write_text('{"seed":')
    with pytest.raises(InputError, match=r"checkpoints/2 is damaged .*: there is no older one"):
        find_checkpoint(tmp_path).config()


KILLED = """
import os, sys, threading, jax.numpy as jnp
from gidd_jax.checkpoints.checkpoint import Checkpointer
from gidd_jax.data.tokenizer import load_tokenizer

workdir, delay = sys.argv[1], float(sys.argv[2])
checkpointer = Checkpointer(
    workdir, every=1, max_to_keep=3, config={}, tokenizer=load_tokenizer("embedded")
)
checkpointer.save(1, {"x": jnp.full((16_000_000,), 1.0)}, {"next_index": 1})
checkpointer.wait()
checkpointer.save(2, {"x": jnp.full((16_000_000,), 2.0)}, {"next_index": 2})
threading.Event().wait(delay)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_killed_while_saving_goes_on_from_the_last_complete_step(tmp_path, open_in, delay):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(delay)], check=False, capture_output=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    with open_in(tmp_path, max_to_keep=3) as checkpointer:
        step = checkpointer.latest_step()
        assert step in (1, 2)  # 2 only where the disk was faster than the kill
        shape = {"x": jax.ShapeDtypeStruct((16_000_000,), jnp.float32)}
        restored, data = checkpointer.restore(shape)
        assert np.all(np.asarray(restored["x"]) == step)
        assert data == {"next_index": step}
        if step == 1:
            assert checkpointer.save(2, {"x": jnp.full((16_000_000,), 2.0)}, {"next_index": 2})
            checkpointer.wait()
            assert checkpointer.latest_step() == 2
    assert find_checkpoint(tmp_path).step == 2


def test_text_files_are_replaced_whole(tmp_path):
    path = tmp_path / "new" / "config.json"
    write_atomically(path, json.dumps({"a": 1}))
    write_atomically(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]
