"""Conversations as the chat template of a model's tokenizer writes them.

A template is a text in Jinja's language. transformers renders it in a sandbox that reaches neither
files nor Python's own functions: it can write text, and nothing else.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from gidd_jax.data.texts import check_texts
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError, first_line

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, in their order


class Conversations:
    """Writes conversations as a tokenizer's chat template does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises InputError where the tokenizer has no template."""
        if tokenizer.chat_template is None:
            raise InputError(
                f"tokenizer {tokenizer.name!r} has no chat template: give records of prompt and "
                "answer, or a tokenizer folder with chat_template.jinja"
            )
        self._tokenizer = tokenizer
        # For what a template writes, in which special tokens are what they spell.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = False
        decoder = self._backend.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in decoder.items() if token.special}

    def prompt_ids(self, messages: Messages, where: str) -> np.ndarray:
        """Return the ids int32 [num_tokens] of a conversation, up to where the answer begins.

        Without the token that begins a row. `where` is how errors begin. Raises InputError where
        the template refuses the conversation, or a message spells one of its special tokens.
        """
        checked = [_checked(message, number, where) for number, message in enumerate(messages, 1)]
        if not checked:
            raise InputError(f"{where}: no message before the answer")
        text = self._rendered(checked, where)
        for number, message in enumerate(checked, 1):
            found = [i for i in self._ids(message["content"]) if i in self._special]
            if found:
                spelled = self._backend.id_to_token(found[0])
                raise InputError(
                    f"{where}: message {number} spells the special token {spelled!r}: take it out"
                )
        ids = np.array(self._ids(text), np.int32)
        return ids[1:] if len(ids) and ids[0] == self._tokenizer.bos_id else ids

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _rendered(self, messages: list[dict[str, str]], where: str) -> str:
        # Read at the first import: without it transformers warns that there is no PyTorch.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self._tokenizer
        roles = (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
        names: dict[str, Any] = {
            f"{role}_token": "" if i is None else self._backend.id_to_token(i) for role, i in roles
        }
        try:
            texts, _ = render_jinja_template(
                [messages],
                chat_template=tokenizer.chat_template,
                add_generation_prompt=True,
                **names,
            )
        except Exception as error:  # whatever the template, or Jinja, raises
            raise InputError(
                f"{where}: the chat template of {tokenizer.name!r} refuses it: {first_line(error)}"
            ) from error
        return texts[0]


def _checked(message: object, number: int, where: str) -> dict[str, str]:
    if isinstance(message, Mapping):
        found = {key: message.get(key) for key in ("role", "content")}
        if all(isinstance(value, str) for value in found.values()):
            check_texts([found["content"]], f"{where}: message")
            return {key: str(value) for key, value in found.items()}
    raise InputError(f"{where}: message {number} has no role and content that are texts")
