"""The loss of a chunk's logits in one reading of them: a TPU's kernel that goes row by row.

The compiler goes through the logits once for each sum that the next one needs. A block of rows with
all its columns fits into a TPU's vector memory: there the kernel makes all of them, and the
gradient. It runs the formulas of `chunk_loss.py` as they stand, which by passes are its twin.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gidd_jax import hardware
from gidd_jax.ops.chunk_loss import ChunkLoss, Columns, Targets, Terms
from gidd_jax.ops.vocabulary import OnChip

Array = jax.Array

ROWS = 16  # of a block
# Some eight arrays of a block's size are on the chip at once, 55 MiB in float32. TPUs from v5 on
# have 64 MiB or 128; those before have 16, too little for a usual vocabulary.
MOST_COLUMNS = 100 << 10
VECTOR_MEMORY = 60 << 20
SMALL = ("TPU v2", "TPU v3", "TPU v4")


def suits(columns: int) -> bool:
    """Tell whether the devices of this process are TPUs that hold rows of so many columns."""
    kind = hardware.device_kind()
    return kind.startswith("TPU") and not kind.startswith(SMALL) and columns <= MOST_COLUMNS


def loss_by_rows(
    loss: ChunkLoss,
    products: Array,
    columns: Columns,
    targets: Targets,
    with_gradient: bool,
    dtype: Any,
) -> tuple[Terms, tuple[Array, Array] | None]:
    """Return the terms [n] of products [n, V], and the gradients of the summed loss.

    Those by the logits, in `dtype`, and by the bias, float32 [V]. n is a multiple of ROWS.
    """
    n, width = products.shape
    on_chip = dataclasses.replace(loss, vocabulary=OnChip(None, major=False))
    block: Any = pl.BlockSpec((ROWS, width), lambda i: (i, 0))
    of_tokens: Any = pl.BlockSpec((ROWS, 1), lambda i: (i, 0))
    of_columns: Any = pl.BlockSpec((1, width), lambda i: (0, 0))

    def body(products: Any, columns: Any, targets: Any, terms: Any, gradients: Any) -> None:
        columns, targets = jax.tree.map(lambda ref: ref[...], (columns, targets))
        found, dl = on_chip.terms(products[...], columns, targets, with_gradient)
        for ref, values in zip(terms, found, strict=True):
            ref[...] = values
        if dl is None:
            return
        of_logits, of_bias = gradients
        of_logits[...] = dl.astype(dtype)
        summed = jnp.sum(dl, axis=0, keepdims=True)
        first = pl.program_id(0) == 0
        of_bias[...] = summed + jnp.where(first, 0.0, of_bias[...])

    token: Any = jax.ShapeDtypeStruct((n, 1), jnp.float32)
    outs: Any = (Terms(token, token), None)
    specs: Any = (Terms(of_tokens, of_tokens), None)
    if with_gradient:
        bias = jax.ShapeDtypeStruct((1, width), jnp.float32)
        outs = (outs[0], (jax.ShapeDtypeStruct(products.shape, dtype), bias))
        specs = (specs[0], (block, of_columns))
    run = pl.pallas_call(
        body,
        grid=(n // ROWS,),
        in_specs=(
            block,
            Columns(*[of_columns] * len(columns)),
            Targets(*[of_tokens] * len(targets)),
        ),
        out_specs=specs,
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VECTOR_MEMORY),
        interpret=not hardware.device_kind().startswith("TPU"),
        name="loss_by_rows",
    )
    terms, gradients = run(
        products,
        jax.tree.map(lambda a: a[None], columns),
        jax.tree.map(lambda a: a[:, None], targets),
    )
    terms = Terms(*(jnp.squeeze(a, 1) for a in terms))
    if gradients is None:
        return terms, None
    return terms, (gradients[0], jnp.squeeze(gradients[1], 0))
