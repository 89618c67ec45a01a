"""A forest whose distances and directions are known comes out as it is."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.fingerprints.weights import open_weights
from minimoe.fleet.forest import Forest, grow, tree_of, tree_of_store
from minimoe.fleet.store import Store
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.upcycling import upcycle
from tests.fingerprints.toys import disturbed
from tests.fleet.models import toy
from tests.fleet.test_store import described, near_copy

NAMES = ["leaf", "root", "middle", "other", "alone", "child"]
PARENTS = {"leaf": "middle", "middle": "root", "other": "root", "child": "alone"}


def similarities() -> np.ndarray:
    """0.9 to the power of the steps between two models of a tree, 0 between trees."""

    def line(name):
        return [name, *(line(PARENTS[name]) if name in PARENTS else ())]

    table = np.zeros((len(NAMES), len(NAMES)))
    for i, a in enumerate(NAMES):
        for j, b in enumerate(NAMES):
            shared = len(set(line(a)) & set(line(b)))
            steps = len(line(a)) + len(line(b)) - 2 * shared
            table[i, j] = 0.9**steps if shared else 0.0
    return table


def older(a, b):
    """The side of the ancestor, of two that are one step apart."""
    return "a" if PARENTS.get(NAMES[b]) == NAMES[a] else "b"


def parents(forest: Forest) -> dict:
    return {node.name: node.parent for node in forest.nodes}


def related(i, j):
    return similarities()[i, j] > 0.5


def test_a_known_forest():
    forest = grow(NAMES, similarities(), related, older)
    assert parents(forest) == {name: PARENTS.get(name) for name in NAMES}
    assert all(node.known == (node.name in PARENTS) for node in forest.nodes)
    seen = [node.name for node in forest.nodes]
    assert all(seen.index(parent) < seen.index(name) for name, parent in PARENTS.items())
    assert "        > 0.90  leaf" in str(forest).splitlines()


def test_one_direction_decides_those_that_are_not_known():
    """Only that `middle` is below `root` is known: everything else hangs from there, and is marked as a guess."""

    def tell(i, j):
        return older(i, j) if {NAMES[i], NAMES[j]} == {"root", "middle"} else None

    found = {node.name: node for node in grow(NAMES, similarities(), related, tell).nodes}
    assert found["middle"].parent == "root" and found["middle"].known
    assert found["leaf"].parent == "middle" and not found["leaf"].known


def test_a_wrong_direction_is_outvoted_and_shown_as_unknown():
    def tell(i, j):
        right = older(i, j)
        return {"a": "b", "b": "a"}[right] if {NAMES[i], NAMES[j]} == {"middle", "leaf"} else right

    found = {node.name: node for node in grow(NAMES, similarities(), related, tell).nodes}
    assert found["other"].parent == "root" or found["middle"].parent == "leaf"  # two votes against one, or one path
    assert sum(node.known for node in found.values()) == 3


def test_equal_models_hang_together():
    forest = grow(["a", "b", "c"], np.ones((3, 3)), lambda i, j: True, lambda i, j: None)
    assert sum(node.parent is None for node in forest.nodes) == 1


def test_no_models(tmp_path):
    assert str(grow([], np.empty((0, 0)), related, older)) == ""
    with Store(tmp_path) as store:
        assert str(tree_of_store(store)) == ""


def test_a_store_as_a_forest(tmp_path):
    parent = described(1)
    models = [parent, near_copy(parent, 500, 2), described(3), near_copy(parent, 3000, 4)]  # the last: .40
    with Store(tmp_path) as store:
        for model in models:
            store.record(model)
        found = parents(tree_of_store(store))
    shown = CliRunner().invoke(app, ["fleet", "tree", "--store", str(tmp_path)]).output.splitlines()
    assert sorted(line.split()[-1] for line in shown) == [f"model-{number}" for number in range(1, 5)]
    assert sum("? 0.98" in line for line in shown) == 1
    assert {found["model-1"], found["model-2"]} == {None, "model-1"} or found["model-1"] == "model-2"
    assert found["model-3"] is None and found["model-4"] is None  # of another width than the zoo


@pytest.fixture
def sparse_is_younger(monkeypatch):
    """A stand-in for `direction`: of a dense model and a mixture, the dense one is the ancestor."""

    def direction(a, b):
        counts = a.num_experts, b.num_experts
        return SimpleNamespace(ancestor=None if counts[0] == counts[1] else "ab"[int(counts[0] > counts[1])])

    stand_in = ModuleType("minimoe.fingerprints.direction")
    stand_in.direction = direction
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)


def test_models_at_hand(sparse_is_younger):
    dense, stranger = toy(0), toy(1)
    mixture = upcycle(disturbed(dense, 0.02), num_experts=4, num_experts_per_tok=2, model_type="minimoe")
    mixture.tokenizer_json = dense.tokenizer_json
    family = {"mixture": mixture, "dense": dense, "stranger": stranger, "gauged": all_gauges(dense, 3)}
    forest = tree_of([open_weights(model) for model in family.values()], names=list(family))
    found = parents(forest)
    assert found["stranger"] is None and found["mixture"] in ("dense", "gauged")
    assert sum(parent is None for parent in found.values()) == 2
