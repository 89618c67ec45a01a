"""One mixture-of-experts layer: a router chooses, experts compute, their outputs are weighted and added.

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, I expert width, E experts, K experts per token.

    chosen = router(x)                                   routing.py has the rule of every router, as a pure function
    dispatched = chosen, less what exceeds a capacity    balance.py
    output = experts(x, indices, weights)                experts.py has three ways to compute one sum
    output += shared expert(x)
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.model import routing
from minimoe.model.balance import apply_capacity, expert_capacity
from minimoe.model.config import MoEConfig, require
from minimoe.model.experts import IMPLEMENTATIONS, add_shared_expert, clamped_swiglu, swiglu
from minimoe.model.layers import MLP, Linear, at_least_float32, initialise, is_autocast
from minimoe.model.routing import RouterOutput


class MoELayer(nn.Module):
    """Router, dispatch, experts, combine; plus the shared expert that every token meets.

    Args:
        seed: of the initial weights; None leaves them to the caller.
    """

    def __init__(self, config: MoEConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config, seed=None)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config.hidden_size, shared) if shared else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        self.limit = within_capacity  # training/parallel.py puts another here, for tokens that lie in many processes
        if seed is not None:
            initialise(self, config.initializer_range, seed)

    def forward(
        self, hidden_states: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """Map [B, S, H] to [B, S, H]; also return what the router chose for the T = B * S tokens.

        Args:
            input_ids: [B, S], which only the hash router looks at.
            attention_mask: [B, S], 0 for padding: such a token meets no routed expert and takes nobody's place.
        """
        x = hidden_states.flatten(0, 1)
        ids = None if input_ids is None else input_ids.flatten()
        real = None if attention_mask is None else attention_mask.flatten().bool()
        dispatched = chosen = self.gate(x, ids, real)
        if self.config.capacity_factor is not None and self.config.router != "expert_choice":  # which never exceeds it
            dispatched = self.limit(chosen, self.config, real)
        output = self.experts(x, dispatched.indices, dispatched.weights)
        if self.shared_expert is not None:
            gate_logits = None if self.shared_expert_gate is None else self.shared_expert_gate(x)
            output = add_shared_expert(output, self.shared_expert(x), gate_logits)
        return output.view_as(hidden_states), chosen


class Router(nn.Module):
    """A router's weights, and the call of the routing function that the configuration names.

    `weight` [E, H] gives the logits. By configuration also: `bias` [E], `noise_weight` [E, H], `router_scale` [E], and
    the buffer `e_score_correction_bias` [E], which no gradient reaches (`balance.update_bias` moves it) and which stays
    in float32 in a model of half precision, as DeepSeek-V3 keeps it: its steps of 0.001 would be rounded away.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_experts, config.hidden_size)
        if config.router != "hash":
            self.weight = nn.Parameter(torch.empty(shape))
        if config.router == "noisy_topk":
            self.noise_weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.moe_bias else None
        self.router_scale = nn.Parameter(torch.ones(config.num_experts)) if config.router_scale else None
        correction = torch.zeros(config.num_experts, dtype=torch.float32) if config.e_score_correction_bias else None
        self.register_buffer("e_score_correction_bias", correction)

    def forward(self, x: Tensor, input_ids: Tensor | None = None, real: Tensor | None = None) -> RouterOutput:
        """Route tokens x [T, H]; slots of padding, where `real` [T] is False, stay empty.

        Only the hash router looks at `input_ids` [T].
        """
        chosen = self._choose(x, input_ids, real)
        return chosen if real is None else routing.leave_out(chosen, real)

    def _choose(self, x: Tensor, input_ids: Tensor | None, real: Tensor | None) -> RouterOutput:
        config, k = self.config, self.config.num_experts_per_tok
        if config.router == "hash":
            require(input_ids is not None, "input_ids", None, "the token ids, which router='hash' needs")
            return routing.route_hash(input_ids, config.num_experts, k)
        logits = self._logits(x, self.weight, self.bias)
        if config.router == "topk":
            return routing.route_topk(
                logits,
                k,
                score_func=config.score_func,
                norm_topk_prob=config.norm_topk_prob,
                bias=self.e_score_correction_bias,
                n_group=config.n_group,
                topk_group=config.topk_group,
                routed_scaling_factor=config.routed_scaling_factor,
            )
        if config.router == "topk_softmax":
            return routing.route_topk_softmax(logits, k)
        if config.router == "noisy_topk":
            noise_logits = self._logits(x, self.noise_weight)
            return routing.route_noisy_topk(logits, noise_logits, k, training=self.training)
        if config.router == "switch":
            return routing.route_switch(logits)
        if config.router == "expert_choice":
            return routing.route_expert_choice(logits, _capacity(config, x.shape[0], real), real=real)
        if config.router == "grouped":
            return routing.route_grouped(logits, k, config.n_group, router_scale=self.router_scale)
        raise NotImplementedError(f"router={config.router!r} is in config.ROUTERS and has no branch here")

    def _logits(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b, [T, E], in float32 at least, whatever the model's dtype, and under autocast too."""
        with torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext():
            x = at_least_float32(x)
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _load_from_state_dict(self, state_dict, prefix: str, *arguments) -> None:
        """What `load_state_dict` calls, which may put tensors in place of ours: the bias in float32 at least."""
        name = f"{prefix}e_score_correction_bias"
        if name in state_dict:
            state_dict = {**state_dict, name: at_least_float32(state_dict[name])}
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn, recurse: bool = True) -> "Router":
        """What `.to(dtype)`, `.half()` and the like call: they move the bias, but leave it in float32 at least."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after is not None and torch.finfo(after.dtype).bits < 32:
            self.e_score_correction_bias = before.to(after.device)
        return self


class Experts(nn.Module):
    """E gated MLPs in three tensors: `gate_proj` and `up_proj` [E, I, H], `down_proj` [E, H, I].

    By configuration each has a bias, `gate_proj_bias` and `up_proj_bias` [E, I], `down_proj_bias` [E, H].

    Args:
        config: its `experts_implementation` names the function that runs them.
        seed: of the initial weights; None leaves them to the caller.
    """

    def __init__(self, config: MoEConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.implementation = config.experts_implementation
        self.gate_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.biases = [f"{name}_proj_bias" for name in ("gate", "up", "down")] if config.moe_bias else []
        for name, size in zip(self.biases, (width, width, hidden), strict=False):
            self.register_parameter(name, nn.Parameter(torch.empty(experts, size)))
        limit, alpha = config.swiglu_limit, config.swiglu_alpha
        self.act = swiglu if limit is None else partial(clamped_swiglu, limit=limit, alpha=alpha)
        if seed is not None:
            initialise(self, config.initializer_range, seed)

    def forward(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Map [T, H] to [T, H], given `indices` and `weights` [T, K] of a `RouterOutput`."""
        run = IMPLEMENTATIONS[self.implementation]
        weights = weights.to(hidden_states.dtype)
        biases = (getattr(self, name) for name in self.biases)
        matrices = self.gate_proj, self.up_proj, self.down_proj
        return run(hidden_states, indices, weights, *matrices, *biases, act=self.act)


def within_capacity(chosen: RouterOutput, config: MoEConfig, real: Tensor | None) -> RouterOutput:
    """What the experts accept of a choice; `real` [T] is False for padding, None: there is none."""
    return apply_capacity(chosen, _capacity(config, len(chosen.indices), real))


def _capacity(config: MoEConfig, num_tokens: int, real: Tensor | None) -> int:
    """Slots per expert. Padding does not count, so that its number has to be read from the device."""
    tokens = num_tokens if real is None else int(real.sum())
    return expert_capacity(tokens, config.num_experts, config.num_experts_per_tok, config.capacity_factor)
