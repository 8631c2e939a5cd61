"""Suite noising: drawing z_t ~ q_t(.|x)."""

from benchmarks import inputs
from benchmarks.measure import jax_subject, torch_device, torch_wait
from benchmarks.plan import EAGER, OURS, TWIN, Case, Check, Found, Subject, ratio_checks

VOCAB_SIZE = 50304
TARGETS = {"cpu": {"noising_16x128": {EAGER: 300.0}}, "gpu": {"noising_64x512": {EAGER: 20.0}}}


def cases(scale: str, dtype: str) -> list[Case]:
    """Return the case of the target, and a series over the batch."""
    del dtype  # probabilities are float32
    if scale == "small":
        return [_case(2, 16, 512, TWIN), _case(4, 16, 512, sweep="batch")]
    batch, length = (16, 128) if scale == "cpu" else (64, 512)
    series = [_case(batch * k, length, VOCAB_SIZE, sweep="batch") for k in (1, 4, 16, 64)]
    series += [_case(batch, length, v, sweep="vocab_size") for v in (VOCAB_SIZE // 16, VOCAB_SIZE)]
    return [_case(batch, length, VOCAB_SIZE, TWIN), *series]


def _case(
    batch: int, length: int, vocab_size: int, twin: tuple[str, ...] = (), sweep: str = ""
) -> Case:
    name = f"noising_{batch}x{length}"
    return Case(
        kind="noising",
        name=name if not sweep else f"{name}_v{vocab_size}_by_{sweep}",
        shape={"batch": batch, "length": length, "vocab_size": vocab_size, "p_uniform": 0.1},
        tokens=batch * length,
        bytes_moved=8.0 * batch * length,  # the ids in and out
        variants=(OURS, *twin),
        sweep=sweep,
    )


def ours(case: Case) -> Subject:
    """A few uniform numbers per token."""
    import jax
    import jax.numpy as jnp

    from gidd_jax.process import HybridProcess

    vocab_size = case.shape["vocab_size"]
    process = HybridProcess(vocab_size, vocab_size - 1, case.shape["p_uniform"])
    x = inputs.token_ids(case.shape, case.shape["batch"], case.shape["length"])
    t = inputs.times(len(x))
    return jax_subject(process.sample, jax.random.key(0), jnp.asarray(x), jnp.asarray(t))


def twin(case: Case, compiled: bool) -> Subject:
    """A distribution over the vocabulary per token, and a draw from it."""
    import torch

    from benchmarks import torch_twin

    vocab_size, device = case.shape["vocab_size"], torch_device()
    process = torch_twin.Hybrid(vocab_size, vocab_size - 1, case.shape["p_uniform"])
    x = inputs.token_ids(case.shape, case.shape["batch"], case.shape["length"])
    ids = torch.from_numpy(x).long().to(device)
    t = torch.from_numpy(inputs.times(len(x))).to(device)
    sample = torch.compile(process.sample) if compiled else process.sample

    @torch.no_grad()
    def run() -> None:
        sample(ids, t)
        torch_wait()

    return Subject(run)


def checks(scale: str, found: Found) -> list[Check]:
    """Return the targets beside what was measured."""
    return [
        check
        for case, speed_ups in TARGETS[scale].items()
        for check in ratio_checks(found, case, speed_ups)
    ]
