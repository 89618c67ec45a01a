"""The small parts that everything else is made of: linear maps, the norm, the dense MLP, the first weights.

Shapes: H hidden size, I width of the MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear that is filled by `initialise` alone, so that building a model leaves torch's global RNG as it is."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its memory to `initialise`, for the same reason."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 at least (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
def initialise(module: nn.Module, std: float, seed: int) -> None:
    """Fill `module`: matrices from N(0, std^2), biases, sinks and buffers with 0, norms and scales with 1.

    The numbers are drawn on the CPU, so that they are the same on every device. What lies on the meta device has no
    memory to fill and is left alone.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if name.endswith(("bias", "sinks")):
            parameter.zero_()
        elif parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * std)
        else:
            parameter.fill_(1.0)
    for buffer in module.buffers():
        buffer.zero_()


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it was in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def is_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `x`. The meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def has_values(x: Tensor) -> bool:
    """Whether the numbers in `x` can be looked at.

    They cannot on the meta device, nor while torch.compile or torch.export trace the model: a check of values would
    end the graph there. So such checks are left out then, and made everywhere else.
    """
    return not (x.is_meta or torch.compiler.is_compiling())
