"""Folders as others publish them: their configs, a tokenizer of words, golden weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
from conftest import GOLDEN
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers

LLAMA_CONFIG = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
ORIGINAL_DIT = """
model:
  type: diffusion
  diffusion_process: gidd
  p_uniform: 0.2
  t_eps: 0.0001
  hidden_size: 64
  n_blocks: 3
  n_heads: 4
  cond_dim: 32
  max_seq_len: 32
training:
  seed: 1
"""
ORIGINAL_AR = """
model: {type: autoregressive, hidden_size: 64, n_blocks: 2, n_heads: 4, max_seq_len: 32}
"""


def write_words(folder: Path, size: int, special: tuple[str, ...] = ("[PAD]", "[MASK]")) -> None:
    """A tokenizer of `size` tokens: words, the end of a text, then the special ones."""
    words = [f"w{i}" for i in range(size - 1 - len(special))]
    names = [*words, "<eos>", *special]
    backend = tokenizers.Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>", *special])
    backend.save(str(folder / "tokenizer.json"))
    roles = {"[PAD]": "pad_token", "[MASK]": "mask_token"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    config |= {roles[name]: name for name in special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def published(folder: Path, name: str, size: int) -> Path:
    shutil.copytree(GOLDEN / name, folder)
    write_words(folder, size)
    return folder


def llama_folder(folder: Path, state_dict: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | config))
    save_file(state_dict, folder / "model.safetensors")
    write_words(folder, 67)
    return folder
