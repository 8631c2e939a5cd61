"""Low-rank adapters (LoRA, arXiv 2106.09685): a few numbers beside frozen matrices of the blocks.

The network does not know of them: it is run with W + scale * A B, which a step makes of its frozen
parameters and the adapters, and whose gradient reaches the adapters alone. So they work with every
network, mesh, kernel and loss here. (qwix has LoRA for Linen, too: it finds weights by watching the
products that they enter as they are, and here they enter cast, gathered and fused with the loss.)
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Params = Any
# Input axes of what is adapted, after that of the layers; all others are outputs.
_INPUTS = {
    "qkv": 1,
    "query": 1,
    "key": 1,
    "value": 1,
    "attn_out": 2,
    "mlp_gate": 1,
    "mlp_in": 1,
    "mlp_out": 1,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of a rank, whose product is scaled by alpha / rank."""

    rank: int
    alpha: float

    def adapters(self, params: Params, key: jax.Array) -> Params:
        """Return new adapters of a network's parameters, boxed as these: B is 0, nothing changes.

        A [layers, *inputs, rank] is drawn uniformly with the variance 1 / inputs; B [layers, rank,
        *outputs].
        """
        made: dict[Any, Any] = {}
        for number, (path, leaf) in enumerate(sorted(_adapted(params).items())):
            boxed = isinstance(leaf, nn.LogicallyPartitioned)
            kernel = leaf.value if boxed else leaf
            names = leaf.names if boxed else (None,) * kernel.ndim
            cut = 1 + _INPUTS[path[-2]]
            bound = math.sqrt(3 / math.prod(kernel.shape[1:cut]))
            shape = (*kernel.shape[:cut], self.rank)
            a = jax.random.uniform(
                jax.random.fold_in(key, number), shape, kernel.dtype, -bound, bound
            )
            b = jnp.zeros((kernel.shape[0], self.rank, *kernel.shape[cut:]), kernel.dtype)
            if boxed:
                a = nn.LogicallyPartitioned(a, (*names[:cut], None))
                b = nn.LogicallyPartitioned(b, (names[0], None, *names[cut:]))
            made[(*path[:-1], "a")], made[(*path[:-1], "b")] = a, b
        return unflatten_dict(made)

    def merged(self, frozen: Params, adapters: Params) -> Params:
        """Return the parameters that the network is run with."""
        flat: dict[Any, Any] = dict(flatten_dict(frozen))
        parts: dict[Any, Any] = dict(flatten_dict(adapters))
        for path in _adapted(frozen):
            kernel = flat[path]
            a, b = (parts[(*path[:-1], name)] for name in ("a", "b"))
            layers = kernel.shape[0]
            product = a.reshape(layers, -1, self.rank) @ b.reshape(layers, self.rank, -1)
            flat[path] = kernel + self.alpha / self.rank * product.reshape(kernel.shape)
        return unflatten_dict(flat)


def _adapted(params: Params) -> dict[tuple[str, ...], Any]:
    """Return the kernels that are adapted, by their paths."""
    flat = flatten_dict(params)
    return {
        path: leaf
        for path, leaf in flat.items()
        if path[0] == "blocks" and path[-1] == "kernel" and path[-2] in _INPUTS
    }
