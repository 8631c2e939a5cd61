"""Tokenizers: any tokenizer.json behind one small picklable wrapper."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from gidd_jax.data.long_texts import lots
from gidd_jax.data.symbols import unknown_symbol
from gidd_jax.data.token_bytes import share_ends, with_bytes
from gidd_jax.data.tokenizer_files import (
    CONFIG_FILE,
    ROLES,
    SPEC_FILE,
    TEMPLATE_FILE,
    UNFRAMED_KEY,
    TokenizerFiles,
    is_of_library,
    one_line,
    read_tokenizer_files,
)
from gidd_jax.data.tokenizer_spec import (
    FINGERPRINT_KEY,
    canonical,
    digest,
    pairs,
    unknown_id,
    without_tokens,
)
from gidd_jax.errors import InputError, first_line

# What a fingerprint begins with: those without it are of the definition before this one.
_FINGERPRINT_VERSION = "2:"
# Neither ids nor texts depend on these; transformers adds and drops them as it reads and writes.
_NOT_OF_TEXTS = ("version", "truncation", "padding", "post_processor")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids of its special tokens; `bos_id` is None where there is no BOS.

    Where no token ends a text (`eos_id` is None) none fills it up: `pad_id` is the mask's, for what
    is still to be filled in. Raises InputError where the mask has another role, too.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    mask_id: int
    name: str
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        # The texts are data: "[MASK]" written in one of them is seven characters, not the mask.
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        for role, token_id in self._ids_by_role.items():
            if role != "mask" and token_id == self.mask_id:
                raise InputError(
                    f"tokenizer {self.name!r}: mask and {role} are one token, "
                    f"{self.backend.id_to_token(token_id)!r} (id {token_id}): give each its own "
                    f"in {CONFIG_FILE}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # pickling loses encode_special_tokens

    @property
    def _ids_by_role(self) -> dict[str, int]:
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "mask": self.mask_id}
        if self.eos_id is None:
            del ids["pad"]
        return {role: token_id for role, token_id in ids.items() if token_id is not None}

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, special and added tokens included (one more than the largest id)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Version and SHA-256 of everything that decides which ids a text gets, what they mean and
        how they are written."""
        spec = {key: value for key, value in self._spec.items() if key not in _NOT_OF_TEXTS}
        model = spec["model"] | {"merges": pairs(spec["model"].get("merges", []))}
        content = [canonical(spec | {"model": model}), self._ids_by_role]
        return _FINGERPRINT_VERSION + digest(content)

    @functools.cached_property
    def _earlier_fingerprint(self) -> str:
        """The fingerprint that is found in what was written before there were versions."""
        spec = self._spec
        content = {
            "vocab": self.backend.get_vocab(with_added_tokens=True),
            "model": spec["model"]["type"],
            "merges": pairs(spec["model"].get("merges", [])),
            "normalizer": spec["normalizer"],
            "pre_tokenizer": spec["pre_tokenizer"],
            "special": [self.bos_id, self.eos_id, self.pad_id, self.mask_id],
        }
        return digest(content)

    def has_fingerprint(self, recorded: str) -> bool:
        """Tell whether a fingerprint that was written with some ids, now or by an earlier version
        of this package, is that of this tokenizer."""
        is_versioned = recorded.startswith(_FINGERPRINT_VERSION)
        return recorded == (self.fingerprint if is_versioned else self._earlier_fingerprint)

    def gives_ids_of(self, other: "Tokenizer") -> bool:
        """Tell whether both have the same vocabulary, roles, merges and ways to divide a text."""
        return self._earlier_fingerprint == other._earlier_fingerprint

    def encode(self, texts: Sequence[str], *, with_ends: bool = False) -> list[np.ndarray]:
        """Token ids of each text, int32 [num_tokens], without BOS and EOS, in parallel threads.

        with_ends: with what tokenizer.json puts around a text. What spells a special token is text
        like any other. Raises InputError for a text that the tokenizer cannot encode.
        """
        if with_ends:
            return [ids for ids, _ in self._encode(texts, with_offsets=False, with_ends=True)]
        found = self._encode_in_parts(texts, lambda _, ids, __: (ids,))
        return [ids for (ids,) in found]

    def encode_with_bytes(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Like `encode`, plus the number of UTF-8 bytes each token stands for, int32 [num_tokens].

        The bytes of a text's tokens sum to its length in bytes: what a tokenizer drops (such as
        blanks) counts with the next token, a character of several tokens with the first of them.
        Of a text without tokens nothing counts here (see `rows.tokenise`).
        """
        return self._encode_in_parts(texts, with_bytes, with_offsets=True)

    def pieces(self, text: str) -> list[str]:
        """What each token of a text stands for: slices that together are the text.

        They are divided as the bytes of `encode_with_bytes`; a text without tokens has none.
        """
        ((_, encoding),) = self._encode([text], with_offsets=True)
        ends = share_ends(text, encoding).tolist()
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Text of one sequence of ids [num_tokens]."""
        return self.backend.decode(
            np.asarray(ids).tolist(), skip_special_tokens=skip_special_tokens
        )

    def decode_within(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text that ids [num_tokens] write after others: alone, many would lose the blank before
        them."""
        anchor = self._anchor
        return self.decode([*anchor, *np.asarray(ids).tolist()])[len(self.decode(anchor)) :]

    def revise(self, text: str, before: np.ndarray, after: np.ndarray) -> str:
        """Text with the ids `after` in place of its own, `before`, both [num_tokens].

        What was not changed stays as it is written in `text`, even where the tokenizer drops or
        replaces some of it.
        """
        if np.array_equal(before, after):
            return text
        if self.decode(before, skip_special_tokens=True) == text:
            return self.decode(after, skip_special_tokens=True)
        pieces = self.pieces(text)
        # Tokens that share a character change together: all but the first stand for nothing.
        starts = np.array([i == 0 or piece != "" for i, piece in enumerate(pieces)])
        group = np.cumsum(starts) - 1
        changed = np.bincount(group, before != after)[group] > 0
        parts, start = [], 0
        for end in range(1, len(pieces) + 1):
            if end < len(pieces) and changed[end] == changed[start]:
                continue
            if changed[start]:
                ids = [i for i in after[start:end].tolist() if not self._is_control[i]]
                parts.append(self.decode_within(ids) if start else self.decode(ids))
            else:
                parts.extend(pieces[start:end])
            start = end
        return "".join(parts)

    def save(self, folder: str | Path, *, size: int | None = None) -> None:
        """Write files that transformers and we read; tokens that were added from `size` on are not
        in them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids = {r: i for r, i in self._ids_by_role.items() if size is None or i < size}
        config: dict[str, Any] = {f"{r}_token": self.backend.id_to_token(i) for r, i in ids.items()}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config[FINGERPRINT_KEY] = self.fingerprint
        if self.eos_id is None:
            config[UNFRAMED_KEY] = True
        if self.chat_template is not None:
            (folder / TEMPLATE_FILE).write_text(self.chat_template, "utf-8")
        (folder / SPEC_FILE).write_text(without_tokens(self.backend, size), "utf-8")
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", "utf-8")

    @functools.cached_property
    def _is_control(self) -> np.ndarray:
        """Whether an id stands for something that is no text, bool [vocab_size]."""
        added = self.backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} - {unknown_id(self._spec)}
        found = np.zeros(self.vocab_size, bool)
        found[[*special, *self._ids_by_role.values()]] = True
        return found

    @functools.cached_property
    def _apart(self) -> tokenizers.Tokenizer:
        """The backend for texts that spell special tokens which the model's vocabulary holds: it
        sees their first character apart from the rest."""
        spec = self._spec
        splits = [
            {
                "type": "Split",
                "pattern": {"Regex": f"{re.escape(name[0])}(?={re.escape(name[1:])})"},
                "behavior": "Isolated",
                "invert": False,
            }
            for token_id in np.flatnonzero(self._is_control).tolist()
            if len(name := self.backend.id_to_token(token_id) or "") > 1
        ]
        first = [] if spec["pre_tokenizer"] is None else [spec["pre_tokenizer"]]
        together = {"type": "Sequence", "pretokenizers": [*first, *splits]}
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": together}))
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _anchor(self) -> list[int]:
        """A token to write others after, if there is one that writes text by itself."""
        usual = [i for i in [self.backend.token_to_id("a")] if i is not None]
        for token_id in [*usual, *np.flatnonzero(~self._is_control).tolist()]:
            text = self.decode([token_id])
            if text.strip() and "\N{REPLACEMENT CHARACTER}" not in text:
                return [token_id]
        return []

    def _encode_in_parts(
        self, texts: Sequence[str], arrays: Callable[..., Any], *, with_offsets: bool = False
    ) -> list[Any]:
        """Arrays of each text, from those of its parts: arrays(text, ids, encoding)."""
        found: list[list[Any]] = [[] for _ in texts]
        for lot in lots(texts, self._splits):
            numbers = [part.number for part in lot], len(texts)
            encoded = self._encode(
                [part.text for part in lot], with_offsets=with_offsets, numbers=numbers
            )
            for part, (ids, encoding) in zip(lot, encoded, strict=True):
                found[part.number].append(arrays(part.text, ids, encoding))
        return [
            parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts, strict=True)))
            for parts in found
        ]

    def _splits(self, left: str, right: str) -> bool:
        """Tell whether the words of left + right, its ids and their bytes are those of both."""
        normalizer, pre_tokenizer = self.backend.normalizer, self.backend.pre_tokenizer
        if pre_tokenizer is None:
            return False
        texts = left, right, left + right
        normal = [t if normalizer is None else normalizer.normalize_str(t) for t in texts]
        words = [[word for word, _ in pre_tokenizer.pre_tokenize_str(t)] for t in normal]
        if normal[0] + normal[1] != normal[2] or words[0] + words[1] != words[2]:
            return False
        encoded = self._encode(texts, with_offsets=True)
        a, b, both = (with_bytes(t, *e) for t, e in zip(texts, encoded, strict=True))
        return min(len(a[0]), len(b[0])) > 0 and all(
            np.array_equal([*x, *y], z) for x, y, z in zip(a, b, both, strict=True)
        )

    def _encode(
        self,
        texts: Sequence[str],
        *,
        with_offsets: bool,
        with_ends: bool = False,
        numbers: tuple[list[int], int] | None = None,
    ) -> list[tuple[np.ndarray, tokenizers.Encoding]]:
        texts = list(texts)
        of_text, total = numbers or (range(len(texts)), len(texts))

        def run(backend: tokenizers.Tokenizer, some: list[str]) -> list[Any]:
            encode: Callable[..., Any] = (
                backend.encode_batch if with_offsets else backend.encode_batch_fast
            )
            try:
                encodings = encode(some, add_special_tokens=with_ends)
            except BaseException as error:
                if not is_of_library(error):
                    raise
                problem = unknown_symbol(backend, some) or f"a text: {first_line(error)}"
                raise InputError(f"tokenizer {self.name!r} cannot encode {problem}") from None
            return [(np.array(e.ids, np.int32), e) for e in encodings]

        found = run(self.backend, texts)
        spelled = [n for n, (ids, e) in enumerate(found) if len(self._spelled(ids, e))]
        if spelled:
            again = run(self._apart, [texts[n] for n in spelled])
            for n, encoded in zip(spelled, again, strict=True):
                left = self._spelled(*encoded)
                if len(left):
                    token = self.backend.id_to_token(int(left[0]))
                    raise InputError(
                        f"tokenizer {self.name!r} turns a part of text {of_text[n] + 1} of {total} "
                        f"into its special token {token!r} (id {left[0]}): take it out of the "
                        "texts, or use a tokenizer that can write it as text"
                    )
                found[n] = encoded
        return found

    def _spelled(self, ids: np.ndarray, encoding: tokenizers.Encoding) -> np.ndarray:
        """Ids of special tokens among those that a text itself gave."""
        is_control = self._is_control[ids]
        if not is_control.any():
            return ids[:0]
        return ids[is_control & (np.array(encoding.special_tokens_mask) == 0)]


def load_tokenizer(name_or_path: str | Path, *, ends: bool = True) -> Tokenizer:
    """Load 'embedded', a local folder (tokenizer.json is enough), a name on the Hugging Face hub,
    or symbols, 'ids:VOCAB' and 'chars:FILE'; ends: with tokens that end and fill up a text.

    Its ids are those of tokenizer.json. [PAD] and [MASK] are added where they are missing. Raises
    InputError when there is no such tokenizer, it is damaged, has no fast version, no token that
    ends a text, or a mask that is something else, too.
    """
    name = str(name_or_path)
    files = read_tokenizer_files(name, ends=ends)
    with one_line(f"tokenizer {name!r} is damaged or of an unknown kind"):
        backend, ids = _built(files, name)
        bos_id, eos_id = ids.get("bos", ids.get("cls")), ids.get("eos", ids.get("sep"))
        if eos_id is None and not files.is_unframed:
            raise InputError(
                f"tokenizer {name!r} has neither an EOS nor a SEP token: "
                f"set eos_token in its {CONFIG_FILE}"
            )
        if ids["mask"] == unknown_id(files.spec):
            raise InputError(
                f"tokenizer {name!r}: mask and unk are one token (id {ids['mask']}): "
                f"give each its own in {CONFIG_FILE}"
            )
        pad_id = ids.get("pad", ids["mask"])
        roles = bos_id, eos_id, pad_id, ids["mask"]
        tokenizer = Tokenizer(backend, *roles, name, files.chat_template)
        _try(tokenizer)
    return tokenizer


def _built(files: TokenizerFiles, name: str) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """The backend with all the tokens that the files name, and the id of each role."""
    roles = {"mask": "[MASK]"} | files.roles
    if not files.is_unframed:
        roles = {"pad": "[PAD]"} | roles
    for token in files.spec["added_tokens"]:
        if token["content"] in roles.values():
            token["special"] = True
    backend = tokenizers.Tokenizer.from_str(json.dumps(files.spec))
    backend.add_tokens(list(files.further.values()))
    declared = {token["content"]: token["id"] for token in files.spec["added_tokens"]}
    declared |= {token.content: token_id for token_id, token in files.further.items()}
    for content, token_id in declared.items():
        found = backend.token_to_id(content)
        if found != token_id:
            raise InputError(
                f"tokenizer {name!r} gives {content!r} the id {token_id}, where its vocabulary "
                f"has room for it at {found}: give it that id, or fetch the files again"
            )
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    named = [files.roles.get(role) for role in ROLES]
    for content in filter(None, [*named, roles.get("pad"), roles["mask"]]):
        if content not in special:
            backend.add_special_tokens([tokenizers.AddedToken(content, special=True)])
            special.add(content)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return backend, {role: vocabulary[content] for role, content in roles.items()}


def _try(tokenizer: Tokenizer) -> None:
    """Encode and decode something, so that a tokenizer that cannot is refused where it is named."""
    tokenizer.decode(np.arange(min(tokenizer.vocab_size, 16)))
    with contextlib.suppress(Exception):  # a text that it does not know; a panic is none
        tokenizer.backend.encode("a 1\n", add_special_tokens=False)
