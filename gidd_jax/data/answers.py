"""Prompts and answers: rows whose prompt is given, whose answer is learnt.

A record holds `prompt` and `answer`, two texts, or `messages`, a conversation whose last message is
the answer and that the tokenizer's chat template writes. A row is the token that begins it, the
prompt, the answer and the token that ends it, which fills the row up, too. One record is one row:
no record sees another.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from gidd_jax.data.chat import Conversations
from gidd_jax.data.corpus import Documents, iterate
from gidd_jax.data.files import text_of
from gidd_jax.data.rows import ids_dtype
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError

MESSAGES = "messages"
_LOT = 4096  # records handed to the tokenizer at a time


class AnswerRows(NamedTuple):
    """Rows of ids, each cut to the context, which of their tokens are given, and the UTF-8 bytes of
    each answer, int64 [N]."""

    ids: list[np.ndarray]
    given: list[np.ndarray]
    num_bytes: np.ndarray


def answer_rows(documents: Documents, tokenizer: Tokenizer, seq_len: int, split: str) -> AnswerRows:
    """Return a row for each record, JSON in `documents`.

    Answers that do not fit are cut, and a warning counts them. Raises InputError for a record of
    another form, a prompt that leaves no room for an answer, and where all answers are empty.
    """
    ids: list[np.ndarray] = []
    given: list[np.ndarray] = []
    sizes: list[int] = []
    num_cut, has_answer, records = 0, False, []
    writer: Conversations | None = None

    def add(records: Sequence[tuple[Any, str]]) -> None:
        nonlocal num_cut, has_answer, writer
        asked = [prompt for prompt, _ in records]
        texts = iter(tokenizer.encode([prompt for prompt in asked if isinstance(prompt, str)]))
        if writer is None and not all(isinstance(prompt, str) for prompt in asked):
            writer = Conversations(tokenizer)
        first, prompts = len(ids), []
        for number, prompt in enumerate(asked, first):
            if isinstance(prompt, str):
                prompts.append(next(texts))
            else:
                assert writer is not None
                prompts.append(writer.prompt_ids(prompt, _where(split, number)))
        answers = tokenizer.encode_with_bytes([answer for _, answer in records])
        for prompt, (answer, num_bytes) in zip(prompts, answers, strict=True):
            row = _row(prompt, answer, tokenizer)
            if len(prompt) + 2 > seq_len:
                raise InputError(
                    f"{_where(split, len(ids))}: its prompt has {len(prompt)} tokens, and with the "
                    f"token that begins a row and one to answer it exceeds the context, {seq_len}: "
                    "shorten it, or raise model.max_seq_len"
                )
            num_cut += len(row) > seq_len
            has_answer |= len(answer) > 0
            ids.append(row[:seq_len])
            given.append(np.arange(len(ids[-1])) <= len(prompt))
            sizes.append(int(num_bytes[: seq_len - len(prompt) - 1].sum()))

    for number, text in enumerate(iterate(documents, f"Tokenising the {split} split")):
        records.append(_read(text, _where(split, number)))
        if len(records) == _LOT:
            add(records)
            records = []
    add(records)
    if not has_answer:
        raise InputError(f"the answers of the {split} split are all empty: there is none to learn")
    if num_cut:
        logging.warning(
            "%d of the %d answers of the %s split are cut at the context of %d tokens",
            num_cut,
            len(ids),
            split,
            seq_len,
        )
    return AnswerRows(ids, given, np.array(sizes, np.int64))


class AnswerTexts:
    """The texts of records, prompt and answer together, as documents."""

    def __init__(self, documents: Documents):
        self._documents = documents
        self.num_bytes, self.is_random_access = documents.num_bytes, documents.is_random_access

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        prompt, answer = _read(self._documents[index], f"record {index + 1}")
        return f"{prompt}{answer}"


def _row(prompt: np.ndarray, answer: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    row = [[begin], prompt, answer, [tokenizer.eos_id]]
    return np.concatenate(row).astype(ids_dtype(tokenizer.vocab_size))


def _where(split: str, number: int) -> str:
    return f"record {number + 1} of the {split} split"


def _read(text: str, where: str) -> tuple[Any, str]:
    """Return the prompt of a record, a text or messages, and the answer."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if isinstance(record, dict) and MESSAGES in record:
        messages = record[MESSAGES]
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise InputError(f"{where}: the last of its messages must be the assistant's answer")
        return messages[:-1], text_of(last, "content", where)
    if not isinstance(record, dict) or not {"prompt", "answer"} <= record.keys():
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where} has neither prompt and answer nor {MESSAGES}; it has: {keys}")
    return text_of(record, "prompt", where), text_of(record, "answer", where)
