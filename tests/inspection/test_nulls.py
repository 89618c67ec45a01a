"""Nulls and intervals against sums over all cases, against simulation, and against their own promises."""

from inspect import isfunction, signature
from itertools import combinations

import numpy as np
import pytest

from minimoe.inspection import ablation, metrics, nulls
from tests.inspection.traces import close, make_trace, planted, uneven

# --- what chance gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", [[0, 4, 0], [1, 2, 3]])
def test_random_router_draws_sets_of_the_right_size_all_alike(filled):
    """Mean and covariance of the counts of a random router, against the sum over all sets."""
    experts = 4
    counts = nulls.random_loads(np.array(filled), experts, 20_000, np.random.default_rng(0))
    assert (counts.sum(1) == np.dot(filled, range(len(filled)))).all()
    covariance = np.zeros((experts, experts))
    for k, tokens in enumerate(filled):
        sets = np.array([[e in s for e in range(experts)] for s in combinations(range(experts), k)], dtype=float)
        covariance += tokens * np.cov(sets.T, bias=True)
    np.testing.assert_allclose(counts.mean(0), counts.sum(1).mean() / experts, rtol=0.02)
    np.testing.assert_allclose(np.cov(counts.T), covariance, atol=0.05 * covariance.max())


@pytest.mark.parametrize("metric", [metrics.max_violation, metrics.load_entropy])
def test_a_random_router_is_as_uneven_as_the_null_says(metric):
    found = [metric(planted("nothing", seed), draws=2, seed=seed) for seed in range(60)]
    values, nulls = (np.array([getattr(one, name) for one in found]) for name in ("value", "null"))
    standard_error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - nulls.mean()) < 3 * standard_error


def test_empty_slots_are_empty_by_chance_too():
    """One expert is given one token and all others none, whoever chooses."""
    trace = make_trace([[[3, 8], [8, 8]]], experts=8)
    for metric, worst in ((metrics.max_violation, 8 - 1), (metrics.load_entropy, 0)):
        found = metric(trace)
        close((found.value, found.null), worst)


@pytest.mark.parametrize("sizes", [[0, 1], [0, 0, 1], [0, 0, 0, 1], [0.1, 0, 0.5, 0.1, 0.3]], ids=str)
def test_pairs_of_the_most_random_router_against_all_sets(sizes):
    """Conditional Poisson by enumeration: inclusion and pair probabilities for weights that are given."""
    weights = np.array([3.0, 1.0, 1.0, 0.4, 0.05])
    pairs = np.zeros((5, 5))
    for k, share in enumerate(sizes):
        sets = list(combinations(range(5), k))
        probability = np.array([weights[list(s)].prod() for s in sets])
        probability *= share / probability.sum()
        member = np.array([[e in s for e in range(5)] for s in sets], dtype=float)
        pairs += np.einsum("s,si,sj->ij", probability, member, member)
    found = nulls.random_pairs(np.diagonal(pairs), np.array(sizes))
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(found[off], pairs[off], atol=1e-7)


@pytest.mark.parametrize(
    "inclusion, sizes",
    [
        ([1.0, 0.5, 0.5, 0.0], [0, 0, 1]),
        ([0.9, 0.6, 0.3, 0.2], [0, 0, 1]),
        ([0.5, 0.4, 0.3, 0.3], [0.2, 0.3, 0.3, 0.2]),
        ([1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 1]),
        ([1e-4, 0.9999, 0.5, 0.5], [0, 0, 1]),
    ],
)
def test_pairs_have_the_load_they_are_given(inclusion, sizes):
    """Summed over all partners, N_ij is the mean number of partners: sum_ij p_ij = sum_k sizes[k] k (k - 1)."""
    inclusion, sizes = np.array(inclusion), np.array(sizes)
    pairs = nulls.random_pairs(inclusion, sizes)
    np.fill_diagonal(pairs, 0)
    k = np.arange(len(sizes))
    assert pairs.sum() == pytest.approx(sizes @ (k * (k - 1)), abs=1e-6)
    assert (pairs <= np.minimum.outer(inclusion, inclusion) + 1e-6).all()
    if (sizes == 1).any():
        np.testing.assert_allclose(pairs.sum(1), inclusion * (k[sizes == 1][0] - 1), atol=1e-6)


# --- the interval -----------------------------------------------------------------------------------------


def test_resamples_keep_as_many_documents_of_every_stratum():
    trace = uneven(planted("nothing"))
    weights = nulls.Resamples.draw(trace.documents, 50, 0, trace.domains).weights
    of_document = np.repeat(np.arange(4), [35, 10, 15, 20])
    assert (np.stack([weights[of_document == domain].sum(0) for domain in range(4)], 1) == [35, 10, 15, 20]).all()
    assert weights.shape == (80, 51) and (weights[:, 0] == 1).all() and (weights[:, 1:].std(1) > 0).all()
    once_each = nulls.Resamples.draw(np.arange(4), 50, 0, np.arange(4)).weights
    assert once_each.shape == (4, 1)  # nothing that could be drawn again


def test_interval_covers_the_truth_when_documents_differ():
    """Documents whose tokens are all alike: 95 % of the intervals hold the true share. Tokens as units would hold it in
    a third of the cases, for they would be 4 times too narrow."""
    held, widths = 0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        indices = np.repeat(rng.random(60) < 0.3, 16).astype(int)[None, :, None]
        found = metrics.load(make_trace(indices, documents=np.repeat(np.arange(60), 16), experts=2), seed=seed)
        held += found.low[0, 1] <= 0.3 <= found.high[0, 1]
        widths.append(found.high[0, 1] - found.low[0, 1])
    assert 0.89 < held / 200 < 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 60) ** 0.5, rel=0.1)


def test_interval_is_the_percentile_bootstrap_with_its_mean_at_the_value():
    statistics = np.random.default_rng(0).exponential(size=(201, 3))
    found = nulls.measured([statistics], 0.0)
    drawn = statistics[1:]
    for name, share in (("low", 0.025), ("high", 0.975)):
        close(getattr(found, name)[0], np.quantile(drawn, share, axis=0) - drawn.mean(0) + statistics[0])


def test_draws_without_a_group_are_left_out_of_its_interval():
    statistics = np.random.default_rng(0).random((101, 2))
    statistics[1:51, 1] = np.nan
    found = nulls.measured([statistics], 0.0)
    drawn = statistics[51:, 1]
    close(found.high[0, 1], np.quantile(drawn, 0.975) - drawn.mean() + statistics[0, 1])


def test_same_seed_same_numbers_another_seed_another_interval():
    trace = planted("nothing")
    first, again, other = (metrics.mutual_information(trace, "language", seed=seed, draws=40) for seed in (3, 3, 4))
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    close(first.value, other.value)
    assert first.low != other.low and first.null != other.null


def test_everything_is_resampled_alike_unless_asked_otherwise():
    """What stands side by side in a figure then has intervals from the same documents."""
    public = [found for name, found in vars(metrics).items() if not name.startswith("_")] + [ablation.ablate]
    asked = [signature(found).parameters for found in public if isfunction(found)]
    resampling = [parameters for parameters in asked if {"draws", "seed"} <= parameters.keys()]
    assert len(resampling) > 5
    assert {(parameters["draws"].default, parameters["seed"].default) for parameters in resampling} == {(200, 0)}


def test_large_tables_are_resampled_in_parts(monkeypatch):
    trace = planted("nothing")
    whole = metrics.mutual_information(trace, "domain", "token")
    monkeypatch.setattr(nulls, "LARGEST_TABLE", 5000)
    for ours, theirs in zip(whole, metrics.mutual_information(trace, "domain", "token"), strict=True):
        close(ours, theirs)
