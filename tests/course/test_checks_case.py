"""The case: its check scores trees, its folders tell nothing, and the instructor guide holds the answer."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from minimoe.course.checks import WrongAnswer, check_case
from minimoe.data_files import data_path
from minimoe.fingerprints.std_profile import std_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_neurons
from minimoe.model import MoEForCausalLM

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "instructor.md"
NO_TREE = dict.fromkeys("abcdef")


def answer():
    """The tree in the instructor guide's script."""
    return ast.literal_eval(re.search(r"^PARENTS = (\{.*\})$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)[1])


def test_the_answer_of_the_guide_is_right():
    assert check_case(answer()).startswith("All 6 are right")


def test_one_wrong_parent_is_counted_and_not_named():
    for child, right in answer().items():
        for parent in {*"abcdef", None} - {child, right}:
            with pytest.raises(WrongAnswer, match=r"^5 of 6 are right|cannot descend from itself"):
                check_case(answer() | {child: parent})


def test_claiming_no_relation_scores_the_models_that_have_none():
    alone = sum(parent is None for parent in answer().values())
    with pytest.raises(WrongAnswer, match=f"^{alone} of 6"):
        check_case(NO_TREE)


@pytest.mark.parametrize(
    ("tree", "hint"),
    [
        (None, "parents is None; wanted a dictionary"),
        (NO_TREE | {"g": None}, "wanted a dictionary with an entry for each of a to f"),
        (NO_TREE | {"a": "alder"}, "The parent of a is 'alder'; wanted one of a to f, or None"),
        (NO_TREE | {"a": "b", "b": "c", "c": "a"}, "a from b from c from a: a model cannot"),
    ],
)
def test_what_is_no_tree_is_refused(tree, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_case(tree)


def test_folders_tell_nothing_of_their_history():
    folders = sorted(data_path("cases").iterdir())
    assert [folder.name for folder in folders if folder.is_dir()] == list("abcdef")
    for folder in filter(Path.is_dir, folders):
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert not {"parents", "recipe", "_name_or_path"} & written.keys()
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders if folder.is_dir()}) == 1


def test_only_the_guide_holds_the_answer():
    for path in (data_path("cases") / "README.md", GUIDE.parents[1] / "notebooks/exercises/the_case.ipynb"):
        text = path.read_text(encoding="utf-8")
        for child, parent in answer().items():
            assert not re.search(rf'["\']?{child}["\']?\s*:\s*["\']?{parent}\b', text) or parent is None


def test_what_the_guide_says_of_models_that_were_not_trained():
    """c computes what f without a quarter of its neurons computes; b has the profile of f, and other outputs."""
    b, c, f = (MoEForCausalLM.from_pretrained(data_path("cases") / name).double() for name in "bcf")
    input_ids = torch.arange(24).view(2, 12) * 41 % 1024
    with torch.no_grad():
        pruned = prune_neurons(f, keep=0.75)(input_ids).logits
        assert torch.allclose(c(input_ids).logits, pruned, atol=0.05)  # float16 rounds what gauges rescale
        assert not torch.allclose(f(input_ids).logits, pruned, atol=0.5)
        assert not torch.allclose(b(input_ids).logits, f(input_ids).logits, atol=0.5)
    assert std_profile(open_weights(b), open_weights(f)).score > 0.999
