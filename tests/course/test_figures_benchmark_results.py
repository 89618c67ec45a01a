"""The figures of the benchmark against its tables, which are made without them, and against the tree."""

import csv
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from minimoe.course import figures
from minimoe.course.figures import benchmark_results
from minimoe.course.figures.benchmark_results import REMEMBERING
from minimoe.course.published import CLAIMED
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.zoo_scores import is_rewritten, read_table, scores

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
    drawn, data = figures.std_profile_of_strangers()
    counted = {row["strangers"]: row for row in table("false_positives") if row["method"] == "std_profile"}
    groups = {"strangers of 4 layers": "4 layers", "strangers of 8 layers": "8 layers"}
    for axes, (group, name) in zip(drawn.axes, groups.items(), strict=False):  # the last panel shows relatives
        pairs, above = (int(counted[name][column]) for column in ("pairs", "above"))  # the last cut-off
        shown = [row["score"] for row in rows(data) if row["group"] == group]
        assert len(shown) == pairs
        assert sum(score > CLAIMED for score in shown) == above
        assert axes.get_title(loc="left") == f"{group}: {pairs} pairs, {above / pairs:.0%} above {CLAIMED}"
    as_they_are = [row for row in table("scores") if row["use"] == "positive" and "gauged" not in row["a"] + row["b"]]
    assert Counter(data["group"])["relatives as they are"] == sum(row["std_profile"] != "" for row in as_they_are)


def test_curves_have_the_areas_of_the_table():
    data = rows(figures.roc_curves()[1])
    areas = {row["method"]: float(row["auc"]) for row in table("methods")}
    for label, method in benchmark_results.CURVES.items():
        false, true = (
            [row[rate] for row in data if row["method"] == label]
            for rate in ("false_positive_rate", "true_positive_rate")
        )
        assert np.trapezoid(true, false) == pytest.approx(areas[method], abs=1e-4)
        assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


def test_frames_reach_what_the_table_says():
    data = rows(figures.framed_strangers()[1])
    highest = {(row["frame"], row["method"]): row["highest"] for row in table("forgery")}
    methods = {"std profile": "std_profile", "norms": "norm_profile", "csu": "csu", "combined": "score"}
    for label, method in methods.items():
        for frame in ("framed-std", "framed-norms", "framed-both", "framed-order"):
            found = [row["score"] for row in data if (row["frame"], row["method"]) == (frame, label)]
            assert max(found) == pytest.approx(float(highest[frame, method]), rel=1e-4)


def test_planted_strangers_are_shown_with_whom_the_parts_are_from():
    """Not with whom they really are, and not those that were rewritten besides."""
    methods = ("match", "expert_attribution", "aligned_neurons", "best_part")
    pairs = [("roots", "evaluation", 0.1), ("roots", "calibration", 0.2), ("planted-dead", "planted", 0.3)]
    pairs += [
        ("planted-dead", "positive", 0.4),
        ("planted-dead-gauged", "planted", 0.5),
        ("planted-sums", "planted", 0.6),
    ]
    some = [{"kind": kind, "use": use, **dict.fromkeys(methods, score)} for kind, use, score in pairs]
    drawn, data = figures.planted_strangers(some)
    shown = [(row["plant"], row["score"]) for row in rows(data) if row["method"] == "best part"]
    assert shown == [("strangers as they are", 0.1), ("planted-dead", 0.3), ("planted-sums", 0.6)]
    assert len(drawn.axes) == len(methods) and "expert attribution 0.60" in drawn.get_label()


def test_strangers_by_width_stand_at_the_narrower_model_beside_a_level_that_they_set():
    made = [("stranger", "roots", 48, score) for score in (0.0, 0.02, 0.02, 0.02, 0.04)]
    made += [("relative", "copy", 384, 0.9), ("relative", "transplant, donor", 384, 0.01)]
    some = [
        {"use": use, "kind": kind, "width_a": width, "width_b": 96, "csu": score} for use, kind, width, score in made
    ]
    drawn, data = figures.strangers_by_width(some, methods=["csu"])
    assert data["width"] == [48] * 5 + [96] and data["score"][-1] == 0.9  # the donor is left out
    level = np.tanh(np.arctanh(0.02) + 5 * (np.arctanh(0.04) - np.arctanh(0.02)))
    dashed = [line for line in drawn.axes[0].lines if line.get_label() == "evidence begins"]
    assert dashed[0].get_ydata()[0] == pytest.approx(level)


def test_the_gauge_map_is_the_table_of_invariances():
    found = {(row["gauge"], row["method"]): row["score"] for row in rows(figures.gauge_map()[1])}
    for row in table("invariance"):
        if row["model"] == "alder":
            for method in benchmark_results.MAPPED:
                wanted = row[method]
                assert found.pop((row["gauge"], method)) == (pytest.approx(float(wanted), rel=1e-4) if wanted else "")
    assert not found


# --- transformations --------------------------------------------------------------------------------------


def test_every_transformation_is_in_one_group_and_rewritten_ones_are_apart():
    relatives = [row for row in scores() if row["use"] == "positive"]
    groups = {row["kind"]: benchmark_results.group_of(row) for row in relatives}
    for rewritten in (False, True):
        labels = {groups[row["kind"]] for row in relatives if is_rewritten(row) == rewritten}
        data = figures.found_by_transformation(rewritten=rewritten)[1]
        assert labels == set(data["transformation"])
        assert len(labels) <= 12 and len(set(data["method"])) <= 8
    for kind, group in groups.items():
        assert ("trained" in kind.replace("continued", "") and "donor" not in kind) == ("then trained" in group)
        assert groups.get(f"{kind}-gauged", group) == group
    listed = [kind for some in benchmark_results.GROUPS.values() for kind in some]
    assert len(listed) == len(set(listed)) and set(listed) <= set(groups)


def test_a_group_is_what_its_transformations_are_where_strangers_are_the_same():
    methods = [*METHODS, "score"]
    found = {
        (rewritten, row["transformation"], row["method"]): row["found"]
        for rewritten in (False, True)
        for row in rows(figures.found_by_transformation(rewritten=rewritten, methods=methods)[1])
    }
    one_by_one = {(row["transformation"], row["method"]): row for row in table("transformations")}
    for group in ("merged", "narrower"):
        for rewritten, suffix in ((False, ""), (True, "-gauged")):
            for method in methods:
                some = [one_by_one[kind + suffix, method] for kind in benchmark_results.GROUPS[group]]
                hits = sum(float(row["tpr"]) * int(row["relatives"]) for row in some)
                share = hits / sum(int(row["relatives"]) for row in some)
                known = found[rewritten, group, method]  # empty where the method refuses all
                assert (known or 0) == pytest.approx(share, abs=1e-4), (group, method)


def test_a_method_that_refuses_all_leaves_its_cell_empty_and_verdicts_are_counted():
    pairs = [("positive", "lerp", None, "shared lineage"), ("positive", "lerp", None, "cannot tell")]
    pairs += [("evaluation", "roots", 0.1, "no evidence of shared lineage")]
    some = [
        {"a": "a", "b": "b", "use": use, "kind": kind, "shapes": "dense", "csu": score, "verdict": verdict}
        for use, kind, score, verdict in pairs
    ]
    data = figures.found_by_transformation(some, methods=["csu", "verdict"])[1]
    assert data["found"] == ["", 0.5]


# --- p-values ---------------------------------------------------------------------------------------------


def test_small_p_values_are_as_frequent_as_the_table_says():
    data, counted = rows(figures.p_values_by_promise()[1]), table("calibration")
    assert {row["method"] for row in counted} == {row["test"] for row in data}
    for row in counted:
        found = [line for line in data if line["test"] == row["method"]]
        assert len(found) == int(row["pairs"])
        values = [line["p_value"] for line in found]
        assert share_of(values, float(row["promised"])) == pytest.approx(float(row["found"]), abs=1e-4)
        assert found[-1]["share"] == 1 and values == sorted(values)
        assert {line["promise"] for line in found} == {row["p_value"]}


def test_exact_p_values_are_those_of_the_table_without_framed_strangers():
    data = rows(figures.p_values_of_strangers()[1])
    for method in ("csu", "permutation_test"):
        strangers = [
            row
            for row in table("scores")
            if row["relation"] == "strangers" and row["use"] not in ("forgery", "planted")
        ]
        known = [row[f"{method}_p"] for row in strangers]
        assert sorted(float(p) for p in known if p) == [row["p_value"] for row in data if row["method"] == method]


def test_exact_p_values_keep_their_promise_and_the_others_need_not():
    """Exact ones: within what as many uniform numbers give. The others are shown because they do not.

    Of csu and the permutation test among roots alone: the table has a pair of them once for all that was made of it.
    """
    counted = {(row["method"], float(row["promised"])): float(row["low"]) for row in table("calibration")}
    data = figures.p_values_of_strangers([row for row in scores() if row["kind"] == "roots"])[1]
    for method in ("csu", "permutation_test"):
        found = [row["p_value"] for row in rows(data) if row["method"] == method]
        for promised in (0.01, 0.05, 0.1, 0.5):
            hits = sum(p <= promised for p in found)
            assert stats.binomtest(hits, len(found)).proportion_ci().low <= promised, (method, promised)
            assert counted["palimpsest", promised] <= promised
    assert counted["expert_attribution", 0.01] > 0.01
    assert counted["token_agreement, 1 control", 0.05] > 0.05


def test_orders_are_those_of_the_table_and_the_line_parts_small_p_values_from_others():
    drawn, data = figures.orders_remembered()
    for row, wanted in zip(rows(data), table("palimpsest"), strict=True):
        assert row["rho"] == float(wanted["rho_within_domains"]) and row["relation"] == wanted["relation"]
        assert row["p_value"] == float(wanted["p_value_within_domains"])
    (line,) = {line.get_xdata()[0] for line in drawn.axes[0].lines if line.get_linestyle() == "--"}
    for row in rows(data):
        if abs(row["p_value"] - benchmark_results.RARE) > 0.004:
            assert (row["rho"] > line) == (row["p_value"] < benchmark_results.RARE), row
    marks = [x for line in drawn.axes[0].lines[:2] for x in line.get_xdata()]
    drawn_rows = [row for row in table("palimpsest") if benchmark_results._seen_from_its_root(row) in REMEMBERING]
    assert sorted(marks) == sorted(float(row["rho_within_domains"]) for row in drawn_rows) and len(marks) > 12


# --- another benchmark ------------------------------------------------------------------------------------


def test_tables_of_another_benchmark_are_drawn(tmp_path):
    """Three relatives and four strangers: what is found of them can be counted by hand."""
    header = ["a", "b", "use", "kind", "relation", "shapes", "score", *METHODS]
    pairs = [("positive", "lerp", 0.9), ("positive", "lerp", 0.2), ("positive", "slerp", "")]
    pairs += [("evaluation", "roots", score) for score in (0.1, 0.3, "", -0.2)]
    lines = [
        (f"a{n}", f"b{n}", use, kind, "", "dense", *[score] * (len(METHODS) + 1))
        for n, (use, kind, score) in enumerate(pairs)
    ]
    with open(tmp_path / "scores.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    read = read_table("scores", tmp_path)
    assert [row["score"] for row in read] == [0.9, 0.2, None, 0.1, 0.3, None, -0.2]
    drawn, data = figures.roc_curves(read, {"mine": "csu"})
    corners = list(zip(data["false_positive_rate"], data["true_positive_rate"], strict=True))
    third, two_thirds = 1 / 3, 2 / 3
    wanted = [(0, 0), (0, third), (0.25, third), (0.25, two_thirds), (0.5, two_thirds), (0.75, two_thirds), (1, 1)]
    np.testing.assert_allclose(corners, wanted)
    assert drawn.axes[0].get_xlabel() == "strangers taken for relatives"
    drawn, data = figures.found_by_transformation(read, methods=[*METHODS, "score"])
    assert set(data["transformation"]) == {"merged"}
    assert data["found"] == pytest.approx([1 / 3] * (len(METHODS) + 1))  # 0.9 alone is above the highest stranger


def test_only_the_rows_that_are_given_are_drawn():
    some = [row for row in scores() if row["use"] != "calibration"]
    here, there = (figures.p_values_of_strangers(rows)[1] for rows in (scores(), some))
    assert 0 < len(there["p_value"]) < len(here["p_value"])
    assert len(figures.orders_remembered(read_table("palimpsest")[:3])[1]["suspect"]) == 3
    data = figures.gauge_map([row for row in scores() if row["kind"] == "mix_vo"])[1]
    assert set(data["gauge"]) == {"mix_vo"}
