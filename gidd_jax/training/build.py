"""From settings to the objects of a run: process, network, objective."""

from typing import Any

import jax.numpy as jnp

from gidd_jax.models import gidd
from gidd_jax.models.dit import DiT
from gidd_jax.models.gidd import TimeFreeTransformer
from gidd_jax.models.llama import Llama
from gidd_jax.models.llama_denoiser import LlamaDenoiser
from gidd_jax.models.rotary import scaling_of
from gidd_jax.own_process import Source, make
from gidd_jax.process import HybridProcess, InterpolatingProcess, LogSnrProcess, MaskedProcess
from gidd_jax.settings import ModelSettings, ProcessSettings, Settings
from gidd_jax.training.annealing import Annealing
from gidd_jax.training.lora import Lora
from gidd_jax.training.noising import Noising
from gidd_jax.training.objective import Network, Objective


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


def build_model(settings: Settings, vocab_size: int) -> Network:
    """Return the network (a Linen module without parameters)."""
    model, position_times = settings.model, settings.position_times
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "max_seq_len": model.max_seq_len,
        "dtype": jnp.dtype(model.dtype),
        "scan_layers": model.scan_layers,
        "remat": model.remat,
        "attention": model.attention,
    }
    if model.name == "llama":
        shape = _llama_shape(model)
        if settings.process.name == "autoregressive":
            return Llama(**shared, **shape)
        return LlamaDenoiser(
            **shared,
            **shape,
            cond_dim=model.cond_dim,
            shift=model.shift,
            position_times=position_times,
        )
    if model.name == "gidd":
        return TimeFreeTransformer(
            **shared,
            **_parametrization(model),
            position_times=position_times,
            block_length=settings.train.block_length,
        )
    return DiT(cond_dim=model.cond_dim, position_times=position_times, **shared)


def _llama_shape(settings: ModelSettings) -> dict[str, Any]:
    return {
        "num_kv_heads": settings.num_kv_heads or None,
        "head_dim": settings.head_dim or None,
        "intermediate_size": settings.intermediate_size or None,
        "qkv_bias": settings.qkv_bias,
        "out_bias": settings.out_bias,
        "mlp_bias": settings.mlp_bias,
        "head_norms": settings.head_norms,
        "rope_theta": settings.rope_theta,
        "rope_scaling": scaling_of(settings.rope_scaling),
        "rms_norm_eps": settings.rms_norm_eps,
        "tie_embeddings": settings.tie_embeddings,
    }


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
        model=build_model(settings, vocab_size),
        process=build_process(settings.process, vocab_size, mask_id, own),
        weighting=settings.train.weighting,
        min_weight=settings.train.min_weight,
        max_weight=settings.train.max_weight,
        stratified=settings.process.stratified,
        mask_padding=settings.train.mask_padding,
        align_mask_to_input=settings.train.align_mask_to_input,
        keep_padding_columns=settings.model.keep_padding_columns,
        padding_weight=settings.train.padding_weight,
        aggregation=settings.train.aggregation,
        noising=Noising(
            by_position=settings.process.by_position,
            ascending=settings.process.ascending,
            givens=settings.data.givens,
            givens_kind=settings.data.givens_kind,
            short_rows=settings.data.short_rows,
            whole_vocabulary=settings.process.uniform_ids == "all",
            block_length=settings.train.block_length,
        ),
        annealing=Annealing(settings.adapt.attention_steps, settings.adapt.noise_steps),
        lora=Lora(settings.adapt.lora_rank, settings.adapt.lora_alpha)
        if settings.adapt.lora_rank
        else None,
    )
