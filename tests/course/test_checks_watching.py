"""The checks on repetition accept every right answer and name each known mistake."""

from collections import Counter
from fractions import Fraction
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch

from minimoe.course.checks import WrongAnswer, check_chance_by_load, check_repetition


def pair_by_pair(choices, documents):
    pairs = [
        (a == b) for (a, d), (b, e) in pairwise(zip(choices[:, 0].tolist(), documents.tolist(), strict=True)) if d == e
    ]
    return sum(pairs) / len(pairs)


def document_by_document(choices, documents):
    rows = zip(documents.tolist(), choices[:, 0].tolist(), strict=True)
    texts = [[expert for _, expert in text] for _, text in groupby(rows, key=lambda row: row[0])]
    same = sum(a == b for text in texts for a, b in pairwise(text))
    return torch.tensor(same / sum(len(text) - 1 for text in texts))


def with_numpy(choices, documents):
    first, within = choices[:, 0].numpy(), np.diff(documents.numpy()) == 0
    return np.mean(np.diff(first)[within] == 0)


def as_a_fraction(choices, documents):
    return Fraction(pair_by_pair(choices, documents)).limit_denominator(1000)


def as_a_row(choices, documents):
    return [pair_by_pair(choices, documents)]


def all_pairs(choices, num_experts):
    first = choices[:, 0]
    return (first[:, None] == first).double().mean()


def counted(choices, num_experts):
    counts = Counter(choices[:, 0].tolist())
    return sum((count / len(choices)) ** 2 for count in counts.values())


def as_a_fraction_of_pairs(choices, num_experts):
    return Fraction(int((choices[:, None, 0] == choices[:, 0]).sum()), len(choices) ** 2)


def with_bincount(choices, num_experts):
    return np.square(np.bincount(choices[:, 0], minlength=num_experts) / len(choices)).sum()


@pytest.mark.parametrize("answer", [pair_by_pair, document_by_document, with_numpy, as_a_fraction, as_a_row])
def test_right_repetitions_are_accepted(answer):
    assert check_repetition(answer).startswith("Right")


@pytest.mark.parametrize("answer", [all_pairs, counted, as_a_fraction_of_pairs, with_bincount])
def test_right_chances_are_accepted(answer):
    assert check_chance_by_load(answer).startswith("Right")


def within(documents):
    return documents[1:] == documents[:-1]


def mean_of_documents(choices, documents):
    return np.mean([pair_by_pair(choices[documents == d], documents[documents == d]) for d in documents.unique()])


WRONG = [
    (check_repetition, lambda c, d: (c[1:, 0] == c[:-1, 0]).double().mean(), "first of the next"),
    (check_repetition, lambda c, d: pair_by_pair(c, d) * within(d).sum() / len(d), "number of tokens"),
    (check_repetition, lambda c, d: pair_by_pair(c, d) * within(d).sum() / (len(d) - 1), "also by those of two"),
    (
        check_repetition,
        lambda c, d: torch.tensor([bool({*a} & {*b}) for a, b in pairwise(c.tolist())])[within(d)].double().mean(),
        "anywhere among the choices",
    ),
    (check_repetition, lambda c, d: (c[1:] == c[:-1])[within(d)].double().mean(), "place by place"),
    (check_repetition, mean_of_documents, "mean of the documents"),
    (check_repetition, lambda c, d: 1 / 6, "Not yet"),
    (check_repetition, lambda c, d: torch.nan, "Not yet"),
    (check_repetition, lambda c, d: Fraction(1, 6), "Not yet"),
    (check_repetition, lambda c, d: 1j, "wanted a tensor"),
    (check_repetition, lambda c, d: c[1:, 0] == c[:-1, 0], "shape"),
    (check_repetition, lambda c, d: None, "return"),
    (check_chance_by_load, lambda c, e: 1 / e, "1 / E"),
    (check_chance_by_load, lambda c, e: all_pairs(c.reshape(-1, 1), e), "all choices"),
    (check_chance_by_load, lambda c, e: torch.bincount(c[:, 0]).square().sum(), "squared counts"),
    (check_chance_by_load, lambda c, e: Counter(c[:, 0].tolist()).most_common(1)[0][1] / len(c), "largest share"),
    (check_chance_by_load, lambda c, e: 1, "Square them"),
    (check_chance_by_load, lambda c, e: (all_pairs(c, e) * len(c) - 1) / (len(c) - 1), "two \\*different\\*"),
    (check_chance_by_load, lambda c, e: torch.bincount(c[:, 0], minlength=e) / len(c), "shape"),
    (check_chance_by_load, lambda c, e: "a third", "wanted a tensor"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)
