"""Configs of gidd_jax's diffusion models for transformers (copied into exported folders).

Apache-2.0, https://github.com/dvruette/gidd is the original implementation of GIDD.
"""

import math

from transformers import PretrainedConfig


class GiddConfig(PretrainedConfig):
    """A DiT of GIDD or MDLM, as the folder's config.json describes it."""

    model_type = "dit"

    def __init__(self, **values):
        values.setdefault("tie_word_embeddings", False)
        super().__init__(**values)


class GiddLlamaConfig(GiddConfig):
    """A denoiser made of a Llama, Qwen2 or Qwen3."""

    model_type = "llama_denoiser"

    def __init__(self, **values):
        # Of its own: transformers rewrites these keys for the families that it knows.
        theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling", None)
        self.rotary = {"rope_theta": theta, "rope_scaling": scaling}
        super().__init__(**values)

    def to_dict(self):
        values = super().to_dict()
        return values | values.pop("rotary", {})

    def rope_frequencies(self):
        """Return angular frequencies [head_dim / 2], scaled, and the factor of their tables."""
        half, base = self.head_dim // 2, self.rotary["rope_theta"]
        scaling = self.rotary["rope_scaling"] or {}
        frequencies = [base ** (-i / half) for i in range(half)]
        kind, factor = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
        if kind in ("default", "linear"):
            return [f / factor for f in frequencies], 1.0
        length = scaling["original_max_position_embeddings"]
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = [length * f / (2 * math.pi) for f in frequencies]
            kept = [min(max((n - low) / (high - low), 0.0), 1.0) for n in turns]
            return self._stretched(frequencies, kept, factor), 1.0
        low, high = (
            half * math.log(length / (turns * 2 * math.pi)) / math.log(base)
            for turns in (scaling["beta_fast"], scaling["beta_slow"])
        )
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        high += 0.001 * (low == high)
        kept = [1 - min(max((i - low) / (high - low), 0.0), 1.0) for i in range(half)]
        return self._stretched(frequencies, kept, factor), scaling["attention_factor"]

    def _stretched(self, frequencies, kept, factor):
        pairs = zip(frequencies, kept, strict=True)
        return [f * (share + (1 - share) / factor) for f, share in pairs]
