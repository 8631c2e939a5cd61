"""Every reader of files on damaged ones: nothing but InputError comes out, nothing is executed,
and no entry leads out of its folder."""

import gzip
import io
import json
import lzma
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import GOLDEN
from fuzzing import damaged, fuzz, only_input_error
from hypothesis import strategies as st
from published_folders import LLAMA_CONFIG, ORIGINAL_AR, ORIGINAL_DIT, write_words
from safetensors.numpy import save_file
from tiny_run import tiny_settings, write_tokenizer

from gidd_jax.checkpoints.workdir import check_workdir
from gidd_jax.data.files import open_text_file
from gidd_jax.data.texts import read_texts
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.inference.samples import load_ids
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.weight_files import read_safetensors
from gidd_jax.sampling.trace import changes_between, load_trace, make_trace, save_trace


class Reader(NamedTuple):
    """How valid files are written into a folder, which one is damaged, and how they are read."""

    write: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]


# ---- the readers


def corpus(name: str) -> Reader:
    data = "".join(json.dumps({"text": f"Text é {i}.", "id": i}) + "\n" for i in range(4)).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)

    return Reader(
        lambda folder: (folder / name).write_bytes(pack(data)),
        name,
        lambda folder: read_documents(folder / name),
    )


def write_parquet(folder: Path) -> None:
    table = pyarrow.table({"text": ["one", "two", "three"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)


def read_parquet(folder: Path) -> None:
    read_documents(folder / "a.parquet")


def read_documents(file: Path) -> None:
    documents = open_text_file(file, "text", "blank_line")
    assert all(isinstance(documents[i], str) for i in range(len(documents)))


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids, _ = tokenizer.encode_with_bytes(["It is a truth, é."])[0]
    tokenizer.decode(ids)
    assert tokenizer.vocab_size > max(tokenizer.pad_id, tokenizer.mask_id)
    assert tokenizer.has_fingerprint(tokenizer.fingerprint)


def write_words_and(folder: Path, files: dict[str, str]) -> None:
    write_words(folder, 67)
    for name, text in files.items():
        (folder / name).write_text(text)


def write_published(folder: Path) -> None:
    shutil.copytree(GOLDEN / "c05_hf_dit_sliced", folder, dirs_exist_ok=True)
    write_words(folder, 67)


def write_tensors(folder: Path) -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"a": tensor}, folder / "part-1.safetensors")
    save_file({"b": tensor}, folder / "part-2.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_samples(folder: Path) -> None:
    fields = {"ids": np.arange(6, dtype=np.int32).reshape(2, 3), "texts": np.array(["a", "bé"])}
    fingerprint = load_tokenizer("embedded").fingerprint
    np.savez_compressed(
        folder / "a.npz", **fields, tokenizer=fingerprint, sampling_precision="float32"
    )


def write_trace(folder: Path) -> None:
    frames = np.random.default_rng(0).integers(3, 20, (4, 2, 5))
    changes = changes_between(frames[0], frames[1:], np.zeros((3, 2, 5)))
    tokenizer = load_tokenizer("embedded")
    given = np.zeros((2, 5), bool)
    trace = make_trace(changes, given, np.array([5, 4]), ["a", "é"], tokenizer)
    save_trace(folder / "trace.npz", trace)


def write_workdir_config(folder: Path) -> None:
    (folder / "config.json").write_text(tiny_settings(folder).to_json())


def read_ids(folder: Path) -> None:
    assert load_ids(folder / "a.npz", load_tokenizer("embedded")).ndim == 2


def read_sampled_texts(folder: Path) -> None:
    assert all(isinstance(text, str) for text in read_texts(folder / "a.npz", "--samples").texts)


READERS = {
    "txt": corpus("a.txt"),
    "jsonl": corpus("a.jsonl"),
    "jsonl.gz": corpus("a.jsonl.gz"),
    "jsonl.xz": corpus("a.jsonl.xz"),
    "parquet": Reader(write_parquet, "a.parquet", read_parquet),
    "tokenizer": Reader(write_tokenizer, "tokenizer.json", read_tokenizer),
    "tokenizer config": Reader(write_tokenizer, "tokenizer_config.json", read_tokenizer),
    "ids": Reader(write_samples, "a.npz", read_ids),
    "texts": Reader(write_samples, "a.npz", read_sampled_texts),
    "trace": Reader(write_trace, "trace.npz", lambda folder: load_trace(folder / "trace.npz")),
    "index": Reader(write_tensors, "model.safetensors.index.json", read_safetensors),
    "safetensors": Reader(write_tensors, "part-1.safetensors", read_safetensors),
    "published config": Reader(write_published, "config.json", load_pretrained),
    "workdir": Reader(
        write_workdir_config,
        "config.json",
        lambda folder: check_workdir(folder, tiny_settings(folder)),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(tmp_path, name):
    reader = READERS[name]
    reader.write(tmp_path)
    reader.read(tmp_path)  # what is not damaged is read
    file = tmp_path / reader.file
    valid = file.read_bytes()

    def check(data: bytes) -> None:
        file.unlink()  # not in place: the one before may still be mapped
        file.write_bytes(data)
        only_input_error(lambda: reader.read(tmp_path))

    fuzz(check, damaged(valid))


# Without a tokenizer_config.json a tokenizer is whole.
@pytest.mark.parametrize("name", sorted(READERS.keys() - {"tokenizer config"}))
def test_folders_in_place_of_files(tmp_path, name):
    reader = READERS[name]
    reader.write(tmp_path)
    (tmp_path / reader.file).unlink()
    (tmp_path / reader.file).mkdir()
    with pytest.raises(InputError):
        reader.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [ORIGINAL_DIT, ORIGINAL_AR, json.dumps(LLAMA_CONFIG)],
    ids=["diffusion", "autoregressive", "llama"],
)
def test_model_configs_without_weights(tmp_path, text):
    """All of the config is read before the weights, which are not there."""
    is_original = text.lstrip().startswith("model:")
    write_words_and(tmp_path, {})
    if not is_original:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    file = tmp_path / ("config.yaml" if is_original else "config.json")

    def check(data: bytes) -> None:
        file.write_bytes(data)
        with pytest.raises(InputError):
            load_pretrained(tmp_path)

    fuzz(check, damaged(text.encode()))


ARRAYS = [
    *(np.array(v) for v in (0, -1, 1.5, "x", True, [], [[]], [-1, 2], [["x"]], [1 << 62], [[0.5]])),
    np.array([{"a": 1}, None], dtype=object),
    np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
    np.zeros((2, 0, 3), np.int32),
]


@pytest.mark.parametrize("name", ["ids", "texts", "trace"])
def test_other_arrays(tmp_path, name):
    """Well-formed files whose arrays are not what they should be."""
    reader = READERS[name]
    reader.write(tmp_path)
    file = tmp_path / reader.file
    with np.load(file) as found:
        valid = dict(found)

    def check(change: tuple[str, int]) -> None:
        field, choice = change
        np.savez(file, **{**valid, field: ARRAYS[choice]})
        only_input_error(lambda: reader.read(tmp_path))

    fuzz(check, st.tuples(st.sampled_from(sorted(valid)), st.integers(0, len(ARRAYS) - 1)), 40)


def test_an_array_that_claims_more_than_the_memory(tmp_path):
    write_samples(tmp_path)
    header = io.BytesIO()
    claim = {"descr": "<i4", "fortran_order": False, "shape": (1 << 30, 1 << 20)}
    np.lib.format.write_array_header_1_0(header, claim)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("ids.npy", header.getvalue())
    with pytest.raises(InputError, match="is no file of samples"):
        read_ids(tmp_path)


# ---- code


class Touch:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_is_executed(tmp_path):
    marker = tmp_path / "executed"
    evil = pickle.dumps(Touch(marker))
    pickle.loads(evil)
    assert marker.exists()  # it would
    marker.unlink()

    write_samples(tmp_path)
    np.savez(tmp_path / "a.npz", ids=np.array([Touch(marker)], dtype=object))
    (tmp_path / "trace.npz").write_bytes(evil)
    for name in ("ids", "texts", "trace"):
        with pytest.raises(InputError):
            READERS[name].read(tmp_path)

    original = tmp_path / "original"
    original.mkdir()
    path = f"!!python/object/apply:pathlib.Path [{marker}]"
    call = f"!!python/object/apply:pathlib.Path.touch [{path}]"
    write_words_and(original, {"config.yaml": f"model: {call}\n"})
    with pytest.raises(InputError, match="no plain YAML"):
        load_pretrained(original)

    remote = tmp_path / "remote"
    write_tokenizer(remote)
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n"
    (remote / "evil.py").write_text(code)
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (remote / "tokenizer_config.json").write_text(json.dumps(config))
    only_input_error(lambda: load_tokenizer(remote))
    assert not marker.exists()
