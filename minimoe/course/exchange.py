"""What real processes send each other when they share the experts of a layer: for notebook 13 and a benchmark."""

from typing import NamedTuple

import torch

from minimoe.course.cost import popular_logits
from minimoe.model import MoEConfig, route_grouped, route_topk
from minimoe.model.balance import expert_load
from minimoe.model.config import require
from minimoe.model.moe import Experts
from minimoe.training.parallel import ShardedExperts
from minimoe.training.processes import Ranks, Sent

RULES = ("top-k", "MoGE")


class Exchanged(NamedTuple):
    """What one process did in a pass forwards and backwards."""

    given: list[int]  # slots of its tokens whose experts are on each rank
    computed: int  # rows that it was sent, its own among them
    sent: dict[str, Sent]  # by kind of collective


def exchange(
    ranks: Ranks, rule: str, experts: int, k: int, skew: float, tokens: int, *, hidden: int = 32, seed: int = 0
) -> Exchanged:
    """One layer, forwards and backwards, on the tokens of `place_experts`, of which each process has an equal part.

    For `processes.run_processes`. Args as of `place_experts`; `hidden` is also the width of an expert. Raises
    ValueError: there is no such rule.
    """
    require(rule in RULES, "rule", rule, f"one of {', '.join(RULES)}")
    config = MoEConfig(hidden_size=hidden, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=k)
    layer, logits = ShardedExperts(Experts(config), ranks), popular_logits(experts, skew, tokens, seed)
    own = logits.chunk(ranks.size)[ranks.rank]
    output = route_topk(own, k) if rule == "top-k" else route_grouped(own, k, ranks.size)
    x = torch.zeros(len(own), hidden, requires_grad=True)
    layer(x, output.indices, output.weights).sum().backward()
    given = expert_load(output.indices, experts).view(ranks.size, -1).sum(1).tolist()
    return Exchanged(given, layer.received, ranks.sent)


def exchange_both(ranks: Ranks, *arguments, **options) -> dict[str, Exchanged]:
    """`exchange` by both rules, one after the other."""
    found = {}
    for rule in RULES:
        ranks.sent = {}
        found[rule] = exchange(ranks, rule, *arguments, **options)
    return found
