"""Causal grouped-query attention with rotary positions.

Shapes: B batch, S sequence, P positions before these, that a cache holds, H hidden size, D head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.model.config import MoEConfig
from minimoe.model.layers import Linear, RMSNorm

KeysValues = tuple[Tensor, Tensor]  # of one layer, [B, kv heads, P + S, D] each


def rope_frequencies(config: MoEConfig, device: torch.device | None = None) -> Tensor:
    """Angle per position of each pair of a head's dimensions, [D / 2] float32 (Su et al. 2021, arXiv 2104.09864).

    `rope_scaling` stretches them: "linear" divides all by `factor` (Chen et al. 2023, arXiv 2306.15595); "llama3", of
    Llama 3.1, only those whose wavelength is long against the original context, with a ramp between.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float()
    frequencies = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [B, heads, S, D] by the angles of each position.

    `cos` and `sin` are [S, D/2], or [B, 1, S, D/2] where the rows of a batch have positions of their own.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def visible_keys(new: int, past: int, real: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may look at: [S, P + S], or [B, 1, S, P + S] with padding; None: a causal mask will do.

    Args:
        new: S, the queries, which come last.
        past: P.
        real: [B, P + S] bool, False for padding, which nobody looks at, except padding at itself: a softmax over no
            keys at all would be NaN.
    """
    if real is None and (past == 0 or new == 1):
        return None
    causal = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)
    if real is None:
        return causal
    own = torch.ones_like(causal).triu(past) & causal
    return (causal & real[:, None, None, :]) | own


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
