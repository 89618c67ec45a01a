"""p-values of strangers are uniform; each test sees what it says it sees, and no more."""

import math

import pytest
import torch
from scipy import stats

from minimoe.fingerprints.independence import csu, fisher, match, permutation_test, spearman
from minimoe.fingerprints.matching import assign
from minimoe.lineage.derive import prune_layers, prune_neurons
from minimoe.lineage.upcycling import upcycle
from tests.fingerprints.toys import KINDS, disturbed, gauged, random_model, weights

TINY = {"hidden_size": 12, "head_dim": 4, "num_hidden_layers": 2, "intermediate_size": 24}
STRANGERS = {
    "dense": ({}, {}),
    "deeper": ({"num_hidden_layers": 3}, {}),
    "mixtures": ({"num_experts": 3}, {"num_experts": 3}),
}


def strangers(kind, count=80):
    first, second = STRANGERS[kind]
    for seed in range(count):
        yield (
            weights(random_model(2 * seed, **TINY | first)),
            weights(random_model(2 * seed + 1, **TINY | second)),
        )


@pytest.mark.parametrize("kind", STRANGERS)
def test_csu_is_uniform_among_strangers(kind):
    p_values = [csu(a, b).p_value for a, b in strangers(kind)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_csu_is_uniform_between_a_model_and_a_mixture_upcycled_from_a_stranger():
    """Its experts are copies: as tests of their own they would all say the same, and Fisher's method be wrong."""
    plain = {"attention_bias": False, "attention_output_bias": False}
    p_values = []
    for seed in range(80):
        a, parent = random_model(2 * seed, **TINY | plain), random_model(2 * seed + 1, **TINY | plain)
        p_values.append(csu(weights(a), weights(upcycle(parent, num_experts=4, num_experts_per_tok=2))).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.parametrize("kind", ["dense", "mixtures"])
def test_the_permutation_test_is_uniform_among_strangers(kind):
    """With T = 19 there are 20 possible values, equally likely."""
    found = [permutation_test(a, b, trials=19, seed=n).p_value for n, (a, b) in enumerate(strangers(kind, 100))]
    counts = torch.histc(torch.tensor(found), bins=5, min=0.025, max=1.025)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_equal_neurons_are_no_evidence():
    """Ties are broken by chance: neurons that are all alike, or 0, say nothing about a common order."""
    p_values = []
    for seed in range(60):
        a, b = random_model(seed, **TINY), random_model(100 + seed, **TINY)
        for block in b.model.layers:
            block.mlp.up_proj.weight.data[:12] = 0
        for block in a.model.layers:
            block.mlp.up_proj.weight.data[:] = block.mlp.up_proj.weight.data[:1]
        p_values.append(csu(weights(a), weights(b)).p_value)
    assert assign(torch.zeros(30, 30)).tolist() != list(range(30))
    assert min(p_values) > 1e-4


@pytest.mark.parametrize("test", [csu, permutation_test])
def test_training_is_seen_through(test):
    model = random_model()
    found = test(weights(model), weights(disturbed(model, 0.7)))
    assert found.p_value <= 1e-3 and found.score > 0.3


def test_no_p_value_is_0():
    model = weights(random_model(intermediate_size=200))
    assert csu(model, model).score == 1 and csu(model, model).p_value == 1e-300
    assert permutation_test(model, model, trials=99).p_value == 0.01


SEEN_THROUGH = {"fold_norms", "rotate_qk", "scale_qk", "mix_vo", "permute_heads", "permute_experts", "shift_router"}
HIDING = {"permute_neurons", "all"}
WEAKENING = {"rotate_residual", "permute_residual", "scale_neurons", "exchange_router_scale"}


@pytest.mark.parametrize("test", [csu, permutation_test])
@pytest.mark.parametrize("kind", KINDS)
def test_under_gauges(test, kind):
    """Those of attention and of experts change nothing; blind spots, with seeds fixed, are no more than chance."""
    model = random_model(**KINDS[kind])
    for name, copy in gauged(model).items():
        found = test(weights(model), weights(copy))
        if name in SEEN_THROUGH:
            assert found.score == pytest.approx(1, abs=1e-5) and found.p_value <= 1e-3, name
        elif name in HIDING:
            assert found.score < 0.3 and found.p_value > 0.005, name
        else:
            assert name in WEAKENING, name
            looks_at_it = test is permutation_test or name != "exchange_router_scale"  # csu has no downs
            assert (found.score < 0.99) == looks_at_it, name


def test_layers_left_out():
    model = random_model(num_hidden_layers=5)
    found = csu(weights(model), weights(disturbed(prune_layers(model, [1, 4]), 0.3)))
    assert found.details["layers"] == 3 and found.p_value < 1e-20


def test_match_under_gauges():
    for kind in KINDS:
        model = random_model(**KINDS[kind])
        for name, copy in gauged(model).items():
            assert match(weights(model), weights(copy)).score > 0.999, name
        assert abs(match(weights(model), weights(random_model(1, **KINDS[kind]))).score) < 0.3


def test_match_with_other_shapes():
    model = random_model()
    for other in (prune_neurons(model, 0.5), prune_layers(model, [1])):
        assert match(weights(model), weights(other)).score > 0.99
        assert match(weights(other), weights(model)).score > 0.99


def test_match_is_blind_to_new_mlps():
    model, other = random_model(), random_model()
    for block, from_a_stranger in zip(other.model.layers, random_model(1).model.layers, strict=True):
        block.mlp = from_a_stranger.mlp
    assert abs(match(weights(model), weights(other)).score) < 0.3


def test_statistics():
    x, y = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 4, 3])
    assert spearman(x, y)[0] == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert fisher([0.2, 0.3]) == pytest.approx(0.06 * (1 - math.log(0.06)))  # the tail of chi-squared with 4 degrees


def test_assignment_against_brute_force():
    from itertools import permutations

    table = torch.randn(4, 6)
    best = max(sum(float(table[i, j]) for i, j in enumerate(order)) for order in permutations(range(6), 4))
    assert float(table[torch.arange(4), assign(table)].sum()) == pytest.approx(best)
    columns = assign(table.mT)
    assert sorted(columns.tolist()) == [-1, -1, 0, 1, 2, 3]
    assert sum(float(table[j, i]) for i, j in enumerate(columns) if j >= 0) == pytest.approx(best)


def test_refusals():
    model = weights(random_model())
    wider = weights(random_model(intermediate_size=40))
    for test in (csu, permutation_test):
        assert "32 neurons of 24 weights and 40 neurons of 24 weights" in test(model, wider).refused
    assert "3 and 2 layers" in permutation_test(model, weights(random_model(num_hidden_layers=2))).refused
    assert "0 shared tokens" in match(model, weights(random_model(), prefix="other")).refused
    empty = random_model()
    empty.model.layers[0].mlp.gate_proj.weight.data.zero_()
    assert "0 or not finite" in match(model, weights(empty)).refused
    assert "0 or not finite" in permutation_test(model, weights(empty)).refused
    few = weights(random_model(intermediate_size=8))
    assert "8 neurons: wanted at least 10" in csu(few, few).refused
    empty.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    assert "layers.0.mlp.up_proj.weight: nan at [0, 0]" in csu(model, weights(empty)).refused
