"""A log-SNR of its own for masks and for random tokens.

A token stays unmasked with probability gamma_t and escapes random replacement with rho_t, each on
a schedule of its own: alpha_t = gamma_t rho_t, the mask has 1 - gamma_t, and gamma_t (1 - rho_t)
are random tokens. These are the marginals of arXiv 2603.02230. The shape of both schedules over t
is this file's own; what happens between two times, weights, loss and sampler are those of every
process here: what is masked can become a random token again, where the paper's masks stay.
"""

import dataclasses
import math

from gidd_jax.process import InterpolatingProcess, NoiseMass, as_float


@dataclasses.dataclass(frozen=True)
class TwoLogSnrs(InterpolatingProcess):
    """Tokens survive masking with sigmoid(log_snr_m(t)), replacement with sigmoid(log_snr_u(t)).

    Both log-SNRs are log((1 - t) / t) plus a shift: the larger it is, the later that noise comes.
    """

    mask_shift: float = 0.0
    uniform_shift: float = 3.0

    def _split(self, t, shift):
        """Return sigmoid(log_snr) and sigmoid(-log_snr), without a logarithm that ends at t = 1."""
        t = as_float(t)
        signal, noise = 1 - t, math.exp(-shift) * t
        return signal / (signal + noise), noise / (signal + noise)

    def alpha(self, t):
        unmasked, _ = self._split(t, self.mask_shift)
        kept, _ = self._split(t, self.uniform_shift)
        return unmasked * kept

    def beta_pi(self, t):
        unmasked, masked = self._split(t, self.mask_shift)
        _, replaced = self._split(t, self.uniform_shift)
        return NoiseMass(mask=masked, uniform=unmasked * replaced / self.num_noise_tokens)
