"""The check of exercise 12 accepts every right answer and names each known mistake."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist

from minimoe.course.checks import WrongAnswer, check_cosine_table, check_layer_map
from minimoe.fingerprints.weight_cosine import weight_cosine
from tests.fingerprints.toys import random_model, weights


def by_scipy(shallow, deep):
    return 1 - cdist([m.ravel() for m in shallow], [m.ravel() for m in deep], "cosine")


def by_torch(shallow, deep):
    rows = [torch.tensor(np.stack(side)).flatten(1)[:, None] for side in (shallow, deep)]
    return F.cosine_similarity(rows[0], rows[1].transpose(0, 1), dim=2)


def by_loops(shallow, deep):
    return [[float(np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b))) for b in deep] for a in shallow]


def spoiling(shallow, deep):
    """Right, and it changes what it was given."""
    for matrices in (shallow, deep):
        for place, matrix in enumerate(matrices):
            matrices[place] = matrix / np.linalg.norm(matrix)
    return np.array([[np.vdot(a, b) for b in deep] for a in shallow])


@pytest.mark.parametrize("answer", [by_scipy, by_torch, by_loops, spoiling])
def test_right_tables_pass(answer):
    assert check_cosine_table(answer).startswith("Right")


def centred(shallow, deep):
    return np.array([[np.corrcoef(a.ravel(), b.ravel())[0, 1] for b in deep] for a in shallow])


def mean_of_rows(shallow, deep):
    return [[F.cosine_similarity(torch.tensor(a), torch.tensor(b), dim=1).mean().item() for b in deep] for a in shallow]


def scaled(by_deep, by_shallow):
    def answer(shallow, deep):
        table = np.array([[np.vdot(a, b) for b in deep] for a in shallow])
        if by_deep:
            table = table / [np.linalg.norm(b) for b in deep]
        return table / [[np.linalg.norm(a)] for a in shallow] if by_shallow else table

    return answer


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (scaled(False, False), "dot products"),
        (scaled(True, False), "of the deep layer only"),
        (scaled(False, True), "of the shallow layer only"),
        (lambda shallow, deep: by_scipy(shallow, deep).T, "on its side"),
        (lambda shallow, deep: abs(by_scipy(shallow, deep)), "The sign is gone"),
        (centred, "Pearson"),
        (mean_of_rows, "cosines of rows"),
        (lambda shallow, deep: 1 - by_scipy(shallow, deep), "distances"),
        (lambda shallow, deep: None, "returned nothing"),
        (lambda shallow, deep: by_scipy(shallow, deep)[:-1], "shape"),
        (lambda shallow, deep: by_scipy(shallow, deep) + 0.01, "Not yet"),
    ],
)
def test_wrong_tables_get_their_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_cosine_table(answer)


def in_one_line(table, size):
    return np.where(table.max(1) > 5 / size**0.5, table.argmax(1), -1)


def one_by_one(table, size):
    found = []
    for row in table.tolist():
        best = max(row)
        found.append(row.index(best) if best * size**0.5 > 5 else -1)
    return found


def with_torch(table, size):
    value, place = torch.from_numpy(table).max(1)
    place[value <= 5 / size**0.5] = -1
    return place


@pytest.mark.parametrize("answer", [in_one_line, one_by_one, with_torch])
def test_right_maps_pass(answer):
    assert check_layer_map(answer).startswith("Right")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda table, size: table.argmax(1), "within chance"),
        (lambda table, size: in_one_line(table.T, size), "along the columns"),
        (lambda table, size: in_one_line(abs(table), size), "no `abs`"),
        (lambda table, size: in_one_line(table, size**2), "not 5 / size"),
        (lambda table, size: table.max(1), "argmax"),
        (lambda table, size: in_one_line(table, size) + 1, "count from 0"),
        (lambda table, size: np.arange(len(table)), "Not yet"),
    ],
)
def test_wrong_maps_get_their_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_layer_map(answer)


def test_the_table_is_what_weight_cosine_looks_at():
    a, b = (weights(random_model(seed)) for seed in (0, 1))
    matrices = [[model.get("q", layer).numpy() for layer in range(model.num_layers)] for model in (a, b)]
    found = weight_cosine(a, b).details
    table = by_scipy(*matrices)
    assert [found[f"q.{layer}"] for layer in range(3)] == pytest.approx(list(table.diagonal()), abs=1e-5)
