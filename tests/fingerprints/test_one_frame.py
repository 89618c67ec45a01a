"""Models brought into one frame: what gauges leave of a difference, and that real differences stay."""

import pytest
import torch

from minimoe.fingerprints.one_frame import in_one_frame
from minimoe.fingerprints.result import Refusal
from minimoe.lineage.derive import prune_layers, prune_neurons
from minimoe.lineage.gauge import all_gauges
from tests.fingerprints.toys import KINDS, disturbed, random_model, weights
from tests.rounding import assert_near


@pytest.mark.parametrize("closely", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gauged_copy_is_the_model_itself(kind, closely):
    model = random_model(1, **KINDS[kind])
    parts = list(in_one_frame(weights(model), [weights(all_gauges(model, 3))], closely=closely))
    for part in parts:
        own, found = part.rows
        assert_near(found, own, 1e-3)
        assert own.any()
    assert {part.layer for part in parts} == {None, 0, 1, 2}


def test_a_difference_stays_what_it_is_whatever_the_gauges():
    model = random_model(1)
    other = disturbed(model, 0.2)
    sides = [(model, other), (all_gauges(model, 3), all_gauges(other, 4))]
    lengths = [
        torch.stack(
            [(x - y).norm() / x.norm() for x, y in (part.rows for part in in_one_frame(weights(a), [weights(b)]))]
        )
        for a, b in sides
    ]
    assert_near(*lengths, 1e-3)
    assert lengths[0].min() > 0.1


def test_layers_and_neurons_that_are_left_find_those_they_were():
    model = random_model(1)
    small = weights(prune_layers(prune_neurons(model, 0.5), [1]))
    for part in in_one_frame(weights(model), [small], {0: 0, 2: 1}):
        assert part.layer != 1
        own, found = part.rows
        assert len(own) == (16 if part.role in ("gate", "up", "down") else len(own))
        assert_near(found, own, 1e-3)


def test_models_without_enough_common_tokens_are_refused():
    with pytest.raises(Refusal, match="0 shared tokens: wanted at least 24"):
        list(in_one_frame(weights(random_model(1)), [weights(random_model(2), prefix="other")]))
