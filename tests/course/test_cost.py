"""What training costs by the formula and as torch counts it; experts on devices, against a loop over tokens."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minimoe.course.cost import crossings, place_experts, popular_logits, training_flop
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training.presets import small_config

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
CONFIGS = {
    "tied": small_config(),
    "untied": MoEConfig(**SHAPE, num_experts=16, num_experts_per_tok=4, tie_word_embeddings=False),
    "shared expert, few keys": MoEConfig(
        **SHAPE, num_key_value_heads=2, num_experts=64, moe_intermediate_size=16, shared_expert_intermediate_size=32
    ),
}


def counted(config, ids):
    """The matrix products of one real forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        MoEForCausalLM(config)(ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_formula_agrees_with_what_torch_counts(config):
    assert counted(config, torch.arange(8)[None]) == pytest.approx(training_flop(config, 8), rel=5e-3)


def test_what_the_formula_leaves_out_is_attentions_comparing():
    """Counted with attention as two matrix products, each S x S x head_dim for each head, forwards and twice back."""
    config, ids = small_config(), torch.zeros(2, 32, dtype=torch.int64)
    counts = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            counts.append(counted(config, ids))
    per_token = 12 * 32 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert counts[1] - counts[0] == per_token * ids.numel()


def brute_force(experts, k, devices, skew, tokens, seed=0):
    """Token by token, with lists: work of each device and mean probability kept, for both rules."""
    draw = torch.Generator().manual_seed(seed)
    rank = 1 + torch.randperm(experts, generator=draw)
    uniform = torch.rand(tokens, experts, generator=draw, dtype=torch.float64).numpy()
    # popularity * Exp(1)^-1 has the softmax that log popularity + Gumbel noise has
    odds = rank.double().numpy() ** -float(skew) / -np.log(uniform)
    size = experts // devices
    results = []
    for grouped in (False, True):
        work, kept = [0] * devices, 0.0
        for token in odds:
            best = sorted(range(experts), key=lambda e: -token[e])
            if grouped:
                chosen = [e for g in range(devices) for e in [e for e in best if e // size == g][: k // devices]]
            else:
                chosen = best[:k]
            for e in chosen:
                work[e // size] += 1
            kept += token[chosen].sum() / token.sum() / tokens
        results.append((np.array(work) / np.mean(work), kept))
    return results


def test_placing_is_what_a_loop_over_tokens_counts():
    for setting in (
        (8, 2, 2, 0.0, 30),
        (12, 6, 3, 1.5, 25),
        (16, 4, 4, 1.0, 40),
        (6, 6, 2, 0.5, 9),
        (5, 2, 1, 1.0, 20),
    ):
        placed = place_experts(*setting)
        assert list(placed) == ["top-k", "MoGE"]
        for found, (work, kept) in zip(placed.values(), brute_force(*setting), strict=True):
            np.testing.assert_allclose(found.work.sum(-1), work)
            assert (found.work.diff(dim=-1) <= 0).all()  # the busiest expert first
            assert found.kept == pytest.approx(kept)
            assert found.time == pytest.approx(work.max())


def test_groups_take_perfect_time_and_never_keep_more():
    for skew in (0.0, 1.0, 2.0):
        topk, moge = place_experts(32, 8, 4, skew, 100).values()
        assert moge.time == 1 < topk.time
        assert moge.kept < topk.kept < 1


def test_first_choices_follow_zipf():
    experts, tokens = 6, 20_000
    for skew in (0.0, 1.0, 2.0):
        work = place_experts(experts, 1, 1, skew, tokens)["top-k"].work[0]
        popularity = np.arange(1, experts + 1) ** -skew
        np.testing.assert_allclose(work, popularity / popularity.sum(), atol=0.012)


def test_what_cannot_be_placed_is_explained():
    for setting, message in (
        ((10, 8, 4), "experts=10: wanted a multiple of devices=4"),
        ((64, 6, 4), "k=6: wanted a multiple of devices=4 up to experts=64"),
        ((8, 16, 8), "k=16: wanted a multiple of devices=8 up to experts=8"),
    ):
        with pytest.raises(ValueError, match=message):
            place_experts(*setting, 1.0, 10)


def test_crossings_by_a_loop_over_tokens():
    """Groups hold a token back: by DeepSeek-V3's rule it meets 4 of 8 nodes at most, as each is a group there."""
    groups = {"score_func": "sigmoid", "n_group": 8, "topk_group": 4}
    free, bound = (MoEConfig(num_experts=64, num_experts_per_tok=8, **more) for more in ({}, groups))
    found = crossings(free, 8, devices=2, tokens=500)
    nodes, places = [], []
    for logits in popular_logits(64, 0.0, 500):
        chosen = logits.topk(8).indices.tolist()
        nodes.append(len({expert // 8 for expert in chosen} - {0}))
        places.append(len({expert // 4 for expert in chosen} - {0}))
    assert found == pytest.approx((np.mean(nodes), np.mean(places)))
    assert crossings(bound, 8, devices=2, tokens=500).nodes < min(4, found.nodes)
    assert crossings(free, 1, devices=2).nodes == 0
    assert crossings(free, 64, devices=2, tokens=99) == crossings(free, 32, devices=2, tokens=99)
    with pytest.raises(ValueError, match="nodes=3: wanted so many that 3 x 2 devices hold as many of 64 experts each"):
        crossings(free, 3, devices=2)
