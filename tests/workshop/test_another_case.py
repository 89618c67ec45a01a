"""A second case is made from a seed, and its check knows the answer that is printed."""

import json

import pytest
import torch

from minimoe.course.checks import check_case
from minimoe.fingerprints.weights import open_weights
from workshop import another_case


def test_a_case_from_a_seed_has_its_own_letters_and_an_answer_that_is_scored(tmp_path, monkeypatch, capsys):
    made = another_case.make_models(5, steps=2)
    monkeypatch.setattr(another_case, "make_models", lambda seed, steps: made)
    another_case.main(["5", str(tmp_path / "case"), "--steps", "2"])
    answer = json.loads(capsys.readouterr().out.split(":", 1)[1])
    assert sorted(answer) == list("abcdefg") and sorted(map(str, answer.values())).count("None") == 3
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))
    sure = {child: {parent: 1.0} for child, parent in answer.items()}
    assert check_case(sure, tmp_path / "case").startswith("Handed in. Score 1.00")
    assert not (tmp_path / "case" / "answer.json").exists()
    experts = [open_weights(tmp_path / "case" / name).num_experts for name in answer]
    assert sorted(experts) == [0] * 6 + [4]


@pytest.mark.exact("compares bits")
def test_the_same_seed_gives_the_same_models():
    first, second = (another_case.make_models(6, steps=2)["renumbered"].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
