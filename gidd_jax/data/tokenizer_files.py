"""What the files of a tokenizer say: its tokenizer.json, and the tokens that have a role.

The ids of a text come from tokenizer.json alone, whatever class a config names beside it:
transformers would build some classes anew, with another pre-tokeniser or normaliser. Only where
that file is missing, transformers makes it out of older ones.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from absl import logging

from gidd_jax.data.symbols import is_symbols, symbols_spec
from gidd_jax.errors import InputError, first_line

EMBEDDED = "embedded"
SPEC_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
UNFRAMED_KEY = "gidd_jax_unframed"  # in the saved config: the mask is the only token with a role
# In the order in which transformers gives ids to those that the vocabulary lacks.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_OLDER_ROLES_FILE = "special_tokens_map.json"
_HUB_FILES = [SPEC_FILE, CONFIG_FILE, TEMPLATE_FILE, _OLDER_ROLES_FILE, "config.json"]
_OLDER_VOCABULARIES = (
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Classes that give no token a role: what others give is found by the names that they all use.
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_USUAL_NAMES = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
}


class TokenizerFiles(NamedTuple):
    """spec: the content of tokenizer.json; roles: token by role, for those of ROLES that are
    named; further: tokens to be added, by the id that they must get; is_unframed: the mask is the
    only token with a role; chat_template: how conversations are written, if they are."""

    spec: dict[str, Any]
    roles: dict[str, str]
    further: dict[int, tokenizers.AddedToken]
    is_unframed: bool = False
    chat_template: str | None = None


def read_tokenizer_files(name: str, *, ends: bool = True) -> TokenizerFiles:
    """Return what 'embedded', symbols, a folder or a name on the Hugging Face hub says.

    ends: symbols (see `data.symbols`) are followed by the tokens of a frame. Raises InputError when
    there is no such tokenizer, or its files are damaged.
    """
    if is_symbols(name):
        return TokenizerFiles(*symbols_spec(name, ends=ends), {}, not ends)
    folder = Path(name).expanduser()
    if name == EMBEDDED:
        folder = Path(str(resources.files("gidd_jax") / "assets/tokenizer"))
    is_local = name != "" and folder.is_dir()
    if not is_local and looks_like_path(name):
        raise InputError(
            f"no tokenizer folder {name!r}: give 'embedded', a folder with tokenizer.json, "
            "a name on the Hugging Face hub, ids:VOCAB or chars:FILE"
        )
    if not is_local:
        folder = _fetched(name)
    if (folder / SPEC_FILE).is_file():
        return _read_folder(folder, name)
    if is_local and not any((folder / n).is_file() for n in _OLDER_VOCABULARIES):
        raise InputError(f"tokenizer folder {name!r} holds no tokenizer.json")
    return _made_by_transformers(str(folder) if is_local else name, name, is_local)


def looks_like_path(name: str) -> bool:
    """Tell a mistyped folder from a hub name, which costs a minute of retries without a network."""
    is_hub_name = name.count("/") <= 1 and not name.startswith((".", "~", "/")) and name != ""
    parent = Path(name).parent
    return not is_hub_name or (parent != Path(".") and parent.is_dir())


@contextlib.contextmanager
def one_line(problem: str) -> Iterator[None]:
    """Turn what the library raises into InputError; what a panic writes to stderr is dropped."""
    with tempfile.TemporaryFile() as written, _stderr_to(written.fileno()) as stderr:
        try:
            yield
        except BaseException as error:
            if is_panic(error):
                written.truncate(0)
            if isinstance(error, InputError) or not is_of_library(error):
                raise
            raise InputError(f"{problem}: {first_line(error)}") from None
        finally:
            written.seek(0)
            os.write(stderr, written.read())


def is_panic(error: BaseException) -> bool:
    """Tell whether code in Rust met a fault of its own, which is no Exception to Python."""
    return type(error).__name__ == "PanicException"


def is_of_library(error: BaseException) -> bool:
    """Tell errors, panics among them, from requests to stop."""
    return isinstance(error, Exception) or is_panic(error)


@contextlib.contextmanager
def _stderr_to(descriptor: int) -> Iterator[int]:
    """Send what is written to file descriptor 2 elsewhere; yields one of the original."""
    sys.stderr.flush()
    original = os.dup(2)
    try:
        os.dup2(descriptor, 2)
        yield original
    finally:
        os.dup2(original, 2)
        os.close(original)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # whatever the hub client raises
        raise InputError(
            f"tokenizer {name!r} is no folder and not on the hub: {first_line(error)}"
        ) from error


def _read_folder(folder: Path, name: str) -> TokenizerFiles:
    spec, named, older, model = (
        _read_json(folder / file, name)
        for file in (SPEC_FILE, CONFIG_FILE, _OLDER_ROLES_FILE, "config.json")
    )
    problem = f"tokenizer {name!r} is damaged or of an unknown kind"
    with one_line(problem):
        _make_exact(spec, name)
        known = {token["content"]: bool(token["special"]) for token in spec["added_tokens"]}
        roles = {
            role: _content(named.get(key) or older[key])
            for role in ROLES
            if (named.get(key := f"{role}_token") or older.get(key)) is not None
        }
        padding = (spec.get("padding") or {}).get("pad_token")
        if padding is not None and "pad" not in roles:
            roles["pad"] = str(padding)
        kind = named.get("tokenizer_class") or model.get("model_type")
        special = {token for token, is_special in known.items() if is_special}
        is_unframed = named.get(UNFRAMED_KEY) is True
        if not is_unframed:
            _add_usual(roles, special, kind in _PLAIN_CLASSES)
        declared = named.get("added_tokens_decoder") or {}
        further = {
            int(token_id): tokenizers.AddedToken(
                str(token["content"]),
                **{k: bool(token[k]) for k in _ADDED_TOKEN_FLAGS if k in token},
            )
            for token_id, token in sorted(declared.items(), key=lambda item: int(item[0]))
            if token["content"] not in known
        }
    return TokenizerFiles(spec, roles, further, is_unframed, _template(folder, named, name))


_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _make_exact(spec: dict[str, Any], name: str) -> None:
    """Take out of a spec what would give a text other ids from one time to the next."""
    spec.setdefault("added_tokens", [])
    dropout = spec["model"].get("dropout")
    if dropout:
        logging.warning("tokenizer %r: its dropout of %s is left out", name, dropout)
    if dropout is not None:
        spec["model"]["dropout"] = None


def _add_usual(roles: dict[str, str], special: set[str], is_plain: bool) -> None:
    """Give roles that no file names to the special tokens whose names say them."""
    has_ends = not roles.keys().isdisjoint(("bos", "eos", "cls", "sep"))
    unnamed = [] if has_ends else ["bos", "eos"]
    if not is_plain:
        unnamed += [role for role in ("pad", "mask") if role not in roles]
    for role in unnamed:
        found = [token for token in _USUAL_NAMES[role] if token in special]
        if found:
            roles[role] = found[0]


def _made_by_transformers(source: str, name: str, is_local: bool) -> TokenizerFiles:
    # Read at the first import: without it transformers warns that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    with one_line(f"tokenizer {name!r} is damaged or of an unknown kind"):
        made: Any = AutoTokenizer.from_pretrained(
            source, local_files_only=is_local, trust_remote_code=False
        )
        if not hasattr(made, "backend_tokenizer"):
            raise InputError(f"tokenizer {name!r} has no fast version (tokenizer.json)")
        spec = json.loads(made.backend_tokenizer.to_str())
        _make_exact(spec, name)
        tokens = {role: getattr(made, f"{role}_token", None) for role in ROLES}
        roles = {role: str(token) for role, token in tokens.items() if token is not None}
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        _add_usual(roles, special, is_plain=True)
    return TokenizerFiles(spec, roles, {})


def _read_json(file: Path, name: str) -> dict[str, Any]:
    """Return the keys of a file, none where it is missing."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"tokenizer {name!r} is damaged: {file.name} is no JSON ({first_line(error)})"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"tokenizer {name!r} is damaged: {file.name} holds no keys")
    return values


def _template(folder: Path, named: dict[str, Any], name: str) -> str | None:
    """Return the chat template of a folder: a file of its own or, in older ones, a key of the
    config; of several the default one; None where there is none."""
    file = folder / TEMPLATE_FILE
    try:
        template: Any = file.read_text("utf-8") if file.is_file() else named.get("chat_template")
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {name!r} is damaged: {file.name}: {error}") from error
    if isinstance(template, list):
        several = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = several.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"tokenizer {name!r} is damaged: its chat template is no text")
    return template


def _content(token: Any) -> str:
    """Return the text of a token, which configs give alone or with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise ValueError(f"{token!r:.100} is no token")
    return text
