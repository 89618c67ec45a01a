"""New strangers: who is compared with whom, and what is said of models that are as good as untrained."""

import csv
from collections import Counter

import pytest

from benchmarks import new_strangers
from minimoe.data_files import data_path
from minimoe.lineage.tree import MEMBERS

SHIPPED = data_path("zoo") / "benchmark" / "new_strangers.csv"


def test_each_pair_with_a_new_root_is_there_once():
    homes = dict.fromkeys(["new-01", "new-02", "new-03", *new_strangers.SHIPPED])
    pairs = list(new_strangers.compared(homes))
    assert Counter(relation for *_, relation in pairs) == {"strangers": 3 + 3 * 4, "shared lineage": 3 * 2}
    assert len({frozenset(pair[:2]) for pair in pairs}) == len(pairs)
    for a, b, relation in pairs:
        assert (a == b.partition("+")[0]) == (relation == "shared lineage")
        assert not {a, b} <= set(new_strangers.SHIPPED)


def test_the_zoo_has_none_of_the_seeds():
    seeds = {member.options.get(name, 0) for member in MEMBERS.values() for name in ("seed", "weights")}
    assert max(seeds) < new_strangers.FIRST_SEED


@pytest.mark.parametrize("kind", ["gauged", "drop-gauged"])
def test_a_descendant_is_found(kind, tmp_path):
    new_strangers.train(tmp_path / "new-01", seed=1, steps=2)
    row = new_strangers.verdict("new-01", f"new-01+{kind}", "shared lineage", {"new-01": tmp_path / "new-01"})
    assert row["verdict"] == {"gauged": "same weights", "drop-gauged": "shared lineage"}[kind]


def test_a_run_trains_each_root_once(tmp_path):
    trained = []
    for _ in range(2):
        rows = new_strangers.run(1, tmp_path, steps=2)
        assert [row["relation"] for row in rows] == ["strangers"] * 4 + ["shared lineage"] * 2
        trained.append((tmp_path / "new-01" / "model.safetensors").stat().st_mtime_ns)
    assert trained[0] == trained[1]


def test_the_shipped_table_has_the_pairs_of_sixteen_roots_and_nobody_is_taken_for_a_relative():
    with open(SHIPPED, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    homes = dict.fromkeys([f"new-{number:02}" for number in range(1, 17)] + list(new_strangers.SHIPPED))
    assert [(row["a"], row["b"], row["relation"]) for row in rows] == list(new_strangers.compared(homes))
    for row in rows:
        related = row["verdict"] in ("same weights", "shared lineage")
        assert related == (row["relation"] == "shared lineage"), row
