"""What all checks have in common: what no reader meant gets a plain message, and nothing changes but the answer."""

import re

import numpy as np
import pytest
import torch

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer, check_setup
from workshop.build import NOTEBOOKS, read

CHECKS = {
    name: check
    for name, check in vars(checks).items()
    if name.startswith("check_") and name not in ("check_setup", "check_case")
}
GARBAGE = {
    "nothing": None,
    "text": "two experts",
    "not a number": float("nan"),
    "many": np.full((3, 1, 2), np.nan),
    "empty": [],
    "complex": 1j,
}


@pytest.mark.parametrize("returned", GARBAGE.values(), ids=GARBAGE)
def test_garbage_gets_a_plain_message(returned):
    for check in CHECKS.values():
        with pytest.raises(WrongAnswer, match=r"return|shape|Not yet|Wanted|Not a number|You say that"):
            check(lambda *inputs: returned)


def test_every_check_is_asked_in_the_solutions():
    """Or below the gaps inside the notebooks."""
    paths = [*NOTEBOOKS.glob("solutions/*.ipynb"), *NOTEBOOKS.glob("*.ipynb")]
    sources = [cell.source for path in paths for cell in read(path).cells]
    asked = set(re.findall(r"print\((check_\w+)\(", "\n".join(sources)))
    assert asked == {*CHECKS, "check_case"}


def test_a_check_leaves_the_random_numbers_alone_and_gives_one_verdict():
    def few_edits(route, logits, position):
        """Whether this is right is a matter of luck."""
        before = route(logits)[:position]
        edits = [torch.cat([logits[:position], 3 * torch.randn_like(logits[position:])]) for _ in range(4)]
        return any(not torch.equal(route(edited)[:position], before) for edited in edits)

    verdicts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        try:
            verdicts.add(checks.check_looks_ahead(few_edits))
        except WrongAnswer as error:
            verdicts.add(str(error))
        found = torch.randn(3)
        torch.manual_seed(seed)
        assert torch.equal(found, torch.randn(3))
    assert len(verdicts) == 1


def test_setup_says_what_is_missing_and_what_to_do(tmp_path, monkeypatch, capsys):
    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else object())
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    check_setup(tmp_path)
    printed = capsys.readouterr().out
    lost = ", ".join(f"data/zoo/moe-real/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json"))
    assert f"MISSING  the shipped model: {lost}\n         -> restore it: `git checkout data`" in printed
    assert "MISSING  the packages: scipy\n         -> run `make setup`" in printed
    assert "MISSING  one thread\n         -> run `torch.set_num_threads(1)`" in printed
    assert "3 to put right" in printed


def test_setup_is_content_with_what_is_shipped(monkeypatch, capsys):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    check_setup()
    printed = capsys.readouterr().out
    assert "ok       the packages: torch, numpy" in printed and "Everything is in place." in printed
