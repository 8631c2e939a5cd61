"""Runs that begin with the weights of others: what becomes of them, and that they train."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from golden_llama import CASES, GOLDEN, IDS
from published_folders import write_words
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_checkpoint
from tiny_run import assert_same_arrays, figures_by_step, saved_arrays, tiny_settings

from gidd_jax.cli import load_config
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.start import from_start
from gidd_jax.process import HybridProcess
from gidd_jax.settings import Settings
from gidd_jax.training import loop
from gidd_jax.training.annealing import CAUSAL
from gidd_jax.training.build import build_model
from gidd_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("on_first_device")


def llama_start(folder, name="smollm"):
    """A golden Llama whose tokenizer has no [PAD] and no [MASK]."""
    shutil.copytree(GOLDEN / name, folder)
    write_words(folder, 67, special=())
    return folder


def adapted(folder, corpus, **changes) -> Settings:
    """The settings of a tiny run of the config adapt."""
    config = load_config("adapt")
    config.model.update(start=str(folder), max_seq_len=16, dtype="float32")
    config.data.update(path=str(corpus), validation="last:4", txt_documents="line")
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2)
    config.train.update(num_steps=12, batch_size=4, eval_every=0, eval_batches=2)
    config.adapt.update(attention_steps=6, noise_steps=8)
    config.checkpoint.every, config.logging.every = 4, 1
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("corpus") / "words.txt"
    lines = [" ".join(f"w{i}" for i in rng.integers(0, 60, 20)) for _ in range(40)]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_the_sources_before_the_first_step(name, tmp_path, corpus):
    """All architectures: shape and weights come over, and the new tokens stand beside the old."""
    folder = llama_start(tmp_path / "start", name)
    settings, start = from_start(adapted(folder, corpus, **{"model.cond_dim": 8}))
    assert start is not None
    network, params = build_model(settings, 69), start(None)
    with np.load(GOLDEN / "logits.npz") as logits:
        wanted = logits[name][:, :15]
    with jax.default_matmul_precision("highest"):
        found = network.apply(
            {"params": params}, jnp.asarray(IDS[:, :16]), jnp.ones(1), None, jnp.float32(CAUSAL)
        )
    found = np.asarray(found)[:, 1:]
    atol = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(found[..., :67], wanted, atol=atol, rtol=0)
    # [PAD] and [MASK]: the mean of the other rows, and so of their logits.
    mean = np.repeat(wanted.mean(axis=-1, keepdims=True), 2, axis=-1)
    np.testing.assert_allclose(found[..., 67:], mean, atol=atol, rtol=0)
    table = params["vocab_embed"]["embedding"]
    assert table.shape[0] == 69
    np.testing.assert_allclose(table[68], table[:67].mean(axis=0), atol=1e-6)


def test_rows_that_only_fill_a_table_are_no_tokens(tmp_path, corpus):
    """67 rows for 60 tokens, as Qwen has them: the mask gets a free one, and no one's numbers."""
    folder = tmp_path / "start"
    shutil.copytree(GOLDEN / "qwen2", folder)
    write_words(folder, 60, special=())
    settings, start = from_start(adapted(folder, corpus))
    assert start is not None
    params, source = start(None), load_pretrained(folder).params
    ours, theirs = (p["vocab_embed"]["embedding"] for p in (params, source))
    assert ours.shape[0] == 62
    np.testing.assert_array_equal(ours[:60], theirs[:60])
    for new in (60, 61):
        np.testing.assert_allclose(ours[new], theirs[:60].mean(axis=0), atol=1e-6)
    head, their_head = (p["output"]["kernel"] for p in (params, source))
    np.testing.assert_allclose(head[:, 61], their_head[:, :60].mean(axis=1), atol=1e-6)
    assert settings.model.qkv_bias
    assert not settings.model.out_bias


def test_an_adapted_model_trains_stops_goes_on_and_samples(tmp_path, corpus):
    start_folder = llama_start(tmp_path / "start")
    constant = {"optimizer.schedule": "constant"}
    whole = adapted(start_folder, corpus, **constant)
    for part in (adapted(start_folder, corpus, **constant, **{"train.num_steps": 8}), whole):
        settings, start = from_start(part)
        train(settings, tmp_path / "parts", start=start)
    train(settings, tmp_path / "whole", start=start)
    assert_same_arrays(saved_arrays(tmp_path / "parts"), saved_arrays(tmp_path / "whole"))
    lines = figures_by_step(tmp_path / "whole")
    assert np.isfinite([line["train/loss"] for line in lines.values()]).all()
    model = Gidd.from_pretrained(tmp_path / "whole")
    samples = model.generate(2, num_steps=4)
    assert not (samples.ids == 68).any()
    corrected = model.correct(samples.ids, num_steps=4)
    assert corrected.ids.shape == samples.ids.shape
    assert np.isfinite(model.log_likelihood(["w1 w2 w3"], num_samples_t=4).log_probs).all()
    model.save_pretrained(tmp_path / "exported")
    again = Gidd.from_pretrained(tmp_path / "exported")
    assert again.network == model.network
    assert again.process == model.process
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("llama_denoiser", "llama")


def test_a_denoiser_that_is_told_the_time_comes_back_from_its_folder(tmp_path, corpus):
    settings, start = from_start(
        adapted(llama_start(tmp_path / "start", "qwen3"), corpus, **{"model.cond_dim": 8})
    )
    assert start is not None
    network, params = build_model(settings, 69), start(None)
    params["blocks"]["modulation"]["kernel"] += 0.1
    tokenizer = load_tokenizer(tmp_path / "start")
    model = Gidd(network, params, tokenizer, HybridProcess(69, 68, 0.1))
    model.save_pretrained(tmp_path / "out")
    again = Gidd.from_pretrained(tmp_path / "out")
    assert again.network.shape == network.shape
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize(
    ("kind", "rank"), [("llama", 0), ("llama", 2), ("run", 0), ("adapters", 0)]
)
def test_a_start_on_a_mesh_is_the_start_on_one_device(tmp_path, corpus, monkeypatch, kind, rank):
    """Weights, moments, average and adapters lie over eight devices; losses are the same."""
    changes = {"train.num_steps": 3, "optimizer.ema_decay": 0.9, "adapt.lora_rank": rank}
    changes |= {"adapt.attention_steps": 2, "adapt.noise_steps": 2}
    folder, make_mesh, found = tmp_path / "start", loop.sharding.make_mesh, {}
    if kind == "llama":
        llama_start(folder)
    elif kind == "adapters":  # a run that trained some, whose weights are merged
        settings, start = from_start(
            adapted(llama_start(tmp_path / "llama"), corpus, **changes | {"adapt.lora_rank": 2})
        )
        train(settings, folder, start=start)
    else:
        model = write_checkpoint(folder, tmp_path, "gidd", **{"process.p_uniform": 0.0})
        model.tokenizer.save(folder / "tokenizer")
    for sizes in ((1, 1, 1), (2, 2, 2)):
        of_mesh = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
        settings, start = from_start(adapted(folder, corpus, **changes, **of_mesh))
        devices = jax.devices()[: math.prod(sizes)]
        monkeypatch.setattr(
            loop.sharding, "make_mesh", functools.partial(make_mesh, devices=devices)
        )
        run = tmp_path / str(math.prod(sizes))
        train(settings, run, start=start)
        found[sizes] = (
            [line["train/loss"] for line in figures_by_step(run).values()],
            saved_arrays(run),
        )
        if kind != "llama" or rank:
            continue
        assert start is not None
        mesh = make_mesh(*sizes, devices=devices)
        kernel = start(mesh)["blocks"]["mlp_in"]["kernel"]  # straight onto all devices
        assert len(kernel.sharding.device_set) == len(devices)
    (alone, arrays), (together, spread) = found.values()
    assert len(alone) == 3
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert arrays.keys() == spread.keys()
    for name, array in arrays.items():
        # Of a gradient that is mere rounding Adam makes a step like any: single numbers may differ.
        difference = np.linalg.norm(np.float64(spread[name]) - array)
        assert difference <= 1e-4 * np.linalg.norm(np.float64(array)) + 1e-6, name


@pytest.mark.parametrize("name", ["gidd", "mdlm"])
def test_from_masks_to_hybrid_only_the_noise_changes(name, tmp_path):
    mine = {"process.p_uniform": 0.0} if name == "gidd" else {}
    model = write_checkpoint(tmp_path / "masks", tmp_path, name, **mine)
    model.tokenizer.save(tmp_path / "masks" / "tokenizer")  # as runs do
    changes = {"model.start": str(tmp_path / "masks"), "adapt.noise_steps": 4}
    settings, start = from_start(
        tiny_settings(
            tmp_path, "gidd", **changes, **{"train.num_steps": 6, "data.tokenizer": "start"}
        )
    )
    assert start is not None
    jax.tree.map(np.testing.assert_array_equal, start(None), model.params)
    assert settings.data.tokenizer.startswith(str(tmp_path))
    train(settings, tmp_path / "run", start=start)
    assert Gidd.from_pretrained(tmp_path / "run").process.p_uniform == settings.process.p_uniform


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.start": "nowhere/at/all"}, "no such folder: nowhere/at/all"),
        ({"model.start": "a/b.gguf"}, "convert the file into a folder first, with python -m"),
        ({"model.max_seq_len": 64}, "model.max_seq_len = 64: must be at most 32, the context of"),
        ({"data.tokenizer": "embedded"}, "has another tokenizer: set it to start"),
    ],
)
def test_what_cannot_be_is_one_line(change, message, tmp_path, corpus):
    settings = adapted(llama_start(tmp_path / "start"), corpus, **change)

    def begin() -> None:
        _, start = from_start(settings)
        assert start is not None
        start(None)

    with pytest.raises(InputError) as caught:
        begin()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_starts_own_tokenizer_may_be_named(tmp_path, corpus):
    """Whatever fills up rows: a Llama's are filled up with the token that ends a text."""
    folder = llama_start(tmp_path / "start")
    for mode in ("packed", "answers"):
        settings = adapted(folder, corpus, **{"data.tokenizer": str(folder), "data.mode": mode})
        assert from_start(settings)[0].data.tokenizer == str(folder)


def test_a_vocabulary_of_pairs(tmp_path, corpus):
    """Unigram models list tokens with their scores."""
    folder = llama_start(tmp_path / "start")
    pairs = [("<unk>", 0.0), *((f"w{i}", -1.0) for i in range(65))]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pairs, unk_id=0))
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    _, start = from_start(adapted(folder, corpus))
    assert start is not None
    assert start(None)["vocab_embed"]["embedding"].shape[0] == 69


def test_weights_that_lack_a_tensor_are_refused_before_the_run_begins(tmp_path, corpus):
    folder = llama_start(tmp_path / "start")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"missing model\.norm\.weight"):
        from_start(adapted(folder, corpus))


def test_damaged_weights_are_refused_and_nothing_is_left(tmp_path, corpus):
    folder = llama_start(tmp_path / "start")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, file)
    settings, start = from_start(adapted(folder, corpus))
    with pytest.raises(InputError, match="is damaged"):
        train(settings, tmp_path / "run", start=start)
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left <= {".lock"}


def test_nothing_is_written_where_the_tokenizer_is_another(tmp_path, corpus):
    settings = adapted(llama_start(tmp_path / "start"), corpus, **{"data.tokenizer": "embedded"})
    with pytest.raises(InputError, match="has another tokenizer"):
        from_start(settings)
    assert not (tmp_path / "run").exists()


def test_adapters_would_leave_new_times_untold(tmp_path, corpus):
    changes = {"adapt.lora_rank": 2, "model.cond_dim": 8}
    with pytest.raises(InputError, match="adapters leave the time embedding as it begins"):
        from_start(adapted(llama_start(tmp_path / "start"), corpus, **changes))


def test_a_diffusion_model_is_no_start_of_an_autoregressive_one(tmp_path):
    write_checkpoint(tmp_path / "run", tmp_path, "gidd")
    settings = tiny_settings(tmp_path, "ar", **{"model.start": str(tmp_path / "run")})
    with pytest.raises(InputError, match="is a diffusion model, and process"):
        from_start(settings)


def test_an_unknown_architecture_is_refused(tmp_path, corpus):
    folder = llama_start(tmp_path / "start")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="only dit, gidd, llama, qwen2, qwen3, llama_denoiser can"):
        from_start(adapted(folder, corpus))


def test_a_tokenizer_of_no_start_is_named():
    with pytest.raises(InputError, match=r"model\.start = '': data\.tokenizer = start is its"):
        from_start(Settings.from_config(load_config("adapt")))
