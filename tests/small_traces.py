"""A trace of two short samples whose tokens try to break pages and terminals."""

import numpy as np

from gidd_jax.sampling.trace import Trace, changes_between

EVIL = "</script><script>hit=1</script><img src=x onerror=hit=1><!--"
TOKENS = [
    "<end>",
    "[MASK]",
    " the",
    EVIL,
    "\udce2",
    "\udc80",
    "\udc9c",
    "<b>&amp;",
    " a\x1b[2J",
    ".",
]
END, MASKED, THE, EVIL_ID, E2, B80, B9C, BOLD, ESCAPE, DOT = range(len(TOKENS))


def make_trace(start: list, frames: list, log_probs: np.ndarray | None = None) -> Trace:
    """A trace of the tokens above; the second token of each sample is given."""
    ids, start_ids = np.array(frames, np.int32), np.array(start, np.int32)
    if log_probs is None:
        log_probs = np.full(ids.shape, np.log(0.25), np.float32)
    changes = changes_between(start_ids, ids, log_probs)
    given = np.zeros(start_ids.shape, bool)
    given[:, 1] = True
    lengths = np.full(len(start), start_ids.shape[1], np.int32)
    ids_of_tokens = np.arange(len(TOKENS), dtype=np.int32)
    texts = [f"{EVIL} text {n}" for n in range(len(start))]
    return Trace(
        changes, given, lengths, texts, ids_of_tokens, TOKENS, MASKED, np.int32([END]), "f"
    )


def small_trace() -> Trace:
    """Two samples of seven tokens in four calls: filled, corrected, noise replaced, remasked."""
    start = [
        [END, THE, MASKED, MASKED, MASKED, MASKED, DOT],
        [END, DOT, DOT, THE, MASKED, BOLD, MASKED],
    ]
    frames = [
        [
            [END, THE, EVIL_ID, MASKED, MASKED, MASKED, DOT],
            [END, DOT, THE, THE, MASKED, BOLD, MASKED],
        ],
        [
            [END, THE, BOLD, E2, MASKED, B9C, DOT],
            [END, DOT, EVIL_ID, THE, DOT, BOLD, MASKED],
        ],
        [
            [END, THE, BOLD, E2, B80, B9C, THE],
            [END, DOT, EVIL_ID, THE, MASKED, BOLD, ESCAPE],
        ],
        [
            [END, THE, EVIL_ID, E2, B80, B9C, THE],
            [END, DOT, EVIL_ID, THE, E2, BOLD, ESCAPE],
        ],
    ]
    return make_trace(start, frames)
