"""What training weights do to a law that is known."""

import pytest
from chain_training import distance, trained

from gidd_jax.evaluation import oracle
from gidd_jax.models.dit import DiT
from gidd_jax.process import HybridProcess
from gidd_jax.sampling.options import SamplerOptions
from gidd_jax.training.objective import Objective

VOCAB, LENGTH, STEPS = 7, 12, 4000


@pytest.mark.slow
def test_weights_that_leave_the_minimum_draw_nearer_to_the_law():
    """Some minutes. The paper's make the token that stands there too probable (test_theory)."""
    process = HybridProcess(VOCAB, 6, p_uniform=0.2)
    network = DiT(VOCAB, 64, 2, 2, cond_dim=32, max_seq_len=LENGTH)
    chain, found = oracle.draw_chain(0, VOCAB - 1), {}
    for weighting in ("dynamic", "dynamic_unbiased"):
        objective = Objective(network, process, weighting, 0.0, 2.0, True, False, False, False)
        params = trained(objective, chain, LENGTH, STEPS)
        options = SamplerOptions(num_steps=128)
        found[weighting], floor = distance(objective, params, chain, LENGTH, options)
        print(f"{weighting}: {found[weighting]:.3f}, exact draws {floor:.3f}")
    assert found["dynamic_unbiased"] < 0.6 * found["dynamic"]
    assert found["dynamic_unbiased"] < 0.03 + floor
