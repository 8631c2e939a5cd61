"""A plain PyTorch twin of GIDD: what the formulas of the paper cost when written down as they are.

The comparator of the benchmarks, and nothing else: every distribution over the vocabulary is a
dense tensor [B, L, V], as in the original implementation, and runs eagerly or under torch.compile.
Formulas of "Generalized Interpolating Discrete Diffusion" (arXiv 2503.04482), section 4; symbols
as in gidd_jax.process. The only module that imports torch.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

TIME_FEATURES = 256
ROTARY_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """The hybrid process: masks and a share p_uniform of uniform noise; times are [B]."""

    vocab_size: int
    mask_id: int
    p_uniform: float
    gamma: float = 1.0

    @property
    def log_b(self) -> float:
        p = self.p_uniform
        return self.gamma * math.log(2) + math.log(p) - math.log1p(-p)

    def uniform_odds(self, t: Tensor) -> Tensor:
        return math.exp(self.log_b) * (t * (1 - t)) ** (0.5 * self.gamma)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + self.uniform_odds(t))

    def noise(self, t: Tensor) -> Tensor:
        """beta_t pi_t as a row over the vocabulary, [B, V]."""
        c = self.uniform_odds(t)[:, None]
        is_mask = F.one_hot(torch.tensor(self.mask_id, device=t.device), self.vocab_size).to(t)
        uniform = (1 - is_mask) / (self.vocab_size - 1)
        return (t[:, None] * is_mask[None] + c * uniform[None]) / (1 + c)

    def marginal(self, clean: Tensor, t: Tensor) -> Tensor:
        """q_t(.|clean) for distributions over clean tokens [B, L, V]."""
        return self.alpha(t)[:, None, None] * clean + self.noise(t)[:, None, :]

    def sample(self, x: Tensor, t: Tensor) -> Tensor:
        """Draw z_t ~ q_t(.|x), [B, L]."""
        return draw(self.marginal(F.one_hot(x, self.vocab_size).to(t.dtype), t))

    def posterior(self, x_hat: Tensor, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """q(z_s | z_t, x_hat) by Bayes' rule, [B, L, V]."""
        alpha_ts = self.alpha(t) / self.alpha(s)
        noise_ts = self.noise(t) - alpha_ts[:, None] * self.noise(s)
        is_z = F.one_hot(z_t, self.vocab_size).to(x_hat.dtype)
        step = alpha_ts[:, None, None] * is_z + noise_ts.gather(1, z_t)[..., None]
        joint = step * self.marginal(x_hat, s)
        return joint / self.marginal(x_hat, t).gather(2, z_t[..., None])

    def elbo_weights(self, x: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """w_t(z_t, x), [B, L]."""
        t = t[:, None]
        c = self.uniform_odds(t)
        rate = c + 0.5 * self.gamma * (1 - 2 * t) / t * c  # c + (1 - t) c'
        on_x = rate / (self.vocab_size - 1) / ((1 - t) * (1 - t + c / (self.vocab_size - 1)))
        on_other, on_mask = rate / ((1 - t) * c), 1 / (t * (1 - t))
        return torch.where(z_t == x, on_x, torch.where(z_t == self.mask_id, on_mask, on_other))

    def dynamic_weights(self, x: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """2 on masks, 1 on other tokens, (B/N) e^(-gamma log_snr / 2) where z_t = x; at most 2."""
        alpha = self.alpha(t)[:, None]
        log_noise = torch.log1p(-alpha) - torch.log(alpha)
        on_x = torch.exp(self.log_b + 0.5 * self.gamma * log_noise) / (self.vocab_size - 1)
        two, one = torch.full_like(on_x, 2.0), torch.ones_like(on_x)
        weights = torch.where(z_t == x, on_x, torch.where(z_t == self.mask_id, two, one))
        return weights.clamp(0.0, 2.0)


def draw(probs: Tensor) -> Tensor:
    """Draw one index per distribution, by the Gumbel trick in the form of exponential clocks."""
    clocks = -torch.log(torch.rand_like(probs).clamp_min(1e-30))
    return (probs / clocks.clamp_min(1e-30)).argmax(-1)


def predicted(process: Hybrid, logits: Tensor) -> Tensor:
    """x_hat: the softmax without the mask, float32 [B, L, V] (float64 stays)."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    ids = torch.arange(process.vocab_size, device=logits.device)
    return torch.softmax(logits.masked_fill(ids == process.mask_id, -math.inf), -1)


def divergences(
    process: Hybrid, logits: Tensor, x: Tensor, z_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(q_t(.|x) || q_t(.|x_hat)) and D_IS(q_t(z_t|x) || q_t(z_t|x_hat)), each [B, L].

    Both marginals as log-probabilities, with a floor: tokens without noise mass have none.
    """
    x_hat = predicted(process, logits)
    q = process.marginal(F.one_hot(x, process.vocab_size).to(x_hat.dtype), t)
    log_q = q.clamp_min(1e-30).log()
    log_q_hat = process.marginal(x_hat, t).clamp_min(1e-30).log()
    kl = F.kl_div(log_q_hat, log_q, reduction="none", log_target=True).sum(-1)
    log_ratio = (log_q.gather(2, z_t[..., None]) - log_q_hat.gather(2, z_t[..., None]))[..., 0]
    return kl, log_ratio.exp() - log_ratio - 1


def mean_loss(process: Hybrid, logits: Tensor, x: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """The training loss: mean over positions of the dynamic weight times KL + IS."""
    kl, is_div = divergences(process, logits, x, z_t, t)
    return (process.dynamic_weights(x, z_t, t) * (kl + is_div)).mean()


def projected_loss(
    process: Hybrid, h: Tensor, kernel: Tensor, bias: Tensor, x: Tensor, z_t: Tensor, t: Tensor
) -> Tensor:
    """`mean_loss` of the output projection of h [B, L, D]; kernel [D, V], bias [V]."""
    return mean_loss(process, h @ kernel + bias, x, z_t, t)


def ancestral_step(process: Hybrid, logits: Tensor, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Draw z_s from the dense posterior, [B, L]."""
    return draw(process.posterior(predicted(process, logits), z_t, t, s))


class Norm(nn.Module):
    """Layer normalisation in float32, with a scale and without bias."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the halves of each head, x [B, H, L, head_dim]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Block(nn.Module):
    """Transformer block with adaptive layer norms."""

    def __init__(self, width: int, num_heads: int, cond_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.modulation = nn.Linear(cond_dim, 6 * width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        dtype = self.qkv.weight.dtype if not torch.is_autocast_enabled() else None
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self._attend(h.to(dtype or h.dtype), cos, sin)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))

    def _attend(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = h.shape
        qkv = self.qkv(h).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin), qkv[2]
        h = F.scaled_dot_product_attention(q, k, v)
        return self.attn_out(h.transpose(1, 2).reshape(batch, length, width))


class DiT(nn.Module):
    """Denoiser: z_t [B, L], t [B] -> logits [B, L, V]; parameters float32."""

    def __init__(
        self, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, cond_dim: int
    ):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.vocab_embed = nn.Embedding(vocab_size, hidden_size)
        self.time_in = nn.Linear(TIME_FEATURES, cond_dim)
        self.time_out = nn.Linear(cond_dim, cond_dim)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, cond_dim) for _ in range(num_layers)
        )
        self.final_norm = Norm(hidden_size)
        self.final_modulation = nn.Linear(cond_dim, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, vocab_size)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angle = t[:, None] * torch.exp(-math.log(10000.0) * steps)[None]
        c = F.silu(self.time_in(torch.cat([angle.cos(), angle.sin()], -1)))
        c = F.silu(self.time_out(c))
        exponent = torch.arange(0, self.head_dim, 2, device=t.device) / self.head_dim
        position = torch.arange(z_t.shape[1], device=t.device, dtype=torch.float32)
        angle = position[:, None] * (ROTARY_BASE**-exponent)[None]
        cos, sin = angle.cos(), angle.sin()
        x = self.vocab_embed(z_t)
        for block in self.blocks:
            x = block(x, c, cos, sin)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, -1)
        return self.output(self.final_norm(x) * (1 + scale) + shift)


def load_parameters(model: DiT, params: Mapping[str, Any]) -> None:
    """Copy the parameters of gidd_jax.models.dit.DiT, nested numpy arrays, into the twin."""
    state: dict[str, np.ndarray] = {
        "vocab_embed.weight": params["vocab_embed"]["embedding"],
        "final_norm.scale": params["final_norm"]["scale"],
    }

    def linear(name: str, layer: Mapping[str, np.ndarray], inputs: int = 1) -> None:
        rows = math.prod(layer["kernel"].shape[:inputs])
        state[f"{name}.weight"] = layer["kernel"].reshape(rows, -1).T
        if "bias" in layer:
            state[f"{name}.bias"] = layer["bias"].reshape(-1)

    linear("time_in", params["time_embed"]["input"])
    linear("time_out", params["time_embed"]["output"])
    linear("final_modulation", params["final_modulation"])
    linear("output", params["output"])
    for i in range(len(model.blocks)):
        block = {
            name: {key: value[i] for key, value in layer.items()}
            for name, layer in params["blocks"].items()
        }
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.scale"] = block[name]["scale"]
        for name in ("modulation", "qkv", "mlp_in", "mlp_out"):
            linear(f"blocks.{i}.{name}", block[name])
        linear(f"blocks.{i}.attn_out", block["attn_out"], inputs=2)
    model.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in state.items()})


class TrainingStep:
    """One update on a batch: t, noise, loss, gradients, clipping, AdamW; returns the loss."""

    def __init__(self, process: Hybrid, model: DiT, compiled: bool, dtype: torch.dtype):
        self.process, self.model, self.dtype = process, model, dtype
        self.optimizer = torch.optim.AdamW(
            model.parameters(), 5e-4, (0.9, 0.99), eps=1e-9, weight_decay=0.02
        )
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, x: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(z_t, t)
        return mean_loss(self.process, logits, x, z_t, t)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            batch = x.shape[0]
            offset = torch.rand((), device=x.device)
            u = (torch.arange(batch, device=x.device) / batch + offset) % 1.0
            t = 1e-4 + (1 - 2e-4) * u
            z_t = self.process.sample(x, t)
        loss = self.loss(x, z_t, t)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Sampler:
    """Ancestral sampling with the dense posterior: a loop on the host over network calls."""

    def __init__(self, process: Hybrid, model: DiT, compiled: bool, dtype: torch.dtype):
        self.process, self.model, self.dtype = process, model, dtype
        self.step = torch.compile(self._step) if compiled else self._step

    def _logits(self, z_t: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(z_t.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(z_t, t)

    def _step(self, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return ancestral_step(self.process, self._logits(z_t, t), z_t, t, s)

    @torch.no_grad()
    def __call__(self, batch: int, length: int, num_steps: int, device: str) -> Tensor:
        times = torch.linspace(1 - 1e-4, 1e-4, num_steps + 1, device=device)
        z = torch.full((batch, length), self.process.mask_id, device=device)
        for t, s in itertools.pairwise(times):
            z = self.step(z, t.expand(batch), s.expand(batch))
        return z

    @torch.no_grad()
    def correct(
        self, z: Tensor, num_steps: int, temperature: float, time: float, patience: int
    ) -> Tensor:
        """Self-correction of samples [N, L], one at a time, one token a step (section 5.3)."""
        return torch.cat(
            [self._correct_one(row[None], num_steps, temperature, time, patience) for row in z]
        )

    def _correct_one(
        self, z: Tensor, num_steps: int, temperature: float, time: float, patience: int
    ) -> Tensor:
        t = torch.full((1,), time, device=z.device)
        best, stalled = -1.0, 0
        for _ in range(num_steps):
            logits = self._logits(z, t).float()
            logits[..., self.process.mask_id] = -math.inf
            probs = torch.softmax(logits / temperature, -1)
            proposal = draw(probs)
            score = probs.gather(2, proposal[..., None])[..., 0] * (proposal != z)
            position = score.argmax(-1)
            changed = z.scatter(1, position[:, None], proposal.gather(1, position[:, None]))
            accuracy = (logits.argmax(-1) == changed).float().mean().item()
            if torch.equal(changed, z):
                break
            stalled = 0 if accuracy > best else stalled + 1
            if stalled > patience:
                break
            best, z = max(best, accuracy), changed
        return z
