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
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.std_profile import std_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_neurons
from minimoe.model import MoEForCausalLM

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "instructor.md"


@pytest.fixture(autouse=True)
def no_hand_in_before(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))


def answer():
    """The tree in the instructor guide's script."""
    return ast.literal_eval(re.search(r"^PARENTS = (\{.*\})$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)[1])


def sure(tree, share=1.0):
    """Beliefs that give an answer this share, and the rest to one that is wrong."""
    wrong = {child: next(x for x in (None, "cannot tell") if x != parent) for child, parent in tree.items()}
    return {child: {parent: share, wrong[child]: 1 - share} for child, parent in tree.items()}


def score_of(text):
    return float(re.search(r"Score (\d\.\d\d)", text)[1])


def test_the_answer_of_the_guide_is_right():
    assert check_case(sure(answer())).startswith("Handed in. Score 1.00 of 1; of 7 likeliest answers 7 are right")


def test_the_rule_is_proper(tmp_path, monkeypatch):
    """Who is right in seven of ten cases does best in the mean by saying so; and sure and wrong is 0."""
    means = {}
    for said in (0.5, 0.7, 0.9):
        found = []
        for right in (True, False):
            monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / f"{said}{right}"))
            found.append(score_of(check_case(sure(answer(), said if right else 1 - said))))
        means[said] = 0.7 * found[0] + 0.3 * found[1]
    assert max(means, key=means.get) == 0.7
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "wrong"))
    assert score_of(check_case(sure(answer(), 0.0))) == 0


def test_the_same_probability_for_all_answers(monkeypatch):
    letters = "abcdefg"
    even = {child: {x: 1 / 8 for x in (*letters, None, "cannot tell") if x != child} for child in letters}
    text = check_case(even)
    assert score_of(text) == pytest.approx(0.56, abs=0.01) and "0.56" in text.split(";")[-1]


def test_there_is_one_shot():
    first = sure(answer(), 0.9)
    assert check_case(first) == check_case(first)
    with pytest.raises(WrongAnswer, match="Other beliefs were handed in before"):
        check_case(sure(answer()))


@pytest.mark.parametrize(
    ("beliefs", "hint"),
    [
        (None, "wanted a dictionary with an entry for each of a to g"),
        ({"h": {None: 1.0}}, "wanted a dictionary with an entry for each of a to g"),
        ({"a": "b"}, "wanted probabilities"),
        ({"a": {"alder": 1.0}}, "'alder' is no parent"),
        ({"a": {"a": 1.0}}, "'a' is no parent"),
        ({"a": {"b": 1.5, None: -0.5}}, "is no probability"),
        ({"a": {"b": 0.5}}, "sum to 0.50; wanted 1"),
    ],
)
def test_what_is_no_belief_is_refused(beliefs, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_case(beliefs and sure(answer()) | beliefs)


def test_folders_tell_nothing_of_their_history():
    folders = sorted(data_path("cases").iterdir())
    assert [folder.name for folder in folders if folder.is_dir()] == list("abcdefg")
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
    """c computes what f without a quarter of its neurons computes; b has the profile of f, g its order of neurons."""
    b, c, f = (MoEForCausalLM.from_pretrained(data_path("cases") / name).double() for name in "bcf")
    input_ids = torch.arange(24).view(2, 12) * 41 % 1024
    with torch.no_grad():
        pruned = prune_neurons(f, keep=0.75)(input_ids).logits
        assert torch.allclose(c(input_ids).logits, pruned, atol=0.05)  # float16 rounds what gauges rescale
        assert not torch.allclose(f(input_ids).logits, pruned, atol=0.5)
        assert not torch.allclose(b(input_ids).logits, f(input_ids).logits, atol=0.5)
    assert std_profile(open_weights(b), open_weights(f)).score > 0.999
    assert compare(*(data_path("cases") / name for name in "fg")).verdict == "cannot tell"
