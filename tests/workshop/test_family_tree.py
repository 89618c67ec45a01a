"""The tree is what FINGERPRINTS promises and means what it says."""

import inspect
import json
import re
from collections import Counter

from minimoe.data_files import data_path
from minimoe.lineage.gauge import GAUGES, obstacle
from minimoe.lineage.recipes import INSTANT
from minimoe.lineage.tree import FAMILIES, MEMBERS, MEMBERS_FILE
from minimoe.lineage.zoo import Zoo, derivation
from minimoe.training import Settings
from workshop.family_tree import CALIBRATION, EVALUATION, STRANGERS, grow, to_json
from workshop.training_recipes import TRAINED

ORDER = {name: place for place, name in enumerate(MEMBERS)}


def test_the_table_that_ships_is_what_the_tree_grows():
    assert to_json(grow()) == data_path(MEMBERS_FILE).read_text(encoding="utf-8")
    assert list(grow()) == list(MEMBERS.values())


def test_no_name_is_given_twice_and_parents_come_before_their_children():
    assert len(list(grow())) == len(MEMBERS)
    assert all(ORDER[parent] < ORDER[name] for name, member in MEMBERS.items() for parent in member.parents)


def test_every_recipe_is_used_and_takes_what_the_tree_gives_it():
    recipes = TRAINED | INSTANT
    assert {member.recipe for member in MEMBERS.values()} == recipes.keys()
    for member in MEMBERS.values():
        trains = member.recipe in TRAINED
        signature = inspect.signature(recipes[member.recipe])
        bound = signature.bind(*member.parents, **member.options, **({"out": None} if trains else {}))
        settings = {key: value for key, value in bound.arguments.get("settings", {}).items() if key != "corpus"}
        if trains:
            Settings(**settings)
        else:  # what is left over for the configuration of the result
            assert settings.keys() <= {"router_aux_loss_coef"}
        assert json.loads(json.dumps(dict(member.options))) == {
            key: list(value) if isinstance(value, tuple) else value for key, value in member.options.items()
        }


def test_there_are_270_pairs_of_strangers_alike_in_all_but_their_seed():
    alike = Counter()
    for name in (*FAMILIES, *STRANGERS):
        member = MEMBERS[name]
        assert not member.parents
        seedless = {key: value for key, value in member.options.items() if key not in ("seed", "weights")}
        alike[member.recipe, str(seedless)] += 1
    (roots,) = alike.values()
    assert roots * (roots - 1) / 2 >= 270
    assert len({MEMBERS[name].options["weights"] for name in (*FAMILIES, *STRANGERS)}) == roots
    assert sorted((*CALIBRATION, *EVALUATION)) == sorted((*FAMILIES, *STRANGERS))
    assert abs(len(CALIBRATION) - len(EVALUATION)) <= 2


DENSE_KINDS = "finetuned lora continued-0.1 continued-1 continued-4 int8 int4 fewer-neurons fewer-heads fewer-layers"
DENSE_KINDS += " deepened lerp slerp ties extended distilled"
DENSE_KINDS += " fresh fresh-only grafted grafted-trained"
MIXED_KINDS = "copy noisy sliced virtual-groups drop-0.25 drop-0.5 drop-0.9 btx transplant"


def test_both_families_have_every_kind_of_descendant_that_is_listed():
    """FINGERPRINTS, "The zoo": mixtures before and after training; everything again behind all gauges."""
    kinds = {*DENSE_KINDS.split(), *MIXED_KINDS.split(), *(f"{kind}-trained" for kind in MIXED_KINDS.split())}
    kinds |= {"copy-qwen2_moe", "copy-pangu"}
    kinds |= {f"{kind}-gauged" for kind in kinds} | {"gauged", "gauged-copy", "gauged-drop-0.5"}
    for root in FAMILIES:
        assert {kind: MEMBERS[f"{root}-{kind}"].kind for kind in kinds} == {kind: kind for kind in kinds}


def test_the_options_are_those_that_the_names_announce():
    for root in FAMILIES:
        tokens = {times: derivation(f"{root}-continued-{times}").tokens for times in ("0.1", "1", "4")}
        assert {times: count / derivation(root).tokens for times, count in tokens.items()} == {
            times: float(times) for times in tokens
        }
        assert MEMBERS[f"{root}-finetuned"].options["corpus"] == "planted"
        assert MEMBERS[f"{root}-twin"].options | {"corpus": "real"} == MEMBERS[root].options | {"corpus": "real"}
    for name, member in MEMBERS.items():
        if rate := re.search(r"drop-([\d.]+)$", name):
            assert member.options["drop_ratio"] == float(rate[1])
        if bits := re.search(r"int(\d)$", name):
            assert member.options["bits"] == int(bits[1])


def test_the_one_by_one_rewrites_are_all_the_gauges_that_apply():
    for name in ("alder", "alder-copy-pangu"):
        tried = {
            member.options["gauge"]
            for member in MEMBERS.values()
            if member.parents == (name,) and member.recipe == "one_gauge"
        }
        assert tried == {gauge for gauge in GAUGES if obstacle(gauge, Zoo().load(name).config) is None}


def test_no_two_members_that_are_trained_share_batches_or_first_weights_but_twins():
    trained = [member for member in MEMBERS.values() if member.recipe in TRAINED]
    seeds = Counter(member.options["seed"] for member in trained)
    assert {seed: count for seed, count in seeds.items() if count > 1} == {1: 2, 2: 2}
    weights = Counter(member.options["weights"] for member in trained if "weights" in member.options)
    assert {seed: count for seed, count in weights.items() if count > 1} == {1: 2, 2: 2}
