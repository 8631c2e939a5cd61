"""A small Markov chain whose exact network is known, and a process of each kind over its tokens."""

from test_process import CosineProcess

from gidd_jax.evaluation import oracle
from gidd_jax.process import HybridProcess, LogSnrProcess, MaskedProcess

PROCESSES = {
    "masks": MaskedProcess(4, 3),
    "hybrid": HybridProcess(4, 1, 0.2),
    "uniform": LogSnrProcess(4, 3, shift=1000.0),
    "own": CosineProcess(4, 0),
}
# Masks at late times and tokens at early ones, the scaling paper's: beside the others where each
# is a family of its own.
FAMILIES = PROCESSES | {"log_snr": LogSnrProcess(4, 3)}
CHAIN = oracle.draw_chain(seed=0, num_tokens=3)
LENGTH = 5
