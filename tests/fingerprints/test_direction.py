"""Which of two relatives is the ancestor: on toys and on the zoo, where it is known."""

from functools import cache
from itertools import product

import pytest
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.direction import CONFIDENCE, NEITHER, direction, partners
from minimoe.fingerprints.fingerprint import fingerprint
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage import plant
from minimoe.lineage.derive import (
    depth_upscale,
    extend_vocabulary,
    prune_heads,
    prune_layers,
    prune_neurons,
    quantise,
)
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.tree import PLANTS
from minimoe.lineage.upcycling import upcycle
from minimoe.lineage.zoo import Zoo
from minimoe.training.tokenizer import load_tokenizer
from tests.fingerprints.toys import disturbed, random_model, weights

LARGER = {"hidden_size": 32, "intermediate_size": 96}
PLAIN = {"attention_bias": False, "attention_output_bias": False}


@cache
def member(name: str) -> Weights:
    return open_weights(Zoo("nothing is built here").load(name), tokenizer=load_tokenizer())


def both_ways(a: Weights, b: Weights) -> str | None:
    """What is said of two models; the same with the sides exchanged."""
    there, back = direction(a, b), direction(b, a)
    assert back.ancestor == {"a": "b", "b": "a", None: None}[there.ancestor]
    return there.ancestor


CHANGES = {
    "noise": lambda model: disturbed(model, 0.3),
    "4 bits": lambda model: quantise(model, 4),
    "fewer neurons": lambda model: prune_neurons(model, 0.5),
    "fewer heads": lambda model: prune_heads(model, 1),
    "fewer layers": lambda model: prune_layers(model, [1]),
    "layers twice": lambda model: depth_upscale(model, 1),
    "more tokens": lambda model: extend_vocabulary(model, 8),
    "a mixture": lambda model: upcycle(model, num_experts=4, num_experts_per_tok=2),
    "slices": lambda model: upcycle(model, num_experts=8, num_experts_per_tok=4, method="split"),
}


@pytest.mark.parametrize(("change", "rewritten"), [*product(CHANGES, (False, True))])
def test_of_random_weights_every_change_has_a_direction(change, rewritten):
    model = random_model(1, **PLAIN | LARGER)
    changed = CHANGES[change](model)
    pair = (all_gauges(model, 3), all_gauges(changed, 4)) if rewritten else (model, changed)
    assert both_ways(*map(weights, pair)) == "a"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("alder", "alder-finetuned-gauged"),
        ("alder", "alder-continued-1"),
        ("birch", "birch-continued-4-gauged"),
        ("alder", "alder-lora-gauged"),
        ("alder-copy", "alder-copy-trained-gauged"),
        ("alder", "alder-sliced-trained"),
        ("alder-gauged", "alder-btx"),
    ],
)
def test_descendants_of_the_zoo_are_told_from_their_ancestors(a, b):
    assert both_ways(member(a), member(b)) == "a"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("alder", "alder-gauged"),
        ("alder-int4", "alder-int4-gauged"),
        ("alder", "alder-twin"),
        ("alder", "birch"),
        ("alder-finetuned", "alder-continued-1-gauged"),
        ("alder-fewer-neurons", "alder-copy"),
        ("alder-fewer-layers", "alder-deepened"),
        ("alder-copy", "alder-sliced"),
        ("alder-int8", "alder-int4"),
        ("alder-lora", "alder-int4"),
        ("alder-transplant", "alder-copy-trained"),
    ],
)
def test_of_others_it_cannot_tell(a, b):
    assert both_ways(member(a), member(b)) is None


@pytest.mark.parametrize("kind", PLANTS)
def test_parts_that_do_nothing_make_no_ancestor(kind):
    """Whoever adds them would have the larger model, from which the other might have been pruned."""
    recipe, options = PLANTS[kind]
    host, other = (Zoo("nothing is built here").load(name) for name in ("stranger-13", "alder"))
    if kind == "expert":
        host = upcycle(host, num_experts=4, num_experts_per_tok=2)
    planted = all_gauges(getattr(plant, recipe)(host, other, **options), 3)
    assert both_ways(*(open_weights(one, tokenizer=load_tokenizer()) for one in (host, planted))) is None


def test_an_average_looks_like_the_ancestor_of_its_parents():
    """A wrong answer, as the head of the file says: what each parent has of its own is halved."""
    assert both_ways(member("alder-lerp"), member("alder-continued-1")) == "a"


def test_partners_are_the_layers_that_were_repeated():
    model = random_model(1, **PLAIN)
    assert partners(weights(depth_upscale(model, 1)), weights(all_gauges(model, 3))) == {0: 0, 1: 1, 2: 1, 3: 2}
    assert partners(weights(model), weights(prune_layers(model, [0]))) == {1: 0, 2: 1}


def test_the_shares_are_those_of_least_squares():
    """Where noise without a frame is all there is: y = x + n, of which 1 - <x, y> / <y, y> is not in x."""
    model = random_model(1, num_hidden_layers=1, **PLAIN)
    changed = disturbed(model, 0.5)
    changed.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    x, y = (
        one.model.layers[0].mlp.gate_proj.weight * one.model.layers[0].post_attention_layernorm.weight
        for one in (model, changed)
    )
    wanted = [1 - float(((x * y).sum() / (side * side).sum()).detach()) for side in (x, y)]
    words = direction(weights(model), weights(changed)).evidence[0].words
    assert (
        words.startswith(f"of the neurons of a, b lacks {wanted[0]:.1%}"[:-1])
        and f"a lacks {wanted[1]:.1%}"[:-1] in words
    )


def test_what_cannot_be_looked_at_is_said():
    model = weights(random_model(1))
    for other, reason in (
        (random_model(2, hidden_size=32), "hidden sizes of 24 and 32: wanted equal ones"),
        (random_model(2, num_hidden_layers=2), "no layer of one resembles any of the other"),
        (random_model(2), "their attention has little in common"),
    ):
        found = direction(model, weights(other))
        assert found.ancestor is None and found.confidence is None
        assert [seen.words for seen in found.evidence] == [reason]


def test_evidence_that_disagrees_decides_nothing():
    model = random_model(1, **PLAIN)
    found = direction(weights(prune_neurons(model, 0.5)), weights(quantise(model, 4)))
    assert {"a", "b"} <= {seen.ancestor for seen in found.evidence} | {NEITHER} and found.ancestor is None


def test_a_report_says_it_where_it_is_asked_for(tmp_path):
    folders = [str(data_path("zoo") / name) for name in ("alder-finetuned", "alder", "birch")]
    report = compare(*folders[:2], methods=["aligned_neurons"], ask_direction=True)
    assert report.direction.ancestor == "b" and 0.5 < report.direction.confidence < 1
    assert report.to_dict()["direction"]["ancestor"] == "b" and "Direction: b is the ancestor" in str(report)
    assert compare(*folders[:2], methods=["aligned_neurons"]).direction is None
    assert compare(*folders[1:], methods=["aligned_neurons"], ask_direction=True).direction is None
    said = CliRunner().invoke(app, ["compare", *folders[:2], "--methods", "aligned_neurons", "--direction"])
    assert said.exit_code == 0 and "of the neurons of a, b lacks" in said.output
    fingerprint(folders[0]).save(tmp_path / "saved.npz")
    with pytest.raises(ValueError, match="ask_direction=True: found a saved fingerprint, wanted the weights"):
        compare(tmp_path / "saved.npz", folders[1], ask_direction=True)


def test_the_confidence_is_what_was_measured():
    page = data_path("zoo/benchmark/direction.md").read_text(encoding="utf-8")
    for how, words in (("shapes", "told by shapes"), ("numbers", "told by numbers alone")):
        (row,) = (line for line in page.splitlines() if line.startswith(f"| calibration | {words} |"))
        pairs, right = map(int, row.split("|")[3:5])
        assert CONFIDENCE[how] == round(right / pairs, 2)
