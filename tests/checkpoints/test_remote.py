"""Runs in a bucket: trained, cut off, resumed bit for bit and read again, on a store of our own."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fake_gcs import FakeGcs, fake_gcs
from tiny_checkpoint import write_checkpoint
from tiny_run import assert_same_arrays, figures_by_step, saved_arrays, steps_on_disk, tiny_settings

from gidd_jax.checkpoints.checkpoint import Checkpointer, find_checkpoint, load_params
from gidd_jax.checkpoints.storage import run_folder
from gidd_jax.checkpoints.workdir import check_workdir
from gidd_jax.data.pipeline import TrainBatches
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError, StorageError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.parallel import sharding
from gidd_jax.training.loop import train
from gidd_jax.training.metrics import MetricWriter

RUN = {"model.num_layers": 1, "train.num_steps": 12, "checkpoint.max_to_keep": 2}


@pytest.fixture(scope="module")
def bucket() -> Iterator[FakeGcs]:
    """The bucket behind gs://bucket; skips where the packages of the extra `gcs` are missing."""
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("needs pip install 'gidd-jax[gcs]'")
    import fsspec.config

    with fake_gcs() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)  # before gcsfs is imported: it reads one of them then
        fsspec.config.set_conf_env(fsspec.config.conf)
        yield store


@pytest.fixture(autouse=True)
def _requests_are_allowed(request) -> Iterator[None]:
    yield
    if "bucket" in request.fixturenames:
        request.getfixturevalue("bucket").refuse = ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def one_device(monkeypatch) -> None:
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        "gidd_jax.training.loop.sharding.make_mesh",
        lambda *sizes: make_mesh(*sizes, devices=jax.devices()[:1]),
    )


def cut_off_at(monkeypatch, number: int) -> None:
    """Let the data of the next run fail at its `number`-th batch."""
    original, count = TrainBatches.__next__, iter(range(1, number + 1))

    def following(self):
        if next(count, number) == number:
            monkeypatch.setattr(TrainBatches, "__next__", original)
            raise OSError("the data are gone")
        return original(self)

    monkeypatch.setattr(TrainBatches, "__next__", following)


# ---- a whole run


def test_a_run_in_a_bucket_resumes_bitwise_and_is_read(
    bucket, folder, tmp_path, monkeypatch, one_device
):
    settings, workdir = tiny_settings(folder, **RUN), epath.Path("gs://bucket/runs/a")
    figures = train(settings, tmp_path / "local")

    cut_off_at(monkeypatch, 7)
    with pytest.raises(OSError, match="the data are gone"):
        train(settings, workdir)
    assert find_checkpoint(workdir).step == 4
    assert list(figures_by_step(workdir)) == [1, 2, 3, 4, 5]  # one step late
    with pytest.raises(InputError, match="another config"):
        check_workdir(workdir, tiny_settings(folder, **RUN, seed=5))
    assert train(settings, workdir) == figures

    # Before steps 4, 8 and 12, and at the end of both starts.
    assert bucket.written.count("runs/a/metrics.jsonl") == 5
    assert_same_arrays(saved_arrays(workdir), saved_arrays(tmp_path / "local"))
    assert figures_by_step(workdir) == figures_by_step(tmp_path / "local")
    assert steps_on_disk(workdir) == [8, 12]
    names = {name.removeprefix("runs/a/") for name in bucket.objects}
    assert not [name for name in names if name.startswith("checkpoints/4/")]  # deleted whole
    events = [name for name in names if name.startswith("tensorboard/")]
    assert len(events) == 2  # of two starts
    assert all(bucket.objects[f"runs/a/{name}"][1] for name in events)
    others = {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))}
    local = [file.relative_to(tmp_path / "local") for file in (tmp_path / "local").rglob("*.json*")]
    assert others == {str(f) for f in local if f.parts[0] != "checkpoints"}

    options = {"num_samples": 2, "num_steps": 4, "length": 8}
    drawn = [
        Gidd.from_pretrained(p).generate(**options).ids for p in (str(workdir), tmp_path / "local")
    ]
    np.testing.assert_array_equal(*drawn)


# ---- checkpoints

STATE = {"w": jnp.arange(6.0).reshape(2, 3)}


def open_in(workdir: str) -> Checkpointer:
    return Checkpointer(
        workdir, every=1, max_to_keep=5, config={"seed": 1}, tokenizer=load_tokenizer("embedded")
    )


def abstract() -> dict[str, jax.ShapeDtypeStruct]:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), STATE
    )


def test_a_step_counts_when_it_is_complete(bucket):
    workdir = "gs://bucket/runs/cut"
    with open_in(workdir) as checkpointer:
        checkpointer.save(1, STATE, {"next_index": 1})
    bucket.refuse = "POST .*/2/commit_success.txt"
    with (
        pytest.raises(StorageError, match=r"continues from step 1$"),
        open_in(workdir) as checkpointer,
    ):
        checkpointer.save(2, STATE, {"next_index": 2})  # leaving the block waits for it
    bucket.refuse = ""
    assert any(name.startswith("runs/cut/checkpoints/2/state") for name in bucket.objects)
    assert find_checkpoint(workdir).step == 1
    with pytest.raises(InputError, match="only a part of a checkpoint"):
        find_checkpoint(f"{workdir}/checkpoints/2")
    with open_in(workdir) as checkpointer:
        restored, position = checkpointer.restore(abstract())
        assert position == {"next_index": 1}
        np.testing.assert_array_equal(restored["w"], STATE["w"])
        checkpointer.save(2, jax.tree.map(lambda a: a + 1, STATE), {"next_index": 2})
    with open_in(workdir) as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(abstract())[0]["w"], STATE["w"] + 1)


def test_what_the_bucket_refuses_is_not_called_damaged(bucket, folder):
    model = write_checkpoint("gs://bucket/runs/closed", folder)
    found = find_checkpoint("gs://bucket/runs/closed")
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    for refused in ("GET .*state/.*ocdbt.*", "GET .*state/_METADATA$", "GET .*/checksums"):
        bucket.refuse = refused
        with pytest.raises(InputError, match="cannot be read now"):
            load_params(found, wanted)
    bucket.refuse = ""
    name = next(name for name in bucket.objects if "/closed/checkpoints/3/config/" in name)
    bucket.put(name, b'{"seed": 5}', None)
    with pytest.raises(InputError, match="is damaged"):
        found.config()


# ---- files


def test_metrics_are_in_the_bucket_after_each_flush(bucket):
    workdir = epath.Path("gs://bucket/runs/metrics")

    def steps() -> list[int]:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    writer = MetricWriter(workdir)
    for step in (1, 2):
        writer.write_scalars(step, {"loss": step})
    assert not (workdir / "metrics.jsonl").exists()
    writer.flush()
    assert steps() == [1, 2]
    writer.write_scalars(3, {"loss": 3})  # killed here
    with MetricWriter(workdir, resume_step=1) as second:
        second.write_scalars(2, {"loss": 20})
    assert steps() == [1, 2]
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[1])["loss"] == 20


def test_a_refused_file_ends_the_run_in_one_line(bucket):
    bucket.refuse = "POST runs/refused/metrics.jsonl"
    with (
        pytest.raises(StorageError, match=r"gs://bucket/runs/refused could not be written \(Forb"),
        MetricWriter("gs://bucket/runs/refused") as writer,
    ):
        writer.write_scalars(1, {"loss": 1})


# ---- the door


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/run", r"lives in a folder, file:///FOLDER or gs://BUCKET/FOLDER; mount"),
        ("memory://run", "mount another store"),
        ("https://host/run", "mount another store"),
        ("file://run", "mount another store"),
        ("gs://", "mount another store"),
        (Path("gs://bucket/run"), "takes a local folder"),
    ],
)
def test_addresses_that_are_no_place_for_a_run(folder, address, words):
    for use in (run_folder, find_checkpoint, lambda a: check_workdir(a, tiny_settings(folder))):
        with pytest.raises(InputError, match=words):
            use(address)


def test_paths_are_absolute_and_file_addresses_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("runs/a:b") == epath.Path(tmp_path / "runs/a:b")
    assert run_folder("file:///data/runs") == epath.Path("/data/runs")


def test_a_missing_package_is_named_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gidd_jax.checkpoints.storage.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'gidd-jax\[gcs\]'"):
        train(tiny_settings(folder), "gs://bucket/run")
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_does_not_answer_is_named(bucket, folder):
    for use in (find_checkpoint, lambda a: check_workdir(a, tiny_settings(folder))):
        with pytest.raises(InputError, match="there is no bucket gs://nowhere"):
            use("gs://nowhere/run")
        bucket.refuse = "GET"
        with pytest.raises(InputError, match=r"cannot be reached \(Forbidden"):
            use("gs://bucket/run")
        bucket.refuse = ""


def test_the_command_says_so_in_one_line(bucket, folder):
    tiny_settings(folder)  # writes the corpus
    arguments = [f"--config.data.path={folder}/corpus.txt", "--workdir=gs://nowhere/run"]
    done = subprocess.run(
        [sys.executable, "-m", "gidd_jax.train", "--config=quickstart", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: gs://nowhere/run: there is no bucket gs://nowhere, or you may not see it"
    ]
