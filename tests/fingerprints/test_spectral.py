"""Spectra do not move under gauges, and strangers' are close: both are said in the docstring."""

import pytest
import torch

from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.spectral import effective_rank, similarity, singular_values, spectral
from minimoe.lineage.derive import prune_layers
from tests.fingerprints.toys import KINDS, gauged, random_model, weights


def test_gauges():
    for kind in KINDS:
        model = random_model(**KINDS[kind])
        for name, copy in gauged(model).items():
            assert spectral(weights(model), weights(copy)).score > 0.999, name


def test_strangers_are_close():
    model = random_model()
    scores = [spectral(weights(model), weights(random_model(seed))).score for seed in range(1, 7)]
    assert min(scores) > 0.7 and max(scores) < 0.99


def test_no_token_is_needed():
    model = random_model()
    assert spectral(weights(model), weights(model, prefix="other")).score == pytest.approx(1, abs=1e-5)


def test_blind_to_mlps_and_biases():
    model, other = random_model(), random_model()
    for block, from_a_stranger in zip(other.model.layers, random_model(1).model.layers, strict=True):
        block.mlp = from_a_stranger.mlp
        for role in "qkvo":
            getattr(block.self_attn, f"{role}_proj").bias = getattr(from_a_stranger.self_attn, f"{role}_proj").bias
    assert spectral(weights(model), weights(other)).score == pytest.approx(1, abs=1e-5)


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)


def test_similarity_by_hand():
    """Both have effective rank above 3: cut to 4 values, scaled to 1, 2/3, 1/3, 0 and 1, .5, .5, 0."""
    x, y = torch.tensor([40.0, 30, 20, 10]), torch.tensor([5.0, 4, 4, 3])
    assert similarity(x, y) == pytest.approx(1 - ((1 / 36 + 1 / 36) / 4) ** 0.5)


def test_depths_that_differ():
    model = random_model(num_hidden_layers=5)
    assert spectral(weights(model), weights(prune_layers(model, [1, 4]))).score == pytest.approx(1)


def test_a_flat_spectrum_is_refused():
    """As of a rotation: scaled to [0, 1] it would be 0 / 0."""
    flat, falling = torch.full((5,), 2.0), torch.tensor([5.0, 4, 3, 2, 1])
    for pair in ((flat, falling), (falling, flat)):
        with pytest.raises(Refusal, match="are all the same"):
            similarity(*pair)


def test_refusals():
    model = random_model()
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()
    assert "0 or not finite" in spectral(weights(model), weights(random_model())).refused


@pytest.mark.parametrize("rows", [3, 12, 40])
def test_singular_values_of_a_product_against_those_of_the_product(rows):
    x, y = torch.randn(2, rows, 12, dtype=torch.float64)
    x[0] = x[-1]  # of a smaller rank, too
    torch.testing.assert_close(singular_values(x, y), torch.linalg.svdvals(x.mT @ y), rtol=0, atol=1e-10)
