"""Tiny networks of transformers' architectures, their folders and their logits.

tests/data/golden_llama was made by this file, with PyTorch and transformers alone:

    python tests/golden_llama.py
"""

import shutil
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "data" / "golden_llama"
TINY = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_theta": 100.0}
CASES = {
    "llama": TINY,
    "llama_biases": TINY | {"attention_bias": True, "mlp_bias": True},
    "llama_wide_heads": TINY | {"head_dim": 8, "tie_word_embeddings": True},
    "smollm": TINY | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2": TINY | {"use_sliding_window": False, "sliding_window": 8},
    "qwen3": TINY | {"head_dim": 6, "tie_word_embeddings": True},
    "qwen3_biases": TINY | {"head_dim": 4, "attention_bias": True},
    "llama_linear": TINY | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
    "llama_llama3": TINY
    | {
        "rope_parameters": ROPE
        | {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen3_yarn": TINY
    | {
        "head_dim": 8,
        "rope_parameters": ROPE
        | {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 3.0,
            "beta_slow": 0.5,
        },
    },
}
IDS = np.random.default_rng(0).integers(0, 67, (2, 32))


def torch_logits(folder: Path, dtype: str = "float32") -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def write_goldens() -> None:
    """Networks of random parameters as save_pretrained writes them, and their logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    logits = {}
    for name, values in CASES.items():
        kind = name.split("_")[0].replace("smollm", "llama")
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
        with torch.no_grad():
            for parameter in model.parameters():
                mean = float(parameter.ndim == 1 and parameter.mean() == 1)
                parameter.copy_(mean + 0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        logits[name] = torch_logits(folder)
    np.savez_compressed(GOLDEN / "logits.npz", **logits)


if __name__ == "__main__":
    write_goldens()
