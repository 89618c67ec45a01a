"""The check of exercise 06 accepts every right answer and names each known mistake."""

from collections import Counter
from functools import cache
from math import log

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from minimoe.course.checks import WrongAnswer, check_information_by_chance, check_mutual_information


def by_counting(labels, experts):
    together, of_label, of_expert = Counter(zip(labels, experts, strict=True)), Counter(labels), Counter(experts)
    n = len(labels)
    return sum(c / n * log(c * n / (of_label[x] * of_expert[e])) for (x, e), c in together.items())


def by_table(labels, experts):
    table = torch.zeros(1001, 50, dtype=torch.float64)
    for label, expert in zip(labels, experts, strict=True):
        table[label, expert] += 1 / len(labels)
    apart = table.sum(1, keepdim=True) * table.sum(0)
    return torch.where(table > 0, table * (table / apart).clamp_min(1e-30).log(), 0.0).nansum()


def entropy(*columns):
    shares = np.array(list(Counter(zip(*columns, strict=True)).values())) / len(columns[0])
    return -(shares * np.log(shares)).sum()


def dealt_by_dictionary(labels, experts, documents, shuffles, score=by_counting):
    names = sorted(set(documents))
    label_of = dict(zip(documents, labels, strict=True))
    rng = np.random.default_rng(5)
    total = 0
    for _ in range(shuffles):
        new = dict(zip(names, rng.permutation([label_of[name] for name in names]), strict=True))
        total += score([new[document] for document in documents], experts)
    return total / shuffles


def dealt_by_torch(labels, experts, documents, shuffles):
    generator = torch.Generator().manual_seed(3)
    _, number = torch.from_numpy(documents).unique(return_inverse=True)
    of_document = torch.zeros(int(number.max()) + 1, dtype=torch.long).index_copy(0, number, torch.from_numpy(labels))
    orders = [torch.randperm(len(of_document), generator=generator) for _ in range(shuffles)]
    return torch.tensor([mutual_info_score(of_document[order][number].numpy(), experts) for order in orders]).mean()


def in_place(labels, experts, documents, shuffles):
    """Right, and it spoils what it was given."""
    found = dealt_by_dictionary(labels, experts, documents, shuffles)
    labels[:] = experts[:] = documents[:] = 0
    return [found]


@pytest.mark.parametrize("answer", [mutual_info_score, by_counting, by_table], ids=lambda f: f.__name__)
def test_right_information_is_accepted(answer):
    assert check_mutual_information(answer).startswith("Right")


@pytest.mark.parametrize("answer", [dealt_by_dictionary, dealt_by_torch, in_place], ids=lambda f: f.__name__)
def test_right_chance_is_accepted(answer):
    assert check_information_by_chance(answer).startswith("Right")


def logarithm_of_zero(labels, experts):
    table = np.zeros((1001, 50))
    np.add.at(table, (labels, experts), 1 / len(labels))
    with np.errstate(all="ignore"):
        return (table * np.log(table / (table.sum(1, keepdims=True) * table.sum(0)))).sum()


def shuffled_tokens(labels, experts, documents, shuffles):
    rng = np.random.default_rng(0)
    return np.mean([mutual_info_score(rng.permutation(labels), experts) for _ in range(shuffles)])


def dealing(deal, summary=np.mean):
    """`chance` in which `deal(labels, documents, label of each document, number of each, rng)` gives the new labels."""

    def answer(labels, experts, documents, shuffles):
        rng = np.random.default_rng(3)
        _, first, number = np.unique(documents, return_index=True, return_inverse=True)
        new = (deal(labels, documents, labels[first], number, rng) for _ in range(shuffles))
        return summary([mutual_info_score(each, experts) for each in new])

    return answer


with_replacement = dealing(lambda x, d, known, number, rng: rng.choice(known, len(known))[number])
any_label = dealing(lambda x, d, known, number, rng: rng.choice(np.unique(x), len(known))[number])
rolled = dealing(lambda x, d, known, number, rng: np.roll(x, rng.integers(1, len(x))))
blocks = dealing(
    lambda x, d, known, number, rng: np.concatenate([x[d == name] for name in rng.permutation(np.unique(d))])
)
same_seed = dealing(lambda x, d, known, number, rng: np.random.default_rng(0).permutation(known)[number])
median = dealing(lambda x, d, known, number, rng: rng.permutation(known)[number], np.median)


def one_shuffle(labels, experts, documents, shuffles):
    return dealt_by_dictionary(labels, experts, documents, 1)


@cache
def stream():
    return np.random.default_rng(8)


def another_shuffle_each_time(labels, experts, documents, shuffles):
    _, first, number = np.unique(documents, return_index=True, return_inverse=True)
    return mutual_info_score(stream().permutation(labels[first])[number], experts)


WRONG = [
    (check_mutual_information, lambda x, e: mutual_info_score(x, e) / log(2), "bits"),
    (check_mutual_information, lambda x, e: -mutual_info_score(x, e), "sign"),
    (check_mutual_information, lambda x, e: entropy(e), r"H\(expert\)"),
    (check_mutual_information, lambda x, e: entropy(x, e) - entropy(x), r"H\(expert \| label\)"),
    (check_mutual_information, lambda x, e: entropy(x, e), "together"),
    (check_mutual_information, lambda x, e: len(x) * mutual_info_score(x, e), "sum over all tokens"),
    (check_mutual_information, lambda x, e: mutual_info_score(x, e) / entropy(e), "share"),
    (check_mutual_information, lambda x, e: mutual_info_score(x, e) / entropy(x), "Not yet"),
    (check_mutual_information, logarithm_of_zero, "log 0"),
    (check_mutual_information, lambda x, e: 0.0, "Not yet"),
    (check_mutual_information, lambda x, e: [0.1, 0.2], "one number"),
    (check_mutual_information, lambda x, e: None, "return"),
    (check_information_by_chance, lambda x, e, d, s: mutual_info_score(x, e), "as they are"),
    (check_information_by_chance, shuffled_tokens, "shuffled the tokens"),
    (check_information_by_chance, lambda x, e, d, s: s * dealt_by_dictionary(x, e, d, s), "mean"),
    (check_information_by_chance, with_replacement, "Not yet|no dealing of the labels"),
    (check_information_by_chance, any_label, "Not yet|no dealing of the labels"),
    (check_information_by_chance, rolled, "Not yet|no dealing of the labels"),
    (check_information_by_chance, blocks, "Not yet|no dealing of the labels"),
    (check_information_by_chance, median, "the median of them"),
    (check_information_by_chance, one_shuffle, "one shuffle"),
    (check_information_by_chance, another_shuffle_each_time, "one shuffle"),
    (check_information_by_chance, same_seed, "one shuffle"),
    (check_information_by_chance, lambda x, e, d, s: 0.0, "Not yet"),
    (check_information_by_chance, lambda x, e, d, s: [dealt_by_dictionary(x, e, d, 1)] * 2, "one number"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)


@pytest.mark.parametrize("seed", range(10))
def test_another_draw_of_a_right_answer_is_right(seed):
    def answer(labels, experts, documents, shuffles):
        rng = np.random.default_rng(seed)
        _, first, number = np.unique(documents, return_index=True, return_inverse=True)
        dealt = [rng.permutation(labels[first])[number] for _ in range(shuffles)]
        return np.mean([by_counting(new.tolist(), experts.tolist()) for new in dealt])

    assert check_information_by_chance(answer)
