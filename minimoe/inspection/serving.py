"""What it costs to serve a mixture: what a step reads and computes, which experts are touched, kept or far away.

Generating is a walk through memory: every step reads each weight that some token of the batch meets, and each
sequence's cache, for a few operations on each number (Pope et al. 2022, arXiv 2211.05102). Formulas here take a
configuration, measurements a `RoutingTrace`; tests hold the formulas against what the code of this kit does.

Shapes: T tokens of a step, E experts, K experts per token, L sparse layers.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimoe.inspection.trace import RoutingTrace
from minimoe.model.config import MoEConfig, require
from minimoe.model.transformer import MoEForCausalLM

POLICIES = ("lru", "load")  # what a cache gives up: the expert that was used longest ago, or that is used least


class Step(NamedTuple):
    """What one forward pass reads from memory, in bytes, and what it computes."""

    weights: float  # outside the routed experts: attention, shared experts, routers, norms, head, rows of the embedding
    experts: float  # the routed experts that some token chose
    cache: float  # keys and values, or latents, of the positions before
    flop: float  # 2 for each token and each weight that it meets

    @property
    def read(self) -> float:
        """All bytes."""
        return self.weights + self.experts + self.cache

    def seconds(self, bandwidth: float, compute: float) -> float:
        """The time that the slower of the two takes, at `bandwidth` bytes and `compute` operations a second.

        That is the roofline (Williams et al. 2009): a bound from below, which real code does not reach.
        """
        return max(self.read / bandwidth, self.flop / compute)


def step(
    config: MoEConfig,
    *,
    sequences: int = 1,
    new: int = 1,
    past: int = 0,
    bits: float = 16,
    expert_bits: float | None = None,
    distinct: float | None = None,
) -> Step:
    """One forward pass of `sequences` texts, by `new` tokens each, after `past` that are cached.

    new = 1 is a step of decoding, new = the length of the prompt and past = 0 is prefill. Left out are activations,
    the scales of numbers in few bits, and what attention spends on comparing tokens, which grows with the context.

    Args:
        bits: of a weight and of a number in the cache.
        expert_bits: of a weight of a routed expert; None: the same.
        distinct: of each sparse layer, how many experts the tokens touch; None: as under uniform routing.
    """
    tokens, hidden, layers = sequences * new, config.hidden_size, config.num_hidden_layers
    sparse, size = sum(map(config.is_sparse, range(layers))), expert_size(config)
    if distinct is None and sparse:
        distinct = distinct_experts(config.num_experts, config.num_experts_per_tok, tokens)
    table = 0 if config.tie_word_embeddings else config.vocab_size * hidden  # an embedding that is looked up alone
    met = config.num_parameters() - sparse * config.num_experts * size - table
    rows = 0 if config.tie_word_embeddings else min(tokens, config.vocab_size) * hidden
    flop = 2 * tokens * (config.num_parameters(active=True) - table)
    experts = sparse * (distinct or 0) * size * (expert_bits or bits) / 8
    return Step((met + rows) * bits / 8, experts, sequences * cache_bytes(config, past, bits), flop)


def expert_size(config: MoEConfig) -> int:
    """The parameters of one routed expert; 0 of a dense model."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return (3 * hidden * width + config.moe_bias * (2 * width + hidden)) if config.num_experts else 0


def cache_bytes(config: MoEConfig, positions: int, bits: float = 16) -> float:
    """What the cache of one text holds after so many positions.

    Of each layer and position, keys and values of `num_key_value_heads` heads (Ainslie et al. 2023, arXiv 2305.13245);
    or, with latent attention, one latent and one rotary key for all heads (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    A sliding window does not shorten it here; an engine may drop what no query will see again.
    """
    numbers = 2 * config.num_key_value_heads * config.head_dim
    if config.kv_lora_rank is not None:
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * positions * numbers * bits / 8


def distinct_experts(num_experts: int, k: int, tokens: int) -> float:
    """How many experts of a layer T tokens touch, in the mean: E (1 - (1 - K / E)^T).

    If each token chooses its K experts evenly and by itself: an expert is missed by one token with 1 - K / E.
    """
    require(0 < k <= num_experts, "k", k, f"1 to num_experts={num_experts}")
    return num_experts * (1 - (1 - k / num_experts) ** tokens)


def distinct_in(trace: RoutingTrace, tokens: int, *, draws: int = 100, seed: int = 0) -> np.ndarray:
    """How many experts of each layer `tokens` tokens of a trace touch, [L] float64: the mean over random batches.

    The tokens of a batch are drawn from the whole trace, as requests of strangers come together, each once.
    Raises ValueError: the trace has fewer tokens.
    """
    require(0 < tokens <= len(trace), "tokens", tokens, f"1 to {len(trace)}, those of the trace")
    rng, counts = np.random.default_rng(seed), np.zeros(trace.num_layers)
    for _ in range(draws):
        drawn = trace.indices[:, rng.choice(len(trace), tokens, replace=False)]
        counts += [len(np.unique(layer[layer < trace.num_experts])) for layer in drawn]
    return counts / draws


def hit_rates(trace: RoutingTrace, held: int, policy: str = "lru") -> np.ndarray:
    """Of the experts that tokens ask for one after the other, the share that a cache has, by layer, [L] float64.

    The fast memory holds `held` experts of each layer, and the others are far away (Eliseev & Mazur 2023, arXiv
    2312.17238, section 3.1, which uses "lru"). Whatever is asked for is brought in, and something else leaves.

    Args:
        policy: "lru" gives up the expert that was used longest ago, "load" the one that was used least so far.

    Raises ValueError: `held` is not 1 to E, or there is no such policy.
    """
    require(1 <= held <= trace.num_experts, "held", held, f"1 to {trace.num_experts}, the experts of a layer")
    require(policy in POLICIES, "policy", policy, f"one of {', '.join(POLICIES)}")
    asked = [layer[layer < trace.num_experts].tolist() for layer in trace.indices]
    return np.array([_hits(experts, held, policy) / len(experts) for experts in asked])


def _hits(asked: list[int], held: int, policy: str) -> int:
    hits, uses, kept = 0, Counter(), {}  # what is kept, and how much it is worth keeping
    for now, expert in enumerate(asked):
        hits += expert in kept
        uses[expert] += 1
        if expert not in kept and len(kept) == held:
            del kept[min(kept, key=kept.get)]
        kept[expert] = (0 if policy == "lru" else uses[expert], now)
    return hits


def same_choices(one: RoutingTrace, other: RoutingTrace) -> np.ndarray:
    """Of the experts that a token was given in one trace, the share that it was given in the other too, [L] float64.

    Raises ValueError: the traces are not of the same tokens and layers.
    """
    same = one.indices.shape == other.indices.shape and np.array_equal(one.token_ids, other.token_ids)
    require(same, "other", other, f"a trace of the same tokens as {one}")
    both = (one.indices[..., :, None] == other.indices[..., None, :]) & (one.indices < one.num_experts)[..., None]
    return both.sum((1, 2, 3)) / (one.indices < one.num_experts).sum((1, 2))


@torch.no_grad()
def changed_by_others(model: MoEForCausalLM, input_ids: Tensor, others: Tensor) -> float:
    """How far the logits of one request, input_ids [1, S], move when `others` [B, S] share its batch: the largest.

    With a capacity, tokens compete for the slots of an expert, across requests; without one, only rounding is left.
    """
    alone = model(input_ids).logits
    together = model(torch.cat([others, input_ids])).logits[-1:]
    return (together - alone).abs().max().item()
