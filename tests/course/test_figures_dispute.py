"""The figures of notebook 11 against the shipped tables, read here by other means, and against formulas."""

import csv
import math
import re
from statistics import mean, median

import numpy as np
import pytest
from scipy import stats

from minimoe.course import figures
from minimoe.course.figures import dispute
from minimoe.data_files import data_path
from minimoe.fingerprints.weights import open_weights
from minimoe.model import MoEForCausalLM


def rows(path):
    return list(csv.DictReader(data_path(path).read_text(encoding="utf-8").splitlines()))


def benchmark():
    return rows("zoo/benchmark/scores.csv")


def score(row, method="std_profile"):
    return float(row[method]) if row[method] else None


# --- the record -------------------------------------------------------------------------------------------


def test_what_was_not_read_at_its_source_says_so():
    indirect = [row for row in rows("published/dispute.csv") if re.match("copy|repost|summary", row["source"])]
    assert indirect
    assert all("second-hand" in row["kind"] for row in indirect)


def test_the_record_names_both_sides_and_passes_no_verdict():
    record = rows("published/dispute.csv")
    kinds = [row["kind"] for row in record]
    assert {"claim", "answer", "independent analysis"} <= set(kinds)
    dated = [row["date"] for row in record if row["date"][0].isdigit()]
    assert [date[:7] for date in dated] == sorted(date[:7] for date in dated)
    alleged = " ".join(row["statement"] for row in record if row["kind"] == "claim")
    assert "alleges potential model plagiarism" in alleged  # the whole claim, as what somebody claims
    words = " ".join(row["statement"] + row["title"] for row in record if row["kind"] != "claim").lower()
    assert not any(word in words for word in ("stolen", "theft", "plagiari", "guilt", "proven", "innocent"))


def test_there_is_one_claimant_and_an_anonymous_letter_is_no_claim_of_theirs():
    record = rows("published/dispute.csv")
    assert all("HonestAGI" in row["party"] for row in record if row["kind"].startswith("claim"))
    (letter,) = (row for row in record if row["kind"].startswith("anonymous"))
    assert "unverified" in letter["kind"] and "second-hand" in letter["kind"]


def test_a_record_of_ones_own_is_drawn_by_side_from_the_top():
    kinds = ("claim", "answer to it", "claim, second-hand", "measurement")
    record = [{"date": f"202{n}", "kind": kind, "party": "P", "title": f"T{n}"} for n, kind in enumerate(kinds)]
    left_out = [record[0] | {"date": "undated"}, record[0] | {"kind": dispute.NOT_DRAWN[0]}]
    drawn, data = figures.dispute_timeline([*record, *left_out])
    assert data["side"] == ["claim", "answer", "claim", "other"]
    marks = [line.get_xydata().tolist() for line in drawn.axes[0].lines if line.get_marker() != "None"]
    assert marks == [[[0, 0]], [[1, 1]], [[0, 2]], [[2, 3]]]
    assert drawn.axes[0].yaxis_inverted()


def test_the_timeline_shows_what_has_a_date_in_its_order():
    drawn, data = figures.dispute_timeline()
    record = rows("published/dispute.csv")
    record = [row for row in record if row["date"] != "undated" and row["kind"] not in dispute.NOT_DRAWN]
    assert len(record) <= 12  # rows that can be read from the last seat
    assert data["title"] == [row["title"] for row in record]
    assert all(row["title"] in drawn.get_label() for row in record)
    sides = dict(zip(data["party"], data["side"], strict=True))
    assert (sides["HonestAGI (paper)"], sides["Huawei Noah's Ark Lab"], sides["arXiv, by a copy of its page"]) == (
        "claim",
        "answer",
        "other",
    )


# --- chance -----------------------------------------------------------------------------------------------


def test_chance_of_independent_layers_has_the_spread_of_theory():
    """Pearson's r of independent normal curves has variance 1 / (L - 1); four of them are averaged."""
    for layers in (8, 48):
        found = dispute.chance("independent", layers, draws=6000)
        assert abs(found.mean()) < 0.01
        assert found.std() == pytest.approx(1 / math.sqrt(4 * (layers - 1)), rel=0.05)


def test_chance_of_a_shared_trend_tends_to_its_share():
    for trend in (0.5, 0.9):
        assert np.median(dispute.chance("shared trend", 400, draws=200, trend=trend)) == pytest.approx(trend, abs=0.01)
    alike = dispute.chance("shared trend", 48, trend=1.0, draws=10)
    np.testing.assert_allclose(alike, 1)


def test_wandering_is_wider_than_independence_and_stays_wide():
    """Of random walks r does not settle with length (Yule 1926): its spread tends to about .49."""
    for layers in (48, 400):
        assert dispute.chance("wandering", layers, draws=3000).std() == pytest.approx(0.49, abs=0.04)


def test_chance_is_reproducible_and_refuses_other_kinds():
    assert (dispute.chance("wandering", 8, draws=5) == dispute.chance("wandering", 8, draws=5)).all()
    assert (dispute.chance("wandering", 8, draws=5) != dispute.chance("wandering", 8, draws=5, seed=1)).all()
    with pytest.raises(ValueError, match="kind='flat': wanted one of independent"):
        dispute.chance("flat", 8)


def test_chance_by_depth_shows_the_draws():
    data = figures.chance_by_depth()[1]
    place = [i for i, of in enumerate(zip(data["assumption"], data["layers"], strict=True)) if of == ("wandering", 16)]
    found = sorted(dispute.chance("wandering", 16))
    assert data["median"][place[0]] == pytest.approx(median(found))
    assert data["at_least"][place[0]] == sum(one >= 0.927 for one in found) / len(found)
    assert figures.chance_by_depth(trend=0.5)[1]["median"] != data["median"]


# --- what the number is worth -----------------------------------------------------------------------------


def counted():
    table = benchmark()
    rewritten = {name for row in table for name in (row["a"], row["b"]) if "gauged" in name}
    relatives = [score(row) for row in table if row["use"] == "positive" and not {row["a"], row["b"]} & rewritten]
    four = [score(row) for row in table if row["relation"] == "strangers" and row["kind"] == "roots"]
    return [one for one in relatives if one is not None], four


def test_groups_are_those_of_the_table():
    relatives, four = counted()
    data = figures.worth_of_the_number()[1]
    of = {group: place for place, group in enumerate(data["group"])}
    for group, found in (("relatives in the zoo", relatives), ("zoo of 4 layers", four)):
        assert data["pairs"][of[group]] == len(found)
        assert data["at_least"][of[group]] == sum(one >= 0.927 for one in found)
        assert data["about"][of[group]] == sum(0.902 <= one <= 0.952 for one in found)
    reported = {
        (row["strangers"], row["cut_off"]): row
        for row in rows("zoo/benchmark/false_positives.csv")
        if row["method"] == "std_profile"
    }
    for group, name in (("zoo of 4 layers", "4 layers"), ("zoo of 8 layers", "8 layers")):
        assert data["at_least"][of[group]] == int(reported[name, "0.927"]["above"])
        assert data["median"][of[group]] == pytest.approx(float(reported[name, "0.927"]["median"]), abs=1e-4)
    assert (data["pairs"][of["published pairs"]], data["at_least"][of["published pairs"]]) == (4, 0)


def test_disputed_pairs_and_relatives_are_no_background():
    published = sorted(dispute.backgrounds()["published pairs"])
    assert published == [0.775, 0.779, 0.811, 0.91]


def test_tail_and_height_are_the_two_readings():
    data = figures.tail_and_height()[1]
    relatives, four = counted()
    for group, found in (("relatives", relatives), ("strangers", four)):
        shown = [hits for of, hits in zip(data["group"], data["pairs"], strict=True) if of == group]
        assert shown == [sum(one >= 0.927 for one in found), sum(0.902 <= one <= 0.952 for one in found)]


def exact(hits, pairs):
    found = stats.binomtest(hits, pairs).proportion_ci(method="exact")
    return found.low, found.high


def test_likelihood_ratio_against_scipy():
    relatives, four = counted()
    hits = [sum(one >= 0.927 for one in found) for found in (relatives, four)]
    (low, high), (least, most) = exact(hits[0], len(relatives)), exact(hits[1], len(four))
    wanted = (low / most, hits[0] / len(relatives) / (hits[1] / len(four)), high / least)
    assert dispute.likelihood_ratio(dispute.relatives(), dispute.backgrounds()["zoo of 4 layers"]) == pytest.approx(
        wanted
    )
    low, ratio, high = dispute.likelihood_ratio(dispute.relatives(), dispute.backgrounds()["zoo of 8 layers"])
    assert (ratio, high) == (math.inf, math.inf)
    assert low == pytest.approx(exact(hits[0], len(relatives))[0] / exact(0, 15)[1])


def test_the_two_readings_disagree_in_direction():
    """What the notebook teaches with this background: about 9 to 1 one way, about 2 to 1 the other."""
    strangers = dispute.backgrounds()["zoo of 4 layers"]
    at_least, about = (
        dispute.likelihood_ratio(dispute.relatives(), strangers, reading)[1] for reading in dispute.READINGS
    )
    assert at_least > 5
    assert 1.5 < 1 / about < 2.5


def test_posterior_by_bayes():
    for prior in (0.01, 0.3, 0.99):
        for ratio in (0.0, 0.2, 1.0, 30.0):
            assert dispute.posterior(prior, ratio) == pytest.approx(prior * ratio / (prior * ratio + 1 - prior))
        assert dispute.posterior(prior, math.inf) == 1
        assert dispute.posterior(prior, 1) == pytest.approx(prior)


def test_belief_stresses_the_row_and_shows_what_bayes_gives():
    backgrounds = dispute.backgrounds()
    for prior, background, reading in (
        (0.05, "published pairs", "at least 0.927"),
        (0.95, "zoo of 8 layers", "about 0.927"),
    ):
        drawn, data = figures.belief(prior, background, reading)
        assert data["background"] == list(backgrounds)
        for name, low, middle, high in zip(data["background"], data["low"], data["belief"], data["high"], strict=True):
            ratio = dispute.likelihood_ratio(dispute.relatives(), backgrounds[name], reading)[1]
            assert 0 <= low <= high <= 1
            assert middle == "" if ratio == math.inf else middle == pytest.approx(dispute.posterior(prior, ratio))
            assert middle == "" or low <= middle <= high
        bold = [label.get_text() for label in drawn.axes[0].get_yticklabels() if label.get_weight() == "bold"]
        assert bold == [background]


def test_belief_and_worth_of_scores_of_ones_own():
    """Of 10 relatives 8 reach the value, of 10 strangers 2: a ratio of 4, so that 50 % become 80 %."""
    related, mine = np.array([0.95] * 8 + [0.1] * 2), np.array([0.95] * 2 + [0.1] * 8)
    data = figures.belief(0.5, "mine", related=related, backgrounds={"mine": mine})[1]
    assert data["belief"] == pytest.approx([0.8])
    drawn, data = figures.worth_of_the_number(related, {"mine": mine})
    assert (data["group"], data["at_least"], data["about"]) == (["relatives in the zoo", "mine"], [8, 2], [8, 2])
    top, bottom = drawn.axes[0].get_ylim()[::-1]
    assert top < 0 < 1 < bottom  # relatives at the top


def test_a_range_in_words_never_reaches_certainty():
    for low, high, words in (
        (0.5, 0.7, "50% to 70%"),
        (0.5, 1.0, "over 50%"),
        (0.9995, 1.0, "over 99%"),
        (0.0, 0.2, "1% to 20%"),
    ):
        assert dispute.in_words(low, high) == words


def test_the_picture_of_belief_states_no_verdict():
    text = figures.belief()[0].get_label().lower()
    assert not any(word in text for word in ("derived", "copied", "guilty", "innocent", "verdict"))


def test_what_cannot_be_drawn_is_refused():
    for arguments, message in (
        ({"prior": 0.0}, "prior=0.0: wanted a probability"),
        ({"prior": 1}, "prior=1: wanted a probability"),
        ({"background": "zoo"}, "background='zoo': wanted one of zoo of 4 layers"),
        ({"reading": "over"}, "reading='over': wanted one of at least"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.belief(**arguments)


# --- other measurements -----------------------------------------------------------------------------------


def test_if_measured_shows_the_pairs_of_each_situation():
    data = figures.if_measured()[1]
    table = benchmark()
    wanted = {
        "reused, then trained": [r for r in table if r["use"] == "positive" and r["kind"].endswith("-trained")],
        "same first weights only": [r for r in table if r["relation"] == "same first weights"],
        "taught by the other": [r for r in table if r["relation"] == "teacher and student"],
    }
    for situation, some in wanted.items():
        for method in ("aligned_cka", "norm_profile", "token_agreement"):
            found = [score(row, method) for row in some if row[method]]
            (place,) = (
                i
                for i, of in enumerate(zip(data["method"], data["situation"], strict=True))
                if of == (method, situation)
            )
            shown = (data["pairs"][place], data["low"][place], data["median"][place], data["high"][place])
            assert shown == pytest.approx((len(found), min(found), median(found), max(found)))


def test_situations_of_ones_own_are_drawn_in_the_order_of_the_methods():
    related, independent = (
        [{"csu": x, "match": y} for x, y in values] for values in (((0.9, 0.2), (0.7, None)), ((0.1, 0.3),))
    )
    drawn, data = figures.if_measured({"mine": related, "independent": independent}, ("match", "csu"))
    rows = list(zip(*data.values(), strict=True))
    assert rows[:2] == [("match", "mine", 1, 0.2, 0.2, 0.2), ("csu", "mine", 2, 0.7, pytest.approx(0.8), 0.9)]
    assert drawn.get_label().endswith("by these methods: mine, csu.")
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["match", "neuron order (csu)"]
    assert drawn.axes[0].yaxis_inverted()


def test_independent_pairs_share_nothing_and_match_in_kind():
    some = dispute.situations()["independent"]
    assert {row["relation"] for row in some} == {"strangers"}
    assert {row["shapes"] for row in some} == {"dense, mixture, equal depths"}


def test_separating_methods_have_no_overlap():
    """The std profile, on which the claim rests, is not among them; what a rewrite touches drops out."""
    situations = dispute.situations()
    before, after = (set(dispute.separating(situations, name)) for name in list(situations)[:2])
    assert after < before
    assert "std_profile" not in before
    assert {"aligned_cka", "virtual_response_whitened"} <= after
    table = benchmark()
    for method in after:
        reused = [score(r, method) for r in table if r["use"] == "positive" and r["kind"].endswith("-trained-gauged")]
        usual = [
            score(r, method)
            for r in table
            if r["use"] in ("calibration", "evaluation") and r["shapes"] == "dense, mixture, equal depths"
        ]
        assert min(reused) > max(usual)


def test_folded_norms_leave_no_row_instead_of_a_zero():
    data = figures.if_measured()[1]
    pairs = list(zip(data["method"], data["situation"], strict=True))
    assert ("norm_profile", "reused, trained, rewritten") not in pairs
    assert len(pairs) == len(dispute.METHODS) * 5 - 1


# --- norms ------------------------------------------------------------------------------------------------


def test_norm_similarities_against_the_models_themselves():
    names = ("alder", "stranger-13")
    models = [MoEForCausalLM.from_pretrained(data_path("zoo") / name) for name in names]
    norms = [
        [
            [w.detach().double().numpy() for n, w in m.named_parameters() if f"layers.{layer}." in n and "norm" in n]
            for layer in range(4)
        ]
        for m in models
    ]
    same, other = [], []
    for i in range(4):
        for j in range(4):
            pearson = [np.corrcoef(x, y)[0, 1] for x, y in zip(norms[0][i], norms[1][j], strict=True)]
            (same if i == j else other).append(mean(pearson))
    found = dispute.norm_similarities(*map(open_weights, models))
    assert found["Pearson, same layer"] == pytest.approx(mean(same), abs=1e-6)
    assert found["Pearson, other layers"] == pytest.approx(mean(other), abs=1e-6)
    x, y = norms[0][2][0], norms[1][2][0]
    assert found["cosine, same layer"] > 0.9 * (x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_strangers_have_high_cosines_and_no_correlation_and_a_relative_has_both():
    data = figures.norms_of_strangers()[1]
    of = {}
    for pair, statistic, value in zip(*data.values(), strict=True):
        of.setdefault(pair, {})[statistic] = value
    strangers = [found for pair, found in of.items() if " and " in pair and "Solar" not in pair]
    assert len(strangers) == 6
    assert all(found["cosine, same layer"] > 0.8 > 0.2 > abs(found["Pearson, same layer"]) for found in strangers)
    assert of["fine-tuned"]["Pearson, same layer"] > 0.9
    assert of["Solar and GLM"] == {
        "cosine, same layer": 0.95,
        "cosine, other layers": 0.94,
        "Pearson, same layer": 0.013,
        "Pearson, other layers": 0.011,
    }


def test_similarities_of_ones_own_are_drawn_in_their_groups():
    mine = {
        "strangers": {"a and b": {"cosine": 0.9, "Pearson": 0.0}},
        "relatives": {"a and c": {"cosine": 1.0, "Pearson": 0.8}},
    }
    drawn, data = figures.norms_of_strangers(mine)
    assert data["value"] == [0.9, 0.0, 1.0, 0.8]
    strangers, relatives, _ = drawn.axes[0].lines
    assert strangers.get_label() == "strangers" and strangers.get_xdata().tolist() == [0.9, 0.0]
    assert relatives.get_xdata().tolist() == [1.0, 0.8]
    assert drawn.get_label().endswith("Means of 1 pairs of strangers: cosine 0.90, Pearson 0.00.")
