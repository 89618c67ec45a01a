"""The checks of the gaps: right answers of several forms pass, and each known mistake gets its hint."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import permutation_test, spearmanr

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer


def cosines(child, parent):
    return F.normalize(child, dim=1) @ F.normalize(parent, dim=1).mT


def nearest_angles(child, parent):
    return torch.rad2deg(torch.acos(cosines(child, parent).max(1).values.clamp(max=1)))


def mixture(x, experts, router, k, normalise, pick=lambda w: w):
    rows = []
    for token in x:  # one token after the other
        weights = torch.softmax(router @ token, 0)
        best = weights.argsort(descending=True)[:k]
        total = weights[best].sum() if normalise else 1
        rows.append(sum(pick(weights)[e] / total * experts[e](token[None])[0] for e in best))
    return torch.stack(rows)


def profile(matrices):
    std = np.array([[np.std(m, ddof=1) for m in matrices[role]] for role in "qkvo"])
    return (std - std.mean(1, keepdims=True)) / std.std(1, keepdims=True)


def auc(relatives, strangers):
    return np.mean([(x > y) + (x == y) / 2 for x in relatives for y in strangers])


def reorder(gate, up, down, order):
    return gate[order], up[order], down.T[order].T


def pair_neurons(one, other):
    return linear_sum_assignment(-cosines(one, other).numpy())[1].tolist()


def order_p(partners, rng):
    found = spearmanr(partners, np.arange(len(partners)))[0]
    reached = 0
    for _ in range(999):
        reached += spearmanr(rng.permutation(partners), np.arange(len(partners)))[0] >= found
    return (reached + 1) / 1000


def chance_score(layers, share, rng):
    line = np.arange(layers) - (layers - 1) / 2
    curves = np.sqrt(share) * line / line.std() + np.sqrt(1 - share) * rng.normal(size=(2, 4, layers))
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*curves, strict=True)])


RIGHT = {
    "check_nearest_angles": nearest_angles,
    "check_mixture": mixture,
    "check_profile": profile,
    "check_score": lambda one, other: np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(one, other, strict=True)]),
    "check_auc": auc,
    "check_reorder": reorder,
    "check_fold": lambda weight, matrix: matrix @ torch.diag(weight),
    "check_frame": lambda q, k, wanted: [q / q.std() * wanted, k * q.std() / wanted],
    "check_pairing": pair_neurons,
    "check_order_p": order_p,
    "check_share_right": lambda one_in, found, flagged: 1 / (1 + (one_in - 1) * flagged / found),
    "check_recapture": lambda three, two: [three / (3 * three / (3 * three + two)) ** 3, 3 * three / (3 * three + two)],
    "check_ratio": lambda relatives, strangers, counts: np.mean(counts(relatives)) / np.mean(counts(strangers)),
    "check_trend": chance_score,
    "check_digest": lambda path: hashlib.sha256(path.read_bytes()).hexdigest(),
    "check_nearest": lambda bits, store: sorted(store, key=lambda name: (store[name] != bits).mean()),
}
WRONG = [
    ("check_nearest_angles", lambda a, b: nearest_angles(a, b).deg2rad(), "radians"),
    ("check_nearest_angles", lambda a, b: nearest_angles(b, a), "other way round"),
    ("check_nearest_angles", lambda a, b: cosines(a, b).min(1).values.acos().rad2deg(), "least similar"),
    ("check_mixture", lambda x, e, r, k, n: mixture(x, e, r, k, not n), "divided by their sum where they should not"),
    ("check_mixture", lambda x, e, r, k, n: torch.zeros_like(x), "Not yet"),
    ("check_profile", lambda m: profile(m)[[2, 1, 0, 3]], "order of the dictionary"),
    ("check_profile", lambda m: None, "returned nothing"),
    ("check_score", lambda one, other: (one * other).sum(1).mean(), "mean of their products"),
    ("check_auc", lambda x, y: np.mean([a > b for a in x for b in y]), "counts a half"),
    ("check_auc", lambda x, y: auc(y, x), "stranger scores higher"),
    ("check_reorder", lambda g, u, d, o: (g[o], u[o], d[:, o.argsort()]), "Down"),
    ("check_reorder", lambda g, u, d, o: (g[o], u, d[:, o]), "Up"),
    ("check_fold", lambda weight, matrix: weight[:, None] * matrix, "rows"),
    ("check_frame", lambda q, k, wanted: (q * wanted / q.std(), k), "products changed"),
    ("check_frame", lambda q, k, wanted: (q, k), "standard deviation"),
    ("check_pairing", lambda a, b: cosines(a, b).argmax(1), "share a partner"),
    ("check_pairing", lambda a, b: linear_sum_assignment(cosines(a, b).numpy())[1], "smallest sum"),
    ("check_order_p", lambda partners, rng: order_p(partners, rng) - 0.001, "p-value is 0"),
    ("check_order_p", lambda partners, rng: 0.001, "turned round"),
    ("check_share_right", lambda one_in, found, flagged: found / (found + flagged), "how rare"),
    ("check_recapture", lambda three, two: (three, 3 * three / (3 * three + two)), "naive"),
    ("check_ratio", lambda a, b, counts: counts(a).sum() / counts(b).sum(), "different sizes"),
    ("check_ratio", lambda a, b, counts: counts(b).mean() / counts(a).mean(), "on its head"),
    ("check_trend", lambda layers, share, rng: share**2, "square of the share"),
    ("check_trend", lambda layers, share, rng: 1.0, "wanted 0.9"),
    ("check_digest", lambda path: hashlib.sha256(str(path).encode()).hexdigest(), "file's name"),
    ("check_digest", lambda path: hashlib.sha256(path.read_bytes()).digest(), "hexdigest"),
    ("check_digest", lambda path: hashlib.sha256(path.read_bytes()[:9]).hexdigest(), "all of them"),
    ("check_nearest", lambda bits, store: sorted(store, key=lambda name: (store[name] == bits).mean()), "farthest"),
    ("check_nearest", lambda bits, store: list(store), "order of the store"),
]


@pytest.mark.parametrize("check", RIGHT)
def test_right_answers_are_praised(check):
    assert getattr(checks, check)(RIGHT[check]).startswith("Right")


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_known_mistakes_get_their_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        getattr(checks, check)(answer)


def test_the_p_value_of_an_order_is_that_of_a_permutation_test():
    partners, numbers = np.random.default_rng(3).permutation(40), np.arange(40)
    found = permutation_test(
        (partners,), lambda x: np.corrcoef(x, numbers)[0, 1], permutation_type="pairings", alternative="greater", rng=0
    )
    assert order_p(partners, np.random.default_rng(1)) == pytest.approx(found.pvalue, abs=0.06)
