"""Check a mixing process, built-in or your own: is it legal, and do weights, draws and bound agree?

Examples:
  python -m gidd_jax.check
  python -m gidd_jax.check --process=hybrid:p_uniform=0.2,gamma=1
  python -m gidd_jax.check --process=masked
  python -m gidd_jax.check --process=log_snr:scale=1,shift=0
  python -m gidd_jax.check --process=cosine.py:CosineProcess
  python -m gidd_jax.check --config.process.name=cosine.py:CosineProcess \\
      --config.process.options='mask_share=0.8'
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
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from gidd_jax.cli import CommandFlags, code_flags, config_flag, load_config, nearest, run
from gidd_jax.errors import InputError

if TYPE_CHECKING:
    from gidd_jax.evaluation.definitions import Check
    from gidd_jax.own_process import Consent
    from gidd_jax.process import InterpolatingProcess
    from gidd_jax.settings import ProcessSettings

flags = CommandFlags()
CONFIG = config_flag(flags, "base")
CODE = code_flags(
    flags,
    "NAME:KEY=VALUE,... of hybrid, masked or log_snr; or FILE.py:NAME or MODULE:NAME of your own, "
    "whose code is run: a process, or a class or function of (vocab_size, mask_id) that makes one. "
    "With --checkpoint, FILE.py:CLASS to run in place of the code recorded there. Default: the "
    "process of --config.",
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Check the process of this model: a run, a checkpoint or a folder."
)


class Subject(NamedTuple):
    """A process, and the same with a vocabulary small enough to enumerate."""

    process: "InterpolatingProcess"
    small: "InterpolatingProcess"


def main(argv: list[str]) -> None:
    del argv
    import jax

    # The references are float64; and no accelerator is taken from a run that uses it.
    jax.config.update("jax_platforms", "cpu")
    # Every program runs once: to compile it is what takes the time.
    jax.config.update("jax_disable_most_optimizations", True)
    from gidd_jax.evaluation import certify

    process, small = find_subject(
        CODE.process.value,
        CHECKPOINT.value,
        allow_code=CODE.allow_code.value,
        config=CONFIG.value,
    )
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


def find_subject(
    description: str | None,
    checkpoint: str | None,
    *,
    allow_code: bool = False,
    config: Any = None,
) -> Subject:
    """Return what the flags name; raises InputError that says what is wrong with it."""
    from gidd_jax.evaluation.certify import reduced
    from gidd_jax.own_process import Consent
    from gidd_jax.settings import Settings

    if checkpoint is not None:
        process = checkpoint_process(checkpoint, Consent(allow_code, description))
        return Subject(process, reduced(process))
    if description is None:
        config = load_config("base") if config is None else config
        return config_subject(Settings.from_config(config).process)
    name, colon, rest = description.rpartition(":")
    if re.fullmatch(r"[A-Za-z_]\w*", rest) and colon and not _is_built_in(name):
        return own_subject(description)
    process = built_in_process(description)
    return Subject(process, reduced(process))


def _is_built_in(name: str) -> bool:
    from gidd_jax.interchange.folders import PROCESSES

    return name in (*PROCESSES, "autoregressive")


def checkpoint_process(path: str, consent: "Consent") -> "InterpolatingProcess":
    """Return the process of a model; the weights of our own runs stay on disk."""
    from gidd_jax.checkpoints.checkpoint import find_checkpoint
    from gidd_jax.interchange import load

    try:
        checkpoint = find_checkpoint(path)
    except InputError:  # another kind of folder, or none
        process = load.load_pretrained(path, **consent._asdict()).process
    else:
        process = load.checkpoint_process(checkpoint, consent)
    if process is None:
        raise InputError(f"{path} is autoregressive: only diffusion has a process to check")
    return process


def config_subject(settings: "ProcessSettings") -> Subject:
    """Return the process of a config, the user's own at both sizes."""
    from gidd_jax.evaluation.definitions import TOY_MASK_ID, TOY_VOCAB_SIZE
    from gidd_jax.own_process import PAPER_IDS, read_source
    from gidd_jax.training.build import build_process

    own = read_source(settings.name)
    process = build_process(settings, *PAPER_IDS, own)
    small = build_process(settings, TOY_VOCAB_SIZE, TOY_MASK_ID, own)
    if process is None or small is None:
        raise InputError("process.name = autoregressive: only diffusion has a process to check")
    return Subject(process, small)


def built_in_process(description: str) -> "InterpolatingProcess":
    """Return the process of `name:key=value,...`; InputError for unknown names and bad values."""
    from gidd_jax.interchange.folders import PROCESSES, process_fields
    from gidd_jax.own_process import PAPER_IDS

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


def own_subject(description: str) -> Subject:
    """Return the process of `FILE.py:NAME` or `MODULE:NAME`, whose code is run."""
    from gidd_jax import own_process
    from gidd_jax.evaluation.certify import reduced
    from gidd_jax.evaluation.definitions import TOY_MASK_ID, TOY_VOCAB_SIZE
    from gidd_jax.process import InterpolatingProcess

    name = f"--process={description}"
    source = own_process.read_source(description)
    if source is not None:
        found = own_process.load(source)
    else:
        module, _, word = description.partition(":")
        found = own_process.attribute(import_module(module), word, name)
    if isinstance(found, InterpolatingProcess):
        own_process.check_functions(name, found)
        return Subject(
            found, own_process.checked(name, "dataclasses.replace", lambda: reduced(found))
        )
    sizes = own_process.PAPER_IDS, (TOY_VOCAB_SIZE, TOY_MASK_ID)
    return Subject(*(own_process.make_from(found, name, ids) for ids in sizes))


def import_module(name: str) -> ModuleType:
    """Import a module from where the command runs, too; InputError if it fails."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"--process: {name}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    run(main, flags)
