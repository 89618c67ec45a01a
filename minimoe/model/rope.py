"""The frequencies of rotary positions: what `transformer` turns by, and what a GGUF file keeps the factors of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minimoe.model.config import MoEConfig


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
