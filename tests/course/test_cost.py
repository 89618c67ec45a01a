"""Experts on devices, against a loop over tokens. (Training by formula: test_figures_twins.py and the exercise.)"""

import numpy as np
import pytest
import torch

from minimoe.course.cost import place_experts


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
