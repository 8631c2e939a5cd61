"""Conversations as the chat template of a model's tokenizer writes them.

A template is a text in Jinja's language. transformers renders it in a sandbox that reaches neither
files nor Python's own functions: it can write text, and nothing else.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from gidd_jax.data.texts import check_texts
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError, first_line

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, in their order


def prompt_ids(tokenizer: Tokenizer, messages: Messages, where: str) -> np.ndarray:
    """Return the ids int32 [num_tokens] of a conversation, up to where the answer begins.

    Without the token that begins a row. `where` is how errors begin. Raises InputError where the
    tokenizer has no template, the template refuses the conversation, or a message spells one of the
    special tokens that the template writes.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"tokenizer {tokenizer.name!r} has no chat template: give records of prompt and "
            "answer, or a tokenizer folder with chat_template.jinja"
        )
    checked = [_checked(message, number, where) for number, message in enumerate(messages, 1)]
    if not checked:
        raise InputError(f"{where}: no message before the answer")
    # Read at the first import: without it transformers warns that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils.chat_template_utils import render_jinja_template

    names: dict[str, Any] = {
        f"{role}_token": "" if token_id is None else tokenizer.backend.id_to_token(token_id)
        for role, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
    }
    try:
        texts, _ = render_jinja_template(
            [checked],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=True,
            **names,
        )
    except Exception as error:  # whatever the template, or Jinja, raises
        raise InputError(
            f"{where}: the chat template of {tokenizer.name!r} refuses it: {first_line(error)}"
        ) from error
    backend = _with_special(tokenizer.backend.to_str())
    for number, message in enumerate(checked, 1):
        spelled = _special(backend, message["content"])
        if spelled:
            raise InputError(
                f"{where}: message {number} spells the special token {spelled!r}: take it out"
            )
    ids = np.array(backend.encode(texts[0], add_special_tokens=False).ids, np.int32)
    return ids[1:] if len(ids) and ids[0] == tokenizer.bos_id else ids


def _checked(message: object, number: int, where: str) -> dict[str, str]:
    if isinstance(message, Mapping):
        found = {key: message.get(key) for key in ("role", "content")}
        if all(isinstance(value, str) for value in found.values()):
            check_texts([found["content"]], f"{where}: message")
            return {key: str(value) for key, value in found.items()}
    raise InputError(f"{where}: message {number} has no role and content that are texts")


@functools.lru_cache(maxsize=4)
def _with_special(spec: str) -> tokenizers.Tokenizer:
    """The backend for what a template writes, in which special tokens are what they spell."""
    backend = tokenizers.Tokenizer.from_str(spec)
    backend.encode_special_tokens = False
    return backend


def _special(backend: tokenizers.Tokenizer, text: str) -> str | None:
    special = {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    found = [i for i in backend.encode(text, add_special_tokens=False).ids if i in special]
    return backend.id_to_token(found[0]) if found else None
