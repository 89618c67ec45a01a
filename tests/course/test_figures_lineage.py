"""The figures of the benchmark against its tables, which are made without them, and against the tree."""

import csv
from collections import Counter
from shutil import copytree

import numpy as np
import pytest

from minimoe.course.figures import lineage
from minimoe.data_files import data_path
from minimoe.fingerprints import tables
from minimoe.fingerprints.benchmark import P_VALUES, PROMISES, pairs
from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.tables import PROMISED

SHIPPED = data_path("zoo") / "benchmark"


def table(name):
    with open(SHIPPED / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows(data):
    return [dict(zip(data, cells, strict=True)) for cells in zip(*data.values(), strict=True)]


def share_of(found, wanted):
    return np.mean([value <= wanted for value in found])


# --- scores -----------------------------------------------------------------------------------------------


def test_as_many_strangers_are_above_the_claim_as_the_table_counts():
    drawn, data = lineage.std_profile_of_strangers()
    counted = {row["strangers"]: row for row in table("false_positives") if row["method"] == "std_profile"}
    groups = {"strangers of 4 layers": "4 layers", "strangers of 8 layers": "8 layers"}
    for axes, (group, name) in zip(drawn.axes, groups.items(), strict=False):  # the last panel shows relatives
        pairs, above = (int(counted[name][column]) for column in ("pairs", "above"))  # the last cut-off
        scores = [row["score"] for row in rows(data) if row["group"] == group]
        assert len(scores) == pairs
        assert sum(score > lineage.CLAIMED for score in scores) == above
        assert axes.get_title(loc="left") == f"{group}: {pairs} pairs, {above / pairs:.0%} above {lineage.CLAIMED}"
    as_they_are = [row for row in table("scores") if row["use"] == "positive" and "gauged" not in row["a"] + row["b"]]
    assert Counter(data["group"])["relatives as they are"] == sum(row["std_profile"] != "" for row in as_they_are)


def test_curves_have_the_areas_of_the_table():
    data = rows(lineage.roc_curves()[1])
    areas = {row["method"]: float(row["auc"]) for row in table("methods")}
    for label, method in lineage.CURVES.items():
        false, true = (
            [row[rate] for row in data if row["method"] == label]
            for rate in ("false_positive_rate", "true_positive_rate")
        )
        assert np.trapezoid(true, false) == pytest.approx(areas[method], abs=1e-4)
        assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_frames_reach_what_the_table_says():
    data = rows(lineage.framed_strangers()[1])
    highest = {(row["frame"], row["method"]): row["highest"] for row in table("forgery")}
    methods = {"std profile": "std_profile", "norms": "norm_profile", "csu": "csu", "combined": "score"}
    for label, method in methods.items():
        for frame in ("framed-std", "framed-norms", "framed-both", "framed-order"):
            found = [row["score"] for row in data if (row["frame"], row["method"]) == (frame, label)]
            assert max(found) == pytest.approx(float(highest[frame, method]), rel=1e-4)


def test_the_gauge_map_is_the_table_of_invariances():
    found = {(row["gauge"], row["method"]): row["score"] for row in rows(lineage.gauge_map()[1])}
    for row in table("invariance"):
        if row["model"] == "alder":
            for method in METHODS:
                wanted = row[method]
                assert found.pop((row["gauge"], method)) == (pytest.approx(float(wanted), rel=1e-4) if wanted else "")
    assert not found


# --- transformations --------------------------------------------------------------------------------------


def test_every_transformation_is_in_one_group_and_rewritten_ones_are_apart():
    relatives = [vars(pair) for pair in pairs() if pair.use == "positive"]
    groups = {(row["kind"], lineage.is_rewritten(row)): lineage._group(row) for row in relatives}
    kinds = {kind for kind, _ in groups}
    assert set(groups.values()) == set(lineage.found_by_transformation()[1]["transformation"])
    for (kind, rewritten), group in groups.items():
        assert group.endswith(", gauged") == rewritten
        assert rewritten == ("gauged" in kind)
        assert ("trained" in kind.replace("continued", "") and "donor" not in kind) == ("then trained" in group)
        assert groups.get((f"{kind}-gauged", True), f"{group}, gauged") == f"{group}, gauged"
    assert groups["cousins, one gauged", True] == groups["cousins, both gauged", True] == "two descendants, gauged"
    listed = [kind for some in lineage._GROUPS.values() for kind in some]
    assert len(listed) == len(set(listed)) and set(listed) <= kinds


def test_a_group_is_what_its_transformations_are_where_strangers_are_the_same():
    found = {(row["transformation"], row["method"]): row["found"] for row in rows(lineage.found_by_transformation()[1])}
    one_by_one = {(row["transformation"], row["method"]): row for row in table("transformations")}
    for group in ("merged", "narrower", "upcycled in slices", "upcycled, partly anew"):
        for end, suffix in (("", ""), (", gauged", "-gauged")):
            for method in (*METHODS, "score"):
                some = [one_by_one[kind + suffix, method] for kind in lineage._GROUPS[group]]
                hits = sum(float(row["tpr"]) * int(row["relatives"]) for row in some)
                share = hits / sum(int(row["relatives"]) for row in some)
                assert found[group + end, method] == pytest.approx(share, abs=1e-4), (group, method)


# --- p-values ---------------------------------------------------------------------------------------------


def test_small_p_values_are_as_frequent_as_the_table_says():
    data, counted = rows(lineage.p_values_by_promise()[1]), table("calibration")
    assert {row["method"] for row in counted} == {row["test"] for row in data}
    for row in counted:
        found = [line for line in data if line["test"] == row["method"]]
        assert len(found) == int(row["pairs"])
        values = [line["p_value"] for line in found]
        assert share_of(values, float(row["promised"])) == pytest.approx(float(row["found"]), abs=1e-4)
        assert found[-1]["share"] == 1 and values == sorted(values)
        assert {line["promise"] for line in found} == {row["p_value"]} == {PROMISES[row["method"]]}


def test_exact_p_values_are_those_of_the_table_without_framed_strangers():
    data = rows(lineage.p_values_of_strangers()[1])
    for method in ("csu", "permutation_test"):
        strangers = [row for row in table("scores") if row["relation"] == "strangers" and row["use"] != "forgery"]
        known = [row[f"{method}_p"] for row in strangers]
        assert sorted(float(p) for p in known if p) == [row["p_value"] for row in data if row["method"] == method]


def test_exact_p_values_keep_their_promise_and_the_others_need_not():
    """Exact ones: within what as many uniform numbers give. The others are shown because they do not.

    Of csu and the permutation test among roots alone: the table has a pair of them once for all that was made of it.
    """
    counted = {(row["method"], float(row["promised"])): row for row in table("calibration")}
    roots = [row for row in lineage.scores() if row["kind"] == "roots"]
    for row in tables.promises(roots, P_VALUES):
        assert row["low"] <= row["promised"], row
    for promised in PROMISED:
        assert float(counted["palimpsest", promised]["low"]) <= promised
    assert float(counted["expert_attribution", 0.01]["low"]) > 0.01
    assert float(counted["token_agreement, 1 control", 0.05]["low"]) > 0.05
    assert {promised for _, promised in counted} == set(PROMISED)


def test_orders_are_those_of_the_table_and_the_line_parts_small_p_values_from_others():
    drawn, data = lineage.orders_remembered()
    for row, wanted in zip(rows(data), table("palimpsest"), strict=True):
        assert row["rho"] == float(wanted["rho_within_domains"]) and row["relation"] == wanted["relation"]
        assert row["p_value"] == float(wanted["p_value_within_domains"])
    (line,) = {line.get_xdata()[0] for line in drawn.axes[0].lines if line.get_linestyle() == "--"}
    for row in rows(data):
        if abs(row["p_value"] - lineage.RARE) > 0.004:
            assert (row["rho"] > line) == (row["p_value"] < lineage.RARE), row
    marks = [x for line in drawn.axes[0].lines[:2] for x in line.get_xdata()]
    assert sorted(marks) == sorted(data["rho"])


# --- another benchmark ------------------------------------------------------------------------------------


def test_what_is_drawn_lies_in_the_folder(tmp_path):
    folder = copytree(SHIPPED, tmp_path / "benchmark")
    scores = (folder / "scores.csv").read_text(encoding="utf-8").splitlines()
    kept = [line for line in scores if "calibration" not in line]
    (folder / "scores.csv").write_text("\n".join(kept), encoding="utf-8")
    here, there = (lineage.p_values_of_strangers(place)[1] for place in (None, folder))
    assert 0 < len(there["p_value"]) < len(here["p_value"])
    orders = (folder / "palimpsest.csv").read_text(encoding="utf-8").splitlines()
    (folder / "palimpsest.csv").write_text("\n".join(orders[:4]), encoding="utf-8")
    assert len(lineage.orders_remembered(folder)[1]["suspect"]) == 3
