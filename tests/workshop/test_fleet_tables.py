"""The tables of the fleet against numbers that are known, or counted one by one."""

import numpy as np
import pytest
from scipy.stats import norm

from minimoe.fingerprints.descriptor import BITS, similarity
from minimoe.fleet.forest import Forest, Node
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import relation
from workshop import fleet_scale
from workshop.family_tree import CALIBRATION, EVALUATION
from workshop.fleet_trees import of_one_function, score, true_parents


def sketches(seed=0, names=(*CALIBRATION, *EVALUATION)):
    """Of strangers that have a mean in common, and nothing else."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(3, BITS))
    return {name: (common + generator.normal(size=(3, BITS))).astype(np.float32) for name in names}


def test_the_law_tells_of_strangers_it_has_not_seen():
    found = sketches()
    centre = np.stack([found[name] for name in CALIBRATION]).mean(0)
    bits = {name: np.packbits((found[name] - centre).sum(0) > 0).view(np.uint64) for name in EVALUATION}
    pairs = [(a, b) for i, a in enumerate(EVALUATION) for b in EVALUATION[:i]]
    seen = [float(similarity(bits[a], bits[b])) for a, b in pairs]
    law = fleet_scale.law_of_strangers(found)
    assert law.mean == pytest.approx(1 / 13, abs=0.01) and np.mean(seen) == pytest.approx(law.mean, abs=0.01)
    assert np.std(seen) == pytest.approx(law.std, rel=0.3)


def test_drawn_strangers_are_as_far_as_real_ones():
    found = sketches()
    centre = np.stack([found[name] for name in CALIBRATION]).mean(0)
    real = np.packbits((sketches(0)["alder"] - centre).sum(0) > 0).view(np.uint64)
    drawn = np.concatenate(list(fleet_scale.draw(300, found)))
    assert drawn.shape == (300, BITS // 64)
    assert similarity(drawn, real).mean() == pytest.approx(1 / 13, abs=0.02)
    assert similarity(drawn, real).std() == pytest.approx(np.pi / 2 / BITS**0.5, rel=0.2)


def test_recall_against_drawing():
    generator = np.random.default_rng(0)
    asked = [fleet_scale.Query("a", "b", similar) for similar in (0.5, 2.0, 2.6)]
    strangers = generator.normal(size=(4000, 1000))
    for nearest in (1, 20):
        counted = [((strangers > query.similarity).sum(1) < nearest).mean() for query in asked]
        assert fleet_scale.recall(asked, 1000, norm.sf, nearest) == pytest.approx(counted, abs=0.03)


def test_queries_are_of_the_other_half_and_share_weights():
    codes = {name: np.zeros(BITS // 64, np.uint64) for name in MEMBERS}
    asked = fleet_scale.queries(codes)
    assert len(asked) > 300
    assert all(relation(query.name, query.parent) == "shared lineage" for query in asked)
    assert not any(query.name.startswith(CALIBRATION) or "framed" in query.name for query in asked)


def test_true_parents():
    names = ["alder", "alder-gauged", "alder-lerp", "alder-distilled", "alder-drop-0.5-gauged", "alder-drop-0.5"]
    assert of_one_function("alder-gauged") == "alder" and of_one_function("alder-drop-0.5-gauged") == "alder-drop-0.5"
    assert true_parents(names) == {
        "alder": set(),
        "alder-lerp": {"alder"},  # of its parents, which are not in the set, this is the parent
        "alder-distilled": set(),
        "alder-drop-0.5": {"alder"},
    }


def test_a_forest_is_scored():
    parents = {"a": set(), "b": {"a"}, "c": {"b"}, "d": set()}
    nodes = [
        Node("b", None, None, False),
        Node("a", "b", 1.0, True),
        Node("c", "b", 1.0, True),
        Node("d", "a", 1.0, False),
    ]
    found = score(Forest(tuple(nodes)), parents, {name: name for name in parents})
    assert (found["trees"], found["true_trees"], found["roots_right"]) == (1, 2, 0)
    assert found["links"] == 3 and found["links_right"] == pytest.approx(2 / 3)
    assert found["directions_right"] == 0.5 and found["known"] == 1.0 and found["known_right"] == 0.5
