"""A trained model as one object: texts in, texts out.

    from gidd_jax import Gidd
    model = Gidd.from_pretrained("outputs/quickstart")
    print(model.generate(num_samples=4).texts[0])
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from gidd_jax.build import build_objective
from gidd_jax.checkpoint import find_checkpoint, load_params
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.models.dit import DiT
from gidd_jax.models.llama import Llama
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampler import SamplerOptions, row_keys, sample_autoregressive, sample_diffusion
from gidd_jax.settings import Settings
from gidd_jax.sharding import batch_sharding, make_mesh
from gidd_jax.state import abstract_params


class Samples(NamedTuple):
    """Generated sequences: ids int32 [N, L] and their texts."""

    ids: np.ndarray
    texts: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Gidd:
    """A network with its parameters, tokenizer and forward process (None: autoregressive)."""

    network: DiT | Llama
    params: Any
    tokenizer: Tokenizer
    process: InterpolatingProcess | None
    keep_padding_columns: bool = False

    @classmethod
    def from_pretrained(cls, path: str | Path, *, ema: bool = False) -> Self:
        """Load a workdir of `gidd_jax.train` (its newest step), or one step of it.

        ema: the moving average of the parameters. Raises InputError when there is no checkpoint,
        or it is damaged.
        """
        checkpoint = find_checkpoint(path)
        settings = Settings.from_config(checkpoint.config())
        tokenizer = checkpoint.tokenizer()
        objective = build_objective(settings, tokenizer.vocab_size, tokenizer.mask_id)
        params = load_params(checkpoint, abstract_params(objective), ema=ema)
        return cls(
            network=objective.model,  # pyright: ignore[reportArgumentType]
            params=params,
            tokenizer=tokenizer,
            process=objective.process,
            keep_padding_columns=settings.model.keep_padding_columns,
        )

    @property
    def max_seq_len(self) -> int:
        return self.network.max_seq_len

    def generate(
        self,
        num_samples: int = 4,
        *,
        batch_size: int = 16,
        length: int | None = None,
        seed: int = 0,
        options: SamplerOptions | None = None,
    ) -> Samples:
        """Draw token sequences of `length` (default: the context) and decode them.

        Batches are split over the local devices. A sample depends on the seed and its number, not
        on the batch size. Raises InputError for a length beyond the context.
        """
        length = self.max_seq_len if length is None else length
        if not 1 <= length <= self.max_seq_len:
            raise InputError(f"length must lie in [1, {self.max_seq_len}], the context: {length}")
        if num_samples < 1 or batch_size < 1:
            raise InputError(
                f"num_samples and batch_size must be at least 1: {num_samples}, {batch_size}"
            )
        devices = jax.local_device_count()
        rows = -(-min(batch_size, num_samples) // devices) * devices
        draw = self._compiled(options or SamplerOptions(), length)
        key = jax.random.key(seed)
        parts = []
        for start in range(0, num_samples, rows):
            keys = row_keys(key, jnp.arange(start, start + rows))
            parts.append(np.asarray(draw(self.params, keys)))
        ids = np.concatenate(parts)[:num_samples]
        return Samples(ids, [self.decode(row) for row in ids])

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of one sequence of ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _compiled(
        self, options: SamplerOptions, length: int
    ) -> Callable[[Any, jax.Array], jax.Array]:
        mesh = make_mesh(-1, 1, 1, devices=jax.local_devices())
        rows = batch_sharding(mesh)
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        draw = self._draw_diffusion if self.process is not None else self._draw_autoregressive
        return jax.jit(
            functools.partial(draw, options, length),
            in_shardings=(replicated, rows),
            out_shardings=rows,
        )

    def _draw_diffusion(
        self, options: SamplerOptions, length: int, params: Any, keys: jax.Array
    ) -> jax.Array:
        assert self.process is not None

        def denoise(z_t: jax.Array, t: jax.Array) -> jax.Array:
            return self.network.apply({"params": params}, z_t, t)  # pyright: ignore

        options = dataclasses.replace(options, keep_padding_columns=self.keep_padding_columns)
        return sample_diffusion(self.process, denoise, options, keys, length)

    def _draw_autoregressive(
        self, options: SamplerOptions, length: int, params: Any, keys: jax.Array
    ) -> jax.Array:
        network = self.network
        assert isinstance(network, Llama)

        def decode(ids: jax.Array, cache: Any, position: jax.Array) -> Any:
            return network.apply({"params": params}, ids, cache, position, method="decode_step")

        tokenizer = self.tokenizer
        bos_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return sample_autoregressive(
            decode,
            network.init_cache(keys.shape[0], length),
            keys,
            length,
            temperature=options.temperature,
            min_p=options.min_p,
            bos_id=bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            vocab_size=tokenizer.vocab_size,
            excluded_ids=(tokenizer.mask_id, tokenizer.pad_id),
        )
