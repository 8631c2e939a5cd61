"""Generalized Interpolating Discrete Diffusion (GIDD) language models in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gidd_jax.inference.gidd import Gidd

__version__ = "0.1.0"
__all__ = ["Gidd", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on demand: jax and transformers take seconds.
    if name == "Gidd":
        from gidd_jax.inference.gidd import Gidd

        return Gidd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
