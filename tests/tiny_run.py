"""A run of seconds: a few lines of text, a tokenizer of bytes, thin layers; and what it left."""

import hashlib
import json
import os
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers

from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.cli import load_config
from gidd_jax.settings import Settings

SENTENCE = "Line {}: it is a truth universally acknowledged, that {} single men want a wife."
END = "<|endoftext|>"
VOCAB_SIZE = 259  # the bytes, END, and the [PAD] and [MASK] that are added

# `python -c TRAIN SIGNAL N ...` is the train command that sends itself the signal before its n-th
# training batch; with 0 0 it is the plain command.
TRAIN = """
import os, runpy, sys
number, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
if at:
    from gidd_jax.data.pipeline import TrainBatches
    original, count = TrainBatches.__next__, 0
    def following(self):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
        return original(self)
    TrainBatches.__next__ = following
runpy.run_module("gidd_jax.train", run_name="__main__", alter_sys=True)
"""


def write_corpus(folder: Path, name: str = "corpus.txt", lines: int = 24) -> Path:
    """A .txt file with one document a line."""
    file = folder / name
    file.write_text("".join(SENTENCE.format(i, 7 * i) + "\n" for i in range(lines)))
    return file


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes with an end token, without pad and mask."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([END, *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_config(folder: Path, name: str = "gidd", **changes: object) -> ConfigDict:
    """The config of a run on the corpus and tokenizer in `folder`, written there if missing.

    `changes` are values by dotted key. name: gidd | mdlm | ar.
    """
    config = load_config(name)
    config.model.update(
        hidden_size=32, num_layers=2, num_heads=4, cond_dim=16, max_seq_len=16, dtype="float32"
    )
    config.data.update(
        path=str(folder / "corpus.txt"),
        tokenizer=str(folder / "tokenizer"),
        validation="last:4",
        txt_documents="line",
        mode="padded",
    )
    config.optimizer.update(learning_rate=3e-3, warmup_steps=5)
    config.train.update(num_steps=20, batch_size=8, eval_every=0, eval_batches=2)
    config.checkpoint.every = 4
    config.logging.every = 1
    if not (folder / "tokenizer").exists():
        write_corpus(folder)
        write_tokenizer(folder / "tokenizer")
    config.update_from_flattened_dict(changes)
    return config


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """The environment of a command that trains in `folder`, again and again the same program."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **changes,
    }


def tiny_settings(folder: Path, name: str = "gidd", **changes: object) -> Settings:
    """The settings of `tiny_config`."""
    return Settings.from_config(tiny_config(folder, name, **changes))


def saved_arrays(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint (the newest one) by its name."""
    checkpoint = find_checkpoint(workdir if step is None else workdir / "checkpoints" / str(step))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        reader, folder = ocp.PyTreeCheckpointHandler(), checkpoint.folder / "state"
        # As NumPy arrays: the devices that saved them need not be here.
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).tree
        )
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_arrays(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def figures_by_step(workdir: Path) -> dict[int, dict[str, float]]:
    """The lines of metrics.jsonl by step, without speeds; fails where a line is there twice."""
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        here = found.setdefault(values.pop("step"), {})
        assert not here.keys() & values.keys(), "a step is there twice"
        here.update({k: v for k, v in values.items() if k != "train/tokens_per_second"})
    return found


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def steps_on_disk(workdir: Path) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(workdir / "checkpoints"))
