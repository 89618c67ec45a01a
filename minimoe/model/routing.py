"""Every router of the kit, each a pure function from logits to a `RouterOutput`.

Shapes: T tokens, E experts, K experts per token. Everywhere `logits` are [T, E], x W_g^T of a learned router, taken in
float32 at least, because a choice made in half precision differs from run to run; and `k` is K.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.model.config import require
from minimoe.model.layers import has_values


class RouterOutput(NamedTuple):
    """What a router decided for T tokens."""

    logits: Tensor  # [T, E] before any score function
    scores: Tensor  # [T, E] after it
    weights: Tensor  # [T, K] what the expert outputs are multiplied by
    indices: Tensor  # [T, K] int64; a dropped slot has weight 0 and index E


def route_topk(
    logits: Tensor,
    k: int,
    *,
    score_func: str = "softmax",
    norm_topk_prob: bool = False,
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
) -> RouterOutput:
    """Score all experts, keep the k best.

    With its defaults the router of OLMoE (arXiv 2409.02060) and Qwen2-MoE; `norm_topk_prob` gives Mixtral's
    (arXiv 2401.04088, section 2.1); sigmoid scores with a `bias` that selects but does not weigh give DeepSeek-V3's
    (arXiv 2412.19437, eq. 12-16); `n_group` > 1 restricts the choice to `topk_group` groups of experts
    (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).

    Args:
        score_func: "softmax" or "sigmoid".
        norm_topk_prob: divide the k weights by their sum.
        bias: [E], added to the scores for the choice only.
        n_group: the experts form this many groups of equal size, in order.
        topk_group: how many groups a token may use. A group is as good as its best expert (softmax) or the sum of
            its two best (sigmoid).
        routed_scaling_factor: multiplies the weights.

    Raises ValueError: k, a group or the score function is impossible; a logit is not a number.
    """
    _check_logits(logits, k)
    require(score_func in ("softmax", "sigmoid"), "score_func", score_func, "'softmax' or 'sigmoid'")
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        choice = _mask_groups(choice, k, n_group, topk_group, best=1 if score_func == "softmax" else 2)
    weights, indices = choice.topk(k, dim=-1)
    if bias is not None:
        weights = scores.gather(-1, indices)  # the bias selects, but does not weigh
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if routed_scaling_factor != 1:
        weights = weights * routed_scaling_factor
    return RouterOutput(logits, scores, weights, indices)


def _mask_groups(choice: Tensor, k: int, n_group: int, topk_group: int, best: int) -> Tensor:
    """Set the choice of every expert outside the `topk_group` best groups to -inf."""
    grouped = _split_groups(choice, n_group)
    size = grouped.shape[-1]
    fits = 1 <= topk_group <= n_group and k <= topk_group * size
    require(fits, "topk_group", topk_group, f"1 to n_group={n_group} groups of {size} that hold k={k} experts")
    group_scores = grouped.topk(min(best, size), dim=-1).values.sum(-1)
    kept = group_scores.topk(topk_group, dim=-1).indices
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
    return grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(-2)


def route_topk_softmax(logits: Tensor, k: int) -> RouterOutput:
    """Keep the k best logits, then softmax over them alone (Shazeer et al. 2017; gpt-oss).

    Equal to `route_topk(..., norm_topk_prob=True)`. At k = 1 the weight is the constant 1, so that the router receives
    no gradient: the reason why Switch takes its softmax first.
    """
    _check_logits(logits, k)
    top = logits.topk(k, dim=-1)
    return RouterOutput(logits, logits.softmax(-1), top.values.softmax(-1), top.indices)


def route_noisy_topk(
    logits: Tensor, noise_logits: Tensor, k: int, *, training: bool, generator: torch.Generator | None = None
) -> RouterOutput:
    """Top-k then softmax on logits with learned noise (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5).

    Args:
        noise_logits: [T, E], x W_noise; the noise has standard deviation softplus(noise_logits).
        training: without it no noise is added, so that evaluation is deterministic.
        generator: where the noise comes from; None: torch's global one.
    """
    if training:
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        logits = logits + noise * F.softplus(noise_logits)
    return route_topk_softmax(logits, k)


def route_switch(logits: Tensor) -> RouterOutput:
    """One expert per token, weighted by its probability, not renormalised.

    Source: Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, eq. 1-2).
    What an expert cannot take is dropped by `balance.apply_capacity`.
    """
    return route_topk(logits, 1)


def route_expert_choice(logits: Tensor, capacity: int, *, real: Tensor | None = None) -> RouterOutput:
    """Each expert takes the `capacity` tokens that score highest for it.

    Source: Zhou et al. 2022, arXiv 2202.09368, section 3.
    Every expert gets the same load by construction, a token gets 0 to E experts. **Not causal**: whether a token is
    taken depends on the tokens after it.

    Args:
        capacity: tokens per expert, 1 to T.
        real: [T] bool, False for padding, which no expert takes before a real token; None: there is none.

    Returns:
        K = E slots a token: slot e holds expert e, or is empty (weight 0, index E).
    """
    _check_logits(logits, 1)
    tokens, experts = logits.shape
    if not 1 <= capacity <= tokens:
        raise ValueError(f"capacity={capacity}: wanted 1 to {tokens}, the number of tokens")
    scores = logits.softmax(-1)
    eligible = scores if real is None else scores.masked_fill(~real[:, None], -1)  # below any probability
    chosen = eligible.topk(capacity, dim=0).indices
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter(0, chosen, True)
    expert_ids = torch.arange(experts, device=logits.device).expand(tokens, experts)
    return RouterOutput(logits, scores, scores * taken, expert_ids.where(taken, experts))


def route_grouped(logits: Tensor, k: int, n_group: int, *, router_scale: Tensor | None = None) -> RouterOutput:
    """The same number of experts from each group: Pangu Pro MoE's MoGE (Tang et al. 2025, arXiv 2505.21411).

    Softmax over all E experts; each of the n_group groups of E / n_group experts gives its k / n_group best. With
    one group per device, every device does the same work for every token.

    Args:
        k: a multiple of n_group.
        n_group: number of groups, a divisor of E.
        router_scale: [E], a learned factor on each expert's weight; weights are not renormalised.

    Returns:
        Indices ordered by group.
    """
    _check_logits(logits, k)
    scores = logits.softmax(-1)
    grouped = _split_groups(scores, n_group)
    require(k % n_group == 0, "k", k, f"a multiple of n_group={n_group}")
    within = grouped.topk(k // n_group, dim=-1).indices
    # A group starts at a multiple of its size, E / n_group, whatever k is.
    start = torch.arange(n_group, device=logits.device)[:, None] * grouped.shape[-1]
    indices = (within + start).flatten(-2)
    weights = scores.gather(-1, indices)
    if router_scale is not None:
        weights = weights * router_scale[indices]
    return RouterOutput(logits, scores, weights, indices)


def route_hash(input_ids: Tensor, num_experts: int, k: int = 1, seed: int = 0) -> RouterOutput:
    """Experts fixed by the token id alone, nothing learned (Roller et al. 2021, arXiv 2106.04426, section 3).

    Args:
        input_ids: [T] int64.
        k: experts per token: the hashed one and its k - 1 successors, each with weight 1 / k.
        seed: another seed, another table.

    Returns:
        Logits and scores are the weights spread over E columns: there is no score function.
    """
    require(1 <= k <= num_experts, "k", k, f"1 to num_experts={num_experts}")
    offset = torch.arange(k, device=input_ids.device)
    indices = (_hash(input_ids, seed)[:, None] + offset) % num_experts
    weights = torch.full(indices.shape, 1 / k, device=input_ids.device)
    scores = weights.new_zeros(input_ids.shape[0], num_experts).scatter(-1, indices, weights)
    return RouterOutput(scores, scores, weights, indices)


def leave_out(output: RouterOutput, kept: Tensor) -> RouterOutput:
    """Empty the slots where `kept` is False, [T, K], or [T] for all slots of a token: weight 0, index E."""
    kept = kept if kept.dim() == 2 else kept[:, None]
    experts = output.logits.shape[-1]
    return output._replace(weights=output.weights * kept, indices=output.indices.where(kept, experts))


def _hash(ids: Tensor, seed: int) -> Tensor:
    """Mix the bits of 31-bit integers: a multiply-and-shift hash that is the same on every machine."""
    mixed = (ids + 1) * 0x9E3779B1 + seed * 0x85EBCA77
    for _ in range(2):
        mixed = mixed & 0x7FFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    return (mixed & 0x7FFFFFFF) >> 8


def _split_groups(scores: Tensor, n_group: int) -> Tensor:
    experts = scores.shape[-1]
    require(n_group >= 1 and experts % n_group == 0, "n_group", n_group, f"a divisor of the {experts} experts")
    return scores.unflatten(-1, (n_group, experts // n_group))


def _check_logits(logits: Tensor, k: int) -> None:
    if logits.dim() != 2:
        raise ValueError(f"router logits have shape {tuple(logits.shape)}: wanted [tokens, experts]")
    require(1 <= k <= logits.shape[-1], "k", k, f"1 to {logits.shape[-1]}, the number of experts")
    if has_values(logits) and not logits.detach().isfinite().all():
        bad = ~logits.detach().isfinite().all(-1)
        token, affected = int(bad.nonzero()[0]), f"{int(bad.sum())} of {len(logits)} tokens are affected"
        raise ValueError(
            f"router logits of token {token} are {logits[token].tolist()}: wanted finite numbers ({affected})"
        )
