"""A decoder-only transformer whose MLP may be a mixture of experts."""

from minimoe.model.config import MoEConfig
from minimoe.model.moe import Experts, MoELayer, Router
from minimoe.model.routing import (
    RouterOutput,
    route_expert_choice,
    route_grouped,
    route_hash,
    route_noisy_topk,
    route_switch,
    route_topk,
    route_topk_softmax,
)
from minimoe.model.transformer import CausalLMOutput, MoEForCausalLM

__all__ = [
    "CausalLMOutput",
    "Experts",
    "MoEConfig",
    "MoEForCausalLM",
    "MoELayer",
    "Router",
    "RouterOutput",
    "route_expert_choice",
    "route_grouped",
    "route_hash",
    "route_noisy_topk",
    "route_switch",
    "route_topk",
    "route_topk_softmax",
]
