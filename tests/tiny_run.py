"""A run of seconds: a corpus of a few lines, a tokenizer of bytes, a network of two thin layers."""

import json
from pathlib import Path

import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers

from gidd_jax.cli import load_config
from gidd_jax.settings import Settings

SENTENCE = "Line {}: it is a truth universally acknowledged, that {} single men want a wife."
END = "<|endoftext|>"
VOCAB_SIZE = 259  # the bytes, END, and the [PAD] and [MASK] that are added


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


def tiny_settings(folder: Path, name: str = "gidd", **changes: object) -> Settings:
    """The settings of `tiny_config`."""
    return Settings.from_config(tiny_config(folder, name, **changes))
