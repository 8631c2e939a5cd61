"""From settings to the objects of a run: process, network, objective."""

from typing import Any

import jax.numpy as jnp

from gidd_jax.models import gidd
from gidd_jax.models.dit import DiT
from gidd_jax.models.gidd import TimeFreeTransformer
from gidd_jax.models.llama import Llama
from gidd_jax.own_process import Source, make
from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess
from gidd_jax.settings import ModelSettings, ProcessSettings, Settings
from gidd_jax.training.noising import Noising
from gidd_jax.training.objective import Objective


def build_process(
    settings: ProcessSettings, vocab_size: int, mask_id: int, own: Source | None = None
) -> InterpolatingProcess | None:
    """Return the forward process, or None for the autoregressive baseline.

    own: the source of the user's own process, which is run. Raises InputError when it fails.
    """
    if own is not None:
        return make(own, vocab_size, mask_id, settings.options)
    if settings.name == "autoregressive":
        return None
    if settings.name == "hybrid":
        return HybridProcess(
            vocab_size, mask_id, settings.p_uniform, settings.gamma, t_eps=settings.t_eps
        )
    if settings.name == "masked":
        return MaskedProcess(vocab_size, mask_id, t_eps=settings.t_eps)
    assert settings.name == "log_snr", "an own process needs its source"
    return LogSnrProcess(
        vocab_size,
        mask_id,
        settings.scale,
        settings.shift,
        settings.min_log_snr,
        settings.max_log_snr,
        t_eps=settings.t_eps,
    )


def build_model(
    settings: ModelSettings, vocab_size: int, position_times: bool = False, block_length: int = 0
) -> DiT | TimeFreeTransformer | Llama:
    """Return the network (a Linen module without parameters).

    position_times: it is told the times of positions, as `Settings.position_times` says;
    block_length: `TrainSettings.block_length`.
    """
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": settings.hidden_size,
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "max_seq_len": settings.max_seq_len,
        "dtype": jnp.dtype(settings.dtype),
        "scan_layers": settings.scan_layers,
        "remat": settings.remat,
        "attention": settings.attention,
    }
    if settings.name == "llama":
        return Llama(**shared)
    if settings.name == "gidd":
        return TimeFreeTransformer(
            **shared,
            **_parametrization(settings),
            position_times=position_times,
            block_length=block_length,
        )
    return DiT(cond_dim=settings.cond_dim, position_times=position_times, **shared)


def _parametrization(settings: ModelSettings) -> dict[str, Any]:
    """Return the multipliers and initial sizes of the time-free transformer.

    CompleteP's are those of the scaling paper: they, and the optimizer's groups, keep the best
    learning rate in place. Standard is a transformer as it is mostly initialised.
    """
    width = settings.hidden_size
    if settings.parametrization == "completep":
        return {
            "resid_scale": gidd.RESID_SCALE,
            "head_scale": gidd.HEAD_WIDTH / width,
            "init_std": gidd.BULK_STD / width**0.5,
            "head_std": 0.0,
        }
    return {
        "resid_scale": float(settings.num_layers),  # branches without a factor
        "head_scale": 1.0,
        "init_std": gidd.AUX_STD,
        "head_std": gidd.AUX_STD,
    }


def build_objective(
    settings: Settings, vocab_size: int, mask_id: int, own: Source | None = None
) -> Objective:
    """Return what the network is trained on; `own` as in `build_process`."""
    return Objective(
        model=build_model(
            settings.model, vocab_size, settings.position_times, settings.train.block_length
        ),
        process=build_process(settings.process, vocab_size, mask_id, own),
        weighting=settings.train.weighting,
        min_weight=settings.train.min_weight,
        max_weight=settings.train.max_weight,
        stratified=settings.process.stratified,
        mask_padding=settings.train.mask_padding,
        align_mask_to_input=settings.train.align_mask_to_input,
        keep_padding_columns=settings.model.keep_padding_columns,
        aggregation=settings.train.aggregation,
        noising=Noising(
            by_position=settings.process.by_position,
            ascending=settings.process.ascending,
            givens=settings.data.givens,
            givens_kind=settings.data.givens_kind,
            whole_vocabulary=settings.process.uniform_ids == "all",
            block_length=settings.train.block_length,
        ),
    )
