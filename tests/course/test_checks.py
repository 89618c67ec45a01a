"""Each check accepts every right answer and names each known mistake."""

import numpy as np
import pytest
import torch

from minimoe.course.checks import (
    WrongAnswer,
    check_first_choice_shares,
    check_grouped_choice,
    check_setup,
    check_topk_weights,
)
from minimoe.model import route_grouped, route_topk_softmax


def counted_by_hand(indices, experts):
    return [sum(int(row[0]) == expert for row in indices) / len(indices) for expert in range(experts)]


def counted_by_numpy(indices, experts):
    return np.bincount(indices[:, 0].numpy(), minlength=experts) / len(indices)


def counted_by_one_hot(indices, experts):
    return torch.nn.functional.one_hot(indices[:, 0], experts).double().mean(0)


def softmax_then_divide(logits, k):
    best = logits.softmax(-1).topk(k).values
    return best / best.sum(-1, keepdim=True)


def softmax_of_the_best(logits, k):
    return route_topk_softmax(logits, k).weights


def exponentials(logits, k):
    best = logits.sort(descending=True).values[:, :k].exp()
    return (best / best.sum(1)[:, None]).tolist()


def group_by_group(logits, k, n_group):
    size = logits.shape[1] // n_group
    parts = [logits[:, g * size : (g + 1) * size].topk(k // n_group).indices + g * size for g in range(n_group)]
    return torch.cat(parts, dim=1)


def best_first(logits, k, n_group):
    chosen = route_grouped(logits, k, n_group).indices
    return chosen.gather(1, logits.gather(1, chosen).argsort(descending=True))


def list_of_tensors(logits, k, n_group):
    return list(group_by_group(logits, k, n_group))


def row_by_row(logits, k, n_group):
    size = logits.shape[1] // n_group
    rows = []
    for row in logits.tolist():
        groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
        rows.append([e for group in groups for e in sorted(group, key=lambda e: -row[e])[: k // n_group]])
    return rows


RIGHT = [
    (check_first_choice_shares, counted_by_hand),
    (check_first_choice_shares, counted_by_numpy),
    (check_first_choice_shares, counted_by_one_hot),
    (check_topk_weights, softmax_then_divide),
    (check_topk_weights, softmax_of_the_best),
    (check_topk_weights, exponentials),
    (check_grouped_choice, group_by_group),
    (check_grouped_choice, best_first),
    (check_grouped_choice, row_by_row),
    (check_grouped_choice, list_of_tensors),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=lambda f: f.__name__)
def test_right_answers_are_accepted(check, answer):
    assert check(answer).startswith("Right")


def group_starts_at_what_it_gives(logits, k, n_group):
    """The known bug: right only where a group holds as many experts as it gives."""
    within = logits.view(len(logits), n_group, -1).topk(k // n_group).indices
    return (within + torch.arange(0, k, k // n_group)[:, None]).flatten(1)


def best_groups(logits, k, n_group):
    """DeepSeek's rule: the groups with the highest expert, and all choices in them."""
    size = logits.shape[1] // n_group
    open_groups = logits.view(len(logits), n_group, size).amax(-1).topk(-(-k // size)).indices
    masked = torch.full_like(logits, -torch.inf)
    for token, groups in enumerate(open_groups.tolist()):
        for g in groups:
            masked[token, g * size : (g + 1) * size] = logits[token, g * size : (g + 1) * size]
    return masked.topk(k).indices


def every_other_expert(logits, k, n_group):
    parts = [logits[:, g::n_group].topk(k // n_group).indices * n_group + g for g in range(n_group)]
    return torch.cat(parts, dim=1)


WRONG = [
    (check_first_choice_shares, lambda i, e: torch.bincount(i[:, 0], minlength=e), "counts"),
    (check_first_choice_shares, lambda i, e: torch.bincount(i.flatten(), minlength=e) / i.numel(), "every choice"),
    (check_first_choice_shares, lambda i, e: torch.bincount(i.flatten(), minlength=e) / len(i), "adds up to K"),
    (check_first_choice_shares, lambda i, e: torch.bincount(i[:, 1], minlength=e) / len(i), None),
    (check_first_choice_shares, lambda i, e: torch.bincount(i[:, -1], minlength=e) / len(i), "last choices"),
    (check_first_choice_shares, lambda i, e: torch.bincount(i[:, 0]) / len(i), "share 0"),
    (check_topk_weights, lambda x, k: x.softmax(-1).topk(k).values, "add up to 1"),
    (check_topk_weights, lambda x, k: softmax_then_divide(x.softmax(0).log(), k), "down the tokens"),
    (check_topk_weights, lambda x, k: x.topk(k).values / x.topk(k).values.sum(-1, keepdim=True), "raw logits"),
    (check_topk_weights, lambda x, k: torch.ones(len(x), k) / k, "same weight"),
    (check_topk_weights, lambda x, k: softmax_then_divide(x, x.shape[1])[:, -k:].flip(1), None),
    (check_topk_weights, lambda x, k: softmax_then_divide(x, k).flip(1), None),
    (check_topk_weights, lambda x, k: softmax_then_divide(x, k + 1), "shape"),
    (check_first_choice_shares, lambda i, e: 0.5, "shape"),
    (check_topk_weights, lambda x, k: torch.full((len(x), k), torch.nan), "Not yet. Entry 0"),
    (check_topk_weights, lambda x, k: [], "shape"),
    (check_topk_weights, lambda x, k: None, "return"),
    (check_topk_weights, lambda x, k: "two experts", "wanted a tensor"),
    (check_grouped_choice, group_starts_at_what_it_gives, "how many experts a group holds"),
    (check_grouped_choice, lambda x, k, g: x.view(len(x), g, -1).topk(k // g).indices.flatten(1), "places within"),
    (check_grouped_choice, lambda x, k, g: x.topk(k).indices, "whatever their group"),
    (check_grouped_choice, every_other_expert, "interleaved"),
    (check_grouped_choice, best_groups, "DeepSeek"),
    (check_grouped_choice, lambda x, k, g: torch.arange(k).expand(len(x), k), "Not yet"),
    (check_grouped_choice, lambda x, k, g: x.topk(k).indices.flatten(), "shape"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)


def test_a_worst_choice_is_named():
    with pytest.raises(WrongAnswer, match="worst"):
        check_topk_weights(lambda x, k: softmax_then_divide(x.softmax(-1), k) * 0 + _worst(x, k))


def _worst(logits, k):
    worst = logits.softmax(-1).topk(k, largest=False).values
    return worst / worst.sum(-1, keepdim=True)


def test_an_answer_cannot_change_the_question():
    def destructive(logits, k):
        weights = softmax_then_divide(logits, k)
        logits.zero_()
        return weights

    assert check_topk_weights(destructive).startswith("Right")


def test_setup_says_what_is_missing_and_what_to_do(tmp_path, capsys):
    (tmp_path / "tokenizer.json").touch()
    check_setup(tmp_path)
    printed = capsys.readouterr().out
    missing = "MISSING  the shipped model: " + ", ".join(
        f"data/zoo/moe-real/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
    )
    assert f"{missing}\n         -> restore them from the repository: `git checkout data`\n" in printed
    assert "ok       the packages: torch, numpy" in printed
    assert "to put right" in printed


def test_setup_names_a_missing_package(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else object())
    check_setup()
    assert "MISSING  the packages: scipy\n         -> run `make setup`" in capsys.readouterr().out


def test_setup_minds_the_threads(capsys):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check_setup()
        assert "MISSING  one thread\n         -> run `torch.set_num_threads(1)`" in capsys.readouterr().out
        torch.set_num_threads(1)
        check_setup()
        assert "Everything is in place." in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)
