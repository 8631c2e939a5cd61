"""Tokenizers: any fast transformers tokenizer behind one small picklable wrapper."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from gidd_jax.errors import InputError

EMBEDDED = "embedded"
# Names that mark the ends of a text in a folder that holds nothing but tokenizer.json.
_BEGIN_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<|endoftext|>")
_VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_END_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids of its special tokens; `bos_id` is None where there is no BOS."""

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    bos_id: int | None
    eos_id: int
    pad_id: int
    mask_id: int
    name: str

    def __post_init__(self):
        # The texts are data: "[MASK]" written in one of them is seven characters, not the mask.
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # pickling loses encode_special_tokens

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, special and added tokens included (one more than the largest id)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text gets and what they mean."""
        spec = json.loads(self.backend.to_str())
        merges = [
            m.split(" ", 1) if isinstance(m, str) else m for m in spec["model"].get("merges", [])
        ]
        content = {
            "vocab": self.backend.get_vocab(with_added_tokens=True),
            "model": spec["model"]["type"],
            "merges": merges,
            "normalizer": spec["normalizer"],
            "pre_tokenizer": spec["pre_tokenizer"],
            "special": [self.bos_id, self.eos_id, self.pad_id, self.mask_id],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [num_tokens], without BOS and EOS, in parallel threads."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Like `encode`, plus the number of UTF-8 bytes each token stands for, int32 [num_tokens].

        The bytes of a text's tokens sum to its length in bytes: what a tokenizer drops (such as
        blanks) counts with the next token, a character of several tokens with the first of them.
        """
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(e.ids, np.int32), _token_bytes(text, e.offsets))
            for text, e in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Text of one sequence of ids [num_tokens]."""
        return self.backend.decode(
            np.asarray(ids).tolist(), skip_special_tokens=skip_special_tokens
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, readable by transformers and by us."""
        from transformers import PreTrainedTokenizerFast

        roles = {"eos": self.eos_id, "pad": self.pad_id, "mask": self.mask_id}
        if self.bos_id is not None:
            roles["bos"] = self.bos_id
        tokens = {f"{role}_token": self.backend.id_to_token(i) for role, i in roles.items()}
        PreTrainedTokenizerFast(tokenizer_object=self.backend, **tokens).save_pretrained(
            str(folder)
        )


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load 'embedded', a local folder (tokenizer.json is enough) or a name on the Hugging Face hub.

    [PAD] and [MASK] are added where they are missing. Raises InputError when there is no such
    tokenizer, or it has no fast version, or no token that ends a text.
    """
    # Read at the first import: without it transformers warns that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    name = str(name_or_path)
    folder = Path(name).expanduser()
    if name == EMBEDDED:
        folder = Path(str(resources.files("gidd_jax") / "assets/tokenizer"))
    is_local = name != "" and folder.is_dir()
    if not is_local and looks_like_path(name):
        raise InputError(
            f"no tokenizer folder {name!r}: give 'embedded', a folder with tokenizer.json, "
            "or a name on the Hugging Face hub"
        )
    if is_local and not any((folder / n).is_file() for n in _VOCABULARY_FILES):
        raise InputError(f"tokenizer folder {name!r} holds no tokenizer.json")
    try:
        hf = AutoTokenizer.from_pretrained(
            str(folder) if is_local else name, local_files_only=is_local, trust_remote_code=False
        )
    except Exception as error:  # whatever the hub client or the parser raises
        where = (
            "is damaged or of an unknown kind" if is_local else "is no folder and not on the hub"
        )
        raise InputError(f"tokenizer {name!r} {where}: {_first_line(error)}") from error
    if not hasattr(hf, "backend_tokenizer"):
        raise InputError(f"tokenizer {name!r} has no fast version (tokenizer.json)")
    return _wrap(hf, name)


def _wrap(hf: Any, name: str) -> Tokenizer:
    """Complete the special tokens of a transformers tokenizer and wrap its backend."""
    if hf.pad_token_id is None:
        hf.add_special_tokens({"pad_token": "[PAD]"})
    if hf.mask_token_id is None:
        hf.add_special_tokens({"mask_token": "[MASK]"})
    # `is None` and not `or`: 0 is a legal id.
    bos_id = hf.cls_token_id if hf.bos_token_id is None else hf.bos_token_id
    eos_id = hf.sep_token_id if hf.eos_token_id is None else hf.eos_token_id
    if bos_id is None and eos_id is None:
        special = {t.content: i for i, t in hf.added_tokens_decoder.items() if t.special}
        bos_id = next((special[n] for n in _BEGIN_NAMES if n in special), None)
        eos_id = next((special[n] for n in _END_NAMES if n in special), None)
    if eos_id is None:
        raise InputError(
            f"tokenizer {name!r} has neither an EOS nor a SEP token: "
            "set eos_token in its tokenizer_config.json"
        )
    pad_id: Any = hf.pad_token_id
    mask_id: Any = hf.mask_token_id
    return Tokenizer(hf.backend_tokenizer, bos_id, eos_id, pad_id, mask_id, name)


def looks_like_path(name: str) -> bool:
    """Tell a mistyped folder from a hub name, which costs a minute of retries without a network."""
    is_hub_name = name.count("/") <= 1 and not name.startswith((".", "~", "/")) and name != ""
    parent = Path(name).parent
    return not is_hub_name or (parent != Path(".") and parent.is_dir())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes per token from the character offsets of the tokens in the text."""
    if not offsets:
        return np.zeros(0, np.int32)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets]))
    ends[-1] = len(text)
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        ends = np.concatenate([[0], np.cumsum(lengths)])[ends]
    return np.diff(ends, prepend=0).astype(np.int32)
