"""Export: what comes back is what was there, in the published names and keys."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from published_folders import llama_folder, published
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_checkpoint import tiny_model, write_checkpoint

from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.interchange.save import save_pretrained
from gidd_jax.process import HybridProcess, LogSnrProcess

BUFFERS = {"rotary_emb.cos_cached", "rotary_emb.sin_cached"}


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    for name in ("network", "process", "keep_padding_columns"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("fingerprint", "bos_id", "eos_id", "pad_id", "mask_id"):
        assert getattr(found.tokenizer, name) == getattr(expected.tokenizer, name)


@pytest.mark.parametrize(
    ("name", "size"),
    [("c05_hf_dit_exact", 128), ("c05_hf_dit_exact", 90), ("c05_hf_dit_sliced", 67)],
)
def test_published_folders_come_back_exactly(tmp_path, name, size):
    source = published(tmp_path / "hf", name, size)
    model = Gidd.from_pretrained(source)
    model.save_pretrained(tmp_path / "out")
    assert_same(Gidd.from_pretrained(tmp_path / "out"), model)

    # Who may read one file may read all.
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    assert set(before) == set(after)
    for key, array in before.items():
        tolerance = 1e-7 if key in BUFFERS else 0
        np.testing.assert_allclose(after[key], array, atol=tolerance, rtol=0, err_msg=key)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    golden_config = json.loads((GOLDEN / name / "config.json").read_text())
    for values in (config, golden_config):
        del values["transformers_version"]
    # It names files of code, which an export does not hold.
    del golden_config["auto_map"]
    assert config == golden_config


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gidd", {}),
        ("mdlm", {}),
        ("gidd", {"process": HybridProcess(259, 258, 0.3, gamma=0.5)}),
        ("gidd", {"process": LogSnrProcess(259, 258, 1.0, 2.0, -8.0, 8.0, t_eps=1e-3)}),
    ],
)
def test_other_processes_come_back_too(tmp_path, name, change):
    model = dataclasses.replace(tiny_model(tmp_path, name), **change)
    first, second = tmp_path / "a", tmp_path / "b"
    model.save_pretrained(first)
    config = json.loads((first / "config.json").read_text())
    is_the_papers = name == "gidd" and not change
    assert ("process" in config, "p_uniform" in config) == (not is_the_papers, is_the_papers)
    # The rows that pad the vocabulary belong to the training, not to the model.
    once = Gidd.from_pretrained(first)
    assert once.process == model.process
    ids, t = jnp.arange(16, dtype=jnp.int32)[None], jnp.full(1, 0.4)
    found, expected = (m.network.apply({"params": m.params}, ids, t) for m in (once, model))
    np.testing.assert_array_equal(found[..., :259], expected[..., :259])
    once.save_pretrained(second)
    assert_same(Gidd.from_pretrained(second), once)


def test_llamas_come_back_exactly(tmp_path, golden):
    weights = golden("c06_llama_state_dict.safetensors")
    rope = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    }
    source = llama_folder(
        tmp_path / "hf", weights, rope_scaling=rope, rope_theta=500.0, rms_norm_eps=1e-5
    )
    model = Gidd.from_pretrained(source)
    model.save_pretrained(tmp_path / "out")
    assert_same(Gidd.from_pretrained(tmp_path / "out"), model)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


def test_transformers_reads_our_llama_config(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    model = tiny_model(tmp_path, "ar")
    model.save_pretrained(tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.vocab_size, config.num_hidden_layers) == ("llama", 259, 2)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.eos_token_id == model.tokenizer.eos_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "It is a truth"
    np.testing.assert_array_equal(
        tokenizer.encode(text, add_special_tokens=False), model.tokenizer.encode([text])[0]
    )
    assert_same(Gidd.from_pretrained(tmp_path / "out"), model_with_explicit_sizes(model))


def model_with_explicit_sizes(model: Gidd) -> Gidd:
    network = model.network.clone(num_kv_heads=4, intermediate_size=128)
    return dataclasses.replace(model, network=network)


def test_transformers_computes_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = tiny_model(tmp_path, "ar")
    model.save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = np.random.default_rng(0).integers(0, 259, (2, 16))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        found = model.network.apply({"params": model.params}, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_nothing_is_overwritten_and_nothing_is_left_half(tmp_path, monkeypatch):
    model = tiny_model(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists: name a new folder"):
        model.save_pretrained(tmp_path / "there")

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "junk").touch()
    model.save_pretrained(tmp_path / "out")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert not (tmp_path / "out.part").exists()


def test_a_process_of_ones_own_cannot_be_exported(tmp_path):
    class Own(HybridProcess):
        pass

    model = tiny_model(tmp_path)
    for process in (
        Own(259, 258, 0.1),
        HybridProcess(259, 258, 0.1, background=(*np.full(258, 1 / 258), 0.0)),
    ):
        fields = model.network, model.params, model.tokenizer, process, False
        with pytest.raises(InputError, match="cannot be exported: the format knows hybrid, masked"):
            save_pretrained(Pretrained(*fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def convert(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gidd_jax.convert", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command(tmp_path):
    saved = write_checkpoint(tmp_path / "run", tmp_path, "ar")
    out = tmp_path / "deep" / "out"
    done = convert(f"--checkpoint={tmp_path / 'run'}", f"--out={out}")
    assert (done.returncode, done.stdout) == (0, f"wrote {out}\n"), done.stderr
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(out).params, saved.params)
    again = convert(f"--checkpoint={tmp_path / 'run'}", f"--out={out}")
    assert again.returncode == 2
    assert again.stderr == f"error: {out} exists: name a new folder, nothing is overwritten\n"
