"""The settings of a run as typed, frozen values: the door between configs and code.

There are no defaults here (they live in `configs/base.py`); every value is checked when a section
is made, and a wrong key, type or value raises InputError that names it and says what is legal.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ml_collections import ConfigDict

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError
from gidd_jax.mixture import split_mixture
from gidd_jax.sections import (
    Section,
    above,
    at_least,
    axis,
    check_keys,
    fraction,
    legal,
    matches,
    not_empty,
    of_kind,
    one_of,
    share,
    split_own_process,
)
from gidd_jax.together import WEIGHTINGS, check_together

# What may differ when a run continues in its workdir: none of these changes the numbers of a step,
# except that a new run length stretches the learning-rate schedule from there on.
MAY_CHANGE_ON_RESUME = (
    "train.num_steps",
    "train.eval_every",
    "train.eval_batches",
    "data.num_workers",
    "mesh.",
    "checkpoint.",
    "logging.",
)
# Paths, which each host may spell its own way, and the speed of reading. Of a process of one's own
# the class and the text must be the same.
MAY_DIFFER_BETWEEN_HOSTS = ("data.path", "data.tokenizer", "data.num_workers", "process.name")
REMOVED = ("logging.profile_at",)  # keys that only older runs have


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    name: str = one_of("dit", "gidd", "llama")
    parametrization: str = one_of("standard", "completep")
    hidden_size: int = at_least(2)
    num_layers: int = at_least(1)
    num_heads: int = at_least(1)
    cond_dim: int = at_least(0)
    max_seq_len: int = at_least(2)
    dtype: str = one_of("float32", "bfloat16")
    scan_layers: bool
    remat: str = one_of("none", "full", "attention", "dots")
    attention: str = one_of("", "xla", "cudnn", "splash")
    keep_padding_columns: bool
    start: str
    num_kv_heads: int = at_least(0)
    head_dim: int = legal(lambda value: value >= 0 and value % 2 == 0, "even and >= 0")
    intermediate_size: int = at_least(0)
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    rope_theta: float = above(1)
    rope_scaling: str = matches(
        r"|(linear|llama3|yarn):[^,]+(,[^,]+)*", "linear:NUMBERS | llama3:NUMBERS | yarn:NUMBERS"
    )
    rms_norm_eps: float = above(0)
    tie_embeddings: bool
    shift: bool


def _is_process(name: str) -> bool:
    return name in WEIGHTINGS or split_own_process(name) is not None


@dataclass(frozen=True, kw_only=True)
class ProcessSettings(Section):
    name: str = legal(
        _is_process, "hybrid | masked | log_snr | autoregressive | FILE.py:CLASS of your own"
    )
    options: str = matches(
        r"(\w+=[^,=]+(,\w+=[^,=]+)*)?", "KEY=VALUE,... for a process of your own, or ''"
    )
    p_uniform: float = fraction()
    gamma: float = legal(lambda value: 0 < value <= 2, "in (0, 2]")
    t_eps: float = legal(lambda value: 0 < value < 0.5, "in (0, 0.5)")
    scale: float = at_least(0)
    shift: float
    min_log_snr: float
    max_log_snr: float
    stratified: bool
    by_position: float = share()
    ascending: float = share()
    uniform_ids: str = one_of("others", "all")

    @property
    def has_position_times(self) -> bool:
        """Whether in some rows of the training positions have times of their own."""
        return self.by_position + self.ascending > 0


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    path: str = legal(lambda value: value != "" and bool(split_mixture(value)), "not empty")
    tokenizer: str = matches(
        r"(?!ids:|chars:).+|ids:([2-9]|[1-9][0-9]{1,6})|chars:.+",
        "a folder or name, chars:FILE, or ids:VOCAB with VOCAB from 2 on",
    )
    validation: str = matches(
        r"last:[1-9][0-9_]*|hash:0?\.[0-9]*[1-9][0-9]*|(path|split):.+",
        "last:COUNT | hash:FRACTION (such as hash:0.05) | path:FILES | split:NAME",
    )
    text_key: str = not_empty()
    txt_documents: str = one_of("file", "line", "blank_line")
    mode: str = one_of("crop", "packed", "padded", "answers")
    frame: str = one_of("ends", "none")
    givens: float = share()
    givens_kind: str = one_of("mixed", "prompt", "infilling")
    marked: bool
    short_rows: float = share()
    empty_tokens: float = legal(lambda value: 0 <= value <= 0.5, "in [0, 0.5]")
    num_workers: int = at_least(0)

    @property
    def row_mode(self) -> str:
        """How rows are framed, one of `data.rows.MODES`."""
        return "none" if self.frame == "none" else self.mode

    @property
    def has_marks(self) -> bool:
        """Whether rows say themselves which of their tokens are given."""
        return self.marked or self.row_mode == "answers"

    @property
    def has_givens(self) -> bool:
        """Whether training gives some tokens of some rows, drawn or marked."""
        return self.givens > 0 or self.has_marks

    @property
    def record_key(self) -> str | None:
        """The field of a record that is its text; None: the record itself is read."""
        return None if self.row_mode == "answers" else self.text_key


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    name: str = one_of("adamw", "laprop", "psgd", "muon")
    learning_rate: float = above(0)
    b1: float = fraction()
    b2: float = fraction()
    eps: float = above(0)
    weight_decay: float = at_least(0)
    norm_decay: float = at_least(0)
    bias_decay: float = at_least(0)
    skip_above: float = at_least(0)
    clip_norm: float = legal(lambda value: 0 <= value < math.inf, ">= 0 and finite; 0 is off")
    warmup_steps: int = at_least(0)
    cooldown_steps: int = at_least(0)
    schedule: str = one_of("cosine", "linear", "constant", "wsd")
    final_lr_ratio: float = share()
    ema_decay: float = fraction()


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    num_steps: int = at_least(1)
    batch_size: int = at_least(1)
    micro_batches: int = at_least(1)
    weighting: str = one_of("elbo", "clip", "dynamic", "dynamic_v1_1", "dynamic_unbiased")
    min_weight: float = at_least(0)
    max_weight: float = at_least(0)
    aggregation: str = one_of("mean", "sum")
    block_length: int = at_least(0)
    mask_padding: bool
    padding_weight: float = share()
    align_mask_to_input: bool
    eval_every: int = at_least(0)
    eval_batches: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class AdaptSettings(Section):
    attention_steps: int = at_least(0)
    noise_steps: int = at_least(0)
    lora_rank: int = at_least(0)
    lora_alpha: float = above(0)


@dataclass(frozen=True, kw_only=True)
class MeshSettings(Section):
    data: int = axis()
    fsdp: int = axis()
    tensor: int = axis()


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Section):
    every: int = at_least(1)
    max_to_keep: int = at_least(1)


@dataclass(frozen=True, kw_only=True)
class LoggingSettings(Section):
    every: int = at_least(1)
    wandb: bool
    wandb_project: str = not_empty()


_SECTIONS = (
    ModelSettings,
    ProcessSettings,
    DataSettings,
    OptimizerSettings,
    TrainSettings,
    AdaptSettings,
    MeshSettings,
    CheckpointSettings,
    LoggingSettings,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that defines a run."""

    seed: int
    model: ModelSettings
    process: ProcessSettings
    data: DataSettings
    optimizer: OptimizerSettings
    train: TrainSettings
    adapt: AdaptSettings
    mesh: MeshSettings
    checkpoint: CheckpointSettings
    logging: LoggingSettings

    def __post_init__(self) -> None:
        if of_kind("seed", self.seed, int) < 0:
            raise InputError(f"seed = {self.seed}: must be >= 0")
        check_together(self)

    @property
    def position_times(self) -> bool:
        """Whether the network is told the times of positions: of all, or of what is given.

        The time-free network is told which tokens are a prompt, and nothing where none is.
        """
        by_position = self.process.has_position_times and self.model.name != "gidd"
        return by_position or self.data.has_givens

    @classmethod
    def from_config(cls, config: ConfigDict | Mapping[str, Any]) -> Self:
        """Return the settings of a config (or of the JSON of `to_json`).

        Raises InputError for a key that is unknown or missing, a wrong type or an illegal value.
        """
        values = config.to_dict() if isinstance(config, ConfigDict) else config
        if {"base", "grid"} <= set(values):
            raise InputError("this is the config of a sweep: train it with gidd_jax.sweep")
        check_keys("", values, {item.name for item in dataclasses.fields(cls)})
        made = {}
        for kind in _SECTIONS:
            name = kind.section_name()
            if not isinstance(values[name], Mapping):
                raise InputError(f"{name} = {values[name]!r}: must be a section of keys")
            check_keys(f"{name}.", values[name], {item.name for item in dataclasses.fields(kind)})
            made[name] = kind(**values[name])
        return cls(seed=values["seed"], **made)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings of a run from what it saved.

        A key that came into being after the run takes the value of the base config, which leaves
        things as they were before there was the key; REMOVED keys are dropped. Raises as
        `from_config`.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"the saved settings are {type(values).__name__}: must be sections")
        whole = load_config("base").to_dict()
        for name, value in values.items():
            if isinstance(value, Mapping) and isinstance(whole.get(name), Mapping):
                kept = {key: v for key, v in value.items() if f"{name}.{key}" not in REMOVED}
                value = {**whole[name], **kept}
            whole[name] = value
        return cls.from_config(whole)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, ready for JSON and for `from_config`."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the settings as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def difference(old: Settings, new: Settings, ignore: tuple[str, ...] = ()) -> list[str]:
    """Return lines such as 'model.num_layers: 8 -> 12', without keys that start as in `ignore`."""
    before, after = flatten(old.to_dict()), flatten(new.to_dict())
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if before[key] != after[key] and not key.startswith(ignore)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
