"""Check a mixing process: is it legal, do weights, draws and bound agree? And what samplers draw.

Examples:
  python -m gidd_jax.check
  python -m gidd_jax.check --process=hybrid:p_uniform=0.2,gamma=1
  python -m gidd_jax.check --process=log_snr:scale=1,shift=0
  python -m gidd_jax.check --process=cosine.py:CosineProcess
  python -m gidd_jax.check --checkpoint=outputs/quickstart
  python -m gidd_jax.check --sampler --process=hybrid:p_uniform=0.2 --out=laws.json
  python -m gidd_jax.check --sampler --methods=ancestral,entropy_bound:epsilon=0 --told=position
  python -m gidd_jax.check --transfer --out=transfer.json

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

Prints a line a check: ok or FAIL, the error found, the largest one allowed, what was compared.
Exit code 1 if a check fails. Errors are absolute for probabilities and nats, relative for weights
and gradients; those of draws are -log10 of the chance that right draws look like that. Runs on the
CPU. A log_snr process with scale > 1 fails: some of its rates are negative.

--sampler measures the samplers instead, with the network that is exactly right for a Markov chain.
For each method and number of steps it prints the network calls and the total variation between what
the method draws and the chain (5 tokens, 20,000 rows; a line above says what as many exact draws
have); for a longer chain the calls, E[-log p] - H in nats a token and the total variation of
neighbours. The last column says in words whether the method samples the model, has a floor that no
number of steps removes, or seeks the mode; exit code 1 when a method that must sample does not.
--told=row: the network knows one time a row, as most do; position: one of each token, so that it
knows which are clean. Takes minutes.

--transfer: does a learning rate keep as the time-free network grows? Prints root mean squares of
activations and of their changes by 8 updates, for widths 64 to 512, depths 2 to 16 and both
parametrizations. Exit code 1 when CompleteP's changes are not flat. Takes minutes.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gidd_jax.cli import CommandFlags, config_flag, run
from gidd_jax.errors import InputError
from gidd_jax.model_flags import code_flags

if TYPE_CHECKING:
    from pathlib import Path

    from gidd_jax.evaluation.definitions import Check
    from gidd_jax.evaluation.subjects import Subject

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
SAMPLER = flags.DEFINE_bool("sampler", False, "Measure samplers instead of checking the process.")
METHODS = flags.DEFINE_string(
    "methods",
    None,
    "--sampler: methods, separated by commas, each with options as in NAME:KEY=VALUE:KEY=VALUE. "
    "Default: all that can sample the process.",
)
TOLD = flags.DEFINE_enum(
    "told", None, ["row", "position"], "--sampler: times that the network knows. Default: row."
)
TRANSFER = flags.DEFINE_bool("transfer", False, "Check that learning rates keep with size instead.")
OUT = flags.DEFINE_string("out", None, "--sampler, --transfer: file to write, ending in .json.")


def main(argv: list[str]) -> None:
    del argv
    import jax

    from gidd_jax.inference.samples import check_output

    out = check_output(OUT.value, ".json") if OUT.value else None
    others = SAMPLER.value or CODE.process.value or CHECKPOINT.value or flags.names_config
    if TRANSFER.value and others:
        raise InputError("--transfer stands alone: leave out what chooses or checks a process")
    if not SAMPLER.value and (METHODS.value or TOLD.value):
        raise InputError("--methods and --told belong to --sampler: add it, or leave them out")
    if OUT.value and not (SAMPLER.value or TRANSFER.value):
        raise InputError("--out belongs to --sampler and --transfer: add one, or leave it out")
    # The references are float64; and no accelerator is taken from a run that uses it.
    jax.config.update("jax_platforms", "cpu")
    # Every program of a check runs once: to compile it is what takes the time.
    jax.config.update("jax_disable_most_optimizations", not SAMPLER.value)
    if TRANSFER.value:
        sys.exit(check_transfer(out))
    from gidd_jax.evaluation import certify
    from gidd_jax.evaluation.subjects import find_subject

    subject = find_subject(
        CODE.process.value,
        CHECKPOINT.value,
        allow_code=CODE.allow_code.value,
        config=CONFIG.value if flags.names_config else None,
    )
    process, small = subject.process, subject.small
    print(f"process: {process}", flush=True)
    if SAMPLER.value:
        sys.exit(measure_samplers(subject, out))
    passed = report(certify.formula_checks(process))
    if small.vocab_size != process.vocab_size:
        print(f"with {small.vocab_size} tokens instead of {process.vocab_size}, to enumerate them:")
    passed += report(certify.toy_checks(small))
    if not all(passed):
        print(f"{passed.count(False)} of {len(passed)} checks failed")
        sys.exit(1)
    print(f"all {len(passed)} checks passed")


def measure_samplers(subject: "Subject", out: "Path | None") -> int:
    """Print a line for each method and number of steps as it ends; return the exit code."""
    from gidd_jax.evaluation import sampler_laws
    from gidd_jax.evaluation.reports import write_report
    from gidd_jax.sampling.schedule import check_options

    sizes = sampler_laws.SHORT_TOKENS, sampler_laws.LONG_TOKENS
    short, long = (subject.at(size + 1, size) for size in sizes)
    methods = sampler_laws.parse_methods(METHODS.value or sampler_laws.legal_methods(short))
    for options in methods.values():
        check_options(short, options)
    floor, failed, told = sampler_laws.noise_floor(), [], TOLD.value or "row"
    bounds = sampler_laws.bounds(long)
    print(
        f"bound of a long row: middle {bounds['middle']:.3f}, full {bounds['full']:.3f} +- "
        f"{bounds['full_standard_error']:.3f}, entropy {bounds['entropy']:.3f} nats"
    )
    print(f"total variation of as many exact draws: {floor:.4f}; the network knows times by {told}")
    headers = ("steps", "calls", "tv", "calls", "nats/token", "neighbours")
    print("  ".join([f"{'method':28}", *(f"{name:>10}" for name in headers)]), flush=True)
    found = {}
    for name, laws in sampler_laws.measure(short, long, methods, told):
        words = sampler_laws.verdict(laws, floor)
        for law in laws:
            excess = "-" if law.excess is None else f"{law.excess:+.4f}"
            cells = (law.steps, law.calls, f"{law.total_variation:.4f}", law.long_calls, excess)
            cells = (*cells, f"{law.bigrams:.4f}")
            ending = f"  {words}" if law is laws[-1] else ""
            print("  ".join([f"{name:28}", *(f"{c:>10}" for c in cells)]) + ending, flush=True)
        if words != sampler_laws.SAMPLES and sampler_laws.claims_to_sample(
            short, told, methods[name]
        ):
            failed.append(name)
        found[name] = {"verdict": words, "laws": [law._asdict() for law in laws]}
    if out is not None:
        report = {"process": str(subject.process), "told": told, "floor": floor, "bounds": bounds}
        write_report(out, report | {"methods": found})
        print(f"wrote {out}")
    for name in failed:
        print(f"FAIL  {name} must sample the model, and does not")
    return 1 if failed else 0


def check_transfer(out: "Path | None") -> int:
    """Print the sizes of each network as they are measured, then the verdict; return exit code."""
    from gidd_jax.evaluation import transfer
    from gidd_jax.evaluation.reports import write_report

    print(transfer.HEADER, flush=True)
    sizes = []
    for one in transfer.measure_all():
        print(transfer.line(one), flush=True)
        sizes.append(one)
    report = transfer.report(sizes)
    print(*transfer.verdict(report), sep="\n")
    if out is not None:
        write_report(out, report)
    return 0 if report["parametrizations"]["completep"]["transfers"] else 1


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
