"""A mixing process of the user's own: a class in a Python file, its options, its recorded text.

Nothing here runs code but `load`, and what calls it: `make`. Who reads a checkpoint gets its source
from `recorded_source`, which refuses unless the user says that the code may run.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from gidd_jax.cli import nearest
from gidd_jax.errors import InputError
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sections import split_own_process
from gidd_jax.settings import ProcessSettings

# vocab_size and mask_id where nothing names them: the tokens of GPT-2, and a mask.
PAPER_IDS = (50258, 50257)
_GIVEN = ("vocab_size", "mask_id", "background")  # no options: they come with the tokenizer
_KINDS = {kind.__name__: kind for kind in (bool, int, float, str)}


class Source(NamedTuple):
    """The text of a file and the name of a class in it."""

    path: str
    class_name: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.class_name}"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def record(self, options: str) -> dict[str, str]:
        """Return what a checkpoint keeps of it, as JSON."""
        return {
            "path": self.path,
            "class": self.class_name,
            "options": options,
            "text": self.text,
            "sha256": self.sha256,
        }


def read_source(name: str) -> Source | None:
    """Return the source that `FILE.py:CLASS` names; None for the name of a built-in process.

    Raises InputError when there is no such file, or it is no text.
    """
    own = split_own_process(name)
    if own is None:
        return None
    path, class_name = own
    try:
        return Source(path, class_name, Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file: {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


class Consent(NamedTuple):
    """What the user says about the code of a model that is read.

    allow_code: run the text that is recorded; process: run this FILE.py:CLASS in its place.
    """

    allow_code: bool = False
    process: str | None = None


def check_no_process_given(consent: Consent, where: object, name: str) -> None:
    """Raise InputError if a file is given for a model whose process is built in."""
    if consent.process is not None:
        raise InputError(
            f"--process={consent.process}: the process of {where} is {name}, not one of its own: "
            "leave the flag out"
        )


def recorded_source(
    settings: ProcessSettings,
    where: object,
    read_recorded: Callable[[], Source | None],
    consent: Consent,
) -> Source | None:
    """Return the source of the process of a model in `where`; None if its process is built in.

    Raises InputError that names the code and says what to pass unless the user consents, or when
    the record is damaged.
    """
    own = split_own_process(settings.name)
    if own is None:
        check_no_process_given(consent, where, settings.name)
        return None
    if consent.process is not None:
        return _given_source(consent.process, where, read_recorded)
    recorded = read_recorded()
    if recorded is None:
        raise InputError(
            f"the process of {where} is code of its own, {settings.name}, and its text is not "
            "recorded there: pass --process=FILE.py:CLASS to run that of your file"
        )
    if not consent.allow_code:
        raise InputError(
            f"the process of {where} is code of its own, {settings.name} (sha256 "
            f"{recorded.sha256[:12]}), which is not run unless you say so: pass --allow_code to "
            "run the text recorded there, or --process=FILE.py:CLASS to run that of your file (in "
            "Python and in --model_args: allow_code=True, process=FILE.py:CLASS)"
        )
    return recorded


def _given_source(
    name: str, where: object, read_recorded: Callable[[], Source | None]
) -> Source | None:
    """Return the source of the file that is to run in place of the record, which may be damaged."""
    if split_own_process(name) is None:
        raise InputError(f"--process={name}: must be FILE.py:CLASS")
    source = read_source(name)
    try:
        recorded = read_recorded()
    except InputError as error:
        logging.warning("%s is used: %s", name, error)
        return source
    if source is not None and recorded is not None and source.sha256 != recorded.sha256:
        logging.warning("%s differs from the text recorded in %s", source.path, where)
    return source


def from_record(record: Any, settings: ProcessSettings, where: object) -> Source | None:
    """Return the source of what `Source.record` gave; InputError if it does not fit `settings`."""
    if record is None:
        return None
    keys = ("path", "class", "options", "text", "sha256")
    if isinstance(record, Mapping) and all(isinstance(record.get(key), str) for key in keys):
        source = Source(record["path"], record["class"], record["text"])
        try:
            same = source.sha256 == record["sha256"]
        except UnicodeEncodeError:  # half of a surrogate pair
            same = False
        if same and (source.name, record["options"]) == (settings.name, settings.options):
            return source
    raise InputError(
        f"the record of the process in {where} is damaged: read the model with "
        "--process=FILE.py:CLASS; a run continues with its file and --allow_config_change"
    )


def load(source: Source) -> Any:
    """Run the text, once for each text, and return what the class's name stands for in it.

    Raises InputError when the code fails or has no such name.
    """
    module_name = f"gidd_jax_own_process_{source.sha256[:16]}"
    module = sys.modules.get(module_name)
    if module is None:
        module = ModuleType(module_name)
        module.__file__ = source.path
        sys.modules[module_name] = module  # where dataclasses look up annotations
        try:
            exec(compile(source.text, source.path, "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise InputError(f"{source.name}: {type(error).__name__}: {error}") from error
    return attribute(module, source.class_name, source.name)


def attribute(module: ModuleType, word: str, name: str) -> Any:
    """Return module.word; raises InputError, which begins with `name`, if it makes no process."""
    if not hasattr(module, word):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise InputError(f"{name}: no {word} there: {nearest(word, public)}")
    found = getattr(module, word)
    if not isinstance(found, InterpolatingProcess) and not callable(found):
        raise InputError(
            f"{name}: {word} is no InterpolatingProcess, and nothing that makes one from "
            "(vocab_size, mask_id)"
        )
    return found


def make(source: Source, vocab_size: int, mask_id: int, options: str = "") -> InterpolatingProcess:
    """Run the source and return the process that its class makes, its functions checked.

    options: 'KEY=VALUE,...' of the class's fields. Raises InputError for what is wrong with them,
    with the code or with alpha and beta_pi.
    """
    return make_from(load(source), source.name, (vocab_size, mask_id), options)


def make_from(
    found: Any, name: str, ids: tuple[int, int], options: str = ""
) -> InterpolatingProcess:
    """Return `found(*ids, **options)`, as `make` does."""
    if isinstance(found, InterpolatingProcess):
        raise InputError(f"{name}: is made for {found.vocab_size} tokens: name its class instead")
    values = parse_options(found, name, options) if options else {}
    return checked(name, f"{name.rpartition(':')[2]}{ids}", lambda: found(*ids, **values))


def checked(name: str, what: str, function: Callable[[], object]) -> InterpolatingProcess:
    """Return function(), a process whose two functions keep the shape of t; else InputError."""
    try:
        process = function()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:
        raise InputError(f"{name}: {what} raises {type(error).__name__}: {error}") from error
    if not isinstance(process, InterpolatingProcess):
        raise InputError(f"{name}: {what} is no InterpolatingProcess")
    check_functions(name, process)
    return process


def check_functions(name: str, process: InterpolatingProcess) -> None:
    """Raise InputError unless alpha and beta_pi are jax functions that keep the shape of t."""
    try:
        shapes = jax.eval_shape(lambda t: (process.alpha(t), *process.beta_pi(t)), jnp.ones(3))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name}: alpha and beta_pi must be functions made of jax.numpy: "
            f"{type(error).__name__}: {first_line}"
        ) from error
    if [shape.shape for shape in shapes] != [(3,)] * 3:
        raise InputError(
            f"{name}: alpha(t) and both entries of beta_pi(t) must have the shape of t"
        )


def parse_options(found: Callable[..., Any], name: str, options: str) -> dict[str, Any]:
    """Return the values of 'KEY=VALUE,...' as the types of the parameters of a class or function.

    Raises InputError for an unknown key, one that is there twice and a value of another type.
    """
    try:
        parameters = list(inspect.signature(found).parameters.values())[2:]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: takes no options: {error}") from error
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    legal = {p.name: p for p in parameters if p.kind in named and p.name not in _GIVEN}
    values: dict[str, Any] = {}
    for item in options.split(","):
        key, _, value = item.partition("=")
        if key not in legal:
            raise InputError(f"{name}: unknown option {key!r}: {nearest(key, legal)}")
        if key in values:
            raise InputError(f"{name}: the option {key} is there twice: leave one out")
        values[key] = typed(f"{name}: {key}={value}", value, _kind(legal[key]))
    return values


def _kind(parameter: inspect.Parameter) -> type | None:
    note = parameter.annotation
    words = note if isinstance(note, str) else getattr(note, "__name__", "")
    return _KINDS.get(words) or _KINDS.get(type(parameter.default).__name__)


def typed(what: str, value: str, kind: type | None) -> Any:
    """Return what was written as a bool, int, float or str; InputError that begins with `what`."""
    if kind is str:
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise InputError(f"{what}: must be true or false")
        return value.lower() == "true"
    if kind is None:
        raise InputError(f"{what}: only numbers, true or false, and strings can be options")
    try:
        return kind(value)
    except ValueError as error:
        words = "an integer" if kind is int else "a number"
        raise InputError(f"{what}: must be {words}") from error
