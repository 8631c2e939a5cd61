"""PyTorch code that goes with a folder, so that transformers loads it with trust_remote_code."""

from importlib import resources
from typing import Any

from gidd_jax.errors import InputError
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.models.dit import DiT
from gidd_jax.models.llama_denoiser import LlamaDenoiser

_FILES = ("configuration_gidd.py", "modeling_gidd.py")
_CLASSES = {
    DiT: ("GiddConfig", "GiddForMaskedLM"),
    LlamaDenoiser: ("GiddLlamaConfig", "GiddLlamaForMaskedLM"),
}


def exported_code(model: Pretrained) -> dict[str, str]:
    """Return the files of code for a model by name; raises InputError where there are none."""
    network = model.network
    if type(network) not in _CLASSES:
        raise InputError(
            f"there is no code for a {type(network).__name__}: leave with_code out (transformers "
            "loads autoregressive models without it)"
        )
    is_told = isinstance(network, DiT) or (isinstance(network, LlamaDenoiser) and network.cond_dim)
    if is_told and network.position_times:  # pyright: ignore[reportAttributeAccessIssue]
        raise InputError(
            "the model is told times of positions, which the code for others does not know: leave "
            "with_code out"
        )
    folder = resources.files("gidd_jax") / "interchange" / "torch_code"
    return {name: (folder / name).read_text("utf-8") for name in _FILES}


def code_config(model: Pretrained) -> dict[str, Any]:
    """Return the keys of a config that name the code's classes, and what samplers need to know."""
    config, network = _CLASSES[type(model.network)]
    tokenizer = model.tokenizer
    return {
        "architectures": [network],
        "auto_map": {
            "AutoConfig": f"configuration_gidd.{config}",
            "AutoModelForMaskedLM": f"modeling_gidd.{network}",
        },
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "mask_token_id": tokenizer.mask_id,
        "noise_vocab_size": tokenizer.vocab_size,
        "pad_token_id": tokenizer.pad_id,
    }
