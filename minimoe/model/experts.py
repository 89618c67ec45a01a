"""Running experts whose weights lie in three fused tensors: several ways, one result.

Shapes: T tokens, H hidden size, I expert width, E experts, K experts per token, N = T * K routed tokens.

Every implementation is a function

    (hidden_states [T, H], indices [T, K], weights [T, K], gate [E, I, H], up [E, I, H], down [E, H, I]) -> [T, H]

and computes, for every token, the sum over its K slots of weight * down(act(gate(x), up(x))). A slot whose index is E
is empty and costs nothing. `act` is `swiglu` if it is not given. After the three matrices, `experts`, there may be the
biases of gate and up, [E, I], and of down, [E, H].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from minimoe.model.layers import is_autocast

FEW_SLOTS = 1024  # N up to which grouped_mm is faster on a CPU than a loop; without gradients, four times as many
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that F.grouped_mm multiplies
Activation = Callable[[Tensor, Tensor], Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor, *, limit: float, alpha: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), elementwise; the gate at most `limit`, `up` no farther than that from 0.

    gpt-oss (OpenAI 2025, arXiv 2508.10925, section 2).
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def _run(x: Tensor, expert: Sequence[Tensor], act: Activation) -> Tensor:
    """One expert, its matrices and its biases if it has any, on some tokens: [n, H] from [n, H]."""
    gate, up, down, *biases = expert
    of_gate, of_up, of_down = biases or (None, None, None)
    return F.linear(act(F.linear(x, gate, of_gate), F.linear(x, up, of_up)), down, of_down)


def eager_experts(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor, act: Activation = swiglu
) -> Tensor:
    """The reference: for each expert, find its tokens, run them, add the weighted result."""
    output = torch.zeros_like(hidden_states)
    for expert in range(len(experts[0])):
        token, slot = torch.where(indices == expert)
        y = _run(hidden_states[token], [tensor[expert] for tensor in experts], act)
        output = output.index_add(0, token, y * weights[token, slot, None])
    return output


def sorted_experts(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor, act: Activation = swiglu
) -> Tensor:
    """The fast path on a CPU: sort the routed tokens by expert, give each expert one contiguous piece.

    Three choices make it fast, and equal from run to run: a stable sort; `index_select`, whose backward adds in a
    fixed order where that of `x[i]` does not; and `unbind`, since indexing `gate[e]` in a loop would build
    a full-size zero gradient for every expert. Few tokens, whose time goes into calls, take one of the next two ways.
    """
    if hidden_states.is_meta:  # where nothing can be counted
        return grouped_experts(hidden_states, indices, weights, *experts, act=act)
    if len(hidden_states) == 1 and not torch.is_grad_enabled():
        return _one_token(hidden_states, indices, weights, experts, act)
    if len(experts) == 3 and _are_few(hidden_states, indices, *experts):
        return _few_slots(hidden_states, indices, weights, *experts, act)
    slots, token, ends, _ = _sort_by_expert(indices, len(experts[0]))
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    slots, token = slots[: sum(counts)], token[: sum(counts)]  # without the empty ones
    pieces = hidden_states.index_select(0, token).split(counts)
    parts = (tensor.unbind() for tensor in experts)
    outputs = [_run(x, own, act) for x, *own in zip(pieces, *parts, strict=True)]
    weighted = torch.cat(outputs) * weights.flatten().index_select(0, slots)[:, None]
    return _add_to_tokens(weighted, token, hidden_states)


def _one_token(x: Tensor, indices: Tensor, weights: Tensor, experts: Sequence[Tensor], act: Activation) -> Tensor:
    """A step of generation, without gradients: there is nothing to sort."""
    output = torch.zeros_like(x)
    for expert, weight in zip(indices[0].tolist(), weights[0], strict=True):
        if expert < len(experts[0]):
            output += weight * _run(x, [tensor[expert] for tensor in experts], act)
    return output


def _few_slots(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """All experts by three calls: `grouped_experts` without empty slots and odd widths, which `_are_few` rules out."""
    slots, token, ends, _ = _sort_by_expert(indices, len(gate))
    routed = x.index_select(0, token)
    inner = act(F.grouped_mm(routed, gate.mT, offs=ends), F.grouped_mm(routed, up.mT, offs=ends))
    weighted = F.grouped_mm(inner, down.mT, offs=ends) * weights.flatten().index_select(0, slots)[:, None]
    return _add_to_tokens(weighted, token, x)


def _are_few(x: Tensor, indices: Tensor, *matrices: Tensor) -> bool:
    """Whether `_few_slots` is the way to run them, and can."""
    most = FEW_SLOTS if torch.is_grad_enabled() else 4 * FEW_SLOTS
    few = 0 < indices.numel() <= most and x.is_cpu and x.dtype in GROUPED_DTYPES and not is_autocast(x)
    fits = few and all(m.is_contiguous() and m.shape[-1] * m.element_size() % 16 == 0 for m in matrices)
    return fits and bool((indices < len(matrices[0])).all())


def grouped_experts(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor, act: Activation = swiglu
) -> Tensor:
    """As `sorted_experts`, with three grouped matrix products in place of loops; what transformers does by default.

    Nothing is read back from the device, so that `torch.compile(fullgraph=True)` and `torch.export` can follow.
    Raises ValueError: the dtype is one that `F.grouped_mm` does not multiply.
    """
    slots, token, ends, empty = _sort_by_expert(indices, len(experts[0]))
    # grouped_mm leaves the rows of empty slots, which are no expert's, undefined in its output and in its gradient: the
    # first mask keeps that out of the gradient of hidden_states, the second out of that of the biases, the third out of
    # the output.
    x = hidden_states.index_select(0, token).masked_fill(empty, 0)
    weight = weights.flatten().index_select(0, slots)
    x, weight, *experts = _autocast(x, weight, *experts)
    if x.dtype not in GROUPED_DTYPES:
        wanted = ", ".join(map(str, GROUPED_DTYPES))
        raise ValueError(f"experts_implementation='grouped' was given {x.dtype}: wanted one of {wanted}")
    x, gate, up, down, *biases = map(_pad_rows, (x, *experts))
    expert = indices.flatten().index_select(0, slots).clamp(max=len(gate) - 1)
    added = [bias.index_select(0, expert).masked_fill(empty, 0) for bias in biases] or 3 * [None]
    inner = act(_grouped_mm(x, gate, ends, added[0]), _grouped_mm(x, up, ends, added[1]))
    output = _grouped_mm(inner, down, ends, added[2])[:, : hidden_states.shape[1]].masked_fill(empty, 0)
    return _add_to_tokens(output * weight[:, None], token, hidden_states)


def _pad_rows(tensor: Tensor) -> Tensor:
    """Zeros after [N, A] or [E, A, B], so that A and B are multiples of 16 bytes, as `F.grouped_mm` wants them."""
    multiple = 16 // tensor.element_size()
    padding = [pad for size in reversed(tensor.shape[1:]) for pad in (0, -size % multiple)]
    return F.pad(tensor, padding) if any(padding) else tensor.contiguous()


def _grouped_mm(rows: Tensor, matrices: Tensor, ends: Tensor, added: Tensor | None) -> Tensor:
    """Each row times the matrix [B, A] of its expert, plus `added`: [N, B] from [N, A].

    By `F.grouped_mm`, where there is memory to run it in; torch 2.13 knows its shapes beforehand for bfloat16 only.
    """
    traced = rows.is_meta or torch.compiler.is_compiling()
    product = _traced_grouped_mm(rows, matrices.mT, ends) if traced else F.grouped_mm(rows, matrices.mT, offs=ends)
    return product if added is None else product + added


@torch.library.custom_op("minimoe::grouped_mm", mutates_args=())
def _traced_grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """[N, A] times [E, A, B] gives [N, B]; [A, N] times [N, B] gives [E, A, B]."""
    return F.grouped_mm(left, right, offs=ends)


@_traced_grouped_mm.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    groups = () if right.dim() == 3 else ends.shape
    return left.new_empty(*groups, left.shape[0], right.shape[-1])  # len() would fix the number of rows


def _backward(ctx, d_output: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right, ends = ctx.saved_tensors
    d_output = d_output.contiguous()
    return _traced_grouped_mm(d_output, right.mT, ends), _traced_grouped_mm(left.T, d_output, ends), None


_traced_grouped_mm.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


if torch.ops.aten._grouped_mm not in flop_registry:  # torch 2.13 knows no formula for it: its counter would say 0

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
        """Floating-point operations, of [N, A] times [E, A, B] or [A, N] times [N, B]."""
        return 2 * left[0] * left[1] * right[-1]


def add_shared_expert(routed: Tensor, shared: Tensor, gate_logits: Tensor | None = None) -> Tensor:
    """Add the output of the expert that every token meets to that of the routed ones, [T, H] each.

    As it is in DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066, section 3.2) and Pangu Pro MoE (arXiv 2505.21411);
    where `gate_logits` [T, 1] are given, scaled by a gate of its own, their sigmoid, as in Qwen2-MoE.
    """
    return routed + (shared if gate_logits is None else gate_logits.sigmoid() * shared)


def _sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots ordered by expert, the token of each, where each expert's end [E], and which are empty: the last."""
    experts, slots = indices.flatten().sort(stable=True)
    every = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    return slots, slots // indices.shape[1], ends, (experts == num_experts)[:, None]


def _add_to_tokens(output: Tensor, token: Tensor, hidden_states: Tensor) -> Tensor:
    """[T, H]: every row of output [N, H] added to that of its token [N]."""
    return torch.zeros_like(hidden_states).index_add_(0, token, output.to(hidden_states.dtype))


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch.autocast does to the arguments of F.linear, and not to those of the products used here."""
    if not is_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


IMPLEMENTATIONS = {"eager": eager_experts, "sorted": sorted_experts, "grouped": grouped_experts}
