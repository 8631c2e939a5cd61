"""Forward processes of interpolating diffusion: q_t(z|x) = alpha_t 1[z=x] + (beta_t pi_t)(z).

A process is a frozen value. Its methods are pure, can be jitted, and compute in at least float32
(float64 under x64). Times t, s have shape [B] (one per sequence), [] or the shape of the token ids.
Notation and equations: section 4 of "Generalized Interpolating Discrete Diffusion" (arXiv
2503.04482); for `LogSnrProcess` "Scaling Behavior of Discrete Diffusion Language Models" (arXiv
2512.10858).

A new process needs two methods, `alpha(t)` and `beta_pi(t)`; everything else follows from them:

    @dataclasses.dataclass(frozen=True)
    class CosineProcess(InterpolatingProcess):
        def alpha(self, t):
            return jnp.cos(0.5 * jnp.pi * t) ** 2
        def beta_pi(self, t):
            noise = jnp.sin(0.5 * jnp.pi * t) ** 2
            return NoiseMass(mask=0.9 * noise, uniform=0.1 * noise / (self.vocab_size - 1))
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gidd_jax.errors import InputError
from gidd_jax.interpolation import (
    WEIGHTINGS,
    InterpolatingProcess,
    NoiseDraws,
    NoiseMass,
    as_float,
    expand_time,
)

# One address for what users of processes need; the base is defined in interpolation.py.
__all__ = [
    "WEIGHTINGS",
    "HybridProcess",
    "InterpolatingProcess",
    "LogSnrProcess",
    "MaskedProcess",
    "NoiseDraws",
    "NoiseMass",
    "as_float",
    "expand_time",
]

MIN_LOG_UNIFORM = -20.0  # floor of log p_uniform and of log B: mask-only GIDD is this limit


@dataclasses.dataclass(frozen=True)
class HybridProcess(InterpolatingProcess):
    """The paper's mixing schedule: masks, and a share p_uniform of uniform noise at t = 1/2.

    c_t = B (t(1-t))^(gamma/2), B = 2^gamma p_uniform/(1-p_uniform), alpha_t = (1-t)/(1+c_t),
    beta_t pi_t = (t m + c_t u)/(1+c_t) (eqs. 9-11). p_uniform in [0, 1): 0 is mask-only GIDD;
    gamma in (0, 2]: beyond 2 transition rates near t = 1 are negative. A traced p_uniform, of a
    share that training anneals, is not checked.
    """

    p_uniform: float | jax.Array
    gamma: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.p_uniform, jax.Array) and not 0.0 <= self.p_uniform < 1.0:
            raise InputError(f"p_uniform must lie in [0, 1): {self.p_uniform}")
        if not 0.0 < self.gamma <= 2.0:
            raise InputError(f"gamma must lie in (0, 2]: {self.gamma}")

    @property
    def log_b(self) -> float | jax.Array:
        """log B, floored at -20."""
        log_scale = self.gamma * math.log(2)
        if isinstance(self.p_uniform, jax.Array):
            p = jnp.maximum(self.p_uniform, math.exp(MIN_LOG_UNIFORM))
            return jnp.maximum(log_scale + jnp.log(p) - jnp.log1p(-p), MIN_LOG_UNIFORM)
        p = max(self.p_uniform, math.exp(MIN_LOG_UNIFORM))
        return max(log_scale + math.log(p) - math.log1p(-p), MIN_LOG_UNIFORM)

    def settled(self) -> "HybridProcess":
        if isinstance(self.p_uniform, jax.Array):
            return dataclasses.replace(self, p_uniform=0.0)
        return self

    def uniform_odds(self, t: jax.Array) -> jax.Array:
        """Return c_t, the uniform mass before normalisation by 1 + c_t."""
        return jnp.exp(self.log_b + 0.5 * self.gamma * (jnp.log(t) + jnp.log1p(-t)))

    def alpha(self, t: ArrayLike) -> jax.Array:
        t = as_float(t)
        return (1 - t) / (1 + self.uniform_odds(t))

    def beta_pi(self, t: ArrayLike) -> NoiseMass:
        t = as_float(t)
        c = self.uniform_odds(t)
        return NoiseMass(mask=t / (1 + c), uniform=c / (1 + c) / self.num_noise_tokens)

    def transition(self, t: ArrayLike, s: ArrayLike) -> tuple[jax.Array, NoiseMass]:
        # The difference of the definition cancels for close times: factor t - s out instead.
        t, s = as_float(t), as_float(s)
        alpha_t, c_t = self.alpha(t), self.uniform_odds(t)
        mask = alpha_t * (t - s) / ((1 - t) * (1 - s))
        log_ratio = 0.5 * self.gamma * jnp.log1p((s - t) / t)
        log_ratio += (0.5 * self.gamma - 1) * jnp.log1p((t - s) / (1 - t))
        uniform = alpha_t * c_t / (1 - t) * -jnp.expm1(log_ratio) / self.num_noise_tokens
        return alpha_t / self.alpha(s), NoiseMass(mask, uniform)

    def elbo_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike) -> jax.Array:
        # Closed forms. A target that is itself the mask never occurs in data; the indicators of
        # the cases then add up, as in the original.
        t = expand_time(t, x)
        rate = 1 / (t * (1 - t))
        on_mask = rate
        # t + (gamma/2)(1 - 2t) and its complement, written without cancellation at gamma = 2
        half = 0.5 * self.gamma
        on_other = ((1 - half) * t + half * (1 - t)) * rate
        token_odds = self.uniform_odds(t) / self.num_noise_tokens * self.background_ratio(x)
        on_x = on_other * token_odds / (1 - t + token_odds)
        on_x += jnp.where(x == self.mask_id, ((1 - half) * (1 - t) + half * t) * rate, 0.0)
        return jnp.where(z_t == x, on_x, jnp.where(z_t == self.mask_id, on_mask, on_other))

    def dynamic_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike, v1_1: bool) -> jax.Array:
        """Return 2 on masks, 1 on other tokens, (B/N) e^(-gamma log_snr / 2) where z_t = x.

        The released code (v1_1) takes sigmoid(-t) for -log_snr and V for N.
        """
        t = expand_time(t, x)
        log_noise = jax.nn.sigmoid(-t) if v1_1 else -self.log_snr(t)
        count = self.vocab_size if v1_1 else self.num_noise_tokens
        on_x = jnp.exp(self.log_b + 0.5 * self.gamma * log_noise) / count
        return jnp.where(z_t == x, on_x, jnp.where(z_t == self.mask_id, 2.0, 1.0))

    def unbiased_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike) -> jax.Array:
        """Return 2 on masks, 1 on other tokens, b / (alpha + b) where z_t = x, b the mass of x as
        noise: the ELBO weights up to a factor of t and z_t.

        Such a factor moves no minimiser. The paper's weight where z_t = x is larger, so that x_hat
        of the token that stands there comes out too probable.
        """
        t = expand_time(t, x)
        as_noise = self.mass_at(self.beta_pi(t), x)
        on_x = as_noise / (self.alpha(t) + as_noise)
        return jnp.where(z_t == x, on_x, jnp.where(z_t == self.mask_id, 2.0, 1.0))


@dataclasses.dataclass(frozen=True)
class MaskedProcess(InterpolatingProcess):
    """The log-linear schedule of MDLM (arXiv 2406.07524): alpha_t = 1 - (1 - eps) t, masks only."""

    eps: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.eps < 1.0:
            raise InputError(f"eps must lie in [0, 1): {self.eps}")

    def alpha(self, t: ArrayLike) -> jax.Array:
        t = as_float(t)
        return (1 - t) + self.eps * t

    def beta_pi(self, t: ArrayLike) -> NoiseMass:
        t = as_float(t)
        return NoiseMass(mask=(1 - self.eps) * t, uniform=jnp.zeros_like(t))

    def transition(self, t: ArrayLike, s: ArrayLike) -> tuple[jax.Array, NoiseMass]:
        t, s = as_float(t), as_float(s)
        mask = (1 - self.eps) * (t - s) / self.alpha(s)
        return self.alpha(t) / self.alpha(s), NoiseMass(mask, jnp.zeros_like(mask))

    def prior(self) -> NoiseMass:
        return NoiseMass(mask=jnp.float32(1.0), uniform=jnp.float32(0.0))


@dataclasses.dataclass(frozen=True)
class LogSnrProcess(InterpolatingProcess):
    """The scaling paper's family: alpha = sigmoid(lambda), a mixture that depends on lambda.

    pi = sigmoid(scale lambda + shift) u + (1 - sigmoid(scale lambda + shift)) m with the log-SNR
    lambda = log((1-t)/t) clipped to [min_log_snr, max_log_snr]. shift -> -inf is masking,
    0 hybrid, +inf uniform (the paper runs it with +-1000). With scale > 1 some rates are negative:
    the loss is defined, but no forward process samples like that.
    """

    scale: float = 1.0
    shift: float = 0.0
    min_log_snr: float = -9.0
    max_log_snr: float = 9.0

    def __post_init__(self):
        super().__post_init__()
        if not self.scale >= 0.0:
            raise InputError(f"scale must not be negative: {self.scale}")
        if not self.min_log_snr < self.max_log_snr:
            raise InputError(
                f"min_log_snr must be below max_log_snr: {self.min_log_snr}, {self.max_log_snr}"
            )

    @property
    def t_min(self) -> float:
        return max(self.t_eps, 1 / (1 + math.exp(self.max_log_snr)))

    @property
    def t_max(self) -> float:
        return min(1 - self.t_eps, 1 / (1 + math.exp(self.min_log_snr)))

    def _clip(self, t: ArrayLike) -> jax.Array:
        low, high = 1 / (1 + math.exp(self.max_log_snr)), 1 / (1 + math.exp(self.min_log_snr))
        return jnp.clip(as_float(t), low, high)

    def mixing_logit(self, t: jax.Array) -> jax.Array:
        """Return scale * lambda + shift, the log odds of uniform noise against the mask."""
        return self.scale * (jnp.log1p(-t) - jnp.log(t)) + self.shift

    def alpha(self, t: ArrayLike) -> jax.Array:
        return 1 - self._clip(t)

    def beta_pi(self, t: ArrayLike) -> NoiseMass:
        t = self._clip(t)
        y = self.mixing_logit(t)
        return NoiseMass(
            mask=t * jax.nn.sigmoid(-y), uniform=t * jax.nn.sigmoid(y) / self.num_noise_tokens
        )

    def transition(self, t: ArrayLike, s: ArrayLike) -> tuple[jax.Array, NoiseMass]:
        # mass_t - alpha_{t|s} mass_s = mass_t (1 - r), r = (mass_s/alpha_s) / (mass_t/alpha_t);
        # log r is formed from differences that keep their accuracy for close times.
        t, s = self._clip(t), self._clip(s)
        mass = self.beta_pi(t)
        step = jnp.log1p((t - s) / (s * (1 - t)))  # lambda_s - lambda_t
        d_y = self.scale * step
        y = self.mixing_logit(t)
        up = jnp.log1p(jax.nn.sigmoid(y) * jnp.expm1(d_y))  # softplus(y_s) - softplus(y_t)
        log_r_mask, log_r_uniform = -step - up, -step + d_y - up
        return (1 - t) / (1 - s), NoiseMass(
            mask=mass.mask * -jnp.expm1(log_r_mask),
            uniform=mass.uniform * -jnp.expm1(log_r_uniform),
        )

    def relative_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike) -> jax.Array:
        """Return (pi(z) - pi'(z)) / (pi(z) + e^lambda 1[z=x]): the ELBO weight times t(1-t)."""
        t = expand_time(t, x)
        y = self.mixing_logit(t)
        on_mask = jnp.where(jax.nn.sigmoid(-y) > 0, 1 + self.scale * jax.nn.sigmoid(y), 0.0)
        on_other = jnp.where(
            jax.nn.sigmoid(y) > 0, (1 - self.scale) + self.scale * jax.nn.sigmoid(y), 0.0
        )
        token = jax.nn.sigmoid(y) / self.num_noise_tokens * self.background_ratio(x)
        on_x = on_other * token / (token + (1 - t) / t)
        return jnp.where(z_t == x, on_x, jnp.where(z_t == self.mask_id, on_mask, on_other))

    def elbo_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike) -> jax.Array:
        t = expand_time(t, x)
        return self.relative_weights(x, z_t, t) / (t * (1 - t))

    def dynamic_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike, v1_1: bool) -> jax.Array:
        """Return the scaling paper's training weights: the ELBO weight times p(lambda) = t(1-t)."""
        if v1_1:
            return super().dynamic_weights(x, z_t, t, v1_1)
        return self.relative_weights(x, z_t, t)

    def prior(self) -> NoiseMass:
        mass = self.beta_pi(self.t_max)
        return NoiseMass(mass.mask / self.t_max, mass.uniform / self.t_max)
