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
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gidd_jax.errors import InputError

WEIGHTINGS = ("elbo", "clip", "dynamic", "dynamic_v1_1")
MIN_LOG_UNIFORM = -20.0  # floor of log p_uniform and of log B: mask-only GIDD is this limit


class NoiseMass(NamedTuple):
    """Noise mass beta_t pi_t: of the mask, and of each other token (their mean)."""

    mask: jax.Array
    uniform: jax.Array


def as_float(t: ArrayLike) -> jax.Array:
    """Return t as a float array of at least float32."""
    t = jnp.asarray(t)
    return t.astype(jnp.promote_types(t.dtype, jnp.float32))


def expand_time(t: ArrayLike, ids: jax.Array) -> jax.Array:
    """Append axes of size one to t until it has the rank of the token ids."""
    t = as_float(t)
    return t.reshape(t.shape + (1,) * (ids.ndim - t.ndim))


@dataclasses.dataclass(frozen=True)
class InterpolatingProcess:
    """Base of all processes: subclasses give `alpha` and `beta_pi`.

    vocab_size counts every real token, the mask included. Times are drawn from [t_eps, 1 - t_eps].
    `background` is the distribution [vocab_size] of the noise that is not the mask (0 at the mask,
    sums to 1); None means uniform. Raises InputError on parameters outside their legal range.
    """

    vocab_size: int
    mask_id: int
    t_eps: float = dataclasses.field(default=1e-4, kw_only=True)
    background: tuple[float, ...] | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self):
        if self.vocab_size < 2:
            raise InputError(
                f"vocab_size must be at least 2 (mask and one token): {self.vocab_size}"
            )
        if not 0 <= self.mask_id < self.vocab_size:
            raise InputError(
                f"mask_id must lie in the vocabulary, [0, {self.vocab_size}): {self.mask_id}"
            )
        if not 0.0 < self.t_eps < 0.5:
            raise InputError(f"t_eps must lie in (0, 0.5): {self.t_eps}")
        if self.background is not None:
            object.__setattr__(self, "background", self._checked_background(self.background))

    def _checked_background(self, background: Sequence[float]) -> tuple[float, ...]:
        values = np.asarray(background, np.float64)
        legal = values.shape == (self.vocab_size,) and np.all(values >= 0)
        if (
            not legal
            or values[self.mask_id] != 0
            or not math.isclose(values.sum(), 1, rel_tol=1e-4)
        ):
            raise InputError(
                f"background must be {self.vocab_size} probabilities that sum to 1, 0 at the mask"
            )
        return tuple(float(v) for v in values / values.sum())

    # The two functions that define a process.

    def alpha(self, t: ArrayLike) -> jax.Array:
        """Return the signal mass alpha_t, shape of t."""
        raise NotImplementedError(f"{type(self).__name__} must define alpha(t)")

    def beta_pi(self, t: ArrayLike) -> NoiseMass:
        """Return the noise masses beta_t pi_t, each of the shape of t; they sum to 1 - alpha_t."""
        raise NotImplementedError(f"{type(self).__name__} must define beta_pi(t)")

    # What follows from them; families override what has a more accurate closed form.

    @property
    def num_noise_tokens(self) -> int:
        """N, the number of tokens that are not the mask."""
        return self.vocab_size - 1

    @property
    def t_min(self) -> float:
        return self.t_eps

    @property
    def t_max(self) -> float:
        return 1.0 - self.t_eps

    def log_snr(self, t: ArrayLike) -> jax.Array:
        """Return the log-SNR log(alpha_t / (1 - alpha_t)), shape of t, in nats."""
        mass = self.beta_pi(t)
        return jnp.log(self.alpha(t)) - jnp.log(mass.mask + self.num_noise_tokens * mass.uniform)

    def transition(self, t: ArrayLike, s: ArrayLike) -> tuple[jax.Array, NoiseMass]:
        """Return alpha_{t|s} and beta_{t|s} pi_{t|s} of the step from s to the noisier t."""
        alpha_ts = self.alpha(t) / self.alpha(s)
        mass_t, mass_s = self.beta_pi(t), self.beta_pi(s)
        return alpha_ts, NoiseMass(*(b - alpha_ts * a for b, a in zip(mass_t, mass_s, strict=True)))

    def noise_rate(self, t: ArrayLike) -> NoiseMass:
        """Return R_t = (beta_t pi_t)' - (alpha_t'/alpha_t) beta_t pi_t, by jax.jvp."""
        t = as_float(t)
        one = jnp.ones_like(t)
        alpha, d_alpha = jax.jvp(self.alpha, (t,), (one,))
        mass, d_mass = jax.jvp(self.beta_pi, (t,), (one,))
        return NoiseMass(*(d - d_alpha / alpha * m for d, m in zip(d_mass, mass, strict=True)))

    def background_ratio(self, ids: jax.Array) -> jax.Array | float:
        """Return N u(id): the background probability of each token relative to uniform."""
        if self.background is None:
            return 1.0
        ratio = np.asarray(self.background) * self.num_noise_tokens
        return jnp.asarray(ratio)[ids]

    def mass_at(self, mass: NoiseMass, ids: jax.Array) -> jax.Array:
        """Return the entry of a noise mass at each token id; mass entries broadcast against ids."""
        return jnp.where(ids == self.mask_id, mass.mask, mass.uniform * self.background_ratio(ids))

    def noise_probs(self, t: ArrayLike) -> jax.Array:
        """Return beta_t pi_t over the vocabulary, shape t.shape + [vocab_size]."""
        mass = NoiseMass(*(m[..., None] for m in self.beta_pi(as_float(t))))
        ids = jnp.arange(self.vocab_size).reshape((1,) * jnp.ndim(t) + (-1,))
        return self.mass_at(mass, ids)

    def marginal_probs(self, x_hat: jax.Array, t: ArrayLike) -> jax.Array:
        """Return q_t(.|x_hat) = alpha_t x_hat + beta_t pi_t for x_hat [B, ..., V].

        Columns of x_hat beyond the vocabulary (padding of the projection) get no noise.
        """
        t = expand_time(t, x_hat[..., 0])
        noise = self.noise_probs(t)
        extra = x_hat.shape[-1] - self.vocab_size
        noise = jnp.pad(noise, [(0, 0)] * (noise.ndim - 1) + [(0, extra)])
        return self.alpha(t)[..., None] * x_hat + noise

    def sample_t(self, key: jax.Array, batch_size: int, stratified: bool = True) -> jax.Array:
        """Draw times [batch_size] in [t_min, t_max]: one shared offset (stratified) or iid."""
        if stratified:
            offset = jax.random.uniform(key)
            u = (jnp.arange(batch_size) / batch_size + offset) % 1.0
        else:
            u = jax.random.uniform(key, (batch_size,))
        return self.t_min + (self.t_max - self.t_min) * u

    def sample_background(self, key: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Draw token ids of the given shape from the background distribution; never the mask."""
        if self.background is None:
            ids = jax.random.randint(key, shape, 0, self.num_noise_tokens)
            return ids + (ids >= self.mask_id)
        cumulative = np.cumsum(self.background)
        cumulative = jnp.asarray(cumulative / cumulative[-1], jnp.float32)
        u = jax.random.uniform(key, shape)
        return jnp.searchsorted(cumulative, u, side="right").astype(jnp.int32)

    def sample(self, key: jax.Array, x: jax.Array, t: ArrayLike) -> jax.Array:
        """Draw z_t ~ q_t(.|x), ids of the shape of x [B, L]; no vocabulary-sized tensor."""
        t = expand_time(t, x)
        mass = self.beta_pi(t)
        noise_mass = mass.mask + self.num_noise_tokens * mass.uniform
        keep_key, mask_key, token_key = jax.random.split(key, 3)
        keep = jax.random.uniform(keep_key, x.shape) >= noise_mass
        is_mask = jax.random.uniform(mask_key, x.shape) * noise_mass < mass.mask
        noise = jnp.where(is_mask, self.mask_id, self.sample_background(token_key, x.shape))
        return jnp.where(keep, x, noise).astype(x.dtype)

    def prior(self) -> NoiseMass:
        """Return the noise distribution at the noisiest time, where sampling starts."""
        mass = self.beta_pi(as_float(1.0))
        total = mass.mask + self.num_noise_tokens * mass.uniform
        return NoiseMass(mass.mask / total, mass.uniform / total)

    def sample_prior(self, key: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Draw fully noisy token ids, int32 of the given shape."""
        mask_key, token_key = jax.random.split(key)
        is_mask = jax.random.uniform(mask_key, shape) < self.prior().mask
        ids = jnp.where(is_mask, self.mask_id, self.sample_background(token_key, shape))
        return ids.astype(jnp.int32)

    def posterior_probs(
        self, x_hat: jax.Array, z_t: jax.Array, t: ArrayLike, s: ArrayLike
    ) -> jax.Array:
        """Return q(z_s|z_t, x_hat) over the vocabulary, [B, L, V], for s < t (paper, section 4.3).

        Dense: for tests and for filters on the posterior; `steps.ancestral_step` draws from the
        same distribution without this tensor.
        """
        t, s = expand_time(t, z_t), expand_time(s, z_t)
        alpha_ts, mass_ts = self.transition(t, s)
        q_s = self.marginal_probs(x_hat, s)
        q_t = self.marginal_probs(x_hat, t)
        at_z = jnp.take_along_axis(q_t, z_t[..., None], axis=-1)
        is_z = z_t[..., None] == jnp.arange(x_hat.shape[-1]).reshape((1,) * z_t.ndim + (-1,))
        step = alpha_ts[..., None] * is_z + self.mass_at(mass_ts, z_t)[..., None]
        return step * q_s / at_z

    def elbo_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike) -> jax.Array:
        """Return the ELBO weight w_t(z_t, x) = R_t(z_t) / q_t(z_t|x), [B, L] (paper, theorem 2)."""
        t = expand_time(t, x)
        rate = self.mass_at(self.noise_rate(t), z_t)
        prob = self.mass_at(self.beta_pi(t), z_t) + jnp.where(z_t == x, self.alpha(t), 0.0)
        return jnp.where(prob > 0, rate / jnp.where(prob > 0, prob, 1.0), 0.0)

    def dynamic_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike, v1_1: bool) -> jax.Array:
        """Return dynamic training weights, [B, L]: the ELBO weight per unit of log-SNR.

        Families override it with what their papers use. v1_1 (as in the released code) is defined
        only there: else it raises InputError.
        """
        if v1_1:
            raise InputError(
                f"weighting 'dynamic_v1_1' is not defined for {type(self).__name__}: use 'elbo', "
                "'clip' or 'dynamic'"
            )
        t = expand_time(t, x)
        speed = -jax.jvp(self.log_snr, (t,), (jnp.ones_like(t),))[1]
        moves = speed > 0
        return jnp.where(moves, self.elbo_weights(x, z_t, t) / jnp.where(moves, speed, 1.0), 0.0)

    def loss_weights(
        self,
        x: jax.Array,
        z_t: jax.Array,
        t: ArrayLike,
        *,
        weighting: str = "dynamic",
        min_weight: float = 0.0,
        max_weight: float = 2.0,
    ) -> jax.Array:
        """Return the training weights [B, L] of the KL and IS terms (paper, section 4.4).

        'elbo': the ELBO weight; 'clip': the same clipped to [min_weight, max_weight]; 'dynamic':
        the paper's closed-form relative weights, clipped; 'dynamic_v1_1': the released code's
        version of them. Raises InputError for any other weighting.
        """
        if weighting not in WEIGHTINGS:
            raise InputError(
                f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}"
            )
        if weighting == "elbo":
            return self.elbo_weights(x, z_t, t)
        if weighting == "clip":
            weights = self.elbo_weights(x, z_t, t)
        else:
            weights = self.dynamic_weights(x, z_t, t, v1_1=weighting == "dynamic_v1_1")
        return jnp.clip(weights, min_weight, max_weight)


@dataclasses.dataclass(frozen=True)
class HybridProcess(InterpolatingProcess):
    """The paper's mixing schedule: masks, and a share p_uniform of uniform noise at t = 1/2.

    c_t = B (t(1-t))^(gamma/2), B = 2^gamma p_uniform/(1-p_uniform), alpha_t = (1-t)/(1+c_t),
    beta_t pi_t = (t m + c_t u)/(1+c_t) (eqs. 9-11). p_uniform in [0, 1): 0 is mask-only GIDD;
    gamma in (0, 2]: beyond 2 transition rates near t = 1 are negative.
    """

    p_uniform: float
    gamma: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.p_uniform < 1.0:
            raise InputError(f"p_uniform must lie in [0, 1): {self.p_uniform}")
        if not 0.0 < self.gamma <= 2.0:
            raise InputError(f"gamma must lie in (0, 2]: {self.gamma}")

    @property
    def log_b(self) -> float:
        """log B, floored at -20."""
        p = max(self.p_uniform, math.exp(MIN_LOG_UNIFORM))
        return max(self.gamma * math.log(2) + math.log(p) - math.log1p(-p), MIN_LOG_UNIFORM)

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
