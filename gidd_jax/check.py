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

Prints one line per check: ok or FAIL, the error found, the largest error allowed, and what was
compared.
Exit code 1 if a check fails. Errors are absolute for probabilities and nats, relative for weights
and gradients; those of draws are -log10 of the chance that right draws look like that. Runs on the
CPU. A log_snr process with scale > 1 fails: some of its rates are negative.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gidd_jax.cli import CommandFlags, code_flags, config_flag, run

if TYPE_CHECKING:
    from gidd_jax.evaluation.definitions import Check

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
    "checkpoint", None, "Check the process of this model, given as for gidd_jax.sample."
)


def main(argv: list[str]) -> None:
    del argv
    import jax

    # The references are float64; and no accelerator is taken from a run that uses it.
    jax.config.update("jax_platforms", "cpu")
    # Every program runs once: to compile it is what takes the time.
    jax.config.update("jax_disable_most_optimizations", True)
    from gidd_jax.evaluation import certify
    from gidd_jax.evaluation.subjects import find_subject

    process, small = find_subject(
        CODE.process.value,
        CHECKPOINT.value,
        allow_code=CODE.allow_code.value,
        config=CONFIG.value if flags.names_config else None,
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


if __name__ == "__main__":
    run(main, flags)
