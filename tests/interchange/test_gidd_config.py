"""Folders of the scaling paper's models: in and out exactly, in bfloat16, onto meshes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_SCALING
from published_folders import write_words
from safetensors.numpy import load_file

from gidd_jax.errors import InputError
from gidd_jax.inference.batches import mesh_of
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange import save
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.parallel import sharding
from gidd_jax.process import HybridProcess, LogSnrProcess

SHARDED = "s02_hf_bf16_sharded"


def folder_of(tmp_path: Path, name: str) -> Path:
    """A golden folder with a tokenizer of as many words."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN_SCALING / name, folder)
    write_words(folder, 97)
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["s01_hf_published", "s01_hf_fanin", "s01_hf_tied"])
def test_folders_go_in_and_out_exactly(tmp_path, name):
    folder = folder_of(tmp_path, name)
    model = load_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert model.process == LogSnrProcess(97, 96, shift=config["noise_type"])
    assert model.network.position_times
    save.save_pretrained(model, tmp_path / "out")
    wanted = tensors_of(folder)
    if name == "s01_hf_tied":
        wanted.pop("lm_head.weight", None)
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(wanted)
    for tensor, array in wanted.items():
        np.testing.assert_array_equal(found[tensor], array, err_msg=tensor)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    of_others = {"auto_map", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}
    of_others |= {"emb_init_scale", "dtype"}
    assert {k: v for k, v in config.items() if k not in of_others} == {
        k: v for k, v in written.items() if k not in of_others
    }
    again = load_pretrained(tmp_path / "out")
    assert (again.network, again.process) == (model.network, model.process)


def test_a_sharded_folder_in_bfloat16_goes_in_and_out_exactly(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, SHARDED)
    model = load_pretrained(folder, dtype="bfloat16")
    assert model.params["blocks"]["norm1"]["scale"].dtype == jnp.float32
    assert model.params["blocks"]["sink_key"].dtype == jnp.bfloat16
    io = np.load(GOLDEN_SCALING / "s02_hf_bf16_io.npz")
    ids = jnp.asarray(io["input_ids"])
    half = model.network.apply({"params": model.params}, ids, jnp.zeros(1))
    np.testing.assert_allclose(half, io["logits/bf16"], atol=0.5, rtol=0)
    single = load_pretrained(folder)
    logits = single.network.apply({"params": single.params}, ids, jnp.zeros(1))
    np.testing.assert_allclose(logits, io["logits/f32"], atol=1e-4, rtol=0)
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 40_000)
    save.save_pretrained(model, tmp_path / "out")
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert len(list((tmp_path / "out").glob("model-*-of-00002.safetensors"))) == 2
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_pretrained(tmp_path / "out", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_parameters_go_straight_into_the_layout_of_a_mesh(tmp_path):
    folder = folder_of(tmp_path, SHARDED)
    mesh = sharding.make_mesh(2, 2, 2)
    split, whole = Gidd.from_pretrained(folder, mesh=mesh), Gidd.from_pretrained(folder)
    kernel = split.params["blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert mesh_of(split.params) == mesh
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)
    options = {"num_samples": 4, "num_steps": 4, "length": 12}
    ours, theirs = split.generate(**options), whole.generate(**options)
    np.testing.assert_array_equal(ours.ids, theirs.ids)


LOAD = """
import sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu"); jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
import jax.numpy as jnp
from gidd_jax.interchange.placing import Target, place
from gidd_jax.interchange.tensors import gidd_format
from gidd_jax.interchange.weight_files import read_safetensors
from gidd_jax.models.gidd import TimeFreeTransformer
from gidd_jax.parallel import sharding
network = TimeFreeTransformer(4096, 1024, 24, 8)
form = gidd_format(8, normed_heads=True, sink=True, mlp_bias=True, tie_embeddings=False)
def held():
    # Without pages of the file, which is mapped: the kernel may drop those.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10
jnp.zeros(8).block_until_ready()
before = most = held()
def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
target = Target(sharding.make_mesh(1, 8, 1), "bfloat16")
tensors = read_safetensors(Path(sys.argv[1]))[0]
inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1)
params = place(network, inputs, tensors, form, target)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(size, max(most, held()) - before)
"""


def sparse_weights(file: Path) -> None:
    """A file of zeros in bfloat16 that takes no room, of the network in LOAD."""
    width, rows = 1024, 4096
    shapes = {"model.embed_tokens.weight": (rows, width), "lm_head.weight": (rows, width)}
    shapes["model.norm.weight"] = (width,)
    for i in range(24):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{layer}.self_attn.{n}_norm.weight": (width,) for n in "qk"}
        shapes |= {f"{layer}.self_attn.{n}_bias": (8, 128) for n in "kv"}
        shapes |= {f"{layer}.{n}_layernorm.weight": (width,) for n in ("attn", "mlp")}
        shapes |= {f"{layer}.mlp.up_proj.weight": (4 * width, width)}
        shapes |= {f"{layer}.mlp.up_proj.bias": (4 * width,)}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, 4 * width)}
        shapes |= {f"{layer}.mlp.down_proj.bias": (width,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def test_the_host_holds_a_tensor_at_a_time(tmp_path):
    """600 MB of weights: the devices, here the host's memory, hold them once."""
    sparse_weights(tmp_path / "model.safetensors")
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    size, grown = map(int, out.stdout.split())
    assert size > 6e8
    assert size < grown < size + 1e8  # the largest tensor has 8 MB, the largest stack 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, r"head_dim = 16: must be hidden_size / num_attention_heads = 8"),
        (
            {"weight_scaling": "fan"},
            "weight_scaling = 'fan': must be a number, or fan_in or fan_out",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling must be null"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type must be default",
        ),
        ({"is_causal": True}, "is_causal must be false"),
        ({"num_attention_heads": 5}, "hidden_size 32 with num_heads 5"),
        ({"use_qk_norm": "yes"}, "use_qk_norm = 'yes': must be true or false"),
        ({"use_qk_norm": False}, r"unknown model.layers.0.self_attn.k_norm.weight"),
        ({"num_hidden_layers": 3}, r"missing model\.layers\.2\."),
        ({"num_hidden_layers": 99}, "has 99 layers, and the weights have 31 tensors"),
        ({"intermediate_size": 64}, r"mlp.down_proj.weight has shape \[32, 128\].* \[32, 64\]"),
        ({"vocab_size": 96}, "the model has 96 tokens and the tokenizer beside it 97"),
        ({"min_log_snr": 9.0}, "min_log_snr must be below max_log_snr"),
        ({"attn_soft_cap": None}, "attn_soft_cap is null: must be a number above 0"),
        ({"attn_soft_cap": -1.0}, "attn_soft_cap = -1.0: must be a number above 0"),
        ({"rope_theta": 0}, "rope_theta = 0.0: must be a number above 0"),
        ({"noise_type": float("nan")}, "noise_type = nan: must be a finite number"),
        ({"block_length": 5}, "block_length = 5: must divide the context, 48"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    folder = folder_of(tmp_path, "s01_hf_published")
    edit(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


def test_shards_that_are_missing_or_do_not_hold_what_the_index_says(tmp_path):
    folder = folder_of(tmp_path, SHARDED)
    with pytest.raises(InputError, match="dtype 'int8': legal values: float32, bfloat16"):
        load_pretrained(folder, dtype="int8")
    index = folder / "model.safetensors.index.json"
    wrong = json.loads(index.read_text())
    wrong["weight_map"]["lm_head.bias"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=r"index.json names lm_head.bias in model-00002.*not"):
        load_pretrained(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors is missing, a shard"):
        load_pretrained(folder)


def test_a_process_of_the_first_paper_is_written_beside_the_network(tmp_path):
    model = load_pretrained(folder_of(tmp_path, "s01_hf_published"))
    model = model._replace(process=HybridProcess(97, 96, 0.2), row_mode="padded")
    model = model._replace(network=model.network.clone(position_times=False))
    save.save_pretrained(model, tmp_path / "out")
    again = load_pretrained(tmp_path / "out")
    assert again.process == model.process
    assert (again.network.position_times, again.row_mode) == (False, "padded")
