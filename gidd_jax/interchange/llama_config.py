"""Configs of autoregressive models as transformers writes them: Llama, Qwen2 and Qwen3.

And of the denoisers that are made of them: the same keys, with what a denoiser has beside them.
"""

import math
from typing import Any

from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.interchange.fields import Fields, checked
from gidd_jax.models.layers import check_heads
from gidd_jax.models.llama import Llama, LlamaTransformer
from gidd_jax.models.llama_denoiser import LlamaDenoiser
from gidd_jax.models.rotary import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

KINDS = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DENOISER = "llama_denoiser"
_BASE = "base_model_type"  # of a denoiser: the one of KINDS whose blocks it has
_QWEN3_HEAD_DIM = 128  # where a config does not say


def llama_network(fields: Fields) -> Llama:
    """Return the network of a config whose model_type is one of KINDS.

    Raises InputError that names the key for what the network does not compute.
    """
    return Llama(**_architecture(fields, fields.text("model_type")))


def denoiser_network(fields: Fields) -> LlamaDenoiser:
    """Return the network of a config whose model_type is DENOISER; raises as `llama_network`."""
    kind = fields.text(_BASE)
    if kind not in KINDS:
        raise fields.error(f"{_BASE} = {kind!r}: must be one of {', '.join(KINDS)}")
    width = fields.number("timestep_cond_dim", 0)
    if width < 0 or width != int(width):
        raise fields.error(f"timestep_cond_dim = {width:g}: must be a whole number from 0")
    return LlamaDenoiser(
        **_architecture(fields, kind),
        cond_dim=int(width),
        shift=fields.flag("shift", False),
        position_times=fields.flag("position_times", False),
    )


def _architecture(fields: Fields, kind: str) -> dict[str, Any]:
    """Return the fields of a network that a config says, as one of KINDS means it."""
    if fields.has("hidden_act") and fields.text("hidden_act") != "silu":
        raise fields.error("hidden_act must be silu: this is another architecture")
    check_attention(fields)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", num_heads if kind == "llama" else None)
    head_dim = fields.size("head_dim", _QWEN3_HEAD_DIM) if _has_head_dim(fields, kind) else None
    checked(fields.file, lambda: check_heads(hidden_size, num_heads, kv_heads, head_dim))
    if head_dim is not None and head_dim * num_heads == hidden_size:
        head_dim = None  # what it is anyway
    has_bias = kind != "qwen2" and fields.flag("attention_bias", False)
    theta, scaling = rope(fields)
    return dict(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size("intermediate_size"),
        qkv_bias=has_bias or kind == "qwen2",
        out_bias=has_bias,
        mlp_bias=kind == "llama" and fields.flag("mlp_bias", False),
        head_norms=kind == "qwen3",
        max_seq_len=fields.size("max_position_embeddings", 2048 if kind == "llama" else None),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _has_head_dim(fields: Fields, kind: str) -> bool:
    return kind == "qwen3" or fields.has("head_dim")


def check_attention(fields: Fields) -> None:
    """Raise InputError where a config asks for attention that no network here computes."""
    # Qwen's configs name a window also where they do not use it.
    if fields.flag("use_sliding_window", True) and fields.has("sliding_window"):
        raise fields.error("sliding_window must be null: tokens attend to the whole context")
    kinds = fields.values.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise fields.error("layer_types must be full_attention: tokens attend to the whole context")
    section = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    for part in (fields, *([fields.section(section)] if fields.has(section) else [])):
        if part.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error("partial_rotary_factor must be 1: positions turn whole heads")


def rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Return base and scaling of the rotary positions, as transformers 4 and 5 write them."""
    theta = fields.number("rope_theta", 10000.0)
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    if not fields.has(key):
        return theta, None
    section = fields.section(key)
    theta = section.number("rope_theta", theta)
    kind = section.text("rope_type" if section.has("rope_type") else "type")
    readers = {"default": lambda _: None, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
    if kind not in readers:
        legal = ", ".join(readers)
        raise fields.error(f"{key}: type {kind!r} is not supported, only {legal}")
    if not theta > 1:
        raise fields.error(f"rope_theta = {theta:g}: must be above 1")
    return theta, readers[kind](section)


def _factor(section: Fields) -> float:
    factor = section.number("factor")
    if not factor > 0:
        raise section.error(f"factor = {factor:g}: must be above 0")
    return factor


def _linear(section: Fields) -> LinearRopeScaling:
    return LinearRopeScaling(_factor(section))


def _llama3(section: Fields) -> Llama3RopeScaling:
    return Llama3RopeScaling(
        factor=_factor(section),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_len=section.size("original_max_position_embeddings"),
    )


def _yarn(section: Fields) -> YarnRopeScaling:
    factor = _factor(section)

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = grown(1.0)
    if section.has("attention_factor"):
        attention = section.number("attention_factor")
    elif section.number("mscale", 0.0) and section.number("mscale_all_dim", 0.0):
        attention = grown(section.number("mscale")) / grown(section.number("mscale_all_dim"))
    return YarnRopeScaling(
        factor=factor,
        original_max_len=section.size("original_max_position_embeddings"),
        attention_factor=attention,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
    )


def llama_config(network: LlamaTransformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the config of a network, with the model_type that computes the same.

    Raises InputError for biases that none of the three has.
    """
    shape = network.shape
    kind = "qwen3" if network.head_norms else "llama"
    if network.qkv_bias and not network.out_bias and not network.head_norms:
        kind = "qwen2"
    elif network.qkv_bias != network.out_bias:
        raise InputError("biases of queries, keys and values alone: no format has them here")
    if network.mlp_bias and kind != "llama":
        raise InputError(f"biases of the perceptron: {kind} has none, no format can hold them")
    config = {
        "architectures": [KINDS[kind]],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": network.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": network.max_seq_len,
        "model_type": kind,
        "num_attention_heads": network.num_heads,
        "num_hidden_layers": network.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": tokenizer.pad_id,
        "rms_norm_eps": network.rms_norm_eps,
        "rope_scaling": _written(network.rope_scaling),
        "rope_theta": network.rope_theta,
        "tie_word_embeddings": network.tie_embeddings,
        "vocab_size": network.vocab_size,
    }
    if kind != "qwen2":
        config["attention_bias"] = network.out_bias
    if kind == "llama":
        config["mlp_bias"] = network.mlp_bias
    else:
        config["use_sliding_window"] = False
    return config


def denoiser_config(network: LlamaDenoiser, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the config of a denoiser that `denoiser_network` reads; raises as `llama_config`."""
    config = llama_config(network, tokenizer)
    return config | {
        "architectures": ["LlamaDenoiser"],
        _BASE: config["model_type"],
        "model_type": DENOISER,
        "position_times": network.position_times,
        "shift": network.shift,
        "timestep_cond_dim": network.cond_dim,
    }


def _written(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if isinstance(scaling, LinearRopeScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3RopeScaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_len,
        }
    if isinstance(scaling, YarnRopeScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_len,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    return None
