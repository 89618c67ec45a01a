"""How the direction between relatives is measured: which pairs are asked, what is true of them, and what is counted."""

import pytest

from minimoe.lineage.zoo import Zoo
from workshop import directions
from workshop.directions import asked, by_kinds, change_of, members, relation_of, simple_numbers, summary


@pytest.mark.parametrize(
    ("a", "b", "truth"),
    [
        ("alder", "alder-finetuned", "a"),
        ("alder-finetuned-gauged", "alder", "b"),
        ("alder-gauged", "alder-copy-trained", "a"),
        ("alder", "alder-gauged-copy", "a"),
        ("alder-int4", "alder-int4-gauged", "same"),
        ("alder-gauged", "alder", "same"),
        ("alder-finetuned", "alder-lerp", "a"),
        ("alder-finetuned", "alder-continued-1", "cousins"),
        ("alder-copy-gauged", "alder-gauged-copy", "cousins"),
    ],
)
def test_what_is_true_of_a_pair(a, b, truth):
    assert relation_of(a, b) == truth


def test_families_hold_what_has_weights_of_the_root():
    zoo = Zoo("nothing is built here")
    family = members("alder", zoo)
    assert {"alder", "alder-gauged", "alder-lora", "alder-btx-trained"} <= set(family)
    assert not {"alder-twin", "alder-distilled", "alder-distilled-gauged", "alder-fold_norms"} & set(family)
    assert all(zoo.has(name) for name in family)
    pairs = asked("stranger-01", zoo)
    assert len(set(map(frozenset, pairs))) == len(pairs) and ("stranger-01", "stranger-01-int8") in pairs


def test_every_kind_of_descendant_is_some_change():
    kinds = {"finetuned-gauged": "trained", "mixture-finetuned": "trained", "gauged-copy": "a mixture"}
    kinds |= {
        "int4": "rounded",
        "fewer-heads-gauged": "other shape",
        "btx-trained": "merged",
        "copy-trained": "a mixture",
    }
    assert {kind: change_of(kind) for kind in kinds} == kinds


def test_answers_are_counted_by_kinds_and_in_all(monkeypatch):
    monkeypatch.setattr(directions, "HALVES", {"calibration": ("alder",)})
    monkeypatch.setattr(
        directions, "asked", lambda *_: [("alder-finetuned", "alder"), ("alder-lerp", "alder-continued-1")]
    )
    zoo = Zoo("nothing is built here")
    rows = list(directions.observe(zoo, "calibration"))
    counts = {(row["first"], row["second"]): (row["right"], row["wrong"]) for row in by_kinds(rows)}
    assert counts == {
        ("root", "finetuned"): (1, 0),
        ("continued-1", "lerp"): (0, 1),
    }  # an average looks like an ancestor
    table = {row["pairs of"]: row for row in summary(rows)}
    assert table["an ancestor and its descendant"]["right, of answers"] == "50%"
    assert table["told by numbers alone"]["pairs"] == 2 and table["told by shapes"]["pairs"] == 0
    assert table["the descendant: trained"]["right"] == 1 and table["cousins"]["pairs"] == 0


def test_simple_rules_look_at_outliers_and_length():
    home = Zoo("nothing is built here").home
    tuned, longer = (simple_numbers(home, f"alder-{kind}") for kind in ("finetuned", "continued-4"))
    assert longer["length"] > tuned["length"] > simple_numbers(home, "alder")["length"]
    assert all(2 < numbers["outliers"] < 50 for numbers in (tuned, longer))
