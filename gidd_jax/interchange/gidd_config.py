"""The config.json of the scaling paper's models, read and written (model_type "gidd")."""

import math
from typing import Any

from gidd_jax.interchange.fields import Fields, checked
from gidd_jax.models.gidd import AUX_STD, MLP_RATIO, ROTARY_BASE, TimeFreeTransformer
from gidd_jax.models.layers import check_heads
from gidd_jax.process import LogSnrProcess

FACTORS = ("fan_in", "fan_out")  # what weight_scaling may be beside a number


def gidd_network(fields: Fields) -> TimeFreeTransformer:
    """Return the network of a config; raises InputError for what it does not compute."""
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    checked(fields.file, lambda: check_heads(hidden_size, num_heads, num_heads))
    if fields.has("head_dim") and fields.size("head_dim") * num_heads != hidden_size:
        raise fields.error(
            f"head_dim = {fields.size('head_dim')}: must be hidden_size / num_attention_heads = "
            f"{hidden_size // num_heads}"
        )
    if fields.has("rope_scaling"):
        raise fields.error("rope_scaling must be null: positions are not scaled")
    if fields.flag("is_causal", False):
        raise fields.error("is_causal must be false: these networks see both sides")
    # Where newer versions of transformers write the base.
    rope = fields.section("rope_parameters") if fields.has("rope_parameters") else fields
    if rope.has("rope_type") and rope.text("rope_type") != "default":
        raise fields.error("rope_parameters: rope_type must be default: positions are not scaled")
    context = fields.size("max_position_embeddings", 1024)
    blocks = fields.size("block_length") if fields.has("block_length") else 0
    if blocks and context % blocks:
        raise fields.error(f"block_length = {blocks}: must divide the context, {context}")
    return TimeFreeTransformer(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        intermediate_size=fields.size("intermediate_size", MLP_RATIO * hidden_size),
        max_seq_len=context,
        resid_scale=fields.number("resid_scale", 4.0),
        head_scale=fields.number("head_scaling", 1.0),
        weight_scale=_weight_scale(fields),
        soft_cap=_positive(fields, "attn_soft_cap", 30.0),
        rms_norm_eps=_positive(fields, "rms_norm_eps", 1e-6),
        normed_heads=fields.flag("use_qk_norm", True),
        sink=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        rope_theta=_positive(rope, "rope_theta", ROTARY_BASE),
        init_std=fields.number("init_scale", 0.4),
        head_std=fields.number("head_init_scale", 0.0),
        # All released models were trained with prompts.
        position_times=fields.flag("position_times", True),
        block_length=blocks,
    )


def _positive(fields: Fields, key: str, default: float) -> float:
    """Return a number above 0; the default where there is no key, but not where it says null."""
    if key in fields.values and fields.values[key] is None:
        raise fields.error(f"{key} is null: must be a number above 0")
    value = fields.number(key, default)
    if not 0 < value < math.inf:
        raise fields.error(f"{key} = {value}: must be a number above 0")
    return value


def _finite(fields: Fields, key: str, default: float) -> float:
    value = fields.number(key, default)
    if not math.isfinite(value):
        raise fields.error(f"{key} = {value}: must be a finite number")
    return value


def _weight_scale(fields: Fields) -> float | str:
    if "weight_scaling" not in fields.values:
        return "fan_in"
    if isinstance(fields.values["weight_scaling"], str):
        text = fields.text("weight_scaling")
        if text not in FACTORS:
            raise fields.error(
                f"weight_scaling = {text!r}: must be a number, or {' or '.join(FACTORS)}"
            )
        return text
    return _positive(fields, "weight_scaling", 1.0)


def gidd_process(fields: Fields, vocab_size: int, mask_id: int) -> LogSnrProcess:
    """Return the process of a config: `noise_type` is the shift of the mixture."""
    shift = _finite(fields, "noise_type", 0.0)
    low, high = _finite(fields, "min_log_snr", -9.0), _finite(fields, "max_log_snr", 9.0)
    return checked(fields.file, lambda: LogSnrProcess(vocab_size, mask_id, 1.0, shift, low, high))


def gidd_config(network: TimeFreeTransformer) -> dict[str, Any]:
    """Return the keys of a config that `gidd_network` reads, and those that name the format."""
    head_dim = network.hidden_size // network.num_heads
    config = {
        "architectures": ["GiddForDiffusionLM"],
        "attention_bias": network.sink,
        "attn_performer": "eager",
        "attn_soft_cap": network.soft_cap,
        "emb_init_scale": AUX_STD,
        "head_dim": head_dim,
        "head_init_scale": network.head_std,
        "head_scaling": network.head_scale,
        "hidden_size": network.hidden_size,
        "init_scale": network.init_std,
        "intermediate_size": network.intermediate_size or MLP_RATIO * network.hidden_size,
        "is_causal": False,
        "max_position_embeddings": network.max_seq_len,
        "mlp_bias": network.mlp_bias,
        "model_type": "gidd",
        "num_attention_heads": network.num_heads,
        "num_hidden_layers": network.num_layers,
        "resid_scale": network.resid_scale,
        "rms_norm_eps": network.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": network.rope_theta,
        "tie_word_embeddings": network.tie_embeddings,
        "use_qk_norm": network.normed_heads,
        "vocab_size": network.vocab_size,
        "weight_scaling": network.weight_scale,
    }
    if not network.position_times:
        config["position_times"] = False
    if network.block_length:
        config["block_length"] = network.block_length
    return config


def gidd_noise(process: LogSnrProcess) -> dict[str, float] | None:
    """Return the keys of a config that `gidd_process` reads; None if they cannot say it."""
    if process.scale != 1.0 or process.t_eps != LogSnrProcess.t_eps:
        return None
    return {
        "noise_type": process.shift,
        "min_log_snr": process.min_log_snr,
        "max_log_snr": process.max_log_snr,
    }
