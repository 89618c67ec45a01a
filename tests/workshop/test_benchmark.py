"""The benchmark: its pairs are what they are said to be, its tables what one counts by hand."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.palimpsest import palimpsest
from minimoe.fingerprints.virtual_response import virtual_response
from minimoe.fingerprints.weights import open_weights
from minimoe.fingerprints.zoo_scores import read_table
from minimoe.lineage.recipes import SHAPES
from minimoe.lineage.tree import FAMILIES, MEMBERS
from minimoe.lineage.zoo import Zoo, origins, relation
from minimoe.model import MoEForCausalLM
from minimoe.training.tokenizer import load_tokenizer
from workshop import benchmark
from workshop import benchmark_tables as tables
from workshop.benchmark import PROMISES, all_tables, draw, order_of, run, score, suspects, with_verdicts
from workshop.benchmark_pairs import DROP_RATES, Pair, pairs
from workshop.training_recipes import keep_training, open_corpus

FEW = [{"transformation": "int8", "method": "csu", "tpr": 1.0}]
STRANGERS = ("calibration", "evaluation", "between")
TESTED = [{"test": test, "p_value": 0.5} for test in list(PROMISES)[2:]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return Zoo(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def rows():
    return with_verdicts(read_table("scores"))


# --- the pairs


def test_the_use_of_every_pair_is_the_truth_of_the_tree():
    truth = {"positive": "shared lineage", "invariance": "shared lineage", "twins": "same first weights"}
    truth |= {"student": "teacher and student"}
    truth |= dict.fromkeys(("forgery", "planted", *STRANGERS), "strangers")
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
    whitened = virtual_response(a, b, whiten=True).score
    assert row["virtual_response_whitened"] == pytest.approx(whitened, abs=1e-4)  # small directions count, and round
    assert row["shapes"] == "dense, mixture, equal depths" and row["relation"] == "strangers"
    assert all(row[f"{name}_s"] > 0 for name in METHODS)


def test_what_is_shipped_is_what_is_computed(zoo, rows):
    """Of a few pairs; on another processor, to three digits."""
    wanted = [("alder", "alder-continued-4"), ("birch", "alder-sliced-trained"), ("alder", "stranger-13-framed-both")]
    for row in rows:
        if (row["a"], row["b"]) in wanted:
            again = score(zoo, Pair(row["a"], row["b"], row["use"], row["kind"]))
            for name in METHODS:
                near = 0.1 if name in ("aligned_neurons", "best_part") else 2e-3  # strangers' nearest neurons
                assert again[name] == (None if row[name] is None else pytest.approx(row[name], abs=near)), name
            wanted.remove((row["a"], row["b"]))
    assert not wanted


def test_a_run_computes_what_it_can_and_takes_the_rest_from_the_shipped_scores(zoo, rows, tmp_path, monkeypatch):
    there = Pair("alder", "alder-int8", "positive", "int8")
    absent = next(pair for pair in pairs() if pair.b == "stranger-24-int8" and pair.use == "positive")
    strangers = next(pair for pair in pairs() if (pair.a, pair.b) == ("stranger-01", "stranger-02"))
    monkeypatch.setattr(benchmark, "pairs", lambda: [there, absent, strangers])
    tabled = []
    monkeypatch.setattr(benchmark, "all_tables", lambda rows: tabled.extend(rows) or {"transformations": FEW})
    monkeypatch.setattr(benchmark, "trials", lambda zoo, processes: {"p_values": TESTED})
    computed = run(zoo, tmp_path, processes=1)
    assert [(row["a"], row["b"]) for row in computed] == [("alder", "alder-int8")]
    written = read_table("scores", tmp_path)
    assert [row["b"] for row in written] == ["alder-int8", "stranger-24-int8", "stranger-02"]
    assert [{name: row[name] for name in METHODS} for row in tabled] == [
        {n: row[n] for n in METHODS} for row in written
    ]
    shipped = next(row for row in rows if row["b"] == "stranger-24-int8" and row["use"] == "positive")
    assert {name: written[1][name] for name in METHODS} == {name: shipped[name] for name in METHODS}
    page = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert "1 of 3 pairs compared here" in page and "## p_values" not in page
    assert page.index("| exact | csu | 0.010 |") < page.index("| nominal | expert_attribution | 0.010 | 1 |")


def test_the_figures_of_a_run_are_drawn_from_its_tables(tmp_path):
    for name in ("scores", "p_values", "palimpsest", "calibration"):
        rows = read_table(name)
        if name == "scores":
            rows = [row for row in rows if "birch" not in row["a"] + row["b"]]
        (tmp_path / f"{name}.csv").write_text(benchmark.to_csv(rows), encoding="utf-8")
    paths = draw(tmp_path)
    assert {path.parent for path in paths} == {tmp_path / "figures"} and len(paths) >= 24
    drawn = read_table("std_profile_of_strangers", tmp_path / "figures")
    shipped = {row["std_profile"] for row in read_table("scores", tmp_path)}
    assert {row["score"] for row in drawn} <= shipped and len(drawn) < len(read_table("scores")) / 2


# --- orders of training, and p-values that take a third party


def test_an_order_is_what_training_met():
    model, met = MoEForCausalLM(SHAPES["dense"]), []
    model.register_forward_pre_hook(lambda model, inputs: met.append(inputs[0][0].clone()))
    options = {key: value for key, value in MEMBERS["birch"].options.items() if key != "weights"}
    keep_training(model, out=None, **options | {"steps": 3})
    examples, domains = order_of("birch", 3)
    assert torch.equal(examples, torch.stack(met))
    streams = {name: open_corpus("real").tokens(name, "train").tobytes() for name in open_corpus("real").domains}
    for example, domain in zip(examples, domains, strict=True):
        assert example.numpy().astype("uint16").tobytes() in streams[list(streams)[domain]]


def test_a_shipped_palimpsest_is_that_of_the_method(zoo):
    row = next(row for row in read_table("palimpsest") if row["suspect"] == "birch-distilled")
    suspect, reference = (open_weights(zoo.load(name)) for name in (row["suspect"], benchmark.REFERENCE))
    examples, domains = order_of("birch")
    found = palimpsest(suspect, examples, reference=reference, kinds=domains)
    assert found.score == pytest.approx(row["rho_within_domains"], abs=2e-3)
    assert found.p_value == pytest.approx(row["p_value_within_domains"], abs=5e-3)


def test_palimpsests_say_how_suspects_are_related_and_all_of_these_are_at_hand(zoo):
    rows = read_table("palimpsest")
    assert [(row["order_of"], row["suspect"]) for row in rows] == [(r, name) for r in FAMILIES for name in suspects(r)]
    for row in rows:
        assert zoo.has(row["suspect"])
        itself = row["order_of"] == row["suspect"]
        assert row["relation"] == ("itself" if itself else relation(row["order_of"], row["suspect"]))


def test_p_values_that_take_a_third_party_are_of_strangers():
    rows = read_table("p_values")
    assert {row["test"] for row in rows} | {"csu", "permutation_test"} == PROMISES.keys()
    for row in rows:
        parties = {row["a"], row["b"], row["about"]} & MEMBERS.keys()
        assert len(parties) == (3 if row["test"] == "token_agreement, 1 control" else 2)
        assert all(relation(*pair) == "strangers" for pair in combinations(parties, 2)), row
        assert 0 < row["p_value"] <= 1


def test_without_the_corpus_of_the_shipped_models_their_orders_are_taken_from_the_tables(zoo, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "_orders_are_known", lambda: False)
    monkeypatch.setattr(benchmark, "_in_processes", lambda tasks, *_, **__: asked.extend(tasks) or [])
    found = benchmark.trials(zoo)
    assert {task[0] for task in asked} == {benchmark._agreements, benchmark._nominal}
    assert found["palimpsest"] == read_table("palimpsest")
    assert found["p_values"] == [row for row in read_table("p_values") if row["test"] == "palimpsest"]


# --- tables


def test_the_shipped_tables_are_made_from_the_shipped_scores(rows):
    for name, table in all_tables(rows).items():
        for shipped, made in zip(read_table(name), table, strict=True):
            for key, value in made.items():
                wanted = pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
                assert shipped[key] == wanted, (name, key)


def test_the_shipped_calibration_is_made_from_the_shipped_p_values(rows):
    made = tables.calibration(rows, read_table("p_values"), PROMISES)
    for found, wanted in zip(read_table("calibration"), made, strict=True):
        numbers = {key: value for key, value in wanted.items() if not isinstance(value, str)}
        assert {key: found[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)
        assert (found["p_value"], found["method"]) == (wanted["p_value"], wanted["method"])


def test_the_shipped_verdicts_follow_from_the_shipped_scores(rows):
    assert [row["verdict"] for row in read_table("scores")] == [row["verdict"] for row in rows]


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


def test_partial_auc_is_the_area_under_the_curve_by_small_steps():
    generator = np.random.default_rng(0)
    high, low = generator.normal(1, 1, 70).round(1), generator.normal(0, 1, 210).round(1)  # with ties
    thresholds = np.append(np.inf, np.unique([*high, *low])[::-1])
    false, true = ((scores >= thresholds[:, None]).mean(1) for scores in (low, high))
    area = np.interp(np.linspace(0, 0.05, 200_001), false, true).mean()
    labels, scores = np.repeat([1, 0], [len(high), len(low)]), np.concatenate([high, low])
    curve = roc_curve(labels, scores)[:2]
    assert tables.area_under(curve, 0.05) == pytest.approx(area, abs=1e-4)
    assert tables.area_under(curve) == pytest.approx(roc_auc_score(labels, scores))
    standardised = roc_auc_score(labels, scores, max_fpr=0.05)
    assert tables.area_under(curve, 0.05) == pytest.approx(0.025 + (2 * standardised - 1) * 0.975)
    for at in (0.01, 0.05, 0.2):
        threshold = tables.true_positive_threshold(low, at)
        assert (low > threshold).mean() <= at < (low >= threshold).mean()


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


def test_calibration_takes_p_values_from_where_they_are():
    made = toy_rows(use=["evaluation", "positive", "between"], csu_p=[0.005, 0.001, 0.5])
    tested = [{"test": "mine", "p_value": p} for p in (0.2, 0.01, 0.03, 1.0)]
    found = tables.calibration(made, tested, {"csu": "exact", "mine": "nominal"})
    assert [(row["p_value"], row["method"], row["promised"]) for row in found[3:5]] == [
        ("exact", "csu", 0.5),
        ("nominal", "mine", 0.01),
    ]
    assert [(row["pairs"], row["found"]) for row in found[::4]] == [(2, 0.5), (4, 0.25)]


def test_promises_count_small_p_values():
    made = toy_rows(use=["evaluation"] * 5, csu_p=[0.005, 0.04, 0.2, 0.7, None])
    found = {row["promised"]: row["found"] for row in tables.promises(made, ["csu"])}
    assert found == {0.01: 0.25, 0.05: 0.5, 0.1: 0.5, 0.5: 0.75}


# --- what the whole benchmark is to show


def test_orders_are_told_by_the_model_itself_its_rewrite_and_its_student_and_by_no_stranger():
    """Within domains: by chance, one kind of text came earlier than another in the order of birch."""
    for row in read_table("palimpsest"):
        kind = row["suspect"].removeprefix(f"{row['order_of']}-")
        if row["relation"] == "itself" or kind in ("gauged", "int4", "transplant", "distilled"):
            assert row["p_value_within_domains"] < 0.01, row
        if row["relation"] in ("strangers", "same first weights"):
            assert row["p_value_within_domains"] > 0.01, row


def test_targets_of_the_combined_verdict(rows):
    found = {row["method"]: row for row in tables.by_method(rows, ["score"])}["score"]
    assert found["auc"] >= 0.995 and found["tpr"] >= 0.95
    assert found["strangers"] >= 1000 and found["tpr_at_0.1%"] >= 0.95
    said = Counter((row["use"], row["verdict"]) for row in rows)
    unrelated = (*STRANGERS, "twins", "student", "forgery", "planted")
    assert not any(said[use, verdict] for use in unrelated for verdict in ("same weights", "shared lineage"))
    students = [row["score"] for row in rows if row["use"] == "student"]
    assert max(students) < 0.4  # others may learn more from their teacher
    left_open = {row["kind"] for row in rows if row["verdict"] == "cannot tell"}
    assert left_open == {"framed-order"}


def test_targets_of_expert_attribution(rows):
    for row in tables.attribution(rows, DROP_RATES):
        assert row["right_layer"] >= 0.95 or row["drop_rate"] > 0.5, row
        assert abs(row["estimated"] - row["drop_rate"]) <= 0.1, row
