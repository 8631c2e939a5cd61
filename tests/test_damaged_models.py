"""A model with a number that is none: every command names the array, and writes nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from fresh_command import fresh_command
from published_folders import llama_folder, published
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import tiny_model
from tiny_run import tiny_settings

from gidd_jax.checkpoints.checkpoint import Checkpointer
from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.load import load_pretrained


def damaged(folder: Path, name: str, value: float) -> str:
    """Write a run whose last step has a damaged kernel; return the array's name."""
    model = tiny_model(folder, name)
    flat: dict[str, Any] = flatten_dict(model.params, sep=".")
    array = next(key for key in sorted(flat) if "kernel" in key and "blocks" in key)
    flat[array] = flat[array].at[(1,) * flat[array].ndim].set(value)
    params = unflatten_dict(flat, sep=".")
    settings = tiny_settings(folder, name)
    with Checkpointer(
        folder / name, every=1, max_to_keep=2, config=settings.to_dict(), tokenizer=model.tokenizer
    ) as checkpointer:
        checkpointer.save(3, {"step": jnp.int32(3), "params": model.params}, {"next_index": 0})
        checkpointer.save(4, {"step": jnp.int32(4), "params": params}, {"next_index": 0})
    return array


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, {"gidd": damaged(folder, "gidd", np.nan), "ar": damaged(folder, "ar", np.inf)}


@pytest.mark.parametrize(
    ("command", "name", "flags"),
    [
        ("sample", "gidd", ["--out={new}/o.npz", "--replay={new}/r.html", "--method=confidence"]),
        ("sample", "ar", ["--out={new}/o.npz"]),
        ("self_correct", "gidd", ["--samples={runs}/corpus.txt", "--out={new}/o.npz"]),
        ("evaluate", "gidd", ["--out={new}/o.json"]),
        ("evaluate", "ar", ["--out={new}/o.json"]),
        ("highlight", "gidd", ["--text={runs}/corpus.txt", "--out={new}/o.html"]),
        ("highlight", "gidd", ["--evaluate", "--out={new}/o.json"]),
        ("convert", "gidd", ["--out={new}/hf"]),
        ("convert", "ar", ["--out={new}/hf"]),
        ("generative_ppl", "ar", ["--samples={runs}/corpus.txt", "--out={new}/o.json"]),
    ],
)
def test_every_command_names_the_damaged_array(runs, tmp_path, command, name, flags):
    folder, arrays = runs
    model = "scorer" if command == "generative_ppl" else "checkpoint"
    given = [flag.format(runs=folder, new=tmp_path / "new") for flag in flags]
    with pytest.raises(InputError) as error:
        fresh_command(command, f"--{model}={folder / name}", *given).main([])
    step = folder / name / "checkpoints" / "4"
    assert f"checkpoint {step} is damaged (1 of the " in str(error.value)
    assert f"numbers in params.{arrays[name]} are NaN or infinite)" in str(error.value)
    assert str(error.value).endswith("delete it to continue from step 3")
    assert not (tmp_path / "new").exists()


def test_a_run_does_not_go_on_from_damaged_parameters(runs):
    folder, arrays = runs
    settings, model = tiny_settings(folder, "gidd"), load_pretrained(folder / "gidd/checkpoints/3")
    state = {"step": jnp.int32(0), "params": model.params}
    with Checkpointer(
        folder / "gidd",
        every=1,
        max_to_keep=2,
        config=settings.to_dict(),
        tokenizer=model.tokenizer,
    ) as checkpointer:
        assert int(checkpointer.restore(state, 3)[0]["step"]) == 3
        with pytest.raises(InputError, match=f"numbers in params.{arrays['gidd']} are NaN"):
            checkpointer.restore(state)


@pytest.mark.parametrize("kind", ["dit", "llama"])
def test_published_folders_with_a_nan_are_damaged(tmp_path, golden, kind):
    if kind == "dit":
        folder = published(tmp_path / "a", "c05_hf_dit_sliced", 67)
    else:
        folder = llama_folder(tmp_path / "a", golden("c06_llama_state_dict.safetensors"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if weights[name].ndim == 2)
    weights[name][0, 0] = np.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"a is damaged \(1 of the \d+ numbers in .* fetch it"):
        load_pretrained(folder)


def test_a_damaged_model_is_not_exported(tmp_path):
    model = tiny_model(tmp_path)
    flat: dict[str, Any] = flatten_dict(model.params, sep=".")
    name = sorted(flat)[0]
    flat[name] = flat[name] * jnp.inf
    broken: Gidd = dataclasses.replace(model, params=unflatten_dict(flat, sep="."))
    with pytest.raises(InputError, match=f"numbers in {name} are NaN or infinite"):
        broken.save_pretrained(tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))
