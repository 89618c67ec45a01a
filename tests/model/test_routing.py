"""Every router against a slow version in plain Python, written from the papers' formulas."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

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

SEEDS = st.integers(0, 2**31)
TOKENS = st.integers(1, 9)


def random_logits(tokens: int, experts: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, experts, dtype=dtype, generator=generator)


@st.composite
def shapes(draw) -> tuple[int, int, int]:
    """Tokens, experts and experts per token."""
    experts = draw(st.integers(1, 12))
    return draw(TOKENS), experts, draw(st.integers(1, experts))


@st.composite
def limited_groups(draw) -> tuple[int, int, int, int, int]:
    """Tokens, experts, groups, groups a token may use, experts per token."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    used = draw(st.integers(1, groups))
    return draw(TOKENS), groups * size, groups, used, draw(st.integers(1, used * size))


@st.composite
def equal_groups(draw) -> tuple[int, int, int, int]:
    """Tokens, experts, groups, experts per token, where a group seldom holds as many experts as a token uses."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return draw(TOKENS), groups * size, groups, groups * draw(st.integers(1, size))


# The slow versions: one token at a time, {expert: weight}, best expert first.


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-value)) for value in row]


def best(values: list[float], k: int, among: list[int] | None = None) -> list[int]:
    among = range(len(values)) if among is None else among
    return sorted(among, key=lambda index: -values[index])[:k]


def slow_topk(row, k, score, normalise, bias, groups, used, scale) -> dict[int, float]:
    scores = softmax(row) if score == "softmax" else sigmoid(row)
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(row) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    how_many = 1 if score == "softmax" else 2
    group_score = [sum(sorted((choice[e] for e in group), reverse=True)[:how_many]) for group in members]
    open_experts = [expert for group in best(group_score, used) for expert in members[group]]
    chosen = best(choice, k, open_experts)
    total = sum(scores[e] for e in chosen) + 1e-20 if normalise else 1.0
    return {e: scores[e] / total * scale for e in chosen}


def slow_grouped(row, k, groups, scale) -> dict[int, float]:
    scores, size = softmax(row), len(row) // groups
    chosen = [e for g in range(groups) for e in best(scores, k // groups, range(g * size, (g + 1) * size))]
    return {e: scores[e] * scale[e] for e in chosen}


def assert_same(output: RouterOutput, wanted: list[dict[int, float]]) -> None:
    """Same experts, in the same order, with the same weights."""
    assert output.indices.dtype == torch.int64
    assert output.indices.tolist() == [list(row) for row in wanted]
    torch.testing.assert_close(
        output.weights, output.weights.new_tensor([list(row.values()) for row in wanted]), rtol=1e-10, atol=1e-15
    )


@given(shapes(), SEEDS, st.booleans())
def test_softmax_topk(shape, seed, normalise):
    tokens, experts, k = shape
    logits = random_logits(tokens, experts, seed)
    output = route_topk(logits, k, norm_topk_prob=normalise)
    none = [0.0] * experts
    assert_same(output, [slow_topk(row, k, "softmax", normalise, none, 1, 1, 1.0) for row in logits.tolist()])
    torch.testing.assert_close(output.scores, torch.tensor([softmax(row) for row in logits.tolist()]).double())
    assert torch.equal(output.logits, logits)


@given(limited_groups(), SEEDS, st.sampled_from(["softmax", "sigmoid"]), st.booleans(), st.sampled_from([1.0, 2.5]))
def test_topk_within_the_best_groups(shape, seed, score, normalise, scale):
    tokens, experts, groups, used, k = shape
    logits = random_logits(tokens, experts, seed)
    bias = random_logits(1, experts, seed + 1)[0] if score == "sigmoid" else None
    output = route_topk(
        logits,
        k,
        score_func=score,
        norm_topk_prob=normalise,
        bias=bias,
        n_group=groups,
        topk_group=used,
        routed_scaling_factor=scale,
    )
    bias = [0.0] * experts if bias is None else bias.tolist()
    rows = logits.tolist()
    assert_same(output, [slow_topk(row, k, score, normalise, bias, groups, used, scale) for row in rows])


def test_the_bias_selects_but_does_not_weigh():
    logits = torch.tensor([[2.0, 0.0, -2.0]])
    output = route_topk(logits, 1, score_func="sigmoid", bias=torch.tensor([0.0, 0.0, 5.0]))
    assert output.indices.tolist() == [[2]]
    assert output.weights.item() == pytest.approx(1 / (1 + math.exp(2)))


@given(shapes(), SEEDS)
def test_topk_then_softmax_is_softmax_over_the_chosen(shape, seed):
    tokens, experts, k = shape
    logits = random_logits(tokens, experts, seed)
    output = route_topk_softmax(logits, k)
    wanted = []
    for row in logits.tolist():
        chosen = best(row, k)
        wanted.append(dict(zip(chosen, softmax([row[e] for e in chosen]), strict=True)))
    assert_same(output, wanted)
    torch.testing.assert_close(output.weights, route_topk(logits, k, norm_topk_prob=True).weights)


@given(shapes(), SEEDS)
def test_noise_is_normal_times_softplus_and_absent_in_evaluation(shape, seed):
    tokens, experts, k = shape
    logits, noise_logits = random_logits(tokens, experts, seed), random_logits(tokens, experts, seed + 1)
    noise = torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    noisy = [
        [value + eps * math.log1p(math.exp(width)) for value, eps, width in zip(*rows, strict=True)]
        for rows in zip(logits.tolist(), noise.tolist(), noise_logits.tolist(), strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    output = route_noisy_topk(logits, noise_logits, k, training=True, generator=generator)
    torch.testing.assert_close(output.logits, torch.tensor(noisy, dtype=torch.float64))
    assert output.indices.tolist() == [best(row, k) for row in noisy]
    quiet = route_noisy_topk(logits, noise_logits, k, training=False)
    assert all(map(torch.equal, quiet, route_topk_softmax(logits, k)))


@given(TOKENS, st.integers(1, 12), SEEDS)
def test_switch_takes_the_likeliest_expert_with_its_probability(tokens, experts, seed):
    logits = random_logits(tokens, experts, seed)
    wanted = []
    for row in logits.tolist():
        probability = softmax(row)
        expert = best(probability, 1)[0]
        wanted.append({expert: probability[expert]})
    assert_same(route_switch(logits), wanted)


@given(TOKENS, st.integers(2, 8), SEEDS, st.data())
def test_expert_choice_gives_every_expert_its_best_tokens(tokens, experts, seed, data):
    logits = random_logits(tokens, experts, seed)
    capacity = data.draw(st.integers(1, tokens))
    output = route_expert_choice(logits, capacity)
    scores = [softmax(row) for row in logits.tolist()]
    taken = [best([scores[t][e] for t in range(tokens)], capacity) for e in range(experts)]
    for token in range(tokens):
        for expert in range(experts):
            chosen = token in taken[expert]
            assert output.indices[token, expert] == (expert if chosen else experts)
            assert output.weights[token, expert].item() == pytest.approx(scores[token][expert] * chosen)
    assert torch.bincount(output.indices.flatten(), minlength=experts + 1)[:experts].tolist() == [capacity] * experts


def test_expert_choice_looks_ahead():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert route_expert_choice(logits, 1).indices[0].tolist() == [0, 2]
    logits[1, 0] = 5.0  # the second token now suits expert 0 better, and the first loses it
    assert route_expert_choice(logits, 1).indices[0].tolist() == [2, 1]


@given(equal_groups(), SEEDS)
def test_grouped_takes_the_same_number_from_every_group(shape, seed):
    tokens, experts, groups, k = shape
    logits, scale = random_logits(tokens, experts, seed), random_logits(1, experts, seed + 1)[0].exp()
    output = route_grouped(logits, k, groups, router_scale=scale)
    assert_same(output, [slow_grouped(row, k, groups, scale.tolist()) for row in logits.tolist()])
    for row in output.indices.tolist():
        assert [e // (experts // groups) for e in row] == [g for g in range(groups) for _ in range(k // groups)]
    plain = route_grouped(logits, k, groups)
    assert_same(plain, [slow_grouped(row, k, groups, [1.0] * experts) for row in logits.tolist()])


def test_grouped_by_hand():
    """6 experts in 2 groups of 3, 2 a token: a group offset of k, or of k per group, would give other experts."""
    probabilities = torch.tensor([[0.1, 0.4, 0.05, 0.15, 0.05, 0.25]])
    scale = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 2.0])
    output = route_grouped(probabilities.log(), 2, 2, router_scale=scale)
    assert output.indices.tolist() == [[1, 5]]
    torch.testing.assert_close(output.weights, torch.tensor([[0.2, 0.5]]))


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=9), st.integers(1, 70), st.integers(0, 1000), st.data())
def test_hash_gives_a_token_its_hashed_expert_and_the_next_ones(ids, experts, seed, data):
    k = data.draw(st.integers(1, experts))
    output = route_hash(torch.tensor(ids), experts, k, seed)
    for token, row in zip(ids, output.indices.tolist(), strict=True):
        first = slow_hash(token, seed) % experts
        assert row == [(first + i) % experts for i in range(k)]
    torch.testing.assert_close(output.weights, torch.full((len(ids), k), 1 / k))
    torch.testing.assert_close(output.scores.sum(-1), torch.ones(len(ids)))
    assert torch.equal(output.scores.gather(1, output.indices), output.weights)


def slow_hash(token: int, seed: int) -> int:
    """Python's integers never overflow, so they show whether the 64-bit version does."""
    mixed = (token + 1) * 0x9E3779B1 + seed * 0x85EBCA77
    for _ in range(2):
        mixed %= 2**31
        mixed = (mixed ^ (mixed // 2**15)) * 0x2C1B3C6D
    return mixed % 2**31 // 2**8


@pytest.mark.parametrize("experts", [3, 64])
def test_hash_spreads_a_vocabulary_evenly(experts):
    """Chi-square of the load of 20 000 tokens, 5 standard deviations wide on both sides."""
    load = torch.bincount(route_hash(torch.arange(20_000), experts).indices.flatten(), minlength=experts).double()
    chi_square = ((load - load.mean()) ** 2 / load.mean()).sum().item()
    assert abs(chi_square - (experts - 1)) < 5 * math.sqrt(2 * (experts - 1))


def test_hash_seeds_are_independent():
    """Two tables agree on 1 token in E, as two random tables do."""
    one, two = (route_hash(torch.arange(8000), 8, seed=seed).indices for seed in (0, 1))
    assert (one == two).double().mean().item() == pytest.approx(1 / 8, abs=0.02)


def test_hash_is_the_same_on_every_machine():
    table = route_hash(torch.arange(4096), 64, seed=7).indices.flatten().tolist()
    digest = hashlib.sha256(bytes(table)).hexdigest()
    assert digest == "4c27c80d6d26c178c683de9d56b60e8ffd1dff9237de91c5b48ab99394520c4c"


ROUTES = {
    "softmax": lambda logits: route_topk(logits, 4),
    "softmax, normalised": lambda logits: route_topk(logits, 4, norm_topk_prob=True),
    "sigmoid and bias in groups": lambda logits: route_topk(
        logits, 4, score_func="sigmoid", bias=torch.linspace(-1, 1, 12), n_group=4, topk_group=2
    ),
    "softmax in groups": lambda logits: route_topk(logits, 4, n_group=4, topk_group=2),
    "top-k then softmax": lambda logits: route_topk_softmax(logits, 4),
    "noisy": lambda logits: route_noisy_topk(logits, logits, 4, training=True),
    "switch": route_switch,
    "expert choice": lambda logits: route_expert_choice(logits, 1),
    "grouped": lambda logits: route_grouped(logits, 4, 2),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@given(tokens=TOKENS, seed=SEEDS, size=st.sampled_from([0.0, 1.0, 100.0]))
def test_weights_are_not_negative_and_experts_distinct(route, tokens, seed, size):
    """Also when all logits are equal, and when they are so far apart that probabilities underflow."""
    output = route(size * random_logits(tokens, 12, seed, torch.float32))
    assert output.weights.shape == output.indices.shape
    assert (output.weights >= 0).all() and output.weights.isfinite().all()
    for row in output.indices.tolist():
        filled = [expert for expert in row if expert != 12]
        assert len(set(filled)) == len(filled) and all(0 <= expert < 12 for expert in filled)


@given(shapes(), SEEDS)
def test_relabelling_the_experts_relabels_the_choice(shape, seed):
    tokens, experts, k = shape
    logits = random_logits(tokens, experts, seed)
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    for route in (route_topk, route_topk_softmax):
        plain, moved = route(logits, k), route(logits[:, order], k)
        assert torch.equal(order[moved.indices], plain.indices)
        torch.testing.assert_close(moved.weights, plain.weights)


def router_gradient(route) -> torch.Tensor:
    logits = random_logits(5, 4, 0).requires_grad_()
    (route(logits).weights * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    return logits.grad


def test_one_expert_after_the_choice_teaches_the_router_nothing():
    """Softmax over a single chosen logit is the constant 1, however it is written."""
    assert (router_gradient(lambda logits: route_topk_softmax(logits, 1)) == 0).all()
    normalised = router_gradient(lambda logits: route_topk(logits, 1, norm_topk_prob=True))
    torch.testing.assert_close(normalised, torch.zeros(5, 4).double(), rtol=0, atol=1e-14)
    assert (router_gradient(route_switch).abs().sum(-1) > 1e-3).all()


def test_noise_width_is_learned():
    logits, noise_logits = random_logits(4, 5, 0), random_logits(4, 5, 1).requires_grad_()

    def weights(width):
        generator = torch.Generator().manual_seed(3)
        return route_noisy_topk(logits, width, 3, training=True, generator=generator).weights

    assert torch.autograd.gradcheck(weights, noise_logits)
    (grad,) = torch.autograd.grad(weights(noise_logits)[:, 0].sum(), noise_logits)
    assert (grad.abs().sum(-1) > 0).all()


# transformers as the oracle.


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("family", "name"), [("qwen2_moe", "Qwen2Moe"), ("olmoe", "Olmoe")])
def test_equals_transformers_softmax_routers(family, name, normalise):
    import transformers

    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["modeling"])
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, num_experts=10, num_experts_per_tok=3, norm_topk_prob=normalise
    )
    router = getattr(module, f"{name}TopKRouter")(config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(40, 16)
    _, weights, indices = router(x)
    output = route_topk(F.linear(x, router.weight), 3, norm_topk_prob=normalise)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.weights, weights)


@pytest.mark.parametrize("normalise", [False, True])
def test_equals_transformers_deepseek_v3(normalise):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16,
        num_attention_heads=2,
        n_routed_experts=12,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.normal_()
    x = torch.randn(40, 16)
    logits, weights, indices = router(x)
    output = route_topk(
        logits,
        4,
        score_func="sigmoid",
        norm_topk_prob=normalise,
        bias=router.e_score_correction_bias,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    assert_same_choice(output, weights, indices)


def test_equals_transformers_deepseek_v2():
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = DeepseekV2Config(
        hidden_size=16,
        num_attention_heads=2,
        n_routed_experts=12,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    )
    router = DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    logits, weights, indices = router(torch.randn(40, 16))
    output = route_topk(logits, 4, n_group=4, topk_group=2, routed_scaling_factor=16.0)
    assert_same_choice(output, weights, indices)


def assert_same_choice(output: RouterOutput, weights: torch.Tensor, indices: torch.Tensor) -> None:
    """DeepSeek's routers return the chosen experts in no particular order."""
    ours, theirs = output.indices.argsort(-1), indices.argsort(-1)
    assert torch.equal(output.indices.gather(1, ours), indices.gather(1, theirs))
    torch.testing.assert_close(output.weights.gather(1, ours), weights.gather(1, theirs))


LOGITS = torch.zeros(3, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route_topk(LOGITS, 7), "k=7: wanted 1 to 6, the number of experts"),
        (lambda: route_topk(LOGITS, 0), "k=0: wanted 1 to 6"),
        (lambda: route_topk_softmax(LOGITS, 7), "k=7: wanted 1 to 6"),
        (lambda: route_topk(LOGITS, 1, score_func="relu"), "score_func='relu': wanted 'softmax' or 'sigmoid'"),
        (lambda: route_topk(LOGITS, 1, n_group=4), "n_group=4: wanted a divisor of the 6 experts"),
        (lambda: route_topk(LOGITS, 1, n_group=3, topk_group=4), "topk_group=4: wanted 1 to n_group=3"),
        (lambda: route_topk(LOGITS, 3, n_group=3, topk_group=1), "topk_group=1: .* of 2 that hold k=3"),
        (lambda: route_grouped(LOGITS, 2, 4), "n_group=4: wanted a divisor of the 6 experts"),
        (lambda: route_grouped(LOGITS, 2, 0), "n_group=0: wanted a divisor of the 6 experts"),
        (lambda: route_grouped(LOGITS, 2, 3), "k=2: wanted a multiple of n_group=3"),
        (lambda: route_expert_choice(LOGITS, 0), "capacity=0: wanted 1 to 3, the number of tokens"),
        (lambda: route_expert_choice(LOGITS, 4), "capacity=4: wanted 1 to 3"),
        (lambda: route_hash(torch.tensor([1]), 4, 5), "k=5: wanted 1 to num_experts=4"),
        (lambda: route_topk(torch.zeros(1, 3, 6), 2), r"shape \(1, 3, 6\): wanted \[tokens, experts\]"),
        (lambda: route_expert_choice(torch.zeros(1, 3, 6), 2), r"shape \(1, 3, 6\): wanted \[tokens, experts\]"),
    ],
)
def test_impossible_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_logit_that_is_no_number_is_refused(route):
    logits = torch.zeros(3, 12)
    for bad in (math.nan, math.inf, -math.inf):
        logits[1, 2] = bad
        with pytest.raises(ValueError, match=r"router logits of token 1 are .*: wanted finite numbers \(1 of 3 tokens"):
            route(logits)
