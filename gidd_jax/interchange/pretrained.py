"""A model as it comes out of a folder."""

from typing import Any, NamedTuple

from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.process import InterpolatingProcess
from gidd_jax.training.objective import Network


class Pretrained(NamedTuple):
    """A network, its parameters, tokenizer and process (None: autoregressive).

    keep_padding_columns: its distributions include the columns that pad the vocabulary. row_mode:
    how rows were framed in training, one of `data.rows.MODES`.
    """

    network: Network
    params: Any
    tokenizer: Tokenizer
    process: InterpolatingProcess | None
    keep_padding_columns: bool
    row_mode: str = "packed"
