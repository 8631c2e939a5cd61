"""Files of llama.cpp (.gguf): the weights, dequantised, the config and the tokenizer of a Llama.

The file says all of it, in other names than transformers: here it becomes the config.json and the
tensors of such a folder, one tensor at a time.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.data.tokenizer_files import SPEC_FILE
from gidd_jax.errors import InputError, first_line

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_NAMES = {  # of a layer's tensors, there and here
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROOT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Gguf(Mapping[str, np.ndarray]):
    """The tensors of a file by transformers' names, float32, each dequantised when asked for."""

    def __init__(self, file: Path) -> None:
        """Read the header; raises InputError for a file that is damaged, or of another model."""
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise InputError(f"{file}: pip install 'gidd-jax[gguf]' to read it") from error
        try:
            self._reader = GGUFReader(file)
        except Exception as error:  # the reader's own, and NumPy's of what is cut off
            raise InputError(f"{file} is damaged ({first_line(error)}): fetch it again") from error
        self.file = file
        self.architecture = self.value("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{file} holds a {self.architecture!r}: only {', '.join(ARCHITECTURES)} can be read"
            )
        self._tensors = {_named(t.name): t for t in self._reader.tensors}
        if "rope_freqs.weight" in self._tensors:
            raise InputError(
                f"{file} has frequencies of its own (rope_freqs), without saying of which type: "
                "give the model's folder of safetensors"
            )

    def value(self, key: str, default: Any = None) -> Any:
        """Return a value of the header; raises InputError where it is missing without a default."""
        field = self._reader.get_field(key)
        if field is None and default is None:
            raise InputError(f"{self.file} has no {key}: it is no whole model")
        return default if field is None else field.contents()

    def number(self, key: str, default: Any = None) -> Any:
        """Return a value of the section that the architecture names."""
        return self.value(f"{self.architecture}.{key}", default)

    def config(self) -> dict[str, Any]:
        """Return what config.json of such a folder says."""
        scaling = self.number("rope.scaling.type", "none")
        if scaling != "none":
            raise InputError(
                f"{self.file}: rope.scaling.type = {scaling!r} is not read from such files: give "
                "the model's folder of safetensors"
            )
        heads, width = self.number("attention.head_count"), self.number("embedding_length")
        has_bias = "model.layers.0.self_attn.q_proj.bias" in self
        return {
            "model_type": self.architecture,
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": width,
            "intermediate_size": self.number("feed_forward_length"),
            "num_hidden_layers": self.number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv", heads),
            "head_dim": self.number("attention.key_length", width // heads),
            "max_position_embeddings": self.number("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "attention_bias": has_bias and self.architecture != "qwen2",
            "tie_word_embeddings": "lm_head.weight" not in self,
            "use_sliding_window": False,
        }

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError as error:
            raise InputError(
                f"{self.file}: {name} is of type {tensor.tensor_type.name}, which the package gguf "
                "cannot dequantise: give a file of another quantisation"
            ) from error
        array = array.reshape(self.shape(name))
        for part, count in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
            if self.architecture == "llama" and f".{part}." in name:
                array = _halves(array, self.number(f"attention.{count}"))
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it; there axes are counted from the last."""
        return tuple(int(size) for size in self._tensors[name].shape[::-1])

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def tokenizer(self, folder: Path) -> Tokenizer:
        """Return the tokenizer, written into a folder; one beside the file is preferred.

        Raises InputError for another kind than byte-level BPE of a known way to divide texts.
        """
        if (self.file.parent / SPEC_FILE).is_file():
            return load_tokenizer(self.file.parent)
        kind, way = self.value("tokenizer.ggml.model"), self.value("tokenizer.ggml.pre", "default")
        split = _divided(way)
        if kind != "gpt2" or split is None:
            raise InputError(
                f"{self.file}: its tokenizer is {kind!r}, divided as {way!r}, which is not read "
                f"from such files: put the model's {SPEC_FILE} beside it"
            )
        tokens = self.value("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ", 1)) for pair in self.value("tokenizer.ggml.merges")]
        backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        backend.pre_tokenizer = split
        backend.decoder = decoders.ByteLevel()
        types = self.value("tokenizer.ggml.token_type", [])
        for token, number in zip(tokens, types, strict=False):
            if number in (_CONTROL, _USER_DEFINED):
                special = number == _CONTROL
                backend.add_tokens([AddedToken(token, special=special, normalized=False)])
        folder.mkdir(parents=True, exist_ok=True)
        backend.save(str(folder / SPEC_FILE))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for role in ("bos", "eos"):
            number = self.value(f"tokenizer.ggml.{role}_token_id", -1)
            if number >= 0:
                config[f"{role}_token"] = tokens[number]
        template = self.value("tokenizer.chat_template", "")
        if template:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_tokenizer(folder)


def _named(name: str) -> str:
    """Return transformers' name of a tensor; its own where there is none."""
    if name in _ROOT:
        return _ROOT[name]
    parts = name.split(".")  # blk.3.attn_q.weight
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _NAMES:
        return f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    return name


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of queries or keys in transformers' order: llama.cpp turns neighbours, not the
    halves of a head, and keeps the rows in pairs."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _divided(way: str) -> Any:
    """Return what divides a text into words before byte-level BPE; None for an unknown way."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if way in ("default", "gpt-2"):
        return plain
    if way == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    digits = {"qwen2": "", "llama-bpe": "{1,3}"}
    if way not in digits:
        return None
    words = pre_tokenizers.Split(Regex(_WORDS % digits[way]), "isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, rest])
