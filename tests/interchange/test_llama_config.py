"""Llama, Qwen2 and Qwen3 by their differences, against transformers' own networks.

Stored logits (see golden_llama.py); where PyTorch is installed, it is asked, too.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_llama import CASES, GOLDEN, IDS, torch_logits
from published_folders import write_words

from gidd_jax.errors import InputError
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.save import save_pretrained


@pytest.fixture
def folder(request, tmp_path):
    shutil.copytree(GOLDEN / request.param, tmp_path / "model")
    write_words(tmp_path / "model", 67)
    return tmp_path / "model"


def our_logits(model):
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.network.apply)({"params": model.params}, jnp.asarray(IDS))


@pytest.mark.parametrize(("folder", "name"), [(n, n) for n in CASES], indirect=["folder"])
def test_logits_are_those_of_transformers(folder, name):
    with np.load(GOLDEN / "logits.npz") as logits:
        wanted = logits[name]
    assert wanted.std() > 0.5
    model = load_pretrained(folder)
    np.testing.assert_allclose(our_logits(model), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize(("folder", "name"), [(n, n) for n in CASES], indirect=["folder"])
def test_folders_come_back_and_transformers_reads_them(folder, name, tmp_path):
    model = load_pretrained(folder)
    save_pretrained(model, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.network == model.network
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")
    )
    for key in ("model_type", "architectures", "num_key_value_heads", "vocab_size"):
        assert after[key] == before[key]
    pytest.importorskip("torch")
    wanted = torch_logits(folder)
    np.testing.assert_allclose(torch_logits(tmp_path / "out"), wanted, atol=1e-6, rtol=0)
    np.testing.assert_allclose(our_logits(model), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_the_cache_goes_on_where_the_sequence_ended(folder):
    model = load_pretrained(folder)
    network, variables = model.network, {"params": model.params}
    cache, parts = network.init_cache(2, 32), []
    for first, last in ((0, 5), (5, 6), (6, 32)):
        ids = jnp.asarray(IDS[:, first:last])
        part, cache = network.apply(variables, ids, cache, first, method="decode_step")
        parts.append(part)
    found = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(found, our_logits(model), atol=1e-4)


@pytest.mark.parametrize("folder", ["qwen2"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "only dit, gidd, llama, qwen2, qwen3, llama_denoiser can"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window must be null"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "only default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
        ({"layer_types": [{}]}, "layer_types must be"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor = 0: must be above 0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1}},
            "rope_theta = 1: must be above 1",
        ),
        ({"head_dim": 3}, "head_dim is 3: it must be even"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3; it must divide"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ],
)
def test_other_architectures_are_refused_by_name(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


def test_a_tokenizer_without_pad_and_mask_goes_out_as_it_came(tmp_path):
    """They are added on the way in, and are no tokens of the model: it could not be read again."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    write_words(tmp_path / "model", 67, special=())
    model = load_pretrained(tmp_path / "model")
    assert model.tokenizer.vocab_size == 69
    save_pretrained(model, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.tokenizer.encode(["w1 w2"])[0].tolist() == [1, 2]
    assert again.tokenizer.pad_id == model.tokenizer.pad_id
    spec = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert max(token["id"] for token in spec["added_tokens"]) < 67
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
