"""Diffusion language models of gidd_jax in PyTorch (copied into exported folders).

    from transformers import AutoModelForMaskedLM, AutoTokenizer
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    print(tokenizer.batch_decode(model.generate(num_steps=64), skip_special_tokens=True))

The network, ancestral sampling and self-correction of "Generalized Interpolating Discrete
Diffusion" (arXiv 2503.04482), needing nothing but torch and transformers. Apache-2.0.
"""

import itertools
import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_gidd import GiddConfig, GiddLlamaConfig

TIME_FEATURES = 256


class NoiseProcess:
    """q_t(z|x) = alpha_t 1[z=x] + mass_t(z): masses of the mask and of each other token."""

    def __init__(self, config):
        section = getattr(config, "process", None)
        if section is None:
            section = {"name": "hybrid", "p_uniform": config.p_uniform, "gamma": 1.0}
            section["t_eps"] = config.t_eps
        self.numbers, self.name = section, section["name"]
        self.vocab_size, self.mask_id = config.noise_vocab_size, config.mask_token_id
        self.t_min, self.t_max = section["t_eps"], 1.0 - section["t_eps"]
        if self.name == "log_snr":
            self.t_min = max(self.t_min, 1 / (1 + math.exp(section["max_log_snr"])))
            self.t_max = min(self.t_max, 1 / (1 + math.exp(section["min_log_snr"])))

    def masses(self, t):
        """Return alpha_t and the noise masses of the mask and of each other token, float64."""
        n, numbers = self.vocab_size - 1, self.numbers
        if self.name == "masked":
            mask = (1 - numbers["eps"]) * t
            return 1 - mask, mask, torch.zeros_like(t)
        if self.name == "log_snr":
            t = t.clamp(self.t_min, self.t_max)
            mixing = numbers["scale"] * (torch.log1p(-t) - torch.log(t)) + numbers["shift"]
            uniform = t * torch.sigmoid(mixing) / n
            return 1 - t, t * torch.sigmoid(-mixing), uniform
        p, gamma = max(numbers["p_uniform"], math.exp(-20.0)), numbers["gamma"]
        log_b = max(gamma * math.log(2) + math.log(p) - math.log1p(-p), -20.0)
        c = torch.exp(log_b + gamma / 2 * (torch.log(t) + torch.log1p(-t)))
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c) / n

    def at(self, mask, uniform, ids):
        """Return the mass of each id."""
        return torch.where(ids == self.mask_id, mask, uniform)

    def time_of(self, share):
        """Return the time at which 1 - alpha is the share, by bisection."""
        low, high = torch.full_like(share, self.t_min), torch.full_like(share, self.t_max)
        for _ in range(40):
            middle = (low + high) / 2
            below = 1 - self.masses(middle)[0] < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def posterior(self, x_hat, z, t, s):
        """Return q(z_s | z_t, x_hat) up to a factor, [B, L, V], for times s < t of one step."""
        alpha_t, mask_t, uniform_t = self.masses(t)
        alpha_s, mask_s, uniform_s = self.masses(s)
        ratio = alpha_t / alpha_s
        mask_ts = (mask_t - ratio * mask_s).clamp(min=0)
        uniform_ts = (uniform_t - ratio * uniform_s).clamp(min=0)
        ids = torch.arange(x_hat.shape[-1], device=z.device)
        marginal = alpha_s * x_hat + self.at(mask_s, uniform_s, ids) * (ids < self.vocab_size)
        jump = self.at(mask_ts, uniform_ts, z)[..., None]
        return marginal * (jump + ratio * (ids == z[..., None]))


class GiddPreTrainedModel(PreTrainedModel):
    """Logits of clean tokens for noisy ones, and the samplers that need nothing else."""

    config_class = GiddConfig
    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"rotary_emb\..*"]

    def forward(self, input_ids, timesteps=None, attention_mask=None, return_dict=True, **unused):
        """Return logits float32 [B, L, V] of noisy input_ids [B, L].

        timesteps [B]: how noisy they are, in (0, 1); None: the share of masks among the tokens.
        attention_mask [B, L]: 0 on padding at the end of rows.
        """
        del unused
        if timesteps is None:
            share = (input_ids == self.config.mask_token_id).double().mean(dim=-1)
            timesteps = NoiseProcess(self.config).time_of(share)
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32, device=input_ids.device)
        timesteps = timesteps.reshape(-1).expand(len(input_ids))
        logits = self.denoise(input_ids, timesteps, attention_mask).float()
        return MaskedLMOutput(logits=logits) if return_dict else (logits,)

    def _x_hat(self, z, t, temperature=1.0):
        logits = self(z, t).logits.double()
        # Predictions are clean tokens; columns beyond them only fill the output layer up.
        logits[..., self.config.mask_token_id] = -torch.inf
        logits[..., self.config.noise_vocab_size :] = -torch.inf
        if temperature == 0:
            return functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return torch.softmax(logits / temperature, dim=-1)

    def _draw(self, weights, generator):
        flat = weights.reshape(-1, weights.shape[-1])
        return torch.multinomial(flat, 1, generator=generator).reshape(weights.shape[:-1])

    @torch.no_grad()
    def generate(
        self,
        input_ids=None,
        *,
        num_steps=128,
        num_samples=1,
        max_length=None,
        temperature=1.0,
        correction_steps=0,  # of self-correction afterwards
        correction_temperature=0.1,
        generator=None,
    ):
        """Return rows of token ids [B, L] by ancestral sampling, given those that begin them.

        input_ids [B, P]: prompts; None: the token that begins a text, num_samples times.
        """
        config, process, device = self.config, NoiseProcess(self.config), self.device
        length = max_length or self.max_length
        if input_ids is None:
            begin = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
            input_ids = torch.full((num_samples, 1), begin, device=device)
        prompt = torch.as_tensor(input_ids, device=device)
        if prompt.shape[1] >= length:
            raise ValueError(f"a prompt of {prompt.shape[1]} tokens leaves no room in {length}")
        shape = len(prompt), length
        given = torch.arange(length, device=device)[None] < prompt.shape[1]
        times = torch.linspace(process.t_max, process.t_min, num_steps + 1, dtype=torch.float64)
        times = times.to(device)
        _, mask, uniform = process.masses(times[:1])
        prior = process.at(mask, uniform, torch.arange(process.vocab_size, device=device))
        z = self._draw(prior.expand(*shape, -1), generator)
        start = functional.pad(prompt, (0, length - prompt.shape[1]))
        z = torch.where(given, start, z)
        for t, s in itertools.pairwise(times):
            # What is given is clean: the network is told the share of noise in the whole row.
            told = process.time_of((1 - process.masses(t)[0]) * (~given).double().mean())
            x_hat = self._x_hat(z, told, temperature)
            drawn = self._draw(process.posterior(x_hat, z, t, s), generator)
            z = torch.where(given, z, drawn)
        drawn = self._draw(self._x_hat(z, process.t_min, temperature), generator)
        z = torch.where((z == config.mask_token_id) & ~given, drawn, z)
        chosen = {"temperature": correction_temperature, "given": given, "generator": generator}
        return self.self_correct(z, correction_steps, **chosen)

    @torch.no_grad()
    def self_correct(
        self, input_ids, num_steps=128, *, t=0.01, temperature=0.1, given=None, generator=None
    ):
        """Return the rows after steps that replace the token of the most probable other proposal.

        The paper's rule (section 5.3); given [B, L]: what must stay.
        """
        z, rows = input_ids.clone(), torch.arange(len(input_ids), device=input_ids.device)
        active = torch.ones_like(rows, dtype=torch.bool)  # a row ends where a step changes nothing
        for _ in range(num_steps):
            x_hat = self._x_hat(z, t, temperature)
            proposal = self._draw(x_hat, generator)
            score = x_hat.gather(-1, proposal[..., None])[..., 0] * (proposal != z)
            if given is not None:
                score = score.masked_fill(given.expand_as(score), 0.0)
            place = score.argmax(dim=-1)
            active &= score[rows, place] > 0
            if not active.any():
                break
            z[rows, place] = torch.where(active, proposal[rows, place], z[rows, place])
        return z


def rotated(x, cos, sin):
    """Turn the halves of heads x [B, L, heads, d] in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rotary_tables(length, frequencies, amplitude=1.0):
    angle = torch.arange(length, device=frequencies.device)[:, None].float() * frequencies
    return tuple(amplitude * table[None, :, None] for table in (angle.cos(), angle.sin()))


def attend(q, k, v, attention_mask):
    """Attention of every token to all but padding; k and v may have fewer heads."""
    groups = q.shape[2] // k.shape[2]
    k, v = (a.repeat_interleave(groups, dim=2) for a in (k, v))
    mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return (
        functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    )


def modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def time_features(t):
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device).float() / half)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def time_perceptron(width):
    return nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))


class ScaleNorm(nn.Module):
    """Layer norm without a bias, in float32."""

    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return functional.layer_norm(x.float(), x.shape[-1:], self.weight.float(), eps=self.eps)


class RootNorm(ScaleNorm):
    """Root-mean-square norm, in float32."""

    def forward(self, x):
        x = x.float()
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class DiTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.norm1, self.norm2 = ScaleNorm(width), ScaleNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        gelu = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(config.timestep_cond_dim, 6 * width)

    def forward(self, x, c, tables, attention_mask):
        parts = self.adaLN_modulation(c).chunk(6, dim=-1)
        dtype = self.attn_qkv.weight.dtype
        qkv = self.attn_qkv(modulated(self.norm1(x), *parts[:2]).to(dtype))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        h = attend(rotated(q, *tables), rotated(k, *tables), v, attention_mask)
        x = x + parts[2][:, None].to(dtype) * self.attn_out(h)
        h = self.mlp(modulated(self.norm2(x), *parts[3:5]).to(dtype))
        return x + parts[5][:, None].to(dtype) * h


class GiddForMaskedLM(GiddPreTrainedModel):
    """The DiT of GIDD."""

    def __init__(self, config):
        super().__init__(config)
        table = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.vocab_embed = nn.ParameterDict({"embedding": table})
        self.sigma_map = nn.ModuleDict({"mlp": time_perceptron(config.timestep_cond_dim)})
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_hidden_layers))
        head = {"norm_final": ScaleNorm(config.hidden_size)}
        head["adaLN_modulation"] = nn.Linear(config.timestep_cond_dim, 2 * config.hidden_size)
        head["linear"] = nn.Linear(config.hidden_size, config.vocab_size)
        self.output_layer = nn.ModuleDict(head)
        self.max_length = config.max_seq_len
        self.post_init()

    def denoise(self, z, t, attention_mask):
        c = functional.silu(self.sigma_map["mlp"](time_features(t)))
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        exponent = torch.arange(0, head_dim, 2, device=z.device).float() / head_dim
        tables = rotary_tables(z.shape[1], 1.0 / 10000.0**exponent)
        x = self.vocab_embed["embedding"][z]
        for block in self.blocks:
            x = block(x, c, tables, attention_mask)
        head = self.output_layer
        h = modulated(head["norm_final"](x), *head["adaLN_modulation"](c).chunk(2, dim=-1))
        return head["linear"](h.to(head["linear"].weight.dtype))


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        is_qwen2 = config.base_model_type == "qwen2"
        bias = is_qwen2 or config.attention_bias
        self.q_proj = nn.Linear(width, heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(heads * dim, width, bias=not is_qwen2 and config.attention_bias)
        self.dim = dim
        self.q_norm = self.k_norm = None
        if config.base_model_type == "qwen3":
            self.q_norm, self.k_norm = RootNorm(dim, eps), RootNorm(dim, eps)

    def forward(self, h, tables, attention_mask):
        maps = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (each(h).unflatten(-1, (-1, self.dim)) for each in maps)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(h.dtype), self.k_norm(k).to(h.dtype)
        return self.o_proj(attend(rotated(q, *tables), rotated(k, *tables), v, attention_mask))


class LlamaPerceptron(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, h):
        return self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, eps, cond_dim = config.hidden_size, config.rms_norm_eps, config.timestep_cond_dim
        self.input_layernorm = RootNorm(width, eps)
        self.post_attention_layernorm = RootNorm(width, eps)
        self.self_attn, self.mlp = LlamaAttention(config), LlamaPerceptron(config)
        self.modulation = nn.Linear(cond_dim, 6 * width) if cond_dim else None

    def forward(self, x, c, tables, attention_mask):
        dtype = self.mlp.up_proj.weight.dtype
        parts = [torch.zeros(1, 1, device=x.device)] * 6
        if self.modulation is not None:
            parts = self.modulation(c).chunk(6, dim=-1)
        h = modulated(self.input_layernorm(x), *parts[:2]).to(dtype)
        x = x + ((1 + parts[2][:, None]) * self.self_attn(h, tables, attention_mask)).to(dtype)
        h = modulated(self.post_attention_layernorm(x), *parts[3:5]).to(dtype)
        return x + ((1 + parts[5][:, None]) * self.mlp(h)).to(dtype)


class LlamaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, cond_dim = config.hidden_size, config.timestep_cond_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RootNorm(width, config.rms_norm_eps)
        self.time_embed = time_perceptron(cond_dim) if cond_dim else None
        self.modulation = nn.Linear(cond_dim, 2 * width) if cond_dim else None


class GiddLlamaForMaskedLM(GiddPreTrainedModel):
    """A denoiser made of a Llama, Qwen2 or Qwen3: every token sees all others."""

    config_class = GiddLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head = None if config.tie_word_embeddings else head
        self.max_length = config.max_position_embeddings
        self.post_init()

    def denoise(self, z, t, attention_mask):
        model, (frequencies, amplitude) = self.model, self.config.rope_frequencies()
        frequencies = torch.tensor(frequencies, device=z.device)
        tables = rotary_tables(z.shape[1], frequencies, amplitude)
        c = (
            None
            if model.time_embed is None
            else functional.silu(model.time_embed(time_features(t)))
        )
        x = model.embed_tokens(z)
        for block in model.layers:
            x = block(x, c, tables, attention_mask)
        h = model.norm(x)
        if c is not None:
            h = modulated(h, *model.modulation(c).chunk(2, dim=-1))
        if self.config.shift:  # the state at a token predicts the next one
            h = torch.cat([h[:, :1], h[:, :-1]], dim=1)
        weight = (model.embed_tokens if self.lm_head is None else self.lm_head).weight
        return functional.linear(h.to(weight.dtype), weight)
