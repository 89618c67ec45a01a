"""What a model costs, without a measurement: training by a formula, and a step on many devices by a simulation."""

from typing import NamedTuple

import torch
from torch import Tensor

from minimoe.model import MoEConfig, route_grouped, route_topk
from minimoe.model.balance import expert_load
from minimoe.model.config import require


def training_flop(config: MoEConfig, tokens: int) -> int:
    """Floating-point operations to train on `tokens` tokens: 6 for each token and each weight that it meets.

    A weight costs a token one multiplication and one addition forwards, and twice that backwards (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1). An embedding that is no output head at the same time is looked up and costs
    nothing; the head counts here, unlike there, because it is a large part of a small model.

    Left out, as there, is what attention spends on comparing tokens with each other: in texts of S tokens up to
    12 x S x num_attention_heads x head_dim for each token and layer, half of that where the tokens still to come are
    skipped. It is a small part of a wide model, not of a narrow one, and it is the same for a mixture and a dense model
    with the same attention: so the formula makes the dearer of the two look dearer still.
    """
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * (config.num_parameters(active=True) - looked_up) * tokens


class Placed(NamedTuple):
    """What one rule makes of a batch whose experts lie on devices."""

    work: Tensor  # [devices, experts on each]: slots, in units of an even share for a device; the busiest first
    kept: float  # of the router's probability, the part that goes to the chosen experts; mean over tokens

    @property
    def time(self) -> float:
        """Of the slowest device, and so of the step, in units of perfect balance."""
        return self.work.sum(-1).max().item()


def place_experts(experts: int, k: int, devices: int, skew: float, tokens: int, *, seed: int = 0) -> dict[str, Placed]:
    """Route one batch by "top-k" and by "MoGE", with the experts placed on devices in blocks of neighbours.

    The logits are those of `popular_logits`. A token meets k experts; those of a device are one group of MoGE. Raises
    ValueError where `experts` or `k` is no multiple of `devices`, or k is more than the experts.
    """
    require(experts % devices == 0, "experts", experts, f"a multiple of devices={devices}, to place as many on each")
    fits = f"a multiple of devices={devices} up to experts={experts}, as MoGE takes as many from each"
    require(k % devices == 0 and k <= experts, "k", k, fits)
    logits, placed = popular_logits(experts, skew, tokens, seed), {}
    for rule, output in (("top-k", route_topk(logits, k)), ("MoGE", route_grouped(logits, k, devices))):
        load = expert_load(output.indices, experts).double().view(devices, -1)
        work = load.sort(descending=True).values / (tokens * k / devices)
        placed[rule] = Placed(work, output.weights.sum(-1).mean().item())
    return placed


def popular_logits(experts: int, skew: float, tokens: int, seed: int = 0) -> Tensor:
    """Router logits [tokens, experts] float64 that make some experts popular.

    The expert of popularity rank r = 1, 2, ... is the first choice of a share of tokens in proportion to r ** -skew
    (Zipf's law; Gumbel noise makes it so), and 0 makes all equally popular. Which expert has which rank is drawn at
    random.
    """
    draw = torch.Generator().manual_seed(seed)
    rank = 1 + torch.randperm(experts, generator=draw)
    gumbel = -(-torch.rand(tokens, experts, generator=draw, dtype=torch.float64).log()).log()
    return gumbel - skew * rank.log()


class Crossing(NamedTuple):
    """What a token sends when the experts of a layer lie on nodes of several devices; means over tokens."""

    nodes: float  # to how many other nodes it goes: one copy each, which the node hands on
    devices: float  # to how many other devices


def crossings(config: MoEConfig, nodes: int, *, devices: int = 8, tokens: int = 4096, seed: int = 0) -> Crossing:
    """Simulate where tokens of the first device go, by `route_topk` in the groups of `config`, all experts alike.

    Experts lie in blocks of neighbours, as many on each device. Where there are more devices than experts, each circle
    of nodes that holds them all keeps to itself. Raises ValueError where devices cannot hold as many each.
    """
    circle, experts = min(nodes * devices, config.num_experts), config.num_experts
    wanted = f"so many that {nodes} x {devices} devices hold as many of {experts} experts each"
    require(experts % circle == 0, "nodes", nodes, wanted)
    options = {"score_func": config.score_func, "n_group": config.n_group, "topk_group": config.topk_group}
    logits = popular_logits(experts, 0.0, tokens, seed)
    chosen = route_topk(logits, config.num_experts_per_tok, **options).indices
    return Crossing(*(_others(chosen // size) for size in (experts // circle * devices, experts // circle)))


def _others(places: Tensor) -> float:
    """Of places [tokens, K], 0 is one's own: how many different others there are, in the mean."""
    met = torch.zeros(len(places), int(places.max()) + 1, dtype=torch.float64).scatter(1, places, 1.0)
    return met[:, 1:].sum(1).mean().item()
