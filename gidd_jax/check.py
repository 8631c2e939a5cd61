"""Check a mixing process, built-in or your own: is it legal, and do weights, draws and bound agree?

Examples:
  python -m gidd_jax.check
  python -m gidd_jax.check --process=hybrid:p_uniform=0.2,gamma=1
  python -m gidd_jax.check --process=masked
  python -m gidd_jax.check --process=log_snr:scale=1,shift=0
  python -m gidd_jax.check --process=cosine.py:CosineProcess
  python -m gidd_jax.check --checkpoint=outputs/quickstart

Your own process is two functions of t, made of jax.numpy, here in cosine.py; all else (weights,
transitions, sampling, the bound) follows from them:

  import dataclasses
  import jax.numpy as jnp
  from gidd_jax.process import InterpolatingProcess, NoiseMass
  @dataclasses.dataclass(frozen=True)
  class CosineProcess(InterpolatingProcess):
      def alpha(self, t):
          return jnp.cos(0.5 * jnp.pi * t) ** 2
      def beta_pi(self, t):
          noise = jnp.sin(0.5 * jnp.pi * t) ** 2
          return NoiseMass(mask=0.9 * noise, uniform=0.1 * noise / (self.vocab_size - 1))

Prints one line a check: ok or FAIL, the error and the largest that is right, what was compared.
Exit code 1 if a check fails. Errors are absolute for probabilities and nats, relative for weights
and gradients; those of draws are -log10 of the chance that right draws look like that. Runs on the
CPU. A log_snr process with scale > 1 fails: some of its rates are negative.
"""

import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from gidd_jax.cli import CommandFlags, load_config, nearest, run
from gidd_jax.errors import InputError

if TYPE_CHECKING:
    from gidd_jax.evaluation.definitions import Check
    from gidd_jax.process import InterpolatingProcess

flags = CommandFlags()
PROCESS = flags.DEFINE_string(
    "process",
    None,
    "NAME:KEY=VALUE,... of hybrid, masked or log_snr; or FILE.py:NAME or MODULE:NAME of your own, "
    "whose code is run: a process, or a class or function of (vocab_size, mask_id) that makes one. "
    "Default: the process of configs/base.py.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Check the process of this model: a run, a checkpoint or a folder."
)

# vocab_size and mask_id where nothing names them: the tokens of GPT-2, and a mask.
PAPER_IDS = (50258, 50257)


class Subject(NamedTuple):
    """A process, and the same with a vocabulary small enough to enumerate."""

    process: "InterpolatingProcess"
    small: "InterpolatingProcess"


def main(argv: list[str]) -> None:
    del argv
    if PROCESS.value is not None and CHECKPOINT.value is not None:
        raise InputError("give either --process or --checkpoint, not both")
    import jax

    # The references are float64; and no accelerator is taken from a run that uses it.
    jax.config.update("jax_platforms", "cpu")
    # Every program runs once: to compile it is what takes the time.
    jax.config.update("jax_disable_most_optimizations", True)
    from gidd_jax.evaluation import certify

    process, small = find_subject(PROCESS.value, CHECKPOINT.value)
    print(f"process: {process}", flush=True)
    passed = report(certify.formula_checks(process))
    if small.vocab_size != process.vocab_size:
        print(f"with {small.vocab_size} tokens instead of {process.vocab_size}, to enumerate them:")
    passed += report(certify.toy_checks(small))
    if not all(passed):
        print(f"{passed.count(False)} of {len(passed)} checks failed")
        sys.exit(1)
    print(f"all {len(passed)} checks passed")


def report(checks: Iterable["Check"]) -> list[bool]:
    """Print a line for each check as it ends, and return which passed."""
    passed = []
    for check in checks:
        sign, word = ("<=", "ok  ") if check.ok else ("> ", "FAIL")
        print(f"{word}  {check.error:8.1e} {sign} {check.bound:5.0e}  {check.name}", flush=True)
        passed.append(check.ok)
    return passed


def find_subject(description: str | None, checkpoint: str | None) -> Subject:
    """Return what the flags name; raises InputError that says what is wrong with it."""
    from gidd_jax.evaluation.certify import reduced

    if checkpoint is not None:
        process = checkpoint_process(checkpoint)
        return Subject(process, reduced(process))
    if description is None:
        process = default_process()
        return Subject(process, reduced(process))
    name, colon, rest = description.rpartition(":")
    if re.fullmatch(r"[A-Za-z_]\w*", rest) and colon and not _is_built_in(name):
        return _own_subject(description, load_module(name), rest)
    process = built_in_process(description)
    return Subject(process, reduced(process))


def _is_built_in(name: str) -> bool:
    from gidd_jax.interchange.load import PROCESSES

    return name in (*PROCESSES, "autoregressive")


def checkpoint_process(path: str) -> "InterpolatingProcess":
    """Return the process of a model; the weights of our own runs stay on disk."""
    from gidd_jax.checkpoints.checkpoint import find_checkpoint
    from gidd_jax.interchange.load import load_pretrained
    from gidd_jax.settings import Settings
    from gidd_jax.training.build import build_process

    try:
        checkpoint = find_checkpoint(path)
    except InputError:  # another kind of folder, or none
        process = load_pretrained(path).process
    else:
        tokenizer = checkpoint.tokenizer()
        settings = Settings.from_saved(checkpoint.config()).process
        process = build_process(settings, tokenizer.vocab_size, tokenizer.mask_id)
    if process is None:
        raise InputError(f"{path} is autoregressive: only diffusion has a process to check")
    return process


def default_process() -> "InterpolatingProcess":
    """Return the process of configs/base.py."""
    from gidd_jax.settings import Settings
    from gidd_jax.training.build import build_process

    process = build_process(Settings.from_config(load_config("base")).process, *PAPER_IDS)
    assert process is not None
    return process


def built_in_process(description: str) -> "InterpolatingProcess":
    """Return the process of `name:key=value,...`; InputError for unknown names and bad values."""
    from gidd_jax.interchange.load import PROCESSES, process_fields

    name, _, rest = description.partition(":")
    if name == "autoregressive":
        raise InputError("--process=autoregressive: only diffusion has a process to check")
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


def load_module(name: str) -> ModuleType:
    """Run and return a .py file, or a module that can be imported; InputError if it fails."""
    try:
        if not name.endswith(".py"):
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(name)
        if not Path(name).is_file():
            raise InputError(f"--process: no such file: {name}")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look up annotations
        spec.loader.exec_module(module)
        return module
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--process: {name}: {type(error).__name__}: {error}") from error


def _own_subject(description: str, module: ModuleType, name: str) -> Subject:
    from gidd_jax.evaluation.certify import reduced
    from gidd_jax.evaluation.definitions import TOY_MASK_ID, TOY_VOCAB_SIZE
    from gidd_jax.process import InterpolatingProcess

    if not hasattr(module, name):
        public = [word for word in vars(module) if not word.startswith("_")]
        raise InputError(f"--process={description}: no {name} there: {nearest(name, public)}")
    found = getattr(module, name)
    if not isinstance(found, InterpolatingProcess) and not callable(found):
        raise InputError(
            f"--process={description}: {name} is no InterpolatingProcess, and nothing that makes "
            "one from (vocab_size, mask_id)"
        )

    def make(what: str, function: Callable[[], object]) -> InterpolatingProcess:
        try:
            process = function()
        except Exception as error:
            raise InputError(
                f"--process={description}: {what} raises {type(error).__name__}: {error}"
            ) from error
        if not isinstance(process, InterpolatingProcess):
            raise InputError(f"--process={description}: {what} is no InterpolatingProcess")
        _check_functions(description, process)
        return process

    if isinstance(found, InterpolatingProcess):
        _check_functions(description, found)
        return Subject(found, make("dataclasses.replace", lambda: reduced(found)))
    sizes = PAPER_IDS, (TOY_VOCAB_SIZE, TOY_MASK_ID)
    return Subject(*(make(f"{name}{ids}", lambda ids=ids: found(*ids)) for ids in sizes))


def _check_functions(description: str, process: "InterpolatingProcess") -> None:
    """Raise InputError unless alpha and beta_pi are jax functions that keep the shape of t."""
    import jax
    import jax.numpy as jnp

    try:
        shapes = jax.eval_shape(lambda t: (process.alpha(t), *process.beta_pi(t)), jnp.ones(3))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--process={description}: alpha and beta_pi must be functions made of jax.numpy: "
            f"{type(error).__name__}: {first_line}"
        ) from error
    if [shape.shape for shape in shapes] != [(3,)] * 3:
        raise InputError(
            f"--process={description}: alpha(t) and both entries of beta_pi(t) must have the shape "
            "of t"
        )


if __name__ == "__main__":
    run(main, flags)
