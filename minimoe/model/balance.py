"""Keeping the experts evenly busy: losses, a bias, a capacity, and how to measure the load.

Shapes: T tokens, E experts, K experts per token. Everything takes what a router returned as an argument; nothing is
kept between calls. `router_outputs` are one for each sparse layer; `attention_mask`, [B, S] or [T], is 0 for padding,
which counts for nothing, and None where there is none.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minimoe.model.config import require
from minimoe.model.routing import RouterOutput, leave_out


def expert_load(indices: Tensor, num_experts: int) -> Tensor:
    """How many slots of `indices` [T, K] int64 each expert received, [E] int64. Dropped ones (index E) do not count."""
    chosen = indices.flatten()
    return chosen.new_zeros(num_experts + 1).scatter_add(0, chosen, torch.ones_like(chosen))[:num_experts]


def max_violation(load: Tensor) -> float:
    """MaxVio = max_i n_i / mean(n) - 1 of the counts `load` [E]: 0 when balanced, E / K - 1 at worst.

    Source: Wang et al. 2024, arXiv 2408.15664.
    Raises ValueError: no token was counted.
    """
    counts = load.tolist()
    require(sum(counts) > 0, "load", counts, "at least one routed token")
    return max(counts) / (sum(counts) / len(counts)) - 1


def load_balancing_loss(
    router_outputs: Sequence[RouterOutput],
    *,
    sequences: int = 1,
    across_layers: str = "mean",
    attention_mask: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """The scalar E * sum_i f_i P_i, f_i the share of tokens that chose expert i, P_i its mean softmax probability.

    f sums to K, so the balanced value is K (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). Only P carries a gradient.
    f counts what the router chose, before any capacity drops it.

    Args:
        sequences: take the loss in each of this many equal stretches of the T tokens, and average. 1 balances
            the batch as a whole; the batch size balances every sequence, as DeepSeek-V3 does (arXiv 2412.19437,
            eq. 17-20; there f is divided by K, and P is of sigmoid scores divided by their sum).
        across_layers: "mean" of the layers' losses, or "pooled": f and P averaged over all layers first, as
            transformers does. Pooling is there for parity only: two layers that collapsed in opposite ways
            look perfectly balanced to it.
        shares: [L, E], f of each layer, if these tokens are a part of the batch that it is to be taken over:
            `training.accumulate_gradients` counts it beforehand. None: of these tokens.

    Raises ValueError: no layer is sparse, the tokens do not divide into the sequences, or `across_layers` is unknown.
    """
    require(across_layers in ("mean", "pooled"), "across_layers", across_layers, "'mean' or 'pooled'")
    real = _real_tokens(router_outputs, attention_mask)
    if shares is None:
        shares = torch.stack([_mean(chosen_experts(output), sequences, real) for output in router_outputs])
    else:
        shares = shares[:, None]
    probability = torch.stack([_mean(output.logits.softmax(-1), sequences, real) for output in router_outputs])
    if across_layers == "pooled":
        shares, probability = shares.mean(0), probability.mean(0)
    losses = shares.shape[-1] * (shares * probability).sum(-1)  # [L, sequences], or [sequences]
    if real is None:
        return losses.mean()
    holds_any = _split(real, sequences).any(1).to(losses.dtype)  # a sequence of padding alone has no loss
    return (losses * holds_any).mean() * sequences / holds_any.sum().clamp(min=1)


def chosen_experts(output: RouterOutput) -> Tensor:
    """Which experts each token chose, [T, E] of 0 and 1, in the dtype of the logits."""
    tokens, experts = output.logits.shape
    chosen = output.logits.new_zeros(tokens, experts + 1)  # the last column takes the empty slots
    return chosen.scatter(1, output.indices, 1.0)[:, :experts]


def _real_tokens(router_outputs: Sequence[RouterOutput], attention_mask: Tensor | None) -> Tensor | None:
    """Which tokens are no padding, [T] bool; None: all of them. Of a dense model there is nothing to look at."""
    if not router_outputs:
        raise ValueError("router_outputs is empty: wanted one entry per sparse layer, found a dense model")
    return None if attention_mask is None else attention_mask.flatten().bool()


def _mean(values: Tensor, sequences: int, real: Tensor | None) -> Tensor:
    """The mean of values [T, E] over the real tokens of each sequence: [sequences, E]."""
    values = _split(values, sequences)
    if real is None:
        return values.mean(1)
    counted = _split(real, sequences)[..., None].to(values.dtype)
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)


def _split(values: Tensor, sequences: int) -> Tensor:
    if sequences < 1 or values.shape[0] % sequences:
        raise ValueError(f"sequences={sequences}: wanted a divisor of the {len(values)} tokens")
    return values.unflatten(0, (sequences, -1))


def router_z_loss(router_outputs: Sequence[RouterOutput], *, attention_mask: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps logits small (ST-MoE: Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    real = _real_tokens(router_outputs, attention_mask)
    squares = [output.logits.logsumexp(-1).square()[:, None] for output in router_outputs]
    return torch.stack([_mean(square, 1, real) for square in squares]).mean()


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float = 1e-3) -> None:
    """Raise the selection bias [E] of idle experts and lower that of busy ones, in place.

    With n the `load` [E], counts of training forwards since the last update, once per optimizer step:
    d = rate * sign(mean(n) - n); d -= mean(d); bias += d. Source: Wang et al. 2024, arXiv 2408.15664.
    """
    load = load.to(bias.dtype)
    step = rate * torch.sign(load.mean() - load)
    bias += step - step.mean()


def expert_capacity(num_tokens: int, num_experts: int, k: int, capacity_factor: float) -> int:
    """How many slots an expert accepts: floor(T * K / E * capacity_factor), at least 1 (Fedus et al. 2021, eq. 3).

    The floor of 1 lets a model generate, one token at a time. Never more than T, which is all there is.
    """
    share = num_tokens * k * capacity_factor / num_experts
    return max(1, math.floor(min(num_tokens, share * (1 + 1e-12))))  # 100 * .29 is 28.999999999999996


def apply_capacity(output: RouterOutput, capacity: int, ahead: Tensor | None = None) -> RouterOutput:
    """Drop what exceeds `capacity` slots per expert: such a slot gets weight 0 and index E.

    All first choices are served before any second choice, and earlier tokens before later ones
    (GShard, arXiv 2006.16668, algorithm 1; ST-MoE, arXiv 2202.08906). **Not causal** for K > 1: the first choice of
    a later token can push out the second choice of an earlier one.

    Args:
        output: of T tokens and K choices, best first.
        capacity: slots per expert, at least 1.
        ahead: [K, E + 1] int64: where these tokens are a part of the batch, how many slots of the other tokens each
            expert serves before those of each choice; the last column, of empty slots, does not matter.
    """
    require(capacity >= 1, "capacity", capacity, "at least 1")
    by_rank = output.indices.T.flatten()  # all first choices, then all second choices, ...
    experts = torch.arange(output.logits.shape[-1] + 1, device=by_rank.device)  # the last one takes the empty slots
    queue = (by_rank[:, None] == experts).long().cumsum(0)
    queue = queue.unflatten(0, output.indices.T.shape)  # [K, T, E + 1]
    if ahead is not None:
        queue = queue + ahead[:, None]
    place = queue.gather(2, output.indices.T[..., None]).squeeze(2)  # [K, T], 1 for the first in an expert's queue
    return leave_out(output, (place <= capacity).T)
