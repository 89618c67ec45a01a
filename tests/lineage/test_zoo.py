"""The tree is what FINGERPRINTS promises and means what it says; the zoo loads, builds and resumes it."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

from minimoe import cli
from minimoe.data_files import data_path
from minimoe.lineage.gauge import GAUGES, obstacle
from minimoe.lineage.recipes import INSTANT, TRAINED
from minimoe.lineage.tree import CALIBRATION, EVALUATION, FAMILIES, MEMBERS, STRANGERS, Member, _grow
from minimoe.lineage.zoo import Zoo, ancestors, derivation, origins, relation
from minimoe.model import MoEForCausalLM
from minimoe.training import Corpus, Settings
from minimoe.training.tokenizer import load_tokenizer
from tests.rounding import assert_near

IDS = torch.randint(1024, (2, 24), generator=torch.Generator().manual_seed(0))
ORDER = {name: place for place, name in enumerate(MEMBERS)}
OF_ALDER = [name for name, member in MEMBERS.items() if "alder" in ancestors(name) and member.recipe in INSTANT]
AT_HAND = [
    name for name in OF_ALDER if all(MEMBERS[a].shipped for a in ancestors(name) if MEMBERS[a].recipe in TRAINED)
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """What is shipped, and nothing else."""
    return Zoo(tmp_path_factory.mktemp("home"))


@cache
def in_float64(name):
    """A member, made in float64 from shipped ones: rounding cannot hide or feign a change of function."""
    member = MEMBERS[name]
    if member.recipe in INSTANT:
        return INSTANT[member.recipe](*map(in_float64, member.parents), **member.options)
    return MoEForCausalLM.from_pretrained(data_path("zoo") / name).double().eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def vector(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def tensors_of(folder):
    return MoEForCausalLM.from_pretrained(folder).state_dict()


# --- the tree ---------------------------------------------------------------------------------------------


def test_no_name_is_given_twice_and_parents_come_before_their_children():
    assert len(list(_grow())) == len(MEMBERS)
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
        assert tried == {gauge for gauge in GAUGES if obstacle(gauge, in_float64(name).config) is None}


def test_no_two_members_that_are_trained_share_batches_or_first_weights_but_twins():
    trained = [member for member in MEMBERS.values() if member.recipe in TRAINED]
    seeds = Counter(member.options["seed"] for member in trained)
    assert {seed: count for seed, count in seeds.items() if count > 1} == {1: 2, 2: 2}
    weights = Counter(member.options["weights"] for member in trained if "weights" in member.options)
    assert {seed: count for seed, count in weights.items() if count > 1} == {1: 2, 2: 2}


# --- what is true of two ------------------------------------------------------------------------------------


def test_ancestors_are_the_closure_of_the_parents():
    for name in MEMBERS:
        reached, new = set(), {name}
        while new:
            new = {parent for member in new for parent in MEMBERS[member].parents}
            reached |= new
        found = ancestors(name)
        assert set(found) == reached and len(found) == len(reached)
        assert all(found.index(parent) < found.index(x) for x in found for parent in MEMBERS[x].parents)


def reached_through_weights(name):
    """The closure of the parents that give weights, by another way: edges first, then a flood."""
    edges = {}
    for child, member in MEMBERS.items():
        imitates = member.recipe in ("frame_std_profile", "frame_norms", "frame_both", "frame_neuron_order")
        edges[child] = () if member.recipe == "distil" else member.parents[:1] if imitates else member.parents
    reached = {name}
    while more := {parent for child in reached for parent in edges[child]} - reached:
        reached |= more
    return {member for member in reached if not edges[member]}


def test_origins_and_relation_are_those_of_a_flood_through_the_tree():
    flooded = {name: reached_through_weights(name) for name in MEMBERS}
    assert {name: set(origins(name)) for name in MEMBERS} == flooded
    sample = [name for place, name in enumerate(MEMBERS) if place % 11 == 0] + [f"{root}-twin" for root in FAMILIES]
    for a, b in combinations(sample, 2):
        assert (relation(a, b) == "shared lineage") == bool(flooded[a] & flooded[b])
        assert relation(a, b) == relation(b, a)


PAIRS = [
    ("alder", "alder", "shared lineage"),
    ("alder", "alder-gauged-drop-0.5", "shared lineage"),
    ("alder-int4", "alder-btx-trained-gauged", "shared lineage"),  # cousins
    ("birch", "alder-transplant-trained", "shared lineage"),  # its donor
    ("birch-copy", "alder-transplant", "shared lineage"),
    ("birch", "alder-copy-trained", "strangers"),
    ("alder", "alder-twin", "same first weights"),
    ("alder-copy", "alder-twin", "same first weights"),
    ("birch-twin", "alder-transplant", "same first weights"),
    ("alder-twin", "birch-twin", "strangers"),
    ("alder", "alder-distilled", "teacher and student"),
    ("alder-copy-gauged", "alder-distilled-gauged", "teacher and student"),
    ("alder-distilled", "alder-distilled-gauged", "shared lineage"),
    ("alder-distilled", "birch-distilled", "strangers"),
    ("alder-twin", "alder-distilled", "strangers"),
    ("alder", "stranger-13-framed-both", "strangers"),
    ("stranger-13", "stranger-13-framed-both", "shared lineage"),
    ("birch", "stranger-14-framed-order", "strangers"),
    ("depth-init-1", "deep-1", "strangers"),
    ("mixture-1", "mixture-1-finetuned-gauged", "shared lineage"),
]


def test_what_is_true_of_two():
    for a, b, truth in PAIRS:
        assert relation(a, b) == relation(b, a) == truth, (a, b)


# --- whether the function is unchanged -----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted({MEMBERS[name].recipe for name in AT_HAND}))
def test_exact_says_whether_the_function_is_that_of_the_first_parent(recipe):
    for name in AT_HAND:
        member = MEMBERS[name]
        if member.recipe != recipe:
            continue
        ours, theirs = logits(in_float64(name)), logits(in_float64(member.parents[0]))
        assert derivation(name).function_unchanged == member.exact, name
        if member.exact:
            assert_close(ours, theirs, rtol=0, atol=1e-8)
        elif member.recipe == "extend_vocabulary":
            assert_close(ours[..., :1024], theirs, rtol=0, atol=1e-8)
            assert ours.shape[-1] == 1024 + 64
        else:
            assert (ours - theirs).abs().max() > 1e-3, name


# --- loading -------------------------------------------------------------------------------------------------


@pytest.fixture
def pup(monkeypatch):
    """A member that two steps of training make."""
    options = {"steps": 2, "seed": 7, "corpus": "planted", "learning_rate": 1e-3}
    monkeypatch.setitem(MEMBERS, "pup", Member(name="pup", parents=("alder",), recipe="keep_training", options=options))
    return "pup"


def test_a_shipped_member_is_loaded_in_float32_as_it_lies_there(zoo):
    model = zoo.load("alder")
    stored = load_file(data_path("zoo") / "alder" / "model.safetensors")
    assert not model.training and {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.exact("two makings of one member are compared to the bit")
def test_what_needs_no_training_is_made_again_every_time_to_the_same_bits(zoo):
    names = ("alder-copy-trained-gauged", "stranger-13-framed-both", "alder-transplant")
    for name in names:
        assert zoo.has(name) and zoo.folder(name) is None
        assert torch.equal(vector(zoo.load(name)), vector(zoo.load(name)))


def test_what_is_missing_is_named_with_the_command_that_makes_it(zoo):
    assert zoo.has("alder-noisy") and not zoo.has("alder-noisy-trained") and not zoo.has("alder-noisy-trained-gauged")
    for name in ("alder-noisy-trained", "alder-noisy-trained-gauged"):
        command = re.escape(f"run `minimoe zoo build alder-noisy-trained --home {zoo.home}`")
        with pytest.raises(ValueError, match=f"alder-noisy-trained: not shipped, and not built.*{command}"):
            zoo.load(name)


def test_the_command_is_plain_where_the_home_is_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"not built in runs/zoo; run `minimoe zoo build stranger-02`$"):
        Zoo().load("stranger-02")
    assert Zoo().home == cli.HOME


def test_what_is_not_in_the_tree_is_refused_everywhere(zoo):
    calls = [zoo.folder, zoo.has, zoo.load, zoo.build_one, zoo.verify, lambda name: zoo.build([name])]
    for call in (*calls, ancestors, derivation, origins, lambda name: relation("alder", name)):
        with pytest.raises(ValueError, match=r"^'alter': not in the zoo; `minimoe zoo list`"):
            call("alter")
    assert not any(zoo.home.iterdir())


# --- building ------------------------------------------------------------------------------------------------


@pytest.mark.exact("two makings of one member are compared to the bit")
def test_two_processes_build_what_is_missing_once(zoo):
    names = ["alder-int4", "alder-copy-gauged", "birch-int8"]
    assert sorted(zoo.build(names, processes=2)) == sorted(names)
    before = {file: file.stat().st_mtime_ns for file in zoo.home.rglob("*")}
    assert zoo.build([*names, "alder"], processes=2) == []
    assert {file: file.stat().st_mtime_ns for file in zoo.home.rglob("*")} == before
    assert {file.relative_to(zoo.home).parts[0] for file in before} == set(names)
    empty = Zoo(zoo.home / "nowhere")
    for name in names:
        assert zoo.folder(name) == zoo.home / name
        assert torch.equal(vector(zoo.load(name)), vector(empty.load(name)))  # made on the spot
        said = json.loads((zoo.home / name / "lineage.json").read_text(encoding="utf-8"))
        assert (said["name"], said["parents"]) == (name, list(MEMBERS[name].parents))
        assert said["options"] == MEMBERS[name].options and said["function_unchanged"] == MEMBERS[name].exact
        assert said["tokens"] == 0 and "corpus_sha256" not in said


def test_ancestors_that_take_training_are_built_first(zoo):
    missing = zoo._missing(["alder-noisy-trained-gauged", "alder-transplant-gauged", "stranger-02-copy", "stranger-02"])
    assert missing == [
        "alder-noisy-trained",
        "alder-noisy-trained-gauged",
        "alder-transplant-gauged",
        "stranger-02",
        "stranger-02-copy",
    ]


def test_a_job_that_fails_says_why(tmp_path):
    (tmp_path / "alder-int8").touch()
    with pytest.raises(OSError, match="alder-int8"):
        Zoo(tmp_path).build(["alder-int8"], processes=1)


@pytest.mark.exact("two trainings from one seed are compared to the bit")
def test_a_trained_member_is_a_whole_folder_in_float16(pup, tmp_path):
    zoo = Zoo(tmp_path)
    assert not zoo.has(pup)
    zoo.build_one(pup)
    assert zoo.folder(pup) == tmp_path / pup
    assert {file.name for file in (tmp_path / pup).iterdir()} == {
        file.name for file in (data_path("zoo") / "alder").iterdir()
    }
    assert {tensor.dtype for tensor in tensors_of(tmp_path / pup).values()} == {torch.float16}
    said = json.loads((tmp_path / pup / "lineage.json").read_text(encoding="utf-8"))
    assert said["corpus_sha256"] == Corpus.planted().sha256
    assert said["tokens"] == 2 * Settings.batch_size * Settings.seq_len
    assert not list((tmp_path / ".training").iterdir())
    verified = zoo.verify(pup)
    assert verified.identical and verified.agrees and verified.loss == verified.stored_loss


def test_training_that_was_killed_before_the_member_was_written_is_not_done_again(pup, tmp_path, monkeypatch):
    zoo = Zoo(tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(MoEForCausalLM, "save_pretrained", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            zoo.build_one(pup)
    assert zoo.folder(pup) is None and not zoo.has(pup)
    monkeypatch.setattr(MoEForCausalLM, "forward", raise_interrupt)
    zoo.build_one(pup)
    assert zoo.has(pup)


def raise_interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_folder_without_its_last_file_does_not_count(zoo, tmp_path):
    half = tmp_path / "stranger-02"
    shutil.copytree(data_path("zoo") / "stranger-01", half)
    assert Zoo(tmp_path).has("stranger-02")
    (half / "config.json").unlink()
    assert Zoo(tmp_path).folder("stranger-02") is None and not Zoo(tmp_path).has("stranger-02")


def test_a_killed_build_ends_all_its_processes_and_leaves_nothing_that_counts(tmp_path):
    """SIGKILL, while it trains. Output is closed only when the last process that could write to it has ended."""
    name = "alder-noisy-trained"
    log = tmp_path / ".training" / name / "log.jsonl"
    command = [sys.executable, "-m", "minimoe.cli", "zoo", "build", name, "--processes", "1", "--home", str(tmp_path)]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (log.exists() and log.read_bytes()):
        assert build.poll() is None, build.communicate()
        time.sleep(0.1)
    build.kill()
    build.communicate(timeout=60)
    assert len(log.read_text(encoding="utf-8").splitlines()) < MEMBERS[name].options["steps"]
    assert Zoo(tmp_path).folder(name) is None and not Zoo(tmp_path).has(name)


# --- verifying -----------------------------------------------------------------------------------------------


def test_training_again_gives_the_member_that_is_shipped(zoo):
    """To the bit on a like processor; elsewhere rounding differs, which a short training hardly amplifies."""
    verified = zoo.verify("alder-continued-0.1")
    assert verified.agrees and verified.cosine > 0.999999
    assert verified.loss == pytest.approx(verified.stored_loss, abs=1e-3)


def test_another_training_does_not_pass_for_the_one_that_is_shipped(zoo, monkeypatch):
    member = MEMBERS["alder-continued-0.1"]
    monkeypatch.setitem(MEMBERS, member.name, replace(member, options={**member.options, "steps": 4}))
    assert not zoo.verify(member.name).agrees


# --- other tools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [("alder-int4", "llama"), ("alder-copy-gauged", "mixtral"), ("alder-copy-qwen2_moe", "qwen2_moe")],
)
def test_transformers_opens_the_folder_of_a_member(name, family, zoo):
    if zoo.folder(name) is None:
        zoo.build_one(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        zoo.folder(name), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    assert theirs.config.model_type == family
    with torch.no_grad():
        assert_near(theirs.eval()(IDS).logits, logits(zoo.load(name)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.folder(name))
    text = "The cat sat. Der Hund bellt!\n1 + 1 = 2"
    assert tokenizer(text)["input_ids"] == load_tokenizer().encode(text).ids
