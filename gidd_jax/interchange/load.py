"""Models out of every kind of folder this package reads: its own, the original's, Hugging Face's.

A folder is data: nothing in it is executed, unless the caller allows the code of a process that
came into a checkpoint from the user's own file. What does not fit raises InputError that names the
file and the fix.
"""

import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from gidd_jax.checkpoints.checkpoint import CHECKPOINTS, Checkpoint, find_checkpoint, load_params
from gidd_jax.checkpoints.numbers import not_numbers
from gidd_jax.checkpoints.workdir import CONFIG_FILE
from gidd_jax.data.rows import check_mode
from gidd_jax.data.tokenizer_files import EMBEDDED, looks_like_path
from gidd_jax.errors import InputError, first_line
from gidd_jax.interchange.folders import (
    PROCESSES,
    from_gguf,
    from_hugging_face,
    from_original,
)
from gidd_jax.interchange.gguf_file import SUFFIX
from gidd_jax.interchange.placing import Target, as_dtype
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.interchange.weight_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
)
from gidd_jax.model_flags import DTYPES
from gidd_jax.own_process import (
    Consent,
    Source,
    check_no_process_given,
    from_record,
    recorded_source,
)
from gidd_jax.sections import split_own_process
from gidd_jax.settings import ProcessSettings, Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.objective import Objective, Params
from gidd_jax.training.step import abstract_adapters, abstract_params

# What a hub folder is asked for: no code, no pickles.
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]
_NOT_CAUSAL = "{} is a diffusion model: give an autoregressive one, it has an exact likelihood"
_NOT_BUILT_IN = (
    "the process of {} is code of its own, {}, which no published format can hold: give a model "
    f"whose process is built in ({', '.join(PROCESSES)})"
)


def place_of(path: str | Path) -> str | Path:
    """Return where the model of a name lies: `embedded` is a folder of the package."""
    if str(path) == EMBEDDED:
        return Path(str(resources.files("gidd_jax") / "assets/model"))
    return path


def load_pretrained(
    path: str | Path,
    *,
    ema: bool = False,
    allow_code: bool = False,
    process: str | None = None,
    row_mode: str | None = None,
    causal: bool = False,
    built_in: bool = False,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    weights: bool = True,
) -> Pretrained:
    """Load a workdir or step of `gidd_jax.train`, a published folder, owner/name, or 'embedded'.

    Folders: GIDD in the published Hugging Face formats of both papers, Llamas, Qwen2 and Qwen3, and
    checkpoints of the original's training (model.pt and config.yaml; needs PyTorch). Also .gguf
    files of llama.cpp that hold one of the latter three (needs the package gguf).

    ema: the moving average of the parameters, which only `gidd_jax.train` keeps. A model with a
    process of its own is refused unless allow_code (run the text recorded in the checkpoint) or
    process (run this FILE.py:CLASS in its place) says otherwise. row_mode: how training framed the
    rows of a folder of others, one of `data.rows.MODES`; None: as it says itself, or else packed.
    causal, built_in: only autoregressive models, only processes of this package; runs with others
    are refused by their settings, before any code runs. dtype, one of DTYPES: of parameters (but
    scales of norms and what the time goes through) and of products; None: float32 parameters,
    products as in training. mesh: weights are read straight into its layout, those of folders a
    tensor at a time; None: onto the first local device. weights False: the parameters are left out.

    Raises InputError when no model is there, or it is damaged or of an unknown architecture.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: legal values: {', '.join(DTYPES)}")
    consent, path = Consent(allow_code, process), place_of(path)
    if row_mode is not None:
        check_mode(row_mode, "row_mode")
    target = Target(mesh, dtype or "float32", weights)

    def of_run(checkpoint: Checkpoint) -> Pretrained:
        if row_mode is not None:
            raise InputError(
                f"row_mode: {checkpoint.folder} says itself how its rows were framed: leave it out"
            )
        settings = Settings.from_saved(checkpoint.config())
        name = settings.process.name
        if causal and name != "autoregressive":
            raise InputError(_NOT_CAUSAL.format(checkpoint.folder))
        if built_in and split_own_process(name) is not None:
            raise InputError(_NOT_BUILT_IN.format(checkpoint.folder, name))
        model = _from_checkpoint(checkpoint, settings, ema, consent, target)
        if dtype is None:
            return model
        return _computing_in(model._replace(params=as_dtype(model.params, dtype)), dtype)

    def read(place: Path, reader: Callable[[Path, Target], Pretrained]) -> Pretrained:
        check_no_process_given(consent, path, "built in")
        if ema:
            raise InputError(f"{path} has no moving average of the parameters: load it without ema")
        model = _computing_in(reader(place, target), target.dtype)
        if causal and model.process is not None:
            raise InputError(_NOT_CAUSAL.format(path))
        bad = not_numbers(model.params)
        if bad is not None:
            raise InputError(f"{path} is damaged ({bad}): fetch it again")
        return model if row_mode is None else _framed_as(model, row_mode, path)

    if "://" in str(path):
        return of_run(find_checkpoint(path))
    if str(path).endswith(SUFFIX):
        file = Path(path).expanduser()
        if not file.is_file():
            raise InputError(f"no such file: {file}")
        return read(file, from_gguf)
    folder = _local_folder(str(path))
    is_hugging_face, is_original = _is_hugging_face(folder), (folder / "config.yaml").is_file()
    if (folder / CHECKPOINTS).is_dir() or not (is_hugging_face or is_original):
        return of_run(find_checkpoint(folder))
    return read(folder, from_hugging_face if is_hugging_face else from_original)


def _computing_in(model: Pretrained, dtype: str) -> Pretrained:
    return model._replace(network=model.network.clone(dtype=jnp.dtype(dtype)))


def _framed_as(model: Pretrained, row_mode: str, path: str | Path) -> Pretrained:
    if model.process is None:
        raise InputError(
            f"row_mode: {path} is autoregressive, its rows are not framed: leave it out"
        )
    return model._replace(row_mode=row_mode)


def _local_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) or looks_like_path(path):
        raise InputError(
            f"no such folder: {path} (give a folder with a model, owner/name of one on the Hugging "
            f"Face hub, or {EMBEDDED})"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=_HUB_FILES))
    except Exception as error:  # whatever the hub client raises
        raise InputError(
            f"{path} is no folder, and not to be had from the Hugging Face hub: {first_line(error)}"
        ) from error


def _is_hugging_face(folder: Path) -> bool:
    if any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        return True
    try:  # the config.json of a workdir holds our settings, without a model_type
        return "model_type" in json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def own_source(
    checkpoint: Checkpoint, settings: ProcessSettings, consent: Consent
) -> Source | None:
    """Return the source of a checkpoint's own process that is to run; None if it is built in."""
    where = checkpoint.folder
    return recorded_source(
        settings, where, lambda: from_record(checkpoint.process(), settings, where), consent
    )


def _from_checkpoint(
    checkpoint: Checkpoint, settings: Settings, ema: bool, consent: Consent, target: Target
) -> Pretrained:
    own = own_source(checkpoint, settings.process, consent)
    tokenizer = checkpoint.tokenizer()
    objective = build_objective(settings, tokenizer.vocab_size, tokenizer.mask_id, own)
    return Pretrained(
        network=objective.model,  # pyright: ignore[reportArgumentType]
        params=_params(checkpoint, objective, ema, target.mesh) if target.weights else None,
        tokenizer=tokenizer,
        process=objective.process,
        keep_padding_columns=settings.model.keep_padding_columns,
        row_mode=settings.data.row_mode,
    )


def _params(checkpoint: Checkpoint, objective: Objective, ema: bool, mesh: Mesh | None) -> Params:
    """Return the network's parameters, with adapters merged where a run trained some."""
    if objective.lora is None:
        return load_params(checkpoint, abstract_params(objective, mesh), ema=ema)
    frozen = load_params(checkpoint, abstract_params(objective, mesh), frozen=True)
    adapters = load_params(checkpoint, abstract_adapters(objective, mesh), ema=ema)
    return objective.lora.merged(frozen, adapters)
