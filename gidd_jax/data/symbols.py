"""Tokenizers of symbols: ids written as numbers, and single characters.

`ids:VOCAB` has the symbols 0 to VOCAB - 1, `chars:FILE` the characters of a file; then follow the
mask and, where rows are framed, the tokens that end a text and fill it up.
"""

import contextlib
import json
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from gidd_jax.errors import InputError

IDS, CHARS = "ids:", "chars:"
MOST_IDS = 1 << 20
_ROLES = {"mask": "[MASK]", "eos": "[EOS]", "pad": "[PAD]"}


def is_symbols(name: str) -> bool:
    """Tell whether the name of a tokenizer is one of symbols."""
    return name.startswith((IDS, CHARS))


def symbols_spec(name: str, *, ends: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of tokenizer.json and the token of each role; ends: with those of a frame.

    Raises InputError for a VOCAB out of range, and a FILE that is missing or no list of characters.
    """
    roles = _ROLES if ends else {"mask": _ROLES["mask"]}
    vocabulary = _numbers(name) if name.startswith(IDS) else read_characters(characters_file(name))
    # No vocabulary of symbols holds its unknown token: what is no symbol is an error.
    backend = Tokenizer(models.WordLevel({s: i for i, s in enumerate(vocabulary)}, unk_token=""))
    if name.startswith(IDS):
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(roles.values()))
    return json.loads(backend.to_str()), dict(roles)


def characters_file(name: str) -> Path:
    """Return FILE of `chars:FILE`."""
    return Path(name.removeprefix(CHARS)).expanduser()


def read_characters(file: Path) -> list[str]:
    """Return the characters of a file, each of which is one token; their order gives the ids.

    Raises InputError when there is no such file, it is no UTF-8, or does not hold each once.
    """
    try:
        characters = list(file.read_bytes().decode())
    except FileNotFoundError:
        raise InputError(
            f"no file of characters {file}: training and gidd_jax.prepare_data write it from the "
            "texts that they are given"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"the file of characters {file} cannot be read: {error}") from error
    if len(characters) < 2:
        raise InputError(f"the file of characters {file} holds {len(characters)}: give at least 2")
    seen: set[str] = set()
    for character in characters:
        if character in seen:
            raise InputError(
                f"the file of characters {file} holds {character!r} twice: each stands there once, "
                "with nothing between them, no line end either"
            )
        seen.add(character)
    return characters


def write_characters(file: Path, texts: Iterable[str]) -> None:
    """Write the characters of texts, sorted, into a file that appears whole.

    Several processes, on one host or many, may write it at once. Raises InputError when the texts
    have fewer than 2 characters, or it cannot be written.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if len(found) < 2:
        raise InputError(
            f"the texts for the file of characters {file} hold {len(found)} different: give texts "
            "with at least 2"
        )
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes("".join(sorted(found)).encode())
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"the file of characters {file} cannot be written: {error}") from error


def unknown_symbol(backend: Tokenizer, texts: Iterable[str]) -> str | None:
    """Say in words the first symbol that a tokenizer of symbols lacks, and of which text.

    None where the texts have no such symbol, or the tokenizer is of another kind.
    """
    pre_tokenizer = backend.pre_tokenizer
    if pre_tokenizer is None or not isinstance(backend.model, models.WordLevel):
        return None
    known = backend.get_vocab(with_added_tokens=False)
    for text in texts:
        for word, _ in pre_tokenizer.pre_tokenize_str(text):
            if word not in known:
                shown = text if len(text) <= 40 else text[:40] + "..."
                return f"the text {shown!r}: it has no token {word!r}"
    return None


def _numbers(name: str) -> list[str]:
    count = name.removeprefix(IDS)
    if not re.fullmatch(r"[1-9][0-9]{0,6}", count) or not 2 <= int(count) <= MOST_IDS:
        raise InputError(
            f"tokenizer {name!r}: VOCAB of ids:VOCAB must be an integer from 2 to {MOST_IDS}"
        )
    return [str(number) for number in range(int(count))]
