"""What is true of two members, and whether the zoo gives what the tree says."""

import os
import re
import shutil
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
from minimoe.lineage.recipes import INSTANT
from minimoe.lineage.tree import FAMILIES, MEMBERS
from minimoe.lineage.zoo import Zoo, ancestors, derivation, origins, relation
from minimoe.model import MoEForCausalLM
from minimoe.training.tokenizer import load_tokenizer
from tests.rounding import assert_near

IDS = torch.randint(1024, (2, 24), generator=torch.Generator().manual_seed(0))
OF_ALDER = [name for name, member in MEMBERS.items() if "alder" in ancestors(name) and member.recipe in INSTANT]
AT_HAND = [
    name for name in OF_ALDER if all(MEMBERS[a].shipped or MEMBERS[a].recipe in INSTANT for a in ancestors(name))
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
        imitates = member.recipe.split("_")[0] in ("frame", "plant")
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
    ("alder", "stranger-13-planted-both-gauged", "strangers"),  # what does nothing does not count
    ("stranger-13", "stranger-13-planted-both-gauged", "shared lineage"),
    ("birch", "alder-grafted-trained", "shared lineage"),
    ("alder", "alder-fresh-gauged", "shared lineage"),
    ("birch", "alder-fresh", "strangers"),
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
            planted = "plant_dead" in f"{recipe}{[MEMBERS[parent].recipe for parent in member.parents]}"
            assert_close(ours, theirs, rtol=0, atol=1e-3 if planted else 1e-8)  # what is next to nothing is not nothing
        elif member.recipe == "extend_vocabulary":
            assert_close(ours[..., :1024], theirs, rtol=0, atol=1e-8)
            assert ours.shape[-1] == 1024 + 64
        else:
            assert (ours - theirs).abs().max() > 1e-3, name


# --- loading -------------------------------------------------------------------------------------------------


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
        command = re.escape(f"run `minimoe zoo build alder-noisy-trained --home {zoo.home}` in a clone")
        with pytest.raises(ValueError, match=f"alder-noisy-trained: not shipped, and not built.*{command}"):
            zoo.load(name)


def test_the_command_is_plain_where_the_home_is_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "minimoe zoo build stranger-02"
    with pytest.raises(ValueError, match=f"not built in runs/zoo; run `{command}` in a clone$"):
        Zoo().load("stranger-02")
    assert Zoo().home == cli.HOME


def test_what_is_not_in_the_tree_is_refused_everywhere(zoo):
    calls = [zoo.folder, zoo.has, zoo.load, zoo.make, zoo.build_one]
    for call in (*calls, ancestors, derivation, origins, lambda name: relation("alder", name)):
        with pytest.raises(ValueError, match=r"^'alter': not in the zoo; `minimoe zoo list`"):
            call("alter")
    assert not any(zoo.home.iterdir())


def test_a_folder_without_its_last_file_does_not_count(zoo, tmp_path):
    half = tmp_path / "stranger-02"
    shutil.copytree(data_path("zoo") / "stranger-01", half)
    assert Zoo(tmp_path).has("stranger-02")
    (half / "config.json").unlink()
    assert Zoo(tmp_path).folder("stranger-02") is None and not Zoo(tmp_path).has("stranger-02")


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
