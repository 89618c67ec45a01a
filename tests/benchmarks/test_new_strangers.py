"""New strangers: who is compared with whom, and what is said of models that are as good as untrained."""

import csv
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of a root that was trained for two steps."""
    home = tmp_path_factory.mktemp("home")
    new_strangers.train(home / "new-01", seed=1, steps=2)
    return home


def test_a_descendant_is_found(home):
    for kind, verdict in {"gauged": "same weights", "drop-gauged": "shared lineage"}.items():
        row = new_strangers.verdict("new-01", f"new-01+{kind}", "shared lineage", {"new-01": home / "new-01"})
        assert row["verdict"] == verdict


def test_a_run_trains_what_is_missing_and_compares_all(home, monkeypatch):
    monkeypatch.setattr(new_strangers, "SHIPPED", ("alder",))
    monkeypatch.setattr(new_strangers, "ProcessPoolExecutor", lambda mp_context: ThreadPoolExecutor(1))
    first = (home / "new-01" / "model.safetensors").stat().st_mtime_ns
    rows = new_strangers.run(2, home, steps=2)
    assert [row["relation"] for row in rows] == ["strangers"] * 3 + ["shared lineage"] * 4
    assert (home / "new-02" / "model.safetensors").exists()
    assert (home / "new-01" / "model.safetensors").stat().st_mtime_ns == first


def test_the_shipped_table_has_the_pairs_of_sixteen_roots_and_nobody_is_taken_for_a_relative():
    with open(SHIPPED, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    homes = dict.fromkeys([f"new-{number:02}" for number in range(1, 17)] + list(new_strangers.SHIPPED))
    assert [(row["a"], row["b"], row["relation"]) for row in rows] == list(new_strangers.compared(homes))
    for row in rows:
        related = row["verdict"] in ("same weights", "shared lineage")
        assert related == (row["relation"] == "shared lineage"), row
