"""Causal attention with rotary positions: grouped-query, or multi-head latent; which keys a query sees.

Shapes: B batch, S sequence, P positions before these, that a cache holds, H hidden size, D head size, R the dimensions
of a head that positions turn, usually D.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.model.config import MoEConfig
from minimoe.model.layers import Linear, RMSNorm

# Of one layer: keys and values, [B, kv heads, P + S, D] each; or the latents [B, 1, P + S, kv_lora_rank] and the rotary
# keys [B, 1, P + S, R] that all heads share.
KeysValues = tuple[Tensor, Tensor]
LATENT_EPS = 1e-6  # of the norms within latent attention, whatever rms_norm_eps is


def rope_frequencies(config: MoEConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of a head's dimensions, [R / 2] float32 (Su et al. 2021, arXiv 2104.09864).

    `rope_scaling` stretches them: "linear" divides all by `factor` (Chen et al. 2023, arXiv 2306.15595); "llama3", of
    Llama 3.1, only those whose wavelength is long against the original context, with a ramp between; "yarn" likewise,
    with another ramp (Peng et al. 2023, arXiv 2309.00071, section 3.2).
    """
    pairs = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device=device).float()
    frequencies = 1.0 / config.rope_theta ** (pairs / config.rotary_dim)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        low, high = (_pair_that_turns(scaling[name], config) for name in ("beta_fast", "beta_slow"))
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.rotary_dim - 1)
        stretch = ((pairs / 2 - low) / (high - low or 0.001)).clamp(0, 1)
        return (1 - stretch) * frequencies + stretch * frequencies / scaling["factor"]
    return frequencies


def _pair_that_turns(times: float, config: MoEConfig) -> float:
    """The number of the pair that turns so often within the original context, as a fraction."""
    length = config.rope_scaling["original_max_position_embeddings"]
    return config.rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def _yarn_scale(scaling: Mapping[str, Any], mscale: float = 1.0) -> float:
    return 1 + 0.1 * mscale * math.log(scaling["factor"]) if scaling["factor"] > 1 else 1.0


def rotary_angles(config: MoEConfig, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles at positions [S] or [B, S], for `rotate`: [S, R / 2], or [B, 1, S, R / 2] each.

    Both are multiplied by what YaRN sharpens attention with, in queries and keys (section 3.4 of that paper); DeepSeek
    gives it as the quotient of two such factors. In the dtype and on the device of `like`.
    """
    angles = positions[..., None].float() * rope_frequencies(config, like.device)
    angles = angles if positions.dim() == 1 else angles[:, None]
    scaling, sharper = config.rope_scaling or {}, 1.0
    if scaling.get("rope_type") == "yarn":
        sharper = scaling.get("attention_factor") or _yarn_scale(scaling)
        if "attention_factor" not in scaling and {"mscale", "mscale_all_dim"} <= scaling.keys():
            sharper = _yarn_scale(scaling, scaling["mscale"]) / _yarn_scale(scaling, scaling["mscale_all_dim"])
    return (sharper * angles.cos()).to(like.dtype), (sharper * angles.sin()).to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2) of x [B, heads, S, D] by the angles of each position; what is after R stays.

    `cos` and `sin` are [S, R/2], or [B, 1, S, R/2] where the rows of a batch have positions of their own.
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def visible_keys(
    new: int, past: int, real: Tensor | None, device: torch.device, window: int | None = None
) -> Tensor | None:
    """Which keys each query may look at: [S, P + S], or [B, 1, S, P + S] with padding; None: a causal mask will do.

    Args:
        new: S, the queries, which come last.
        past: P.
        real: [B, P + S] bool, False for padding, which nobody looks at, except padding at itself: a softmax over no
            keys at all would be NaN.
        window: how many keys a query sees, the last of which is its own (Mistral: Jiang et al. 2023, arXiv 2310.06825,
            section 2); None: all up to its own.
    """
    if window is not None and window >= past + new:
        window = None
    if real is None and window is None and (past == 0 or new == 1):
        return None
    causal = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)
    own = causal.triu(past)
    if window is not None:
        causal = causal.triu(past - window + 1)
    if real is None:
        return causal
    return (causal & real[:, None, None, :]) | own


def attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor | None) -> Tensor:
    """Attention in whose softmax each head has one more logit, a sink, that has no value to give.

    So a head can attend to nothing (gpt-oss: OpenAI 2025, arXiv 2508.10925, section 2).

    Args:
        q: [B, heads, S, D]; k and v: [B, kv heads, P + S, D].
        sinks: [heads].
        visible: as of `visible_keys`.
    """
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if visible is None:
        visible = torch.ones_like(logits[0, 0], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    logits = logits.masked_fill(~visible, -torch.inf)
    sink = sinks[:, None, None].expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1] @ v


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, query, bias=config.attention_bias)
        self.k_proj = Linear(hidden, key, bias=config.attention_bias)
        self.v_proj = Linear(hidden, key, bias=config.attention_bias)
        self.o_proj = Linear(query, hidden, bias=config.attention_output_bias)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None
        self.qk_norm, self.clip_qkv = config.qk_norm, config.clip_qkv
        if config.qk_norm:
            whole = config.qk_norm == "full"
            self.q_norm = RMSNorm(query if whole else config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(key if whole else config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Map [B, S, H] to [B, S, H]; also return the keys and values of all positions so far.

        Args:
            cos, sin: of the angles of each position, as `rotate` takes them.
            visible: what `visible_keys` returned; None: each query sees all keys up to its own.
            past: keys and values of the positions before these.
        """
        q, k, v = self._project(x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if self.sinks is not None:
            mixed = attend_with_sinks(q, k, v, self.sinks, visible)
        else:
            causal = visible is None and past is None
            grouped = q.shape[1] != k.shape[1]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as [B, heads, S, D]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (tensor.clamp(-self.clip_qkv, self.clip_qkv) for tensor in (q, k, v))
        q, k, v = (tensor.view(*x.shape[:2], -1, self.head_dim) for tensor in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2: arXiv 2405.04434, section 2.1).

    A position is kept as one latent, of which every head has keys and values of its own, and one rotary key for all
    heads. Neither keys nor values are computed: the maps that give them go into the query and into the output instead
    (the end of section 2.1.2), so that every head attends to the cached latents themselves.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        hidden, self.heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.own, self.turned = config.qk_nope_head_dim, config.qk_rope_head_dim  # of D: without and with position
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        query, self.rank, self.interleave = self.heads * config.head_dim, config.q_lora_rank, config.rope_interleave
        if self.rank is None:
            self.q_proj = Linear(hidden, query, bias=False)
        else:
            self.q_a_proj = Linear(hidden, self.rank, bias=bias)
            self.q_a_layernorm = RMSNorm(self.rank, LATENT_EPS)
            self.q_b_proj = Linear(self.rank, query, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent + self.turned, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.own + self.value), bias=False)
        self.o_proj = Linear(self.heads * self.value, hidden, bias=config.attention_output_bias)
        self.scale = config.head_dim**-0.5
        if (mscale := (config.rope_scaling or {}).get("mscale_all_dim")) is not None:  # DeepSeek's share in YaRN
            self.scale *= _yarn_scale(config.rope_scaling, mscale) ** 2

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None = None, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Map [B, S, H] to [B, S, H]; also return the latents and rotary keys of all positions so far.

        The arguments are those of `Attention.forward`.
        """
        q = self.q_proj(x) if self.rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        own, turned = q.unflatten(-1, (self.heads, -1)).transpose(1, 2).split([self.own, self.turned], dim=-1)
        latent, key = self.kv_a_proj_with_mqa(x)[:, None].split([self.latent, self.turned], dim=-1)  # [B, 1, S, ...]
        latent, key = self.kv_a_layernorm(latent), self._turn(key, cos, sin)
        if past is not None:
            latent, key = torch.cat([past[0], latent], dim=2), torch.cat([past[1], key], dim=2)
        maps = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        to_keys, to_values = maps.split([self.own, self.value], dim=1)  # [heads, ..., kv_lora_rank]
        q = torch.cat([own @ to_keys, self._turn(turned, cos, sin)], dim=-1)  # [B, heads, S, kv_lora_rank + R]
        keys, causal = torch.cat([latent, key], dim=-1), visible is None and past is None
        options = {"attn_mask": visible, "is_causal": causal, "scale": self.scale, "enable_gqa": True}
        mixed = F.scaled_dot_product_attention(q, keys, latent, **options) @ to_values.mT  # [B, heads, S, v_head_dim]
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (latent, key)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate`, after neighbours were moved half a head apart."""
        return rotate(x.unflatten(-1, (-1, 2)).mT.flatten(-2) if self.interleave else x, cos, sin)
