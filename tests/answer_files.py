"""Small files of prompts and answers, and a tokenizer that writes conversations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Words w0 to w19 and digits; the roles of a conversation are special tokens."""
    words = [f"w{i}" for i in range(20)] + [str(i) for i in range(10)]
    names = [*words, "<bos>", "<eos>", *ROLES]
    backend = tokenizers.Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<bos>", "<eos>", *ROLES])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def answers_tokenizer(folder: Path, **options: Any) -> Tokenizer:
    return load_tokenizer(write_tokenizer(folder, **options))


def write_records(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def reversals(count: int, seed: int, longest: int = 5) -> list[dict[str, str]]:
    """Digits to reverse, two to `longest` of them, and a word that says where the prompt ends.

    A network that is told no times sees no difference between given digits and its own: without
    the word, 9 2 5 and then 5 5 2 9 would be as good a palindrome as 9 2 5 and 5 2 9.
    """
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 10, rng.integers(2, longest + 1)) for _ in range(count)]
    return [
        {"prompt": " ".join(map(str, row)) + " w0", "answer": " ".join(map(str, row[::-1]))}
        for row in rows
    ]
