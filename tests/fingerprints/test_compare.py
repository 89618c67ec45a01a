"""Verdicts and reports: what they say of models whose relation is known, and how they come to say it."""

import json
import math
from collections import Counter
from functools import cache
from shutil import copytree

import huggingface_hub.constants
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import DECIDING, METHODS, background_of_rows, compare
from minimoe.fingerprints.fingerprint import fingerprint
from minimoe.fingerprints.report import title_of
from minimoe.fingerprints.result import Result
from minimoe.fingerprints.verdict import (
    CANNOT_TELL,
    CORRELATION,
    NO_EVIDENCE,
    P_VALUE,
    SAME,
    SHARED,
    Evidence,
    judge,
)
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage import all_gauges, upcycle
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from minimoe.training.tokenizer import load_tokenizer
from tests.fingerprints.toys import Vocabulary, disturbed, random_model, weights
from tests.model.test_remote import Server

SEE_THROUGH = [name for name in DECIDING if name != "csu"]


@cache  # what is read of it once serves all tests
def member(name):
    return open_weights(Zoo("nothing is built here").load(name), tokenizer=load_tokenizer())


# --- what is true is said


@pytest.mark.parametrize("kind", ["finetuned", "fewer-heads", "fewer-layers", "drop-0.5-trained-gauged"])
def test_a_descendant_shares_lineage_with_its_root_and_not_with_another(kind):
    descendant = member(f"alder-{kind}")
    assert compare(member("alder"), descendant).verdict == SHARED
    assert compare(member("birch"), descendant).verdict == NO_EVIDENCE


@pytest.mark.parametrize("kind", ["gauged", "virtual-groups-gauged"])
def test_a_rewritten_copy_is_called_the_same_weights(kind):
    assert compare(member("alder"), member(f"alder-{kind}")).verdict == SAME


@pytest.mark.parametrize("name", ["stranger-13-framed-both", "alder-twin", "alder-distilled"])
def test_framed_strangers_twins_and_students_are_not_called_relatives(name):
    assert compare(member("alder"), member(name)).verdict == NO_EVIDENCE


def test_a_model_against_itself_is_identical_by_its_hash():
    folder = Zoo("nothing is built here").folder("alder")
    report = compare(folder, folder / "model.safetensors")
    assert (report.verdict, report.score) == (SAME, 1.0)
    assert "sha256" in report.reason


def test_files_that_begin_otherwise_are_not_hashed(monkeypatch):
    monkeypatch.delattr(Weights, "sha256")
    assert compare(member("alder"), member("stranger-13"), methods=["csu"]).verdict == CANNOT_TELL


def test_the_order_of_the_models_does_not_matter():
    a, b = member("alder-fewer-layers"), member("alder-drop-0.5-trained")
    there, back = compare(a, b), compare(b, a)
    assert (there.verdict, there.score) == (back.verdict, pytest.approx(back.score, abs=0.02))


def test_an_order_of_neurons_that_stands_alone_leaves_the_verdict_open():
    """Renumbered, a stranger looks to csu as a model does with one expert of another: it can say that, and no more."""
    report = compare(member("alder"), member("stranger-13-framed-order"))
    assert report.methods["csu"].result.p_value < 1e-12
    assert all(report.methods[name].standing < 0.5 for name in SEE_THROUGH)
    assert (report.verdict, report.score, "stands alone" in report.reason) == (CANNOT_TELL, 0.5, True)


@pytest.mark.parametrize("name", ["birch-transplant", "birch-transplant-gauged"])
def test_one_expert_of_another_model_is_shared_lineage(name):
    report = compare(member("alder"), member(name))
    assert report.verdict == SHARED and report.reason.startswith("best_part of ")


@pytest.mark.parametrize("kind", ["dead", "squares", "expert-gauged", "deafening-heads", "rows"])
def test_planted_parts_that_do_nothing_are_no_evidence(kind):
    report = compare(member("alder"), member(f"stranger-13-planted-{kind}"))
    assert report.verdict == NO_EVIDENCE
    if kind != "squares":  # what these would be worth hangs on rounding: some of their angles cancel
        assert ("that do nothing" in report.reason) == (kind in ("dead", "expert-gauged"))


@pytest.mark.parametrize("name", ["alder-fresh", "alder-fresh-gauged"])
def test_a_body_under_new_embeddings_is_found(name):
    assert compare(member("alder"), member(name)).verdict == SHARED
    assert compare(member("birch"), member(name)).verdict == NO_EVIDENCE


@pytest.mark.parametrize("parent", ["alder", "birch"])
def test_both_parents_of_a_graft_are_found(parent):
    assert compare(member(parent), member("alder-grafted-trained-gauged")).verdict == SHARED


def test_an_order_of_neurons_beside_other_evidence_is_not_held_against_it():
    report = compare(member("alder"), member("alder-finetuned"))
    assert report.methods["csu"].result.p_value == 1e-300
    assert (report.verdict, "csu" in report.reason) == (SHARED, False)
    assert report.score == max(report.methods[name].standing for name in SEE_THROUGH)


# --- models of another size


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 40, "num_hidden_layers": 2}, {"num_experts": 4}])
def test_strangers_of_any_size_are_told_apart(sizes):
    report = compare(weights(random_model(1)), weights(random_model(2, **sizes)))
    assert report.verdict == NO_EVIDENCE
    assert "48 to 384 dimensions" in report.background


def test_relatives_of_any_size_are_found():
    model = random_model(1)
    suspect = upcycle(all_gauges(disturbed(model, 0.05), 3), num_experts=4, num_experts_per_tok=2, model_type="minimoe")
    assert compare(weights(model), weights(suspect)).verdict == SHARED


def test_strangers_of_your_own_give_the_background():
    strangers = [weights(random_model(seed)) for seed in range(10, 14)]
    model = random_model(1)
    relative, stranger = weights(disturbed(all_gauges(model, 3), 0.2)), weights(random_model(2))
    assert compare(weights(model), relative, background=strangers).verdict == SHARED
    report = compare(weights(model), stranger, background=strangers)
    assert report.verdict == NO_EVIDENCE
    assert {len(report.methods[name].strangers) for name in SEE_THROUGH} == {2 * len(strangers)}


def test_too_few_strangers_are_refused():
    model = weights(random_model(1))
    with pytest.raises(ValueError, match="background: 2 models"):
        compare(model, model, background=[weights(random_model(2)), weights(random_model(3))])


# --- in memory as on disk


def said(report):
    """Verdict and scores; the names of the two models and how they are equal differ between memory and disk."""
    results = {name: evidence.result for name, evidence in report.methods.items()}
    return report.verdict, {name: (found.score, found.p_value) for name, found in results.items()}


@pytest.mark.exact("two comparisons of the same weights are compared to the bit")
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("alder", "alder"),
        ("alder", "alder-extended"),
        ("moe-real", "alder"),
    ],
)
def test_two_models_in_memory_compare_as_their_folders_do(a, b, tmp_path):
    zoo = Zoo("nothing is built here")
    models, folders = [], []
    for number, name in enumerate((a, b)):
        try:
            model = zoo.load(name)
        except ValueError:  # shipped, and no member of the tree
            model = MoEForCausalLM.from_pretrained(data_path(f"zoo/{name}"), dtype=torch.float32)
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
        models.append(model)
    wanted = said(compare(*folders, methods="all"))
    assert said(compare(*models, methods="all")) == wanted == said(compare(models[0], folders[1], methods="all"))
    assert any(score is not None for score, _ in wanted[1].values())


@pytest.mark.exact("two comparisons of the same weights are compared to the bit")
def test_random_models_in_memory_compare_as_their_folders_do_and_stay_as_they_are(tmp_path):
    """In half precision, in training mode; one with its tokenizer, one without, who is given it."""
    vocabulary = {f"t{number}": number for number in range(160)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    models = [random_model(1).half().train(), random_model(2, num_experts=4).bfloat16().train()]
    models[0].tokenizer_json = tokenizer.to_str()
    for model, name in zip(models, "ab", strict=True):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "b" / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    found = compare(*models, tokenizer=tokenizer)
    assert said(found) == said(compare(tmp_path / "a", tmp_path / "b"))
    assert found.methods["virtual_response_whitened"].result.score is not None
    for model, tensors in zip(models, before, strict=True):
        assert model.training
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
    nameless = compare(*models)
    assert "0 shared tokens" in nameless.methods["aligned_cka"].result.refused


def test_the_tokenizer_of_a_model_is_used_before_the_one_that_is_given():
    model, other = random_model(1), random_model(1)
    model.tokenizer_json = Tokenizer(WordLevel({f"own{i}": i for i in range(160)}, unk_token="own0")).to_str()
    report = compare(model, other, tokenizer=Vocabulary())
    assert "0 shared tokens" in report.methods["aligned_cka"].result.refused


def test_another_default_device_changes_nothing(tmp_path):
    models = [random_model(1, num_experts=4).float(), random_model(2, num_experts=4).float()]
    models[0].save_pretrained(tmp_path)
    wanted = compare(*models, tokenizer=Vocabulary(), methods="all")
    torch.set_default_device("meta")  # where no number could be kept
    try:
        found = compare(*models, tokenizer=Vocabulary(), methods="all")
        kept = fingerprint(tmp_path, tokenizer=Vocabulary())
    finally:
        torch.set_default_device(None)
    for name, evidence in wanted.methods.items():
        score, known = found.methods[name].result.score, evidence.result.score
        near = 0.05 if name in ("aligned_neurons", "best_part") else 1e-4  # strangers' nearest neurons hang on rounding
        assert score == (None if known is None else pytest.approx(known, abs=near)), name
    assert found.verdict == wanted.verdict and kept.features


def test_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        empty = MoEForCausalLM(random_model().config)
    with pytest.raises(ValueError, match="device='meta': wanted a model on a device where its weights have values"):
        compare(empty, random_model())


def test_without_shared_tokens_the_reason_is_given():
    report = compare(weights(random_model(1)), weights(random_model(2), prefix="other"))
    refused = {name: evidence.result.refused for name, evidence in report.methods.items() if evidence.result.refused}
    with_tokens = ("aligned_cka", "virtual_response_whitened")
    assert refused.keys() == {*with_tokens} and all("0 shared tokens" in refused[name] for name in with_tokens)
    assert report.verdict == NO_EVIDENCE, "neurons are looked for without tokens"


@pytest.mark.parametrize("number", [0.0, math.nan])
def test_weights_that_are_no_weights_are_refused_by_every_method(number):
    broken = random_model(1)
    with torch.no_grad():
        for tensor in broken.state_dict().values():
            tensor.fill_(number)
    report = compare(weights(broken), weights(random_model(2)), methods="all")
    assert report.verdict == CANNOT_TELL
    assert all(report.methods[name].result.score is None for name in (*SEE_THROUGH, "std_profile", "norm_profile"))
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"methods=\['magic'\]: wanted .* std_profile"):
        compare(weights(random_model(1)), weights(random_model(2)), methods=["magic"])


def test_methods_that_do_not_enter_leave_the_verdict_open():
    report = compare(member("alder"), member("alder-finetuned"), methods=["std_profile", "weight_cosine"])
    assert (report.verdict, report.score) == (CANNOT_TELL, None)
    assert list(report.methods) == ["std_profile", "weight_cosine"]


def test_methods_that_decide_run_first_and_the_others_on_request():
    pair = member("alder"), member("alder-finetuned")
    few, every = compare(*pair), compare(*pair, methods="all")
    assert list(few.methods) == list(DECIDING) and list(every.methods) == list(METHODS)
    assert (few.verdict, few.reason, few.score) == (every.verdict, every.reason, every.score)
    assert {name for name, found in every.methods.items() if found.level is not None} == set(DECIDING)


def test_each_model_is_read_and_run_once(monkeypatch):
    """Anchors, MLPs and responses are the same for all methods of a pair, and what a model says to the prompts."""
    read = Counter()

    def counted(name):
        call = getattr(Weights, name)
        monkeypatch.setattr(
            Weights, name, lambda self, *place, **o: read.update([(name, id(self), *place)]) or call(self, *place, **o)
        )

    for name in ("get", "matrices", "block"):
        counted(name)
    pair = [weights(random_model(seed, num_experts=4)) for seed in (1, 2)]
    compare(*pair, methods=["virtual_response", "virtual_response_whitened", "match", "expert_attribution"])
    for side in map(id, pair):  # once to run the mixture, and once to look at its neurons
        assert read["get", side, "gate", 1] == read["matrices", side, "gate", 1] == read["get", side, "norm_final"] == 1
    read.clear()
    compare(*pair, methods=["token_agreement", "hidden_cka", "routing_agreement"])
    assert {read["block", id(side), layer] for side in pair for layer in range(3)} == {1}


# --- how scores become a verdict


@given(st.lists(st.integers(-600, 600).map(lambda n: n / 1000), min_size=5, max_size=30, unique=True), st.floats(-1, 1))
def test_a_score_stands_between_the_median_stranger_and_1(strangers, score):
    level = CORRELATION.level(strangers)
    ordered = sorted(strangers)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    assert level == pytest.approx(min(numpy.tanh(5 * numpy.arctanh(max(strangers)) - 4 * numpy.arctanh(middle)), 0.999))
    assert CORRELATION.level(strangers[:4]) is None

    def standing(score):
        return Evidence(result=Result(score=score), strangers=strangers, scale=CORRELATION).standing

    assert (standing(middle), standing(level), standing(1.0)) == pytest.approx((0, 0.5, 1))
    assert 0 < standing(max(strangers)) < 0.5
    assert 0 <= standing(score) <= standing(score + 0.01) <= 1


def of_csu(p_value):
    return Evidence(result=Result(score=0.1, p_value=p_value), strangers=(), scale=P_VALUE)


def test_a_p_value_stands_by_itself_and_says_no_more_than_cannot_tell():
    assert [of_csu(p_value).standing for p_value in (1.0, 1e-3, 1e-6, 1e-300)] == pytest.approx([0, 0.25, 0.5, 1])
    assert judge({"csu": of_csu(1e-5)})[::2] == (CANNOT_TELL, None)  # csu alone misses every rewritten copy
    assert judge({"csu": of_csu(1e-7)})[::2] == judge({"csu": of_csu(1e-300)})[::2] == (CANNOT_TELL, 0.5)


def test_a_p_value_can_keep_a_verdict_open_and_cannot_change_it():
    """Of match the median stranger has 0, and the level is 1/3: where the highest has tanh(artanh(1/3) / 5)."""
    strangers = (-0.1, -0.05, 0.0, 0.05, math.tanh(math.atanh(1 / 3) / 5))
    for score, p_value, said in (
        (0.1, 1e-5, (NO_EVIDENCE, pytest.approx(5 / 12))),
        (0.1, 1e-7, (CANNOT_TELL, 0.5)),
        (0.5, 1e-7, (SHARED, pytest.approx(0.625))),
        (0.5, 1.0, (SHARED, pytest.approx(0.625))),
    ):
        match = Evidence(result=Result(score=score), strangers=strangers, scale=CORRELATION)
        assert judge({"match": match, "csu": of_csu(p_value)})[::2] == said


def test_the_reason_gives_what_was_found_and_what_strangers_have():
    match = Evidence(result=Result(score=0.5), strangers=(-0.1, 0.0, 0.01, 0.02, 0.0692), scale=CORRELATION)
    assert judge({"match": match})[1].startswith("match of 0.500, where strangers have up to 0.069: ")
    assert judge({"csu": of_csu(1e-7)})[1].startswith("csu has p = 1e-07 and stands alone: ")


def test_strangers_of_the_same_shapes_are_taken_and_all_where_there_are_too_few():
    empty = dict.fromkeys(METHODS)
    rows = [{**empty, "shapes": "dense", "match": 0.1}] * 20 + [{**empty, "shapes": "mixture", "match": 0.3}] * 2
    assert background_of_rows(rows, "dense", "the zoo").scores["match"] == [0.1] * 20
    assert sorted(background_of_rows(rows, "mixture", "the zoo").scores["match"]) == [0.1] * 20 + [0.3] * 2


# --- the report


@pytest.fixture(scope="module")
def report():
    return compare(member("birch"), member("alder-sliced"), methods="all")


def test_json_says_everything(report):
    read = json.loads(report.to_json())
    assert read["verdict"] == report.verdict and read["score"] == report.score
    assert list(read["methods"]) == list(METHODS)
    csu = read["methods"]["csu"]
    assert csu["score"] is None and "wanted equal shapes" in csu["refused"]
    match = read["methods"]["match"]
    known = report.methods["match"].strangers
    assert match["strangers"]["pairs"] == len(known) >= 66
    assert match["percentile"] == 100 * sum(score < match["score"] for score in known) / len(known)


def test_a_p_value_is_printed_only_where_it_is_exact(report):
    with_p = compare(member("birch"), member("alder-finetuned"), methods="all")
    assert {name for name, found in with_p.methods.items() if found.result.p_value is not None} == {
        "csu",
        "permutation_test",
    }


def test_text_and_html_have_a_line_for_each_method(report):
    text, page = str(report), report._repr_html_()
    for name in METHODS:
        assert sum(line.split()[:1] == [name] for line in text.splitlines()) == 1
    starts = {line.index("does not apply") for line in text.splitlines() if "does not apply" in line}
    assert starts == {next(line for line in text.splitlines() if line.startswith("method ")).index("score")}
    for name in METHODS:
        assert page.count(f"<td>{name}</td>") + page.count(f"<td>{name} *</td>") == 1
    assert report.verdict in text and report.verdict in page
    assert "stolen" not in text.lower()


def test_weights_that_lie_beside_those_that_were_read_are_named(tmp_path):
    folder = copytree(data_path("zoo") / "alder", tmp_path / "two")
    (folder / "consolidated.safetensors").write_bytes((data_path("zoo") / "birch" / "model.safetensors").read_bytes())
    report = compare(folder, data_path("zoo") / "alder", methods=["csu"])
    line = f"Read of {folder}: model.safetensors. Not read, though beside it: consolidated.safetensors."
    assert line in str(report).splitlines() and line in report._repr_html_() and "Moved" not in str(report)
    ours, theirs = (json.loads(report.to_json())["files"][side] for side in "ab")
    assert (ours["unread"], theirs["unread"], ours["moved"]) == (["consolidated.safetensors"], [], None)
    assert ours["size"] == (folder / "model.safetensors").stat().st_size > ours["read"] > 0
    assert compare(member("alder"), member("birch"), methods=["csu"]).files == {}  # they are in memory


def test_what_was_moved_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # which other tests set
    server = Server()
    address, folder = server.add(data_path("zoo") / "alder"), data_path("zoo") / "birch"
    report = compare(address, folder, methods=["csu"])
    files = report.files["a"]
    assert files.read < files.moved <= server.sent < files.size and "b" in report.files
    assert f"Moved {files.moved / 1e6:.1f} of 1.0 MB of {address}." in str(report).splitlines()
    assert "Moved 0.0 of 1.0 MB" in str(compare(address, folder, methods=["csu"]))  # it is in the cache now
    server.close()


def test_html_is_escaped():
    a = weights(random_model(1))
    a.name = "<script>"
    assert "<script>" not in compare(a, weights(random_model(2)), methods=["match"])._repr_html_()


def test_the_figure_shows_each_score_beside_its_strangers(report, tmp_path):
    figure, data = report.plot()
    figure.savefig(tmp_path / "report.png")
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width and 0 <= drawn.y0 < drawn.y1 <= height  # nothing is cut off
    applicable = [name for name, found in report.methods.items() if found.result.score is not None]
    assert sorted(data) == sorted(applicable)
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert labels == [title_of(name) for name in data]
    assert len(figure.legends[0].texts) == 3  # each mark is explained once
    for name, numbers in data.items():
        known = report.methods[name].strangers
        assert (numbers["lowest"], numbers["highest"]) == (min(known), max(known))


# --- the command


@pytest.fixture
def command():
    return lambda *arguments: CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_runs_the_methods_that_are_asked_for(command):
    pair = [data_path("zoo") / name for name in ("alder", "birch")]
    for asked, names in (("all", list(METHODS)), ("csu,std_profile", ["std_profile", "csu"])):
        assert list(json.loads(command(*pair, "--json", "--methods", asked).stdout)["methods"]) == names
    done = command(*pair, "--methods", "csus")
    assert done.exit_code == 2 and "methods=['csus']" in done.stderr


@pytest.mark.parametrize(("other", "verdict"), [("alder", SAME), ("birch", NO_EVIDENCE)])
def test_the_command_succeeds_whatever_the_verdict(command, other, verdict):
    done = command(data_path("zoo") / "alder", data_path("zoo") / other, "--json")
    assert done.exit_code == 0
    read = json.loads(done.stdout)
    assert read["verdict"] == verdict and list(read["methods"]) == list(DECIDING)
    assert verdict in command(data_path("zoo") / "alder", data_path("zoo") / other).stdout


def test_bad_input_ends_with_2_and_says_what_was_wrong(command, tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    for folder, words in ((tmp_path, "wanted JSON"), (tmp_path / "missing", "missing")):
        done = command(data_path("zoo") / "alder", folder)
        assert done.exit_code == 2 and words in done.stderr and not done.stdout


def test_a_model_with_a_tensor_missing_is_bad_input(command, tmp_path):
    for tensor, words in (
        ("model.layers.1.self_attn.q_proj.weight", "has no 'q' in layer 1"),
        ("model.layers.2.mlp.up_proj.weight", "has no 'up' in layer 2"),
        ("model.embed_tokens.weight", "found no embeddings among model.layers.0."),
    ):
        folder = copytree(data_path("zoo") / "alder", tmp_path / tensor)
        tensors = load_file(folder / "model.safetensors")
        del tensors[tensor]
        save_file(tensors, folder / "model.safetensors")
        done = command(data_path("zoo") / "birch", folder)
        assert done.exit_code == 2 and words in done.stderr and not done.stdout
        done = CliRunner().invoke(app, ["fingerprint", str(folder), "-o", str(tmp_path / "alder.npz")])
        assert done.exit_code == 2 and words in done.stderr and not (tmp_path / "alder.npz").exists()


# --- from saved features


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "alder.npz"
    done = CliRunner().invoke(app, ["fingerprint", str(data_path("zoo") / "alder"), "-o", str(file)])
    assert done.exit_code == 0 and str(file) in done.stdout
    return file


@pytest.mark.parametrize(
    ("other", "verdict"),
    [("alder", SAME), ("alder-drop-0.5-trained", SHARED), ("birch", NO_EVIDENCE)],
)
def test_a_saved_fingerprint_leads_to_the_same_verdict(saved, other, verdict):
    from_file, from_weights = (
        compare(a, data_path("zoo") / other, methods="all") for a in (saved, data_path("zoo") / "alder")
    )
    assert from_file.verdict == from_weights.verdict == verdict
    for name in ("std_profile", "virtual_response", "virtual_response_whitened", "spectral"):
        scores = [report.methods[name].result.score for report in (from_file, from_weights)]
        assert scores[0] == pytest.approx(scores[1], abs=0.01), name
    assert "needs the weights of both models" in from_file.methods["match"].result.refused
    assert compare(data_path("zoo") / other, saved).verdict == verdict


def test_a_damaged_fingerprint_is_bad_input(command, saved, tmp_path):
    half = tmp_path / "half.npz"
    half.write_bytes(saved.read_bytes()[:5000])
    done = command(half, data_path("zoo") / "birch")
    assert done.exit_code == 2 and "wanted a whole fingerprint" in done.stderr
    assert CliRunner().invoke(app, ["fingerprint", str(data_path("zoo") / "alder"), "-o", "alder"]).exit_code == 2
