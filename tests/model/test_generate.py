"""Generation against a plain loop over forward passes; sampling against the distribution it claims."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.transformer import _pick

VOCABULARY = 20


def build(**settings) -> MoEForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MoEConfig(**sizes | {"num_experts": 6, "intermediate_size": 10, "initializer_range": 0.6} | settings)
    return MoEForCausalLM(config, seed=3)


PROMPT = torch.tensor([[1, 2, 3], [7, 8, 9]])


def slow_greedy(model: MoEForCausalLM, ids: Tensor, steps: int) -> Tensor:
    """Each sequence by itself, computed anew at every step."""
    rows = []
    for row in ids.tolist():
        for _ in range(steps):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        rows.append(row)
    return torch.tensor(rows)


def test_greedy_takes_the_likeliest_token_each_time(router_settings):
    """Where tokens route on their own, the cache changes nothing, and neither does the rest of the batch."""
    model = build(**router_settings).eval()
    if router_settings.get("capacity_factor"):
        ids = model.generate(PROMPT, 6, use_cache=False)
        for length in range(3, 9):
            assert torch.equal(ids[:, length], model(ids[:, :length]).logits[:, -1].argmax(-1))
        assert model.generate(PROMPT, 6).shape == (2, 9)
    else:
        for use_cache in (False, True):
            assert torch.equal(model.generate(PROMPT, 6, use_cache=use_cache), slow_greedy(model, PROMPT, 6))


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8}]
)
def test_sampling_is_fixed_by_its_seed(settings):
    model = build()
    before = torch.random.get_rng_state()
    one, same, uncached, other = (
        model.generate(PROMPT, 12, seed=seed, use_cache=cached, **settings)
        for seed, cached in ((1, True), (1, True), (1, False), (2, True))
    )
    assert torch.equal(one, same) and torch.equal(one, uncached)
    assert not torch.equal(one, other)
    assert torch.equal(one[:, :3], PROMPT)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_candidate_is_greedy():
    model = build()
    greedy = model.generate(PROMPT, 8)
    assert torch.equal(model.generate(PROMPT, 8, temperature=2.0, top_k=1), greedy)
    assert torch.equal(model.generate(PROMPT, 8, temperature=2.0, top_p=1e-6), greedy)
    for temperature in (1e-4, 1e-50):
        assert torch.equal(model.generate(PROMPT, 8, temperature=temperature), greedy)


# One draw at a time.


def draw(
    logits: Tensor, times: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> list[int]:
    """How often each token was drawn."""
    generator = torch.Generator().manual_seed(0)
    tokens = _pick(logits.expand(times, -1), temperature, top_k, top_p, generator)
    assert tokens.shape == (times, 1)
    return torch.bincount(tokens.flatten(), minlength=len(logits)).tolist()


def allowed(probabilities: list[float], top_k: int | None, top_p: float | None) -> list[int]:
    """The top_k likeliest tokens; of those, the fewest whose share of the probability reaches top_p."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:top_k]
    kept, reached, total = [], 0.0, sum(probabilities[token] for token in order)
    for token in order:
        kept.append(token)
        reached += probabilities[token] / total
        if top_p is not None and reached >= top_p:
            break
    return kept


FILTERS = [(0.5, None, None), (2.0, 4, None), (0.5, None, 0.7), (1.0, 5, 0.7), (2.0, 8, 1.0), (1.0, None, 0.05)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """Chi-square over 20 000 draws; a token outside the allowed set is never drawn."""
    logits = torch.randn(8)
    probabilities = (logits.double() / temperature).softmax(-1).tolist()
    counts, kept = draw(logits, 20_000, temperature, top_k, top_p), allowed(probabilities, top_k, top_p)
    assert sum(counts[token] for token in kept) == 20_000
    total = sum(probabilities[token] for token in kept)
    expected = [20_000 * probabilities[token] / total for token in kept]
    assert chisquare([counts[token] for token in kept], expected).pvalue > 1e-3 or len(kept) == 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.none() | st.integers(1, 8), st.integers(1, 20))
def test_exactly_the_allowed_tokens_are_drawn(shares, top_k, twentieths):
    """Every allowed token has a chance of 1 in 240 at least: among 8000 draws it is missed once in 10^14."""
    shares = [share + index / 100 for index, share in enumerate(shares)]  # no ties
    probabilities = [share / sum(shares) for share in shares]
    top_k, top_p = min(top_k or len(shares), len(shares)), (twentieths - 0.5) / 20
    counts = draw(torch.tensor(probabilities, dtype=torch.float64).log(), 8000, 1.0, top_k, top_p)
    assert [token for token, count in enumerate(counts) if count] == sorted(allowed(probabilities, top_k, top_p))


def test_top_p_stops_where_the_probability_is_reached():
    """Two of four equal tokens are half of the probability, to the bit; for a little more it takes a third."""
    assert [count > 0 for count in draw(torch.zeros(4), 500, top_p=0.5)] == [True, True, False, False]
    assert [count > 0 for count in draw(torch.zeros(4), 500, top_p=0.5 + 1e-6)] == [True, True, True, False]


def test_sequences_draw_independently():
    """Two rows of equal logits: they agree as often as two independent draws from 8 equal tokens."""
    tokens = torch.cat(
        [_pick(torch.zeros(2, 8), 1.0, None, None, torch.Generator().manual_seed(seed)) for seed in range(2000)], 1
    )
    assert (tokens[0] == tokens[1]).double().mean().item() == pytest.approx(1 / 8, abs=0.03)


# The end of a sequence.


def test_a_finished_sequence_is_filled_with_the_end_token():
    """Sampled, since a greedy sequence may repeat its last token anyway; the other sequence is not disturbed."""
    model = build()
    free = model.generate(PROMPT, 10, temperature=2.0).tolist()
    end = free[0][4]  # the first sequence's second new token
    stops = [row.index(end, 3) if end in row[3:] else len(row) for row in free]
    assert stops[0] < stops[1] and free[0][5:].count(end) < 3
    ids = model.generate(PROMPT, 10, temperature=2.0, eos_token_id=end).tolist()
    for found, wanted, stop in zip(ids, free, stops, strict=True):
        assert len(found) == min(max(stops) + 1, 13)
        assert found == (wanted[:stop] + [end] * 10)[: len(found)]


def test_generation_stops_when_all_have_finished():
    model = build()
    first = model.generate(PROMPT[:1], 10)
    end = int(first[0, 5])
    stop = first[0, 3:].tolist().index(end) + 3
    assert torch.equal(model.generate(PROMPT[:1], 10, eos_token_id=end), first[:, : stop + 1])


# Its manners.


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_restored(training):
    model = build(router="noisy_topk").train(training)
    assert torch.equal(model.generate(PROMPT, 4), model.generate(PROMPT, 4))  # no router noise
    assert model.training is training and model.model.layers[0].mlp.gate.training is training
    model.model.layers[1].mlp.gate.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="router logits"):
        model.generate(PROMPT, 4)
    assert model.training is training and model.model.layers[0].mlp.gate.training is training


def test_no_gradient_is_recorded():
    assert not build().generate(PROMPT, 2).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: wanted at least 1"),
        ({"temperature": math.nan}, r"temperature=nan: wanted 0 \(greedy\) or more"),
        ({"top_k": 0}, "top_k=0: wanted None or 1 to vocab_size=20"),
        ({"top_k": VOCABULARY + 1}, "top_k=21: wanted None or 1 to vocab_size=20"),
        ({"top_p": 0.0}, "top_p=0.0: wanted None or a number above 0 and at most 1"),
        ({"input_ids": torch.tensor([[VOCABULARY]])}, "input_ids holds token id 20: wanted 0 to 19"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids has shape \(1, 0\)"),
    ],
)
def test_impossible_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        build().generate(**{"input_ids": PROMPT, "max_new_tokens": 2} | settings)


def test_generated_tokens_can_be_trained_on():
    model = build()
    ids = model.generate(PROMPT, 4)
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.any()
