"""Models as the text that a page carries: weights in 16 or 8 bits, deflated, in the 85 letters of base64.b85encode.

pages/live/weights.js reads it, and says how the bytes lie.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
from torch import Tensor

from minimoe.model import MoEForCausalLM


def pack(model: MoEForCausalLM, *, bits: int = 16) -> dict[str, Any]:
    """The settings of `model`, its tensors as [name, shape, bits], and their weights as a text.

    bits: 16 or 8, of matrices; routers and norms always have 16.
    """
    listed, halves, integers = [], [], []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding in every model that a page carries
            continue
        is_small = tensor.dim() == 1 or name.endswith("mlp.gate.weight")
        listed.append([name, list(tensor.shape), 16 if is_small else bits])
        if listed[-1][2] == 16:
            halves.append(tensor.half().numpy().ravel())
        else:
            rows, scales = quantise(tensor)
            halves.append(scales.ravel())
            integers.append(rows.ravel())
    planes = np.concatenate(halves).astype(">f2").view(np.uint8).reshape(-1, 2).T  # high bytes deflate well
    data = planes.tobytes() + b"".join(rows.tobytes() for rows in integers)
    deflated = zlib.compress(data, 9)
    padded = deflated + bytes(-len(deflated) % 4)  # to whole groups of five letters
    weights = {"size": len(deflated), "weights": base64.b85encode(padded).decode()}
    return {"config": _settings(model), "tensors": listed, **weights}


def quantise(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows of integers from -127 to 127, int8, and the number each row is to be multiplied by, float16."""
    rows = tensor.float().numpy()
    scales = (np.abs(rows).max(-1, keepdims=True) / 127).astype(np.float16)
    safe = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(rows / safe).clip(-127, 127).astype(np.int8), scales


def pack_tokenizer(tokenizer_json: str) -> dict[str, Any]:
    """The tokens by id, and the merges in order."""
    model = json.loads(tokenizer_json)["model"]
    return {"tokens": sorted(model["vocab"], key=model["vocab"].get), "merges": model["merges"]}


def _settings(model: MoEForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "headSize": config.head_dim,
        "experts": config.num_experts,
        "k": config.num_experts_per_tok,
        "eps": config.rms_norm_eps,
        "theta": config.rope_theta,
        "context": config.max_position_embeddings,
    }
