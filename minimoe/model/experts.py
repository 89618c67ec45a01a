"""Running experts whose weights lie in three fused tensors: several ways, one result.

Shapes: T tokens, H hidden size, I expert width, E experts, K experts per token, N = T * K routed tokens.

Every implementation is a function

    (hidden_states [T, H], indices [T, K], weights [T, K], gate [E, I, H], up [E, I, H], down [E, H, I]) -> [T, H]

and computes, for every token, the sum over its K slots of weight * down(silu(gate(x)) * up(x)). A slot whose index
is E is empty and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_experts(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """The reference: for each expert, find its tokens, run them, add the weighted result."""
    output = torch.zeros_like(hidden_states)
    for expert in range(len(gate)):
        token, slot = torch.where(indices == expert)
        x = hidden_states[token]
        y = F.linear(F.silu(F.linear(x, gate[expert])) * F.linear(x, up[expert]), down[expert])
        output = output.index_add(0, token, y * weights[token, slot, None])
    return output


def sorted_experts(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """The fast path on a CPU: sort the routed tokens by expert, give each expert one contiguous piece.

    Three choices make it fast, and equal from run to run: a stable sort; `index_select`, whose backward adds in a
    fixed order where that of `x[i]` does not; and `unbind`, since indexing `gate[e]` in a loop would build
    a full-size zero gradient for every expert.
    """
    slots, token, counts = _sort_by_expert(indices, len(gate))
    pieces = hidden_states.index_select(0, token).split(counts)
    outputs = [
        F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)
        for x, w_gate, w_up, w_down in zip(pieces, gate.unbind(), up.unbind(), down.unbind(), strict=True)
    ]
    return _combine(torch.cat(outputs), slots, token, weights, hidden_states)


def grouped_experts(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """As `sorted_experts`, with three grouped matrix products in place of a loop; what transformers does by default.

    `F.grouped_mm` accepts neither float64 nor rows that are not a multiple of 16 bytes long.
    """
    slots, token, counts = _sort_by_expert(indices, len(gate))
    x = hidden_states.index_select(0, token)
    ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    inner = F.silu(F.grouped_mm(x, gate.mT, offs=ends)) * F.grouped_mm(x, up.mT, offs=ends)
    return _combine(F.grouped_mm(inner, down.mT, offs=ends), slots, token, weights, hidden_states)


def add_shared_expert(routed: Tensor, shared: Tensor, gate_logits: Tensor | None = None) -> Tensor:
    """Add the output of the expert that every token meets to that of the routed ones.

    As it is in DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066, section 3.2) and Pangu Pro MoE (arXiv 2505.21411);
    scaled by a gate of its own, sigmoid(x w), in Qwen2-MoE.

    Args:
        routed: [T, H].
        shared: [T, H].
        gate_logits: [T, 1], or None for no gate.
    """
    return routed + (shared if gate_logits is None else gate_logits.sigmoid() * shared)


def _sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """The filled slots ordered by expert, the token of each, and how many each expert has."""
    slots = indices.flatten()
    counts = torch.bincount(slots, minlength=num_experts + 1)[:num_experts].tolist()
    slots = slots.argsort(stable=True)[: sum(counts)]  # empty slots have index E and sort last
    return slots, slots // indices.shape[1], counts


def _combine(outputs: Tensor, slots: Tensor, token: Tensor, weights: Tensor, hidden_states: Tensor) -> Tensor:
    weighted = outputs * weights.flatten().index_select(0, slots)[:, None]
    return torch.zeros_like(hidden_states).index_add(0, token, weighted)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "eager": eager_experts,
    "sorted": sorted_experts,
    "grouped": grouped_experts,
}
