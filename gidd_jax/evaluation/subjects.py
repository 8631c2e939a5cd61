"""Which process is checked: a built-in one, that of a config or a model, or a file of the user."""

import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from gidd_jax import own_process
from gidd_jax.checkpoints.checkpoint import find_checkpoint
from gidd_jax.cli import load_config, nearest
from gidd_jax.errors import InputError
from gidd_jax.evaluation.certify import resized
from gidd_jax.evaluation.definitions import TOY_MASK_ID, TOY_VOCAB_SIZE
from gidd_jax.interchange import load
from gidd_jax.interchange.folders import PROCESSES, process_fields
from gidd_jax.own_process import PAPER_IDS, Consent, Source, read_source
from gidd_jax.process import InterpolatingProcess
from gidd_jax.settings import ProcessSettings, Settings
from gidd_jax.training.build import build_process


class Subject(NamedTuple):
    """A process, and `at(vocab_size, mask_id)`, which makes the same over other tokens."""

    process: InterpolatingProcess
    at: Callable[[int, int], InterpolatingProcess]

    @property
    def small(self) -> InterpolatingProcess:
        """The same with a vocabulary small enough to enumerate."""
        if self.process.vocab_size <= 2 * TOY_VOCAB_SIZE:
            return self.process
        return self.at(TOY_VOCAB_SIZE, TOY_MASK_ID)


def resizable(process: InterpolatingProcess) -> Subject:
    """Return a process of dataclass fields, made for other tokens by replacing them."""
    return Subject(process, functools.partial(resized, process))


def find_subject(
    description: str | None,
    checkpoint: str | None,
    *,
    allow_code: bool = False,
    config: Any = None,
) -> Subject:
    """Return what the flags name; raises InputError that says what is wrong with it.

    config: what the user gave, None for the base config.
    """
    named = "--checkpoint" if checkpoint is not None else "--process"
    if config is not None and (checkpoint is not None or description is not None):
        raise InputError(f"--config and {named} both name a process: leave one of them out")
    if allow_code and checkpoint is None:
        raise InputError("--allow_code is for the code in a --checkpoint: leave it out")
    if checkpoint is not None:
        return checkpoint_subject(checkpoint, Consent(allow_code, description))
    if description is None:
        config = load_config("base") if config is None else config
        return config_subject(Settings.from_config(config).process)
    name, colon, rest = description.rpartition(":")
    if re.fullmatch(r"[A-Za-z_]\w*", rest) and colon and not _is_built_in(name):
        return own_subject(description)
    return resizable(built_in_process(description))


def _is_built_in(name: str) -> bool:
    return name in (*PROCESSES, "autoregressive")


def checkpoint_subject(path: str, consent: Consent) -> Subject:
    """Return the process of a model; the weights of our own runs stay on disk."""
    try:
        checkpoint = find_checkpoint(load.place_of(path))
    except InputError:  # another kind of folder, or none
        process = load.load_pretrained(path, **consent._asdict()).process
        if process is not None:
            return resizable(process)
    else:
        settings = Settings.from_saved(checkpoint.config()).process
        tokenizer = checkpoint.tokenizer()
        own = load.own_source(checkpoint, settings, consent)
        if settings.name != "autoregressive":
            return _built(settings, (tokenizer.vocab_size, tokenizer.mask_id), own)
    raise InputError(f"{path} is autoregressive: only diffusion has a process to check")


def config_subject(settings: ProcessSettings) -> Subject:
    """Return the process of a config."""
    if settings.name == "autoregressive":
        raise InputError("process.name = autoregressive: only diffusion has a process to check")
    return _built(settings, PAPER_IDS, read_source(settings.name))


def _built(settings: ProcessSettings, ids: tuple[int, int], own: Source | None) -> Subject:
    """Return the process that training builds from the settings, and how it builds it."""

    def at(vocab_size: int, mask_id: int) -> InterpolatingProcess:
        process = build_process(settings, vocab_size, mask_id, own)
        assert process is not None
        return process

    return Subject(at(*ids), at)


def built_in_process(description: str) -> InterpolatingProcess:
    """Return the process of `name:key=value,...`; InputError for unknown names and bad values."""
    name, _, rest = description.partition(":")
    if name == "autoregressive":
        raise InputError("--process=autoregressive: only diffusion has a process to check")
    if name.endswith(".py"):
        raise InputError(f"--process={description}: name its class too: {name}:CLASS")
    if name not in PROCESSES:
        raise InputError(
            f"--process={description}: unknown process {name!r}: {nearest(name, PROCESSES)}; "
            "your own is FILE.py:NAME or MODULE:NAME"
        )
    kind, legal, values = PROCESSES[name], process_fields(PROCESSES[name]), {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--process={description}: {item!r} must be KEY=VALUE")
        if key not in legal:
            raise InputError(f"--process={description}: unknown {key!r}: {nearest(key, legal)}")
        try:
            values[key] = float(value)
        except ValueError as error:
            raise InputError(f"--process={description}: {key} must be a number") from error
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.name in legal
        if required and field.name not in values:
            raise InputError(f"--process={description}: {field.name} is missing: add it")
    return kind(*PAPER_IDS, **values)


def own_subject(description: str) -> Subject:
    """Return the process of `FILE.py:NAME` or `MODULE:NAME`, whose code is run."""
    name = f"--process={description}"
    source = own_process.read_source(description)
    if source is not None:
        found = own_process.load(source)
    else:
        module, _, word = description.partition(":")
        found = own_process.attribute(import_module(module), word, name)
    if isinstance(found, InterpolatingProcess):
        own_process.check_functions(name, found)
        return Subject(found, lambda *ids: _replaced(found, name, ids))
    return Subject(
        own_process.make_from(found, name, PAPER_IDS),
        lambda *ids: own_process.make_from(found, name, ids),
    )


def _replaced(
    process: InterpolatingProcess, name: str, ids: tuple[int, int]
) -> InterpolatingProcess:
    """Return an instance of the user's own with other tokens in its fields."""
    return own_process.checked(name, "dataclasses.replace", lambda: resized(process, *ids))


def import_module(name: str) -> ModuleType:
    """Import a module from where the command runs, too; InputError if it fails."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"--process: {name}: {type(error).__name__}: {error}") from error
