"""Forward and backward of the experts of one layer: ours, transformers', and a dense MLP with as much arithmetic.

    python -m benchmarks.moe_layer [--rounds N] [--threads 1 2] [--json FILE]

The peers start from the same hidden states [T, H], indices [T, K], weights [T, K] and expert weights, and end at the
output [T, H] and the gradients of hidden states, weights and expert weights. That all of these agree is
asserted before anything is timed. Two yardsticks do no routing and have the same N = T * K rows to work on at once:

- dense SwiGLU: the same operations, down(silu(gate(x)) * up(x)). The targets refer to this one.
- matrix products: gate(x), up(x) and down of the former, with neither silu nor multiplication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.timing import Target, finish, measure, parse_arguments, report, torch_threads
from minimoe.model import Experts, MoEConfig, route_topk

OURS = "minimoe sorted"
DENSE = "dense SwiGLU"


class Size(NamedTuple):
    tokens: int  # T
    hidden: int  # H
    width: int  # I
    experts: int  # E
    k: int  # K


FEW = 64  # tokens, as when a model generates or is fine-tuned on short texts: the overhead is most of the time
SIZES = (
    Size(4096, 128, 256, 8, 2),
    Size(2048, 128, 128, 64, 8),
    *(Size(tokens, 128, 256, 8, 2) for tokens in (1, 16, FEW)),
)

Step = Callable[[], tuple[Tensor, ...]]  # runs forward and backward once


class Problem(NamedTuple):
    """What all peers are given: the leaves of the graph, the choice of experts and the gradient of the output."""

    hidden_states: Tensor  # [T, H]
    indices: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    gate: Tensor  # [E, I, H]
    up: Tensor  # [E, I, H]
    down: Tensor  # [E, H, I]
    output_gradient: Tensor  # [T, H]


def make_problem(size: Size, seed: int = 0) -> Problem:
    """Random tokens, routed by a random router: every expert gets about the same number of tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    tokens, hidden, width, experts, k = size
    chosen = route_topk(normal(tokens, experts), k, norm_topk_prob=True)
    return Problem(
        hidden_states=normal(tokens, hidden).requires_grad_(),
        indices=chosen.indices,
        weights=chosen.weights.requires_grad_(),
        gate=normal(experts, width, hidden, std=hidden**-0.5).requires_grad_(),
        up=normal(experts, width, hidden, std=hidden**-0.5).requires_grad_(),
        down=normal(experts, hidden, width, std=width**-0.5).requires_grad_(),
        output_gradient=normal(tokens, hidden),
    )


def layer_peers(size: Size, problem: Problem) -> dict[str, Step]:
    """Every mixture under test. A step returns the output and the gradients of the five leaves of `problem`."""
    ours = {f"minimoe {name}": _our_step(size, problem, name) for name in ("sorted", "eager", "grouped")}
    theirs = {f"transformers {name}": _their_step(size, problem, name) for name in ("eager", "grouped_mm")}
    return ours | theirs


def _our_step(size: Size, problem: Problem, implementation: str) -> Step:
    config = MoEConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=size.width,
        num_experts=size.experts,
        num_experts_per_tok=size.k,
        experts_implementation=implementation,
    )
    experts = Experts(config)
    parameters = {"gate_proj": problem.gate, "up_proj": problem.up, "down_proj": problem.down}
    experts.load_state_dict(parameters, assign=True)
    leaves = (problem.hidden_states, problem.weights, *experts.parameters())

    def step() -> tuple[Tensor, ...]:
        output = experts(problem.hidden_states, problem.indices, problem.weights)
        return output, *torch.autograd.grad(output, leaves, problem.output_gradient)

    return step


def _their_step(size: Size, problem: Problem, implementation: str) -> Step:
    config = MixtralConfig(
        hidden_size=size.hidden,
        intermediate_size=size.width,
        num_local_experts=size.experts,
        num_experts_per_tok=size.k,
        experts_implementation=implementation,
    )
    experts = MixtralExperts(config)
    gate_up = torch.cat([problem.gate, problem.up], dim=1).detach()
    experts.load_state_dict({"gate_up_proj": gate_up, "down_proj": problem.down}, assign=True)
    leaves = (problem.hidden_states, problem.weights, experts.gate_up_proj, experts.down_proj)

    def step() -> tuple[Tensor, ...]:
        output = experts(problem.hidden_states, problem.indices, problem.weights)
        hidden_states, weights, gate_up, down = torch.autograd.grad(output, leaves, problem.output_gradient)
        return output, hidden_states, weights, *gate_up.chunk(2, dim=1), down

    return step


def yardsticks(size: Size, problem: Problem) -> dict[str, Step]:
    """One dense expert for all N = T * K rows, as an MLP and as its bare matrix products."""
    x = problem.hidden_states.detach().repeat_interleave(size.k, dim=0).requires_grad_()
    gate, up, down = (fused[0].detach().requires_grad_() for fused in (problem.gate, problem.up, problem.down))
    leaves = (x, gate, up, down)
    output_gradient = problem.output_gradient.repeat_interleave(size.k, dim=0)
    inner_gradient = x.new_ones(len(x), size.width)

    def dense() -> tuple[Tensor, ...]:
        output = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return output, *torch.autograd.grad(output, leaves, output_gradient)

    def products() -> tuple[Tensor, ...]:
        outputs = F.linear(F.linear(x, gate), down), F.linear(x, up)
        return *outputs, *torch.autograd.grad(outputs, leaves, (output_gradient, inner_gradient))

    return {DENSE: dense, "matrix products": products}


def assert_same_results(peers: Mapping[str, Step]) -> None:
    """Every peer must compute what the first one does, gradients included.

    Raises:
        AssertionError: naming the peer and the tensor.
    """
    names = ("output", "d hidden_states", "d weights", "d gate", "d up", "d down")
    reference = next(iter(peers.values()))()
    for peer, step in peers.items():
        for name, found, wanted in zip(names, step(), reference, strict=True):
            tolerance = 1e-5 * float(wanted.detach().abs().max())
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=tolerance, msg=lambda text, who=f"{peer}, {name}": f"{who}: {text}"
            )


def targets(size: Size, threads: int) -> list[Target]:
    """Never slower than transformers' grouped_mm, faster than its eager path; on one thread a share of dense speed.

    Few tokens are only compared with mixtures: a dense MLP reads the weights of one expert, a mixture those of all.
    """
    many = size.experts > 16
    found = [Target("transformers grouped_mm", 1.0), Target("transformers eager", 1.7 if many else 1.05)]
    if threads == 1 and size.tokens > FEW:
        found.append(Target(DENSE, 0.60, aim=0.75) if many else Target(DENSE, 0.70, aim=0.85))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    arguments = parse_arguments("Time the experts of one MoE layer, forward and backward.", argv, rounds=40)
    results: list[dict[str, Any]] = []
    for size in SIZES:
        problem = make_problem(size)
        peers = layer_peers(size, problem)
        assert_same_results(peers)
        for threads in arguments.threads:
            with torch_threads(threads):
                seconds = measure(peers | yardsticks(size, problem), arguments.rounds)
            title = f"T {size.tokens}, H {size.hidden}, I {size.width}, E {size.experts}, K {size.k}, threads {threads}"
            result = report(title, seconds, OURS, targets(size, threads))
            results.append({"size": size._asdict(), "threads": threads} | result)
    finish("moe_layer", results, arguments.json)


if __name__ == "__main__":
    main()
