"""Running experts whose weights lie in three fused tensors: several ways, one result.

Shapes: T tokens, H hidden size, I expert width, E experts, K experts per token, N = T * K routed tokens.

Every implementation is a function

    (hidden_states [T, H], indices [T, K], weights [T, K], gate [E, I, H], up [E, I, H], down [E, H, I]) -> [T, H]

and computes, for every token, the sum over its K slots of weight * down(silu(gate(x)) * up(x)). A slot whose index
is E is empty and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import compress

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.model.layers import is_autocast


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

    Equal from run to run. It cannot be differentiated twice; the others can.
    """
    x, gate, up, down = _autocast(hidden_states, gate, up, down)
    return _SortedExperts.apply(x, indices, weights, gate, up, down).to(hidden_states.dtype)


class _SortedExperts(torch.autograd.Function):
    """`sorted_experts` with a gradient of its own.

    Autograd would keep a dozen nodes for every expert and put the gradients of gate, up and down together from E
    pieces. Here every product is written where it belongs, and what is not a product is done for all experts at
    once. The weights multiply what enters `down`: the result is the same, and no output [N, H] need be kept.
    """

    @staticmethod
    def forward(
        ctx, hidden_states: Tensor, indices: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        experts, slots = indices.flatten().sort(stable=True)  # an empty slot has index E and sorts last
        *counts, empty = torch.bincount(experts, minlength=len(gate) + 1).tolist()
        slots = slots[: len(slots) - empty]  # [N] from here on, without the empty ones
        token = slots // indices.shape[1]
        x = hidden_states.index_select(0, token)  # [N, H]
        scale = weights.flatten().index_select(0, slots)[:, None]  # [N, 1]

        gates, ups = x.new_empty(2, len(x), gate.shape[1])  # [N, I] each
        for x_e, gates_e, ups_e, gate_e, up_e in _by_expert(counts, x, gates, ups, gate.mT, up.mT):
            torch.mm(x_e, gate_e, out=gates_e)
            torch.mm(x_e, up_e, out=ups_e)
        inner = F.silu(gates).mul_(ups).mul_(scale)
        y = torch.empty_like(x)
        for inner_e, y_e, down_e in _by_expert(counts, inner, y, down.mT):
            torch.mm(inner_e, down_e, out=y_e)

        ctx.counts, ctx.weights_shape = counts, weights.shape
        ctx.save_for_backward(slots, token, x, scale, gate, up, down, gates, ups, inner)
        return weights.new_zeros(hidden_states.shape).index_add_(0, token, y.to(weights.dtype))

    @staticmethod
    def backward(ctx, d_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "experts_implementation='sorted' was to be differentiated twice (create_graph=True): wanted 'eager'"
            )
        slots, token, x, scale, gate, up, down, gates, ups, inner = ctx.saved_tensors
        needs_hidden_states, _, _, *needs_matrices = ctx.needs_input_grad
        d_hidden_states = d_gate = d_up = d_down = None
        if any(needs_matrices):
            new = torch.empty_like if all(ctx.counts) else torch.zeros_like  # zeros for experts without a token
            d_gate, d_up, d_down = new(gate), new(up), new(down)

        d_y, d_inner = d_output.index_select(0, token).to(x.dtype), torch.empty_like(inner)
        for d_y_e, d_inner_e, down_e in _by_expert(ctx.counts, d_y, d_inner, down):
            torch.mm(d_y_e, down_e, out=d_inner_e)
        d_ups = F.silu(gates).mul_(d_inner)
        d_scale = torch.linalg.vecdot(d_ups, ups)
        d_weights = scale.new_zeros(ctx.weights_shape)
        d_weights.view(-1).index_copy_(0, slots, d_scale.to(scale.dtype))
        d_ups.mul_(scale)
        d_gates = d_inner.mul_(ups).mul_(scale)
        torch.ops.aten.silu_backward(d_gates, gates, grad_input=d_gates)

        if any(needs_matrices):
            pieces = _by_expert(ctx.counts, x, inner, d_gates, d_ups, d_y, d_gate, d_up, d_down)
            for x_e, inner_e, d_gates_e, d_ups_e, d_y_e, d_gate_e, d_up_e, d_down_e in pieces:
                torch.mm(d_gates_e.t(), x_e, out=d_gate_e)
                torch.mm(d_ups_e.t(), x_e, out=d_up_e)
                torch.mm(d_y_e.t(), inner_e, out=d_down_e)
        if needs_hidden_states:
            d_x = torch.empty_like(x)
            for d_x_e, d_gates_e, d_ups_e, gate_e, up_e in _by_expert(ctx.counts, d_x, d_gates, d_ups, gate, up):
                torch.mm(d_gates_e, gate_e, out=d_x_e)
                d_x_e.addmm_(d_ups_e, up_e)
            d_hidden_states = x.new_zeros(d_output.shape).index_add_(0, token, d_x)
        return d_hidden_states, None, d_weights, d_gate, d_up, d_down


def _by_expert(counts: list[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For every expert with tokens: its rows of tensors [N, ...], and its own of matrices [E, ..., ...]."""
    sizes = [count for count in counts if count]
    pieces = (t.split_with_sizes(sizes) if t.dim() == 2 else compress(t.unbind(), counts) for t in tensors)
    return zip(*pieces, strict=True)


def grouped_experts(
    hidden_states: Tensor, indices: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """As `sorted_experts`, with three grouped matrix products in place of loops; what transformers does by default.

    Nothing is read back from the device, so that `torch.compile(fullgraph=True)` and `torch.export` can follow.

    Raises:
        ValueError: the dtype is one that `F.grouped_mm` does not multiply.
    """
    experts, slots = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(len(gate), device=experts.device), right=True, out_int32=True)
    token = slots // indices.shape[1]
    # The rows of empty slots come last and belong to no group. grouped_mm leaves them undefined, in its output and in
    # its gradient: the first mask keeps that out of the gradient of hidden_states, the second out of the output.
    empty = (experts == len(gate))[:, None]
    x, weight, gate, up, down = _autocast(
        hidden_states.index_select(0, token).masked_fill(empty, 0),
        weights.flatten().index_select(0, slots),
        gate,
        up,
        down,
    )
    if x.dtype not in GROUPED_DTYPES:
        raise ValueError(
            f"experts_implementation='grouped' was given {x.dtype}: wanted one of {', '.join(map(str, GROUPED_DTYPES))}"
        )
    x, gate, up, down = map(_pad_rows, (x, gate, up, down))
    inner = F.silu(_grouped_mm(x, gate.mT, ends)) * _grouped_mm(x, up.mT, ends)
    output = _grouped_mm(inner, down.mT, ends)[:, : hidden_states.shape[1]].masked_fill(empty, 0)
    return _add_to_tokens(output * weight[:, None], token, hidden_states)


def _pad_rows(tensor: Tensor) -> Tensor:
    """Zeros after [N, A] or [E, A, B], so that A and B are multiples of 16 bytes, as `F.grouped_mm` wants them."""
    multiple = 16 // tensor.element_size()
    padding = [pad for size in reversed(tensor.shape[1:]) for pad in (0, -size % multiple)]
    return F.pad(tensor, padding) if any(padding) else tensor.contiguous()


@torch.library.custom_op("minimoe::grouped_mm", mutates_args=())
def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`F.grouped_mm`, of whose result torch 2.13 knows the shape beforehand for bfloat16 only.

    Group e ends before row `ends[e]`. [N, A] times [E, A, B] gives [N, B]; [A, N] times [N, B] gives [E, A, B].
    """
    return F.grouped_mm(left, right, offs=ends)


@_grouped_mm.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    groups = () if right.dim() == 3 else ends.shape
    return left.new_empty(*groups, left.shape[0], right.shape[-1])  # len() would fix the number of rows


def _grouped_mm_backward(ctx, d_output: Tensor) -> tuple[Tensor | None, ...]:
    left, right, ends = ctx.saved_tensors
    d_output = d_output.contiguous()
    d_left = d_right = None
    if ctx.needs_input_grad[0] and right.dim() == 3:
        d_left = _grouped_mm(d_output, right.mT, ends)
    elif ctx.needs_input_grad[0]:
        d_left = _grouped_mm(right, d_output.mT, ends).T
    if ctx.needs_input_grad[1]:
        d_right = _grouped_mm(left.T, d_output, ends)
    return d_left, d_right, None


_grouped_mm.register_autograd(
    _grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


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


def _add_to_tokens(output: Tensor, token: Tensor, hidden_states: Tensor) -> Tensor:
    """[T, H]: every row of output [N, H] added to that of its token [N]."""
    return torch.zeros_like(hidden_states).index_add_(0, token, output.to(hidden_states.dtype))


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch.autocast does to the arguments of F.linear, and not to those of the products used here."""
    if not is_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "eager": eager_experts,
    "sorted": sorted_experts,
    "grouped": grouped_experts,
}


GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that F.grouped_mm multiplies
