"""Folders with PyTorch code: our logits in transformers, our noise in its samplers.

What needs PyTorch is skipped where it is not installed.
"""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_llama import CASES, GOLDEN
from published_folders import write_words
from tiny_checkpoint import tiny_model, write_checkpoint

from gidd_jax.cli import load_config
from gidd_jax.data.sources import run_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.card import model_card
from gidd_jax.interchange.exported_code import exported_code
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.interchange.save import save_pretrained
from gidd_jax.interchange.start import from_start
from gidd_jax.process import LogSnrProcess, MaskedProcess
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective

TIMES = np.array([0.1, 0.5, 0.9], np.float32)
LENGTHS = np.array([12, 7, 10])
TOLD_THE_TIME = {"qwen3", "llama_biases"}


def denoiser(folder, name) -> Gidd:
    """The denoiser of a golden Llama; some are told the time, by gates that do something."""
    shutil.copytree(GOLDEN / name, folder)
    write_words(folder, 67, special=())
    config = load_config("adapt")
    width = 8 if name in TOLD_THE_TIME else 0
    config.model.update(start=str(folder), max_seq_len=16, dtype="float32", cond_dim=width)
    settings, start = from_start(Settings.from_config(config))
    assert start is not None
    tokenizer, params = run_tokenizer(settings.data), start(None)
    objective = build_objective(settings, tokenizer.vocab_size, tokenizer.mask_id)
    if width:
        for number, part in enumerate((params["blocks"]["modulation"], params["final_modulation"])):
            part["kernel"] = jax.random.normal(jax.random.key(number), part["kernel"].shape)
    return Gidd(objective.model, params, tokenizer, objective.process)


def pretrained(model: Gidd, **changes: Any) -> Pretrained:
    return Pretrained(*(getattr(model, name) for name in Pretrained._fields))._replace(**changes)


def torch_model(folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForMaskedLM

    model, info = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return torch, model.eval()


@pytest.mark.parametrize("name", ["gidd", "mdlm", *CASES])
def test_transformers_gives_our_logits(name, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = denoiser(tmp_path / "source", name) if name in CASES else tiny_model(tmp_path, name)
    save_pretrained(pretrained(model), tmp_path / "out", with_code=True)
    ids = np.random.default_rng(0).integers(0, model.tokenizer.vocab_size, (3, 12))
    with jax.default_matmul_precision("highest"):
        inputs = jnp.asarray(ids), jnp.asarray(TIMES), jnp.asarray(LENGTHS)
        ours = np.asarray(model.network.apply({"params": model.params}, *inputs))
    torch, theirs = torch_model(tmp_path / "out")
    real = np.arange(12)[None] < LENGTHS[:, None]
    with torch.no_grad():
        found = theirs(torch.tensor(ids), torch.tensor(TIMES), torch.tensor(real)).logits.numpy()
    wanted = ours[real][:, : found.shape[-1]]
    np.testing.assert_allclose(found[real], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    assert wanted.std() > 0.3


@pytest.mark.parametrize("kind", ["hybrid", "masked", "log_snr"])
def test_steps_are_those_of_the_process(kind, tmp_path, monkeypatch):
    """The posterior of an ancestral step, and the time of a share of noise."""
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model(tmp_path, "gidd")
    V, mask = model.tokenizer.vocab_size, model.tokenizer.mask_id
    process = {
        "hybrid": model.process,
        "masked": MaskedProcess(V, mask),
        "log_snr": LogSnrProcess(V, mask, 1.0, 0.5),
    }[kind]
    save_pretrained(pretrained(model, process=process), tmp_path / "out", with_code=True)
    torch, theirs = torch_model(tmp_path / "out")
    import importlib

    module = importlib.import_module(type(theirs).__module__)
    noise = module.NoiseProcess(theirs.config)
    rng = np.random.default_rng(0)
    x_hat = rng.dirichlet(np.ones(V), (2, 5))
    x_hat[..., mask] = 0
    x_hat /= x_hat.sum(-1, keepdims=True)
    z = rng.integers(0, V, (2, 5))
    z[0, 0] = mask
    times = 0.7, 0.6
    tensors = [torch.tensor(a) for a in (x_hat, z, *([t] for t in times))]
    found = noise.posterior(*tensors).numpy()
    found /= found.sum(-1, keepdims=True)
    assert process is not None
    wanted = process.posterior_probs(jnp.asarray(x_hat), jnp.asarray(z), *times)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    share = torch.tensor(float(1 - process.alpha(0.37))).double()
    assert float(noise.time_of(share)) == pytest.approx(0.37, abs=1e-5)


def test_samples_keep_their_prompts_and_hold_no_mask(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model(tmp_path, "gidd")
    save_pretrained(pretrained(model), tmp_path / "out", with_code=True)
    torch, theirs = torch_model(tmp_path / "out")

    def drawn(**options):
        generator = torch.Generator().manual_seed(0)
        return theirs.generate(num_steps=6, generator=generator, **options)

    prompt = torch.tensor([[3, 4, 5], [6, 7, 8]])
    rows = drawn(input_ids=prompt, correction_steps=3)
    assert rows.shape == (2, 16)
    assert (rows[:, :3] == prompt).all()
    assert not (rows == model.tokenizer.mask_id).any()
    with pytest.raises(ValueError, match="a prompt of 16 tokens leaves no room"):
        theirs.generate(torch.zeros((1, 16), dtype=torch.long))
    assert (drawn(num_samples=2) == drawn(num_samples=2)).all()
    finished = drawn(num_samples=2)
    mended = theirs.self_correct(finished, 1, generator=torch.Generator().manual_seed(1))
    assert ((mended != finished).sum(-1) <= 1).all()  # a token a step


def test_columns_that_fill_up_are_never_drawn(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny_model(tmp_path, "gidd")
    padded = pretrained(model, keep_padding_columns=True)
    padded.params["output"]["bias"] += 8.0 * (jnp.arange(384) >= model.tokenizer.vocab_size)
    save_pretrained(padded, tmp_path / "out", with_code=True)
    _, theirs = torch_model(tmp_path / "out")
    assert theirs.config.vocab_size > model.tokenizer.vocab_size
    rows = theirs.generate(num_steps=4, num_samples=4, temperature=1.0, correction_steps=4)
    assert (rows < model.tokenizer.vocab_size).all()


def test_without_the_flag_there_is_no_code(tmp_path):
    model = pretrained(tiny_model(tmp_path, "gidd"))
    save_pretrained(model, tmp_path / "plain")
    save_pretrained(model, tmp_path / "coded", with_code=True, card="# Mine\n")
    plain, coded = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "coded")
    )
    assert "auto_map" not in plain
    assert not list((tmp_path / "plain").glob("*.py"))
    for entry in coded["auto_map"].values():
        file, name = entry.split(".")
        assert f"class {name}(" in (tmp_path / "coded" / f"{file}.py").read_text()
    assert coded["mask_token_id"] == model.tokenizer.mask_id
    assert (tmp_path / "coded" / "README.md").read_text() == "# Mine\n"
    again = load_pretrained(tmp_path / "coded")
    assert again.network == model.network
    assert again.process == model.process


def test_networks_without_code_are_named(tmp_path):
    with pytest.raises(InputError, match="there is no code for a Llama: leave with_code out"):
        exported_code(pretrained(tiny_model(tmp_path, "ar")))
    told = tiny_model(tmp_path, "gidd", **{"data.givens": 0.5})
    with pytest.raises(InputError, match="is told times of positions"):
        exported_code(pretrained(told))


def test_the_card_says_what_the_run_was(tmp_path):
    write_checkpoint(tmp_path / "run", tmp_path, "gidd")
    lines = [
        {"step": s, "eval/perplexity": p, "train/tokens_per_second": speed}
        for s, p, speed in ((2, 8.5, 64.0), (3, 7.25, 32.0), (9, 1.0, 1.0))
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = load_pretrained(tmp_path / "run")
    card = model_card(model, str(tmp_path / "run"), licence="apache-2.0", with_code=True)
    front = card.split("---")[1]
    assert 'license: "apache-2.0"' in front
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert f"{count:,} parameters" in card
    assert "| validation: perplexity | 7.25 |" in card
    assert "| tokens | 384 |" in card  # 128 a step: 4 seconds for the first two and for the third
    assert "| hours of steps | 0.0022 |" in card
    assert '"num_layers": 2' in card
    assert "trust_remote_code=True" in card
    other = model_card(model, "elsewhere", licence=None, with_code=False)
    assert 'license: "other"' in other
    assert "none was named" in other
    assert "## Training" not in other
    assert "trust_remote_code" not in other


def test_the_command_writes_code_and_card(tmp_path):
    write_checkpoint(tmp_path / "run", tmp_path, "gidd")
    command = [sys.executable, "-m", "gidd_jax.convert", f"--checkpoint={tmp_path / 'run'}"]
    command += [f"--out={tmp_path / 'out'}", "--with_code", "--license=mit"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"configuration_gidd.py", "modeling_gidd.py", "README.md"} <= names
    assert 'license: "mit"' in (tmp_path / "out" / "README.md").read_text()
