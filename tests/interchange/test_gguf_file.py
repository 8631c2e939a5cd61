"""Files of llama.cpp: written with the package gguf as its converter does, read by us."""

import numpy as np
import pytest
from golden_llama import GOLDEN, IDS, TINY

from gidd_jax.errors import InputError
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.weight_files import read_safetensors

gguf = pytest.importorskip("gguf")
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROOT = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = ["<eos>", "<|user|>", *LETTERS, "Ġ", "ab", "Ġab"]
TOKENS += [str(i) for i in range(10)] + [f"x{i}" for i in range(67 - len(TOKENS) - 10)]


def permuted(array, heads):
    """The rows of queries and keys as llama.cpp's converter orders them."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def write_gguf(file, name="llama", kind="llama", quantised=(), skip=(), **values):
    """A golden folder as one file; values: of the header, None leaves one out."""
    tensors, _ = read_safetensors(GOLDEN / name)
    writer = gguf.GGUFWriter(file, kind)
    head_dim = {"qwen3": 6, "llama_wide_heads": 8}.get(name, 4)
    header = {
        "block_count": 2,
        "context_length": 32,
        "embedding_length": 16,
        "feed_forward_length": 24,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": head_dim,
    }
    for key, value in (header | values).items():
        if isinstance(value, int):
            writer.add_uint32(f"{kind}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{kind}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(TINY.get("rope_theta", 10000.0))
    writer.add_tokenizer_model(values.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(values.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_token_types([3, 3] + [1] * 65)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    for full in tensors:
        if full in skip:
            continue
        array = np.asarray(tensors[full], np.float32)
        there = ROOT.get(full)
        if there is None:
            _, _, layer, *middle, leaf = full.split(".")
            there = f"blk.{layer}.{NAMES['.'.join(middle)]}.{leaf}"
            for part, heads in (("q_proj", 4), ("k_proj", 2)):
                if kind == "llama" and middle[-1] == part:
                    array = permuted(array, heads)
        if there in quantised:
            of_kind = gguf.GGMLQuantizationType.F16
            writer.add_tensor(there, gguf.quants.quantize(array, of_kind), raw_dtype=of_kind)
        else:
            writer.add_tensor(there, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits_of(model):
    import jax
    import jax.numpy as jnp

    with jax.default_matmul_precision("highest"):
        return np.asarray(model.network.apply({"params": model.params}, jnp.asarray(IDS)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "llama"),
        ("llama_wide_heads", "llama"),
        ("llama_biases", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_the_numbers_are_those_of_the_folder(name, kind, tmp_path):
    biases = [f"model.layers.{i}.mlp.{n}_proj.bias" for i in (0, 1) for n in ("gate", "up", "down")]
    if name == "llama_biases":
        with pytest.raises(InputError, match="unknown model"):
            load_pretrained(write_gguf(tmp_path / "a.gguf", name, kind))
        return  # biases of the perceptron are no part of such files
    model = load_pretrained(write_gguf(tmp_path / "a.gguf", name, kind, skip=biases))
    with np.load(GOLDEN / "logits.npz") as logits:
        wanted = logits[name]
    np.testing.assert_allclose(logits_of(model), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_quantised_numbers_are_dequantised(tmp_path):
    quantised = {"token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_up.weight"}
    model = load_pretrained(write_gguf(tmp_path / "a.gguf", quantised=quantised))
    exact = load_pretrained(write_gguf(tmp_path / "b.gguf"))
    table, other = (m.params["vocab_embed"]["embedding"] for m in (model, exact))
    np.testing.assert_array_equal(np.asarray(table), np.asarray(other).astype(np.float16))
    assert not np.array_equal(table, other)
    np.testing.assert_allclose(logits_of(model), logits_of(exact), atol=0.02)


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = load_pretrained(write_gguf(tmp_path / "a.gguf")).tokenizer
    (ids,) = tokenizer.encode(["ab ab12"])
    assert [TOKENS[i] for i in ids] == ["ab", "Ġab", "1", "2"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)
    assert tokenizer.decode(ids) == "ab ab12"
    assert tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gemma"}, "holds a 'gemma': only llama, qwen2, qwen3 can be read"),
        ({"block_count": None}, "has no llama.block_count: it is no whole model"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn' is not read from such files"),
        ({"tokenizer": "llama"}, "its tokenizer is 'llama', divided as 'smollm', which is not"),
        ({"pre": "tekken"}, "divided as 'tekken', which is not read from such files: put the"),
    ],
)
def test_what_is_not_read_is_one_line(changes, message, tmp_path):
    with pytest.raises(InputError) as caught:
        load_pretrained(write_gguf(tmp_path / "a.gguf", **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_named(tmp_path):
    file = write_gguf(tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="is damaged"):
        load_pretrained(file)
    with pytest.raises(InputError, match="no such file"):
        load_pretrained(tmp_path / "none.gguf")
