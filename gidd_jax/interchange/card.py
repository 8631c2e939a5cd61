"""The model card of an exported folder: README.md, with the front matter that the hub reads."""

import json
import math
from pathlib import Path
from typing import Any

import jax

from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.errors import InputError
from gidd_jax.interchange.load import place_of
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.mixture import split_mixture
from gidd_jax.models.llama import Llama
from gidd_jax.settings import Settings
from gidd_jax.training.metrics import METRICS_FILE

CARD_FILE = "README.md"
_FIGURES = {  # of the last validation, by their names in the log
    "eval/nelbo": "bound, nats per token",
    "eval/perplexity": "perplexity",
    "eval/bits_per_byte": "bits per byte",
}
_SPEED = "train/tokens_per_second"


def model_card(model: Pretrained, source: str, *, licence: str | None, with_code: bool) -> str:
    """Return the card of a model that came from `source`: what it is, how it was made, how to load.

    Of a run of this package it has the settings and the last validation's figures. licence: a name
    that the hub knows, such as apache-2.0; None: the card says that none was named.
    """
    is_causal = isinstance(model.network, Llama)
    kind = "autoregressive" if is_causal else "diffusion"
    front = {
        "license": licence or "other",
        "library_name": "transformers" if with_code or is_causal else "gidd_jax",
        "pipeline_tag": "text-generation",
        "tags": [kind, "gidd_jax"],
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    network = model.network
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# A {kind} language model",
        "",
        f"{type(network).__name__}, {network.num_layers} layers of width {network.hidden_size}, "
        f"{count:,} parameters, contexts of {network.max_seq_len} tokens, a vocabulary of "
        f"{model.tokenizer.vocab_size:,}. Written by gidd_jax from `{Path(source).name}`.",
        "",
        *_noise(model),
        *_licence(licence),
        *_run(source),
        *_loading(with_code, is_causal),
    ]
    return "\n".join(lines)


def _noise(model: Pretrained) -> list[str]:
    if model.process is None:
        return []
    return ["**Noise:** " + repr(model.process) + ".", ""]


def _licence(licence: str | None) -> list[str]:
    return [] if licence else ["**Licence:** none was named when the folder was written.", ""]


def _run(source: str) -> list[str]:
    """Say how a run of this package was made; nothing of other sources."""
    try:
        checkpoint = find_checkpoint(place_of(source))
        settings = Settings.from_saved(checkpoint.config())
    except InputError:
        return []
    data, train = settings.data, settings.train
    rows = {
        "corpus": ", ".join(Path(part.path).name for part in split_mixture(data.path)),
        "start": Path(settings.model.start).name or "nothing",
        "steps": f"{checkpoint.step:,}",
        "tokens": f"{checkpoint.step * train.batch_size * settings.model.max_seq_len:,}",
        "optimizer": settings.optimizer.name,
        "loss weights": train.weighting,
        **_figures(Path(str(checkpoint.folder)).parent.parent, checkpoint.step, settings),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return [
        "## Training",
        "",
        "| | |",
        "| --- | --- |",
        *table,
        "",
        "<details><summary>All settings</summary>",
        "",
        "```json",
        json.dumps(_without_folders(settings), indent=2),
        "```",
        "",
        "</details>",
        "",
    ]


def _without_folders(settings: Settings) -> dict[str, Any]:
    """Return the settings with names in place of the paths of one machine."""
    values = settings.to_dict()
    for section, key in (("data", "path"), ("data", "tokenizer"), ("model", "start")):
        values[section][key] = Path(values[section][key]).name
    rule, colon, files = values["data"]["validation"].partition(":")
    if rule == "path":
        values["data"]["validation"] = rule + colon + Path(files).name
    return values


def _figures(workdir: Path, step: int, settings: Settings) -> dict[str, str]:
    """Return how long the steps took and the last validation up to a step, out of a run's log."""
    found: dict[str, Any] = {}
    tokens, hours, last = settings.train.batch_size * settings.model.max_seq_len, 0.0, 0
    try:
        lines = (workdir / METRICS_FILE).read_text("utf-8").splitlines()
        for values in map(json.loads, lines):
            if values["step"] > step:
                continue
            found |= {name: values[name] for name in _FIGURES if name in values}
            if _SPEED in values:
                hours += (values["step"] - last) * tokens / values[_SPEED] / 3600
                last = values["step"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return {}
    numbers = {name: v for name, v in found.items() if isinstance(v, float) and math.isfinite(v)}
    figures = {f"validation: {_FIGURES[name]}": f"{v:.4g}" for name, v in numbers.items()}
    if hours:
        figures = {"hours of steps": f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"} | figures
    return figures


def _loading(with_code: bool, is_causal: bool) -> list[str]:
    lines = [
        "## Loading",
        "",
        "```python",
        "from gidd_jax import Gidd",
        "model = Gidd.from_pretrained(FOLDER)",
        "print(model.generate(num_samples=1, num_steps=64).texts[0])",
        "```",
        "",
    ]
    if with_code:
        lines += [
            "In PyTorch, with the code in this folder (read it first: it is run):",
            "",
            "```python",
            "from transformers import AutoModelForMaskedLM",
            "model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)",
            "ids = model.generate(num_steps=64, correction_steps=32)",
            "```",
            "",
        ]
    if is_causal:
        lines += ["transformers loads it with `AutoModelForCausalLM`, too.", ""]
    return lines
