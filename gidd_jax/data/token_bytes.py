"""What the tokens of a text stand for: shares that together are the text."""

import numpy as np
import tokenizers


def share_ends(text: str, encoding: tokenizers.Encoding) -> np.ndarray:
    """Where in a text the share of each token ends, in characters, int64 [num_tokens]."""
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    if len(ends):
        ends = np.maximum.accumulate(ends)
        ends[-1] = len(text)
    return ends


def with_bytes(
    text: str, ids: np.ndarray, encoding: tokenizers.Encoding
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a text with the UTF-8 bytes each stands for, both int32 [num_tokens]."""
    return ids, _token_bytes(text, share_ends(text, encoding))


def _token_bytes(text: str, ends: np.ndarray) -> np.ndarray:
    """UTF-8 bytes per token from the ends of their shares of the text."""
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        ends = np.concatenate([[0], np.cumsum(lengths)])[ends]
    return np.diff(ends, prepend=0).astype(np.int32)
