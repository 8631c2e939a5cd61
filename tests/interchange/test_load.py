"""Models out of folders: the published format, the original's checkpoints, Hugging Face Llamas."""

import importlib
import json
import pickle
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from fresh_command import fresh_command
from published_folders import (
    ORIGINAL_AR,
    ORIGINAL_DIT,
    llama_folder,
    published,
    write_words,
)
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_checkpoint

from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.placing import as_dtype
from gidd_jax.models.rotary import Llama3RopeScaling
from gidd_jax.process import HybridProcess, MaskedProcess


def logits(model: Gidd, *inputs: np.ndarray) -> np.ndarray:
    ids, *t = inputs
    arguments = [jnp.asarray(ids, jnp.int32), *(jnp.asarray(a, jnp.float32) for a in t)]
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.network.apply({"params": model.params}, *arguments))


def edit(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("name", "size", "keep"),
    [
        ("c05_hf_dit_exact", 128, False),
        ("c05_hf_dit_exact", 90, True),
        ("c05_hf_dit_sliced", 67, False),
    ],
)
def test_published_folders(tmp_path, golden, name, size, keep):
    """Rows beyond the tokenizer's take part in the published softmax, so they are kept."""
    model = Gidd.from_pretrained(published(tmp_path / "hf", name, size))
    io = golden(f"{name}/io.npz")
    found = logits(model, io["input_ids"], io["timesteps"])[..., : io["logits"].shape[-1]]
    np.testing.assert_allclose(found, io["logits"], atol=1e-4, rtol=0)
    assert model.process == HybridProcess(size, size - 1, 0.1, t_eps=1e-4)
    assert (model.network.vocab_size, model.keep_padding_columns) == (size, keep)


@pytest.fixture
def with_torch(monkeypatch, golden):
    """Stands in for PyTorch: its load gives the tensors of the golden file that the file names."""

    class Tensor:
        def __init__(self, array):
            self.array = array

        def float(self):
            return self

        def numpy(self):
            return self.array

    def load(file, *, map_location, weights_only):
        assert (map_location, weights_only) == ("cpu", True)
        return {k: Tensor(v) for k, v in golden(Path(file).read_text()).items()}

    importlib.import_module("transformers")  # it looks for torch, once, when it is imported
    importlib.import_module("transformers.utils.import_utils")
    stub = types.ModuleType("torch")
    stub.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", stub)


def original(folder: Path, config: str, weights: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    (folder / "model.pt").write_text(weights)
    write_words(folder, 67)
    return folder


def test_the_originals_diffusion_checkpoint(tmp_path, golden, with_torch):
    folder = original(tmp_path / "a", ORIGINAL_DIT, "c05_dit_strong_state_dict.safetensors")
    model = Gidd.from_pretrained(folder)
    assert model.process == HybridProcess(67, 66, 0.2, t_eps=1e-4)
    assert model.keep_padding_columns
    weights = golden("c05_dit_strong_state_dict.safetensors")
    np.testing.assert_array_equal(
        model.params["vocab_embed"]["embedding"], weights["vocab_embed.embedding"]
    )
    (folder / "config.yaml").write_text(ORIGINAL_DIT.replace(": gidd", ": mdlm"))
    assert load_pretrained(folder).process == MaskedProcess(67, 66, t_eps=1e-4)


@pytest.mark.parametrize(
    ("data", "row_mode"),
    [
        ("data: {sequence_packing: false}", "crop"),
        ("data: {sequence_packing: true}", "packed"),
        ("data: {num_workers: 8}", "packed"),
        ("", "packed"),
    ],
)
def test_rows_of_the_original_are_framed_as_its_training_made_them(
    tmp_path, with_torch, data, row_mode
):
    config = f"{ORIGINAL_DIT}\n{data}\n"
    folder = original(tmp_path / "a", config, "c05_dit_strong_state_dict.safetensors")
    assert load_pretrained(folder).row_mode == row_mode
    assert load_pretrained(folder, row_mode="padded").row_mode == "padded"


def test_a_published_folder_that_does_not_say_is_framed_as_the_caller_says(tmp_path, golden):
    folder = published(tmp_path / "hf", "c05_hf_dit_sliced", 67)
    assert Gidd.from_pretrained(folder).row_mode == "packed"
    assert Gidd.from_pretrained(folder, row_mode="crop").row_mode == "crop"
    flags = (f"--checkpoint={folder}", "--row_mode=crop", f"--out={tmp_path}/out")
    fresh_command("convert", *flags).main([])
    assert Gidd.from_pretrained(tmp_path / "out").row_mode == "crop"
    with pytest.raises(InputError, match="row_mode 'cut': legal values: crop, packed, padded"):
        load_pretrained(folder, row_mode="cut")
    edit(folder, row_mode="cut")
    with pytest.raises(InputError, match=r"config\.json: row_mode 'cut': legal values: crop"):
        load_pretrained(folder)
    llama = llama_folder(tmp_path / "ar", golden("c06_llama_state_dict.safetensors"))
    with pytest.raises(InputError, match="ar is autoregressive, its rows are not framed"):
        load_pretrained(llama, row_mode="crop")
    write_checkpoint(tmp_path / "run", tmp_path)
    with pytest.raises(InputError, match=r"row_mode: .*run.* says itself how its rows"):
        load_pretrained(tmp_path / "run", row_mode="crop")


def test_the_originals_autoregressive_checkpoint(tmp_path, golden, with_torch):
    folder = original(tmp_path / "a", ORIGINAL_AR, "c06_llama_state_dict.safetensors")
    model = Gidd.from_pretrained(folder)
    arrays = golden("c06_ar.npz")
    found = logits(model, arrays["input_ids"])
    np.testing.assert_allclose(found, arrays["logits_nomask"], atol=1e-4, rtol=0)
    assert model.process is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  n_heads: 4\n", "", "config.yaml: n_heads is missing"),
        ("n_heads: 4", "n_heads: four", "n_heads = 'four': must be an integer"),
        ("n_heads: 4", "n_heads: 0", "n_heads = 0: must be at least 1"),
        ("p_uniform: 0.2", "p_uniform: 1.5", "config.yaml: p_uniform must lie in"),
        ("type: diffusion", "type: vae", "model.type = 'vae': must be"),
        (": gidd", ": flow", "diffusion_process = 'flow': must be gidd or mdlm"),
        ("model:", "network:", "config.yaml: model is missing"),
        (
            "training:",
            "data: {sequence_packing: 1}\ntraining:",
            "sequence_packing = 1: must be true",
        ),
        ("model:", "model: !!python/object/apply:os.getcwd []\nx:", "config.yaml is no plain YAML"),
        ("n_blocks: 3", "n_blocks: 2", r"model.pt: .*unknown blocks\.2"),
    ],
)
def test_malformed_configs_of_the_original(tmp_path, with_torch, old, new, message):
    config = ORIGINAL_DIT.replace(old, new)
    folder = original(tmp_path / "a", config, "c05_dit_strong_state_dict.safetensors")
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


def test_the_originals_checkpoint_needs_torch(tmp_path, monkeypatch):
    folder = original(tmp_path / "a", ORIGINAL_DIT, "")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"model\.pt: PyTorch is needed.*gidd-jax\[eval\]"):
        load_pretrained(folder)
    (folder / "model.pt").unlink()
    with pytest.raises(InputError, match=r"model\.pt is missing"):
        load_pretrained(folder)


def test_real_torch_files(tmp_path, golden):
    torch = pytest.importorskip("torch")
    folder = original(tmp_path / "a", ORIGINAL_AR, "")
    weights = golden("c06_llama_state_dict.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, folder / "model.pt")
    table = load_pretrained(folder).params["vocab_embed"]["embedding"]
    np.testing.assert_array_equal(table, weights["model.embed_tokens.weight"])

    other = original(tmp_path / "b", ORIGINAL_DIT, "")
    weights = golden("c05_dit_strong_state_dict.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, other / "model.pt")
    arrays = golden("c05_dit_forward.npz")
    found = logits(Gidd.from_pretrained(other), arrays["z_t"], arrays["t"])
    np.testing.assert_allclose(found, arrays["strong/logits"], atol=1e-4, rtol=0)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    for write in (lambda f: pickle.dump(Evil(), f), lambda f: torch.save({"a": Evil()}, f)):
        with (folder / "model.pt").open("wb") as file:
            write(file)
        with pytest.raises(InputError, match=r"model\.pt is damaged or holds more than tensors"):
            load_pretrained(folder)
    assert not (tmp_path / "touched").exists()


def test_llama_folders(tmp_path, golden):
    weights, arrays = golden("c06_llama_state_dict.safetensors"), golden("c06_ar.npz")
    folder = llama_folder(tmp_path / "a", weights)
    found = logits(Gidd.from_pretrained(folder), arrays["input_ids"])
    np.testing.assert_allclose(found, arrays["logits_nomask"], atol=1e-4, rtol=0)

    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    save_file({n: weights[n] for n in names[:9]}, folder / "model-1.safetensors")
    save_file({n: weights[n] for n in names[9:]}, folder / "model-2.safetensors")
    index = {n: f"model-{1 + (i >= 9)}.safetensors" for i, n in enumerate(names)}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    np.testing.assert_array_equal(logits(Gidd.from_pretrained(folder), arrays["input_ids"]), found)
    index_file.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"index\.json is no index of safetensors"):
        load_pretrained(folder)


def test_llama_with_grouped_heads_tied_embeddings_and_scaled_positions(tmp_path, golden):
    weights = golden("c06_llama_state_dict.safetensors")
    del weights["lm_head.weight"]
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name][:32]
    rope = {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    }
    common = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    old = llama_folder(
        tmp_path / "a", weights, **common, rope_theta=500.0, rope_scaling=rope | {"type": "llama3"}
    )
    parameters = rope | {"rope_type": "llama3", "rope_theta": 500.0}
    new = llama_folder(
        tmp_path / "b", weights, **common, rope_theta=None, rope_parameters=parameters
    )
    expected = Llama3RopeScaling(4.0, 1.0, 2.0, 16)
    for folder in (old, new):
        network = load_pretrained(folder).network
        assert (network.rope_theta, network.rope_scaling) == (500.0, expected)
        assert (network.num_kv_heads, network.tie_embeddings) == (2, True)


def test_a_llama_without_pad_and_mask_pads_with_its_end(tmp_path, golden):
    weights = golden("c06_llama_state_dict.safetensors")
    folder = llama_folder(tmp_path / "a", weights)
    write_words(folder, 67, special=())
    model = Gidd.from_pretrained(folder)
    assert (model.tokenizer.pad_id, model.tokenizer.vocab_size) == (66, 69)
    samples = model.generate(prompts=["w1", "w2 w3 w4"], new_tokens=12, batch_size=2)
    assert samples.ids.max() < 67
    assert np.isfinite(samples.log_probs).all()
    write_words(folder, 68, special=())
    with pytest.raises(InputError, match=r"the model has 67 tokens and the tokenizer .* up to 67"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"attention_bias": True}, r"missing model.layers.0.self_attn.k_proj.bias, .* and 3 more"),
        ({"mlp_bias": True}, r"missing model.layers.0.mlp.down_proj.bias, .* and 1 more"),
        ({"head_dim": 32}, r"k_proj.weight has shape \[64, 64\].*\[128, 64\]"),
        ({"sliding_window": 16}, "sliding_window must be null"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "must be 1"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embeddings"),
        ({"model_type": "mistral"}, "model_type = 'mistral': only dit, gidd, llama"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ({"num_attention_heads": 5}, r"hidden_size 64 with num_heads 5"),
        ({"intermediate_size": 128}, r"mlp.down_proj.weight has shape \[64, 256\].*\[64, 128\]"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2': only dit, gidd, llama"),
        ({"vocab_size": None}, r"config.json: vocab_size is missing"),
    ],
)
def test_llama_configs_of_other_architectures(tmp_path, golden, change, message):
    folder = llama_folder(tmp_path / "a", golden("c06_llama_state_dict.safetensors"))
    edit(folder, **change)
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_uniform": None}, "config.json: p_uniform is missing"),
        ({"t_eps": 0.7}, "config.json: t_eps must lie in"),
        ({"num_hidden_layers": 4}, r"model.safetensors: .* missing blocks\.3"),
        ({"timestep_cond_dim": 16}, r"model.safetensors: .* has shape .*, and the config asks for"),
        ({"vocab_size": 68}, "the model has 68 tokens and the tokenizer beside it 67"),
        ({"head_dim": 32}, "head_dim must be"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"sliding_window": 16}, "sliding_window must be null"),
        ({"rope_theta": 5e5}, "rotary positions of a dit must have the base 10000"),
        ({"rope_scaling": {"type": "dynamic"}}, "type 'dynamic' is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"process": {"name": "flow"}}, "process 'flow' is unknown: use one of hybrid, masked"),
        ({"process": {"name": "log_snr", "t_eps": 1e-4}}, "scale is missing"),
    ],
)
def test_malformed_published_configs(tmp_path, change, message):
    folder = published(tmp_path / "hf", "c05_hf_dit_sliced", 67)
    edit(folder, **change)
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


def test_damaged_and_missing_files(tmp_path):
    folder = published(tmp_path / "hf", "c05_hf_dit_sliced", 67)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged .*: fetch it again"):
        load_pretrained(folder)
    save_file(tensors | {"blocks.0.norm1.weight": np.ones(3, np.float32)}, weights)
    with pytest.raises(InputError, match=r"blocks\.0\.norm1\.weight has shape \[3\].*\[64\]"):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load_pretrained(folder)
    save_file(tensors, weights)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json .*: fetch it again"):
            load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load_pretrained(folder)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    for name in (tmp_path / "nowhere", "nowhere", f"{tmp_path}/a/b", ""):
        with pytest.raises(InputError, match="no such folder"):
            load_pretrained(name)
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_pretrained(tmp_path)
    folder = published(tmp_path / "hf", "c05_hf_dit_sliced", 67)
    with pytest.raises(InputError, match="has no moving average"):
        load_pretrained(folder, ema=True)


def test_hub_names(tmp_path, monkeypatch):
    """Neither code nor pickles are fetched; what the hub client raises becomes one line."""
    folder = published(tmp_path / "hf", "c05_hf_dit_sliced", 67)
    asked = []

    def snapshot(name, allow_patterns):
        asked.append(name)
        assert not any(
            Path(f"a{ending}").match(p) for p in allow_patterns for ending in (".py", ".pt")
        )
        if name == "nobody/nothing":
            raise OSError("404\nnot found")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_pretrained("somebody/gidd-small").network.vocab_size == 67
    with pytest.raises(InputError, match=r"nobody/nothing is no folder, .* hub: 404$"):
        load_pretrained("nobody/nothing")
    assert asked == ["somebody/gidd-small", "nobody/nothing"]


def test_a_run_in_bfloat16_gives_its_float32_parameters_up(tmp_path):
    write_checkpoint(tmp_path / "run", tmp_path, "gidd")
    whole = load_pretrained(tmp_path / "run").params
    model = load_pretrained(tmp_path / "run", dtype="bfloat16")
    assert model.network.dtype == jnp.bfloat16
    kernel, scale = ("blocks", "mlp_in", "kernel"), ("blocks", "norm1", "scale")
    found, wanted = flatten_dict(model.params), flatten_dict(whole)
    assert found[kernel].dtype == jnp.bfloat16
    assert found[scale].dtype == jnp.float32
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf.astype(found[path].dtype))
    as_dtype(whole, "bfloat16")
    assert wanted[kernel].is_deleted()
    assert not wanted[scale].is_deleted()


def test_a_workdir_is_still_a_workdir(tmp_path):
    """Its config.json holds the settings of the run, or is lost: the checkpoints have their own."""
    saved = write_checkpoint(tmp_path / "run", tmp_path)
    (tmp_path / "run" / "config.json").write_text("{")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "3"):
        loaded = load_pretrained(path)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, saved.params)
        assert loaded.process == saved.process
