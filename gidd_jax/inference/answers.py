"""Answers to prompts: conversations as the tokenizer writes them, and where an answer ends."""

from collections.abc import Sequence

import numpy as np

from gidd_jax.data.chat import Conversations, Messages
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.inference.prompts import Text, token_ids
from gidd_jax.inference.samples import Samples


def conversations(tokenizer: Tokenizer, prompts: Sequence[str | Messages]) -> list[np.ndarray]:
    """Return the ids of each conversation, up to where its answer begins.

    A text is a conversation of one message by the user. Raises InputError as `data.chat`.
    """
    asked = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    writer = Conversations(tokenizer)
    return [
        writer.prompt_ids(messages, f"prompt {number}")
        for number, messages in enumerate(asked, start=1)
    ]


def answered(
    samples: Samples, prompts: Sequence[Text], tokenizer: Tokenizer, *, begin: bool, alone: bool
) -> Samples:
    """Return samples that end with the first end token after their prompt, padded from there on.

    begin: rows begin with a token of the frame; alone: the texts are the answers without prompts.
    """
    ids, log_probs, drawn_at = (
        array.copy() for array in (samples.ids, samples.log_probs, samples.drawn_at)
    )
    texts = []
    for number, prompt in enumerate(token_ids(tokenizer, prompts, "prompt")):
        start = int(begin) + len(prompt)
        (ends,) = np.nonzero(ids[number, start:] == tokenizer.eos_id)
        after = start + int(ends[0]) + 1 if len(ends) else ids.shape[1]
        ids[number, after:] = tokenizer.pad_id
        log_probs[number, after:], drawn_at[number, after:] = 0.0, 0
        row = ids[number, start if alone else 0 : after]
        texts.append(tokenizer.decode(row, skip_special_tokens=True))
    return samples._replace(ids=ids, texts=texts, log_probs=log_probs, drawn_at=drawn_at)
