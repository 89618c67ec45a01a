"""The benchmark: its pairs are what they are said to be, its tables what one counts by hand."""

import csv
from collections import Counter

import pytest

from minimoe.data_files import data_path
from minimoe.fingerprints import benchmark, tables
from minimoe.fingerprints.benchmark import METHODS, Pair, all_tables, pairs, read_scores, run, score, with_verdicts
from minimoe.fingerprints.virtual_response import virtual_response
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import Zoo, origins, relation
from minimoe.training.tokenizer import load_tokenizer

SHIPPED = data_path("zoo") / "benchmark"
FEW = [{"transformation": "int8", "method": "csu", "tpr": 1.0}]
STRANGERS = ("calibration", "evaluation", "between")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return Zoo(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def rows():
    return with_verdicts(read_scores(SHIPPED / "scores.csv"))


# --- the pairs


def test_the_use_of_every_pair_is_the_truth_of_the_tree():
    truth = {"positive": "shared lineage", "invariance": "shared lineage", "twins": "same first weights"}
    truth |= {"student": "teacher and student", "forgery": "strangers", **dict.fromkeys(STRANGERS, "strangers")}
    for pair in pairs():
        assert relation(pair.a, pair.b) == truth[pair.use], pair


def test_evaluation_sees_no_model_that_calibration_saw():
    seen = {use: set() for use in ("calibration", "evaluation", "positive", "forgery")}
    for pair in pairs():
        if pair.use in seen:
            seen[pair.use] |= origins(pair.a) | origins(pair.b)
    for use in ("evaluation", "forgery"):
        assert not seen["calibration"] & seen[use]
    assert seen["calibration"] & seen["positive"] == {"mixture-1", "mixture-2"} & seen["calibration"]


def test_there_are_as_many_pairs_as_promised():
    uses, roots = Counter(pair.use for pair in pairs()), Counter()
    roots = sum(pair.kind == "roots" for pair in pairs())
    assert roots == 26 * 25 // 2 >= 270  # of one shape and recipe
    assert uses["evaluation"] >= 300
    assert len({(pair.a, pair.b) for pair in pairs() if pair.use in STRANGERS}) == sum(uses[use] for use in STRANGERS)


def test_every_transformation_of_the_tree_is_tried():
    tried = {pair.b for pair in pairs()} | {pair.a for pair in pairs()}
    made = {name for name, member in MEMBERS.items() if name.startswith(("alder-", "birch-")) and member.parents}
    assert made <= tried


# --- scores


def test_scores_are_those_of_the_methods(zoo):
    row = score(zoo, Pair("birch", "alder-drop-0.5-trained", "evaluation", "drop-0.5-trained"))
    a, b = (open_weights(zoo.load(row[side]), tokenizer=load_tokenizer()) for side in "ab")
    assert row["virtual_response_whitened"] == pytest.approx(virtual_response(a, b, whiten=True).score)
    assert row["shapes"] == "dense, mixture, equal depths" and row["relation"] == "strangers"
    assert all(row[f"{name}_s"] > 0 for name in METHODS)


def test_what_is_shipped_is_what_is_computed(zoo, rows):
    """Of a few pairs; on another processor, to three digits."""
    wanted = [("alder", "alder-continued-4"), ("birch", "alder-sliced-trained"), ("alder", "stranger-13-framed-both")]
    for row in rows:
        if (row["a"], row["b"]) in wanted:
            again = score(zoo, Pair(row["a"], row["b"], row["use"], row["kind"]))
            for name in METHODS:
                assert again[name] == (None if row[name] is None else pytest.approx(row[name], abs=2e-3)), name
            wanted.remove((row["a"], row["b"]))
    assert not wanted


def test_a_run_computes_what_it_can_and_takes_the_rest_from_the_shipped_scores(zoo, rows, tmp_path, monkeypatch):
    there = Pair("alder", "alder-int8", "positive", "int8")
    absent = next(pair for pair in pairs() if pair.b == "stranger-24-int8" and pair.use == "positive")
    monkeypatch.setattr(benchmark, "pairs", lambda: [there, absent])
    monkeypatch.setattr(benchmark, "all_tables", lambda rows: {"transformations": FEW})
    computed = run(zoo, tmp_path, processes=1)
    assert [(row["a"], row["b"]) for row in computed] == [("alder", "alder-int8")]
    written = read_scores(tmp_path / "scores.csv")
    assert [row["b"] for row in written] == ["alder-int8", "stranger-24-int8"]
    shipped = next(row for row in rows if row["b"] == "stranger-24-int8" and row["use"] == "positive")
    assert {name: written[1][name] for name in METHODS} == {name: shipped[name] for name in METHODS}
    assert "1 of 2 pairs compared here" in (tmp_path / "benchmark.md").read_text()


# --- tables


def test_the_shipped_tables_are_made_from_the_shipped_scores(rows):
    for name, table in all_tables(rows).items():
        with open(SHIPPED / f"{name}.csv", encoding="utf-8", newline="") as file:
            shipped = list(csv.DictReader(file))
        assert len(shipped) == len(table), name
        for found, wanted in zip(shipped, table, strict=True):
            for key, value in wanted.items():
                if isinstance(value, float):
                    assert float(found[key]) == pytest.approx(value, rel=1e-3, abs=1e-4), (name, key)
                else:
                    assert found[key] == ("" if value is None else str(value)), (name, key)


def test_the_shipped_verdicts_follow_from_the_shipped_scores(rows):
    stored = read_scores(SHIPPED / "scores.csv")
    assert [row["verdict"] for row in stored] == [row["verdict"] for row in rows]


def test_all_pairs_are_in_the_shipped_scores(rows):
    assert [(row["a"], row["b"], row["use"]) for row in rows] == [(pair.a, pair.b, pair.use) for pair in pairs()]


def toy_rows(**columns):
    length = len(next(iter(columns.values())))
    return [{name: values[index] for name, values in columns.items()} for index in range(length)]


def test_rates_count_a_refusal_as_nothing_found():
    made = toy_rows(
        use=["positive"] * 4 + ["evaluation"] * 200,
        kind=["x"] * 4 + ["roots"] * 200,
        shapes=["dense, dense, equal depths"] * 204,
        match=[0.9, 0.8, 0.1, None] + [0.5, 0.4, 0.3] + [0.0] * 197,
    )
    (row,) = tables.by_method(made, ["match"])
    assert (row["relatives"], row["refused"], row["strangers"]) == (4, 1, 200)
    assert row["tpr"] == 0.5  # two of 200 may be above, so the third sets the threshold
    assert row["tpr_low"] < 0.07 and row["tpr_high"] > 0.93


def test_false_positives_are_counted_among_strangers_of_one_shape():
    made = toy_rows(
        use=["calibration", "between", "evaluation", "positive"],
        kind=["roots", "roots", "roots", "int8"],
        a=["stranger-01"] * 4,
        b=["stranger-02"] * 4,
        std_profile=[0.95, 0.85, None, 0.99],
    )
    found = {row["cut_off"]: (row["above"], row["pairs"]) for row in tables.false_positives(made, ["std_profile"])[:3]}
    assert found == {0.8: (2, 2), 0.9: (1, 2), 0.927: (1, 2)}


def test_promises_count_small_p_values():
    made = toy_rows(use=["evaluation"] * 5, csu_p=[0.005, 0.04, 0.2, 0.7, None])
    found = {row["promised"]: row["found"] for row in tables.promises(made, ["csu"])}
    assert found == {0.01: 0.25, 0.05: 0.5, 0.1: 0.5, 0.5: 0.75}


# --- what the whole benchmark is to show


def test_targets_of_the_combined_verdict(rows):
    found = {row["method"]: row for row in tables.by_method(rows, ["score"])}["score"]
    assert found["auc"] >= 0.995 and found["tpr"] >= 0.95
    said = Counter((row["use"], row["verdict"]) for row in rows)
    assert not said["forgery", "shared lineage"] and not said["forgery", "same weights"]
    assert not any(said[use, "same weights"] for use in (*STRANGERS, "twins", "student"))


def test_targets_of_expert_attribution(rows):
    for row in tables.attribution(rows, benchmark.DROP_RATES):
        assert row["right_layer"] >= 0.95 or row["drop_rate"] > 0.5, row
        assert abs(row["estimated"] - row["drop_rate"]) <= 0.1, row
