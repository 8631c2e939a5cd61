"""What every interpolating process has: q_t(z|x) = alpha_t 1[z=x] + (beta_t pi_t)(z).

The base of the processes in `process.py`: noising, marginals, transitions, posteriors and ELBO
weights, all from `alpha(t)` and `beta_pi(t)`. Notation and equations as there.
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

WEIGHTINGS = ("elbo", "clip", "dynamic", "dynamic_v1_1", "dynamic_unbiased")


class NoiseMass(NamedTuple):
    """Noise mass beta_t pi_t: of the mask, and of each other token (their mean)."""

    mask: jax.Array
    uniform: jax.Array


class NoiseDraws(NamedTuple):
    """What noise is made of, each shaped as the ids: two uniforms in [0, 1), and token ids.

    keep: the token stays where it is not below the noise mass; kind: the share of the noise mass
    below which it is the mask; ids: what stands there otherwise.
    """

    keep: jax.Array
    kind: jax.Array
    ids: jax.Array


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

    def settled(self) -> "InterpolatingProcess":
        """Return the process with no traced number in it: of the same tokens and background."""
        return self

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

    def noise_draws(self, key: jax.Array, shape: Sequence[int]) -> NoiseDraws:
        """Draw what noise on token ids of the given shape is made of, at whatever times."""
        keep_key, kind_key, token_key = jax.random.split(key, 3)
        keep, kind = (jax.random.uniform(k, shape) for k in (keep_key, kind_key))
        return NoiseDraws(keep, kind, self.sample_background(token_key, shape))

    def sample(self, key: jax.Array, x: jax.Array, t: ArrayLike) -> jax.Array:
        """Draw z_t ~ q_t(.|x), ids of the shape of x [B, L]; no vocabulary-sized tensor."""
        return self.corrupt(x, t, self.noise_draws(key, x.shape))

    def corrupt(self, x: jax.Array, t: ArrayLike, draws: NoiseDraws) -> jax.Array:
        """Return x [B, L] with noise at times t, made of the given draws."""
        t = expand_time(t, x)
        mass = self.beta_pi(t)
        noise_mass = mass.mask + self.num_noise_tokens * mass.uniform
        noise = jnp.where(draws.kind * noise_mass < mass.mask, self.mask_id, draws.ids)
        return jnp.where(draws.keep >= noise_mass, x, noise).astype(x.dtype)

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

    def unbiased_weights(self, x: jax.Array, z_t: jax.Array, t: ArrayLike) -> jax.Array:
        """Return dynamic weights that leave the minimiser of the loss where the bound's is.

        Only families whose dynamic weights do not have them: else it raises InputError.
        """
        del x, z_t, t
        raise InputError(
            f"weighting 'dynamic_unbiased' is of the hybrid family: that of {type(self).__name__}, "
            "'dynamic', is without bias"
        )

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
        version of them; 'dynamic_unbiased': see `InterpolatingProcess.unbiased_weights`. Raises
        InputError for any other weighting.
        """
        if weighting not in WEIGHTINGS:
            raise InputError(
                f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}"
            )
        if weighting == "elbo":
            return self.elbo_weights(x, z_t, t)
        if weighting == "clip":
            weights = self.elbo_weights(x, z_t, t)
        elif weighting == "dynamic_unbiased":
            weights = self.unbiased_weights(x, z_t, t)
        else:
            weights = self.dynamic_weights(x, z_t, t, v1_1=weighting == "dynamic_v1_1")
        return jnp.clip(weights, min_weight, max_weight)
