"""Rows with tokens to generate, drawn in batches by the compiled programs."""

from typing import TYPE_CHECKING

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.inference import programs
from gidd_jax.inference.batches import by_batches, check_numbers, check_trace
from gidd_jax.inference.framing import (
    decoded,
    following_tokens,
    scheduled_tokens,
    shared_width,
    trace_of,
    unframed,
    widened,
)
from gidd_jax.inference.programs import Batch, special_ids
from gidd_jax.inference.prompts import Rows, check_guidance
from gidd_jax.inference.samples import Samples
from gidd_jax.models.gidd import blocks_of
from gidd_jax.sampling.autoregressive import check_autoregressive
from gidd_jax.sampling.loop import Drawn
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.sampling.trace import changes_of
from gidd_jax.sampling.windows import by_blocks

if TYPE_CHECKING:
    from gidd_jax.inference.gidd import Gidd


def draw_rows(
    model: "Gidd",
    batch_size: int,
    seed: int,
    options: SamplerOptions,
    trace: bool,
    rows: Rows,
) -> Samples:
    """Return the rows with their free tokens drawn."""
    check_trace(trace)
    check_guidance(rows, options, begin=model.begins)
    traced = []

    whole_rows = model.framed_rows(rows)
    if model.process is None:
        check_autoregressive(options)
    else:  # prompts of many lengths share programs
        options = by_blocks(model.network, options)
        if options.stop_at_end and model.tokenizer.eos_id is None:
            raise InputError(
                "stop_at_end: the tokenizer has no token that ends a text, leave it out"
            )
        width = shared_width(whole_rows.ids.shape[1], model.max_seq_len)
        whole_rows = widened(whole_rows, model.tokenizer, width)
    # The windows of a model by blocks are a block wide, whatever follows the prompt.
    follow = whole_rows.ids.shape[1] if blocks_of(model.network) else following_tokens(whole_rows)

    def drawn(batch: Batch) -> Drawn:
        part = programs.draw(
            batch,
            network=model.network,
            process=model.process,
            special=special_ids(model.tokenizer, model.network, is_framed=model.begins),
            options=options,
            num_free=scheduled_tokens(options, whole_rows),
            width=follow,
            trace=trace,
        )
        if trace:
            traced.append(changes_of(part, model.tokenizer.mask_id))
        return part._replace(frames=None)

    parts = by_batches(drawn, model.params, whole_rows, batch_size, seed)
    calls = sum(int(part.network_calls) for part in parts)
    ids, log_probs, drawn_at, stopped_at = (
        np.concatenate([getattr(part, name) for part in parts])[: len(rows.ids)]
        for name in ("ids", "log_probs", "drawn_at", "stopped_at")
    )
    check_numbers(log_probs)
    ids = unframed(ids, rows, model.tokenizer)
    log_probs, drawn_at = (leaf[:, : ids.shape[1]] for leaf in (log_probs, drawn_at))
    texts, noted = decoded(ids, rows, model.tokenizer), None
    if trace:
        noted = trace_of(traced, rows, ~rows.free, texts, model.tokenizer)
    return Samples(ids, texts, log_probs, drawn_at, calls, stopped_at, noted)
