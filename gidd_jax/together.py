"""Settings that are legal alone but not together, and keys that nothing would read."""

from typing import TYPE_CHECKING

from gidd_jax.errors import InputError
from gidd_jax.sections import split_own_process

if TYPE_CHECKING:
    from gidd_jax.settings import (
        DataSettings,
        ModelSettings,
        OptimizerSettings,
        ProcessSettings,
        Settings,
        TrainSettings,
    )

# How the losses of a process's tokens may be weighted.
WEIGHTINGS = {
    "hybrid": ("elbo", "clip", "dynamic", "dynamic_v1_1", "dynamic_unbiased"),
    "log_snr": ("elbo", "clip", "dynamic"),
    "masked": ("elbo",),  # the MDLM loss is its bound
    "autoregressive": ("elbo",),  # the exact likelihood
}
OF_LLAMA = (  # keys of the section model that are off unless they say something
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "head_norms",
    "rope_scaling",
    "tie_embeddings",
)
OF_OWN = ("elbo", "clip", "dynamic")


def check_together(settings: "Settings") -> None:
    """Raise InputError for values that are legal alone but not together."""
    model, process, train, mesh = settings.model, settings.process, settings.train, settings.mesh
    if not (model.name == "llama" and model.head_dim) and model.hidden_size % (2 * model.num_heads):
        raise InputError(
            f"model.hidden_size = {model.hidden_size}: must be a multiple of 2 * model.num_heads = "
            f"{2 * model.num_heads} (rotary embedding needs an even width per head)"
        )
    autoregressive = process.name == "autoregressive"
    if autoregressive and model.name != "llama":
        raise InputError(
            f"model.name = {model.name} does not fit process.name = {process.name}: use llama with "
            "autoregressive, and any model with every other process"
        )
    _check_llama(model, autoregressive)
    if autoregressive and settings.data.row_mode == "answers":
        raise InputError("data.mode = answers: answers are filled in by diffusion: use crop")
    if train.padding_weight != 1 and (train.mask_padding or autoregressive):
        reason = "train.mask_padding = True" if train.mask_padding else "an autoregressive model"
        raise InputError(
            f"train.padding_weight = {train.padding_weight}: nothing reads it with {reason}: set "
            "it to 1"
        )
    _check_annealing(settings)
    if autoregressive and settings.data.givens:
        raise InputError(
            f"data.givens = {settings.data.givens}: only diffusion fills in beside given tokens: "
            "set it to 0"
        )
    _check_noising(process, settings.data)
    if autoregressive and settings.data.frame == "none":
        raise InputError(
            "data.frame = none: an autoregressive model predicts what follows the token that "
            "begins a row: set it to ends, or take a diffusion model"
        )
    if settings.data.marked and settings.data.frame == "ends":
        raise InputError("data.marked = True: only rows without a frame do: set data.frame=none")
    if model.parametrization == "completep" and model.name != "gidd":
        raise InputError(
            f"model.parametrization = completep: model.name = {model.name} has no multipliers for "
            "it: use gidd, or standard"
        )
    _check_optimizer(settings.optimizer, model, train)
    _check_blocks(train, model, settings.data)
    own = split_own_process(process.name) is not None
    if process.options and not own:
        raise InputError(
            f"process.options = {process.options}: belong to a process of your own, FILE.py:CLASS; "
            f"process.name = {process.name} has keys of the section process"
        )
    if process.min_log_snr >= process.max_log_snr:
        raise InputError(
            f"process.min_log_snr = {process.min_log_snr}: must be less than "
            f"process.max_log_snr = {process.max_log_snr}"
        )
    if train.batch_size % train.micro_batches:
        raise InputError(
            f"train.batch_size = {train.batch_size}: must be a multiple of train.micro_batches = "
            f"{train.micro_batches}"
        )
    if train.min_weight > train.max_weight:
        raise InputError(
            f"train.min_weight = {train.min_weight}: must be at most train.max_weight = "
            f"{train.max_weight}"
        )
    weightings = OF_OWN if own else WEIGHTINGS[process.name]
    if train.weighting not in weightings:
        raise InputError(
            f"train.weighting = {train.weighting}: process.name = {process.name} has "
            + " and ".join(weightings)
        )
    if [mesh.data, mesh.fsdp, mesh.tensor].count(-1) > 1:
        raise InputError("mesh: at most one of mesh.data, mesh.fsdp and mesh.tensor may be -1")


def _check_llama(model: "ModelSettings", autoregressive: bool) -> None:
    if model.name == "dit" and model.cond_dim == 0:
        raise InputError("model.cond_dim = 0: a dit is told the time: must be >= 1")
    for key in OF_LLAMA:
        if model.name != "llama" and getattr(model, key):
            raise InputError(
                f"model.{key} = {getattr(model, key)}: only model.name = llama reads it, not "
                f"{model.name}: set it back"
            )
    if model.name == "llama" and model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise InputError(
            f"model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = "
            f"{model.num_heads}"
        )
    if model.shift and (model.name != "llama" or autoregressive):
        raise InputError(
            "model.shift = True: only a llama with a diffusion process has a token to be off by: "
            "set it to False"
        )


def _check_annealing(settings: "Settings") -> None:
    """Refuse annealing of what a run does not have, or that it would not end."""
    adapt, model, process = settings.adapt, settings.model, settings.process
    if adapt.attention_steps and (model.name != "llama" or process.name == "autoregressive"):
        raise InputError(
            f"adapt.attention_steps = {adapt.attention_steps}: only the attention of a llama with "
            "a diffusion process is annealed: set it to 0"
        )
    if adapt.noise_steps and process.name != "hybrid":
        raise InputError(
            f"adapt.noise_steps = {adapt.noise_steps}: process.name = {process.name} has no "
            "p_uniform: use hybrid, or set it to 0"
        )
    if adapt.lora_rank and not model.start:
        raise InputError(
            f"adapt.lora_rank = {adapt.lora_rank}: adapters need a model that they adapt: set "
            "model.start, or the rank to 0"
        )
    if adapt.lora_rank and settings.optimizer.name == "muon":
        raise InputError(
            f"adapt.lora_rank = {adapt.lora_rank}: optimizer.name = muon is for whole "
            "matrices: use adamw, laprop or psgd"
        )
    if adapt.lora_rank and settings.model.parametrization == "completep":
        raise InputError(
            f"adapt.lora_rank = {adapt.lora_rank}: model.parametrization = completep has no rates "
            "for adapters: use standard, or set the rank to 0"
        )
    for key in ("attention_steps", "noise_steps"):
        if getattr(adapt, key) > settings.train.num_steps:
            raise InputError(
                f"adapt.{key} = {getattr(adapt, key)}: must be at most train.num_steps = "
                f"{settings.train.num_steps}"
            )


def _check_blocks(train: "TrainSettings", model: "ModelSettings", data: "DataSettings") -> None:
    if train.block_length and data.short_rows:
        raise InputError(
            f"data.short_rows = {data.short_rows}: with train.block_length = {train.block_length} "
            "the network sees no further than a block anyway: set one of them to 0"
        )
    if train.block_length and model.name != "gidd":
        raise InputError(
            f"train.block_length = {train.block_length}: model.name = {model.name} knows no "
            "blocks: use gidd, or set it to 0"
        )
    if train.block_length and model.max_seq_len % train.block_length:
        raise InputError(
            f"train.block_length = {train.block_length}: must divide model.max_seq_len = "
            f"{model.max_seq_len}"
        )


def _check_noising(process: "ProcessSettings", data: "DataSettings") -> None:
    """Refuse options of the noise in training that contradict each other or that nothing reads."""
    if process.name == "autoregressive" and process.has_position_times:
        raise InputError(
            f"process.by_position = {process.by_position}, process.ascending = {process.ascending}:"
            " only diffusion has times: set both to 0"
        )
    if process.by_position + process.ascending > 1:
        raise InputError(
            f"process.ascending = {process.ascending}: must be at most 1 - process.by_position = "
            f"{1 - process.by_position:g}"
        )
    if process.uniform_ids == "all" and process.name not in ("hybrid", "log_snr"):
        raise InputError(
            f"process.uniform_ids = all: process.name = {process.name} does not read it: set it to "
            "others, or take hybrid or log_snr"
        )
    if data.givens_kind != "mixed" and data.givens == 0:
        raise InputError(
            f"data.givens_kind = {data.givens_kind}: nothing is given with data.givens = 0: set "
            "the share of the rows, in (0, 1], or leave the kind at mixed"
        )
    if data.short_rows > 0 and (process.name == "autoregressive" or data.row_mode != "packed"):
        raise InputError(
            f"data.short_rows = {data.short_rows}: are for diffusion models of packed rows, others "
            "see the end of a text: set it to 0, or data.mode=packed"
        )
    if data.empty_tokens > 0 and process.name == "autoregressive":
        raise InputError(
            f"data.empty_tokens = {data.empty_tokens}: belong to diffusion models: set it to 0"
        )
    if data.empty_tokens > 0 and data.frame == "none":
        raise InputError(
            f"data.empty_tokens = {data.empty_tokens}: rows without a frame hold nothing but their "
            "tokens: set it to 0, or data.frame=ends"
        )


def _check_optimizer(
    optimizer: "OptimizerSettings", model: "ModelSettings", train: "TrainSettings"
) -> None:
    """Refuse an optimizer that the parametrization does not have, and keys that nothing reads."""
    completep = model.parametrization == "completep"
    if completep and optimizer.name not in ("adamw", "laprop"):
        raise InputError(
            f"optimizer.name = {optimizer.name}: model.parametrization = completep has rates for "
            "adamw and laprop: use one of them, or standard"
        )
    for key in ("norm_decay", "bias_decay"):
        if getattr(optimizer, key) and not completep:
            raise InputError(
                f"optimizer.{key} = {getattr(optimizer, key)}: only model.parametrization = "
                "completep has it; otherwise optimizer.weight_decay acts on every parameter: set "
                "it to 0"
            )
    cooldown = optimizer.cooldown_steps
    if cooldown and optimizer.schedule != "wsd":
        raise InputError(
            f"optimizer.cooldown_steps = {cooldown}: only optimizer.schedule = wsd has a cooldown: "
            "set it to 0"
        )
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + cooldown > train.num_steps:
        raise InputError(
            f"optimizer.warmup_steps + optimizer.cooldown_steps = "
            f"{optimizer.warmup_steps + cooldown}: must be at most train.num_steps = "
            f"{train.num_steps} with optimizer.schedule = wsd"
        )
