"""A log-SNR of its own for masks and for random tokens, as in arXiv 2603.02230.

A token is first replaced by a random one, then hidden by the mask; each of the two happens on a
schedule of its own. Once masked, a token stays masked: what there is to correct comes from the
random tokens alone.
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
