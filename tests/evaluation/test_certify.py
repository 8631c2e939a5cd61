"""The checks of a process: right ones pass, every wrong one fails the check that is for it."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_process import CosineProcess
from tiny_checkpoint import write_checkpoint

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError
from gidd_jax.evaluation import certify, definitions, enumerated, subjects
from gidd_jax.process import (
    HybridProcess,
    InterpolatingProcess,
    LogSnrProcess,
    MaskedProcess,
    NoiseMass,
)

IDS, TOY = (50258, 50257), (definitions.TOY_VOCAB_SIZE, definitions.TOY_MASK_ID)
UNEVEN = tuple(np.insert(0.7 ** np.arange(7) / np.sum(0.7 ** np.arange(7)), TOY[1], 0.0))
PROCESSES = {
    "hybrid": lambda v, m: HybridProcess(v, m, 0.1),
    "masked": MaskedProcess,
    "log_snr": LogSnrProcess,
    "two_functions": CosineProcess,
    "hybrid_masks": lambda v, m: HybridProcess(v, m, 0.0),
    "hybrid_steep": lambda v, m: HybridProcess(v, m, 0.5, gamma=2.0),
    "hybrid_uneven": lambda v, m: HybridProcess(*TOY, 0.3, background=UNEVEN),
    "masked_to_the_end": lambda v, m: MaskedProcess(v, m, eps=0.0),
    "log_snr_masks": lambda v, m: LogSnrProcess(v, m, shift=-1000.0),
    "log_snr_uniform": lambda v, m: LogSnrProcess(v, m, shift=1000.0),
    "log_snr_half": lambda v, m: LogSnrProcess(v, m, scale=0.5, shift=1.0),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer draws."""
    monkeypatch.setattr(enumerated, "NUM_DRAWS", 1 << 14)


def quick_checks(process: InterpolatingProcess) -> list[definitions.Check]:
    """All checks but those of the sampler and the fused loss, which take long to compile.

    Operation by operation: those of one process are ready compiled for the next.
    """
    small = subjects.resizable(process).small
    toys = enumerated.posterior, enumerated.noising, enumerated.prior, enumerated.bound
    with jax.disable_jit():
        return [*certify.formula_checks(process), *(check(small) for check in toys)]


def failing(checks) -> set[str]:
    """The first words of the checks that fail."""
    names = (check.name.removeprefix("weights: ") for check in checks if not check.ok)
    return {re.split("[: ]", name)[0] for name in names}


@pytest.mark.parametrize("name", PROCESSES)
def test_right_processes_pass(name):
    checks = quick_checks(PROCESSES[name](*IDS))
    assert failing(checks) == set()
    # Those without closed weights have one check less.
    assert len(checks) == 11 - (name in ("masked", "masked_to_the_end", "two_functions"))
    assert all(check.error >= 0 for check in checks)


@pytest.mark.parametrize("name", ["hybrid", "two_functions"])
def test_sampler_and_fused_loss_pass(name):
    small = PROCESSES[name](*TOY)
    assert failing([enumerated.sampler(small), enumerated.fused(small)]) == set()


# Wrong ones: each changes one thing of a right process.


class ScaledWeights(HybridProcess):
    def elbo_weights(self, x, z_t, t):
        return 1.01 * super().elbo_weights(x, z_t, t)


class NegativeWeights(HybridProcess):
    def elbo_weights(self, x, z_t, t):
        weights = super().elbo_weights(x, z_t, t)
        return jnp.where((z_t != x) & (z_t != self.mask_id), -weights, weights)


class WrongRate(CosineProcess):
    def noise_rate(self, t):
        mask, uniform = super().noise_rate(t)
        return NoiseMass(mask, 2 * uniform)


class CoarseWeights(HybridProcess):
    def elbo_weights(self, x, z_t, t):
        single = jnp.asarray(t).dtype == jnp.float32
        return super().elbo_weights(x, z_t, jnp.maximum(t, 0.001) if single else t)


class Backwards(InterpolatingProcess):
    """Becomes less noisy."""

    def alpha(self, t):
        return 0.01 + 0.9 * jnp.asarray(t)

    def beta_pi(self, t):
        return NoiseMass(1 - self.alpha(t), jnp.zeros_like(t))


class MissingMass(CosineProcess):
    def beta_pi(self, t):
        mask, uniform = super().beta_pi(t)
        return NoiseMass(mask, uniform * (self.vocab_size - 1) / self.vocab_size)


class WrongTransition(HybridProcess):
    def transition(self, t, s):
        alpha_ts, (mask, uniform) = super().transition(t, s)
        more = 0.1 * mask
        return alpha_ts, NoiseMass(mask - more, uniform + more / self.num_noise_tokens)


class WrongPosterior(HybridProcess):
    def posterior_probs(self, x_hat, z_t, t, s):
        return self.marginal_probs(x_hat, s)  # a distribution, but another


class UnnormalisedPosterior(HybridProcess):
    def posterior_probs(self, x_hat, z_t, t, s):
        return 1.001 * super().posterior_probs(x_hat, z_t, t, s)


class MaskingSample(HybridProcess):
    """Its noising knows only masks."""

    def sample(self, key, x, t):
        return MaskedProcess(self.vocab_size, self.mask_id).sample(key, x, t)


class NoiseIsTheMaskToo(HybridProcess):
    def sample_background(self, key, shape):
        return jax.random.randint(key, shape, 0, self.vocab_size)


class UniformPrior(HybridProcess):
    def prior(self):
        return NoiseMass(jnp.float32(0), jnp.float32(1 / self.num_noise_tokens))


@pytest.mark.parametrize(
    ("process", "names"),
    [
        (ScaledWeights(*TOY, 0.2), {"its", "float32", "bound"}),
        (NegativeWeights(*TOY, 0.2), {"its", "float32", "rates", "bound"}),
        (WrongRate(*TOY), {"autodiff", "float32", "bound"}),
        (CoarseWeights(*TOY, 0.2), {"float32"}),
        (Backwards(*TOY), {"rates", "transitions", "prior"}),
        (MissingMass(*TOY), {"masses", "transitions", "posterior", "noising", "bound"}),
        (WrongTransition(*TOY, 0.2), {"Chapman-Kolmogorov", "posterior"}),
        (WrongPosterior(*TOY, 0.2), {"posterior"}),
        (UnnormalisedPosterior(*TOY, 0.2), {"posterior"}),
        (MaskingSample(*TOY, 0.2), {"noising"}),
        (NoiseIsTheMaskToo(*TOY, 0.2), {"noising"}),
        (UniformPrior(*TOY, 0.2), {"prior"}),
        (LogSnrProcess(*TOY, scale=2.0), {"rates", "transitions"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_processes_fail_the_check_that_is_for_it(process, names):
    assert failing(quick_checks(process)) == names


def test_a_step_that_makes_the_sampler_wrong():
    assert failing([enumerated.sampler(WrongTransition(*TOY, 0.2))]) == {"sampler"}


def test_a_fused_loss_that_is_another(monkeypatch):
    right = enumerated.fused_loss

    def without_is(*args, **options):
        loss, terms = right(*args, **options)
        return loss - 1e-3 * jnp.sum(args[7] * terms.is_div), terms

    monkeypatch.setattr(enumerated, "fused_loss", without_is)
    assert failing([enumerated.fused(HybridProcess(*TOY, 0.1))]) == {"loss"}


def test_what_is_not_a_number_fails():
    assert not definitions.Check("", float("nan"), 1.0).ok
    assert enumerated.surprise(np.array([[0, 9]]), np.full((1, 9), 1 / 9)) == np.inf
    assert np.isnan(enumerated.surprise(np.array([[0, 1]]), np.array([[0.5, np.nan]])))


def test_surprise_is_the_chance_of_such_draws():
    draws = np.repeat([[0, 1]], 50, axis=1).reshape(1, -1)
    assert enumerated.surprise(draws, np.array([[0.5, 0.5]])) == 0
    # 2 outcomes, both tails: all of 10 draws are alike with probability 2^-10
    got = enumerated.surprise(np.zeros((1, 10), int), np.array([[0.5, 0.5]]))
    np.testing.assert_allclose(got, -np.log10(4 * 2.0**-10))
    assert enumerated.surprise(np.array([[0, 1]]), np.array([[1.0, 0.0]])) == np.inf


def test_a_smaller_vocabulary_keeps_the_process_and_the_shape_of_its_background():
    p = 0.999 ** np.arange(99)
    background = tuple(np.insert(p / p.sum(), 99, 0.0))
    process = HybridProcess(100, 99, 0.3, background=background)
    small = subjects.resizable(process).small
    assert dataclasses.replace(small, background=None) == HybridProcess(*TOY, 0.3)
    assert small.background is not None
    values = np.delete(small.background, TOY[1])
    np.testing.assert_allclose(values[0] / values[-1], 0.999**98)
    assert subjects.resizable(small).small is small


# The command.

COSINE = """
from __future__ import annotations
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from gidd_jax.process import HybridProcess, InterpolatingProcess, NoiseMass

@dataclasses.dataclass(frozen=True)
class Cosine(InterpolatingProcess):
    share: float = 0.1
    def alpha(self, t):
        return jnp.cos(0.5 * jnp.pi * t) ** 2
    def beta_pi(self, t):
        noise = jnp.sin(0.5 * jnp.pi * t) ** 2
        uniform = self.share * noise / (self.vocab_size - 1)
        return NoiseMass(mask=(1 - self.share) * noise, uniform=uniform)

def factory(vocab_size, mask_id):
    return Cosine(vocab_size, mask_id, 0.2)

instance = Cosine(1000, 7, 0.3)

class WrongSample(Cosine):
    def sample(self, key, x, t):
        return super().sample(key, x, 0.9 * t)

class Scalar(Cosine):
    def alpha(self, t):
        return 1.0

class NotTraced(Cosine):
    def alpha(self, t):
        return np.cos(t)

def needs_more(vocab_size, mask_id, another):
    return Cosine(vocab_size, mask_id)

def other(vocab_size, mask_id):
    return 3
"""

SCRIPT = """
import json, sys
from gidd_jax.evaluation import subjects
from gidd_jax.errors import InputError
for process, checkpoint, *allowed in json.load(sys.stdin):
    try:
        found = subjects.find_subject(process, checkpoint, allow_code=bool(allowed))
        print(repr(found.process), repr(found.small), sep=" and ")
    except InputError as error:
        print("error:", " ".join(str(error).split()))
"""


def run(*words: str, folder, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        input=stdin,
        cwd=folder,
        check=False,
    )


def test_the_processes_that_flags_name(tmp_path):
    write_checkpoint(tmp_path / "run", tmp_path, "gidd")
    write_checkpoint(tmp_path / "ar", tmp_path, "ar")
    (tmp_path / "own.py").write_text(COSINE)
    (tmp_path / "broken.py").write_text("import nothing_there")
    toy, paper = "vocab_size=8, mask_id=3", "vocab_size=50258, mask_id=50257"
    cases = {
        (None, None): f"HybridProcess({paper}, t_eps=0.0001, p_uniform=0.1, gamma=1.0) and Hybrid",
        ("hybrid:p_uniform=0.2,gamma=2", None): "p_uniform=0.2, gamma=2.0) and HybridProcess("
        + toy,
        ("masked", None): f"MaskedProcess({paper}, t_eps=0.0001, eps=0.0001) and MaskedProcess(",
        ("log_snr:shift=-1000", None): "scale=1.0, shift=-1000.0, min_log_snr=-9.0",
        ("own.py:Cosine", None): f"Cosine({paper}, t_eps=0.0001, share=0.1) and Cosine({toy}",
        ("own.py:factory", None): f"share=0.2) and Cosine({toy}, t_eps=0.0001, share=0.2)",
        ("own:factory", None): f"share=0.2) and Cosine({toy}",
        ("own.py:instance", None): f"Cosine(vocab_size=1000, mask_id=7, t_eps=0.0001, share=0.3) "
        f"and Cosine({toy}, t_eps=0.0001, share=0.3)",
        (None, "run"): f"p_uniform=0.1, gamma=1.0) and HybridProcess({toy}",
        (None, "ar"): "error: ar is autoregressive: only diffusion has a process to check",
        (None, "missing"): "error: no such folder: missing",
        ("masked", None, True): "error: --allow_code is for the code in a --checkpoint: leave it",
        ("autoregressive", None): "error: --process=autoregressive: only diffusion has",
        ("hybird:p_uniform=1", None): "unknown process 'hybird': did you mean hybrid?",
        ("own.py", None): "error: --process=own.py: name its class too: own.py:CLASS",
        ("hybrid", None): "error: --process=hybrid: p_uniform is missing: add it",
        ("hybrid:p_uniform", None): "'p_uniform' must be KEY=VALUE",
        ("hybrid:p_uniform=x", None): "p_uniform must be a number",
        ("hybrid:p_uniform=1", None): "error: p_uniform must lie in [0, 1): 1.0",
        ("masked:gamma=1", None): "unknown 'gamma': use one of eps, t_eps",
        ("missing.py:Cosine", None): "error: missing.py:Cosine: no such file: missing.py",
        (
            "broken.py:Cosine",
            None,
        ): "broken.py:Cosine: ModuleNotFoundError: No module named 'noth",
        ("nothing_there:Cosine", None): "No module named 'nothing_there'",
        ("own.py:Cosin", None): "no Cosin there: did you mean Cosine?",
        ("own.py:jnp", None): "jnp is no InterpolatingProcess, and nothing that makes one",
        ("own.py:needs_more", None): "TypeError: needs_more() missing 1 required positional",
        ("own.py:other", None): "other(50258, 50257) is no InterpolatingProcess",
        ("own.py:Scalar", None): "must have the shape of t",
        ("own.py:NotTraced", None): "must be functions made of jax.numpy: TracerArrayConversion",
    }
    result = run("-c", SCRIPT, folder=tmp_path, stdin=json.dumps(list(cases)))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for case, line, want in zip(cases, lines, cases.values(), strict=True):
        assert want in line, case
        assert line.startswith("error: ") == ("Process(" not in line and "Cosine(" not in line)


OWN = """
import dataclasses
from gidd_jax.process import HybridProcess

class Own(HybridProcess):
    def __init__(self, vocab_size, mask_id):
        if vocab_size < 5:
            raise ValueError("too few tokens")
        super().__init__(vocab_size, mask_id, 0.3)

one = Own(1000, 7)
"""


def test_an_own_process_is_made_for_other_tokens_as_it_makes_itself(tmp_path):
    """Its constructor need not take the fields that `dataclasses.replace` passes."""
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path}/own.py:Own"
    config = load_config("base")
    config.update_from_flattened_dict({"process.name": name})
    for subject in (
        subjects.find_subject(name, None),
        subjects.find_subject(None, None, config=config),
    ):
        assert (subject.small.vocab_size, subject.small.mask_id) == TOY
        assert (subject.at(9, 8).vocab_size, subject.at(9, 8).mask_id) == (9, 8)
        with pytest.raises(InputError, match=r"Own\(4, 3\) raises ValueError: too few tokens"):
            subject.at(4, 3)
    fixed = subjects.find_subject(f"{tmp_path}/own.py:one", None)
    with pytest.raises(InputError, match=r"own.py:one: dataclasses.replace raises TypeError"):
        fixed.at(9, 8)


def test_the_command_prints_its_checks_and_exits_with_1(tmp_path):
    (tmp_path / "own.py").write_text(COSINE)
    result = run("-m", "gidd_jax.check", "--process=own.py:WrongSample", folder=tmp_path)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("process: WrongSample(vocab_size=50258")
    assert "with 8 tokens instead of 50258, to enumerate them:" in lines
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == 1
    assert "noising: draws of z_t" in failed[0]
    assert sum(line.startswith("ok   ") for line in lines) == 11
    assert lines[-1] == "1 of 12 checks failed"
    assert "Traceback" not in result.stderr


def test_right_processes_exit_with_0(tmp_path):
    few = (
        "import runpy, sys; from gidd_jax.evaluation import certify as c\n"
        "c.formula_checks, c.toy_checks = lambda p: [c.masses_sum(p)], lambda p: [c.prior(p)]\n"
        "runpy.run_module('gidd_jax.check', run_name='__main__')"
    )
    result = run("-c", few, "--process=masked", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("ok   ") == 2
    assert result.stdout.endswith("all 2 checks passed\n")


@pytest.mark.parametrize("named", ["--process=masked", "--checkpoint=run"])
def test_a_config_beside_another_name_is_refused(named, tmp_path):
    """One of the two would not be what is checked."""
    config = "--config.process.options=mask_share=0.2"
    result = run("-m", "gidd_jax.check", named, config, folder=tmp_path)
    flag = named.partition("=")[0]
    assert result.returncode == 2
    assert result.stderr == (
        f"error: --config and {flag} both name a process: leave one of them out\n"
    )


def test_a_built_in_process_is_not_replaced(tmp_path):
    write_checkpoint(tmp_path / "run", tmp_path, "gidd")
    flags = "--process=masked", "--checkpoint=run"
    result = run("-m", "gidd_jax.check", *flags, folder=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: --process=masked: the process of .*run/checkpoints/3 is hybrid, not one of its "
        r"own: leave the flag out\n",
        result.stderr,
    )
