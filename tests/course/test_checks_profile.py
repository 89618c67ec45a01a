"""The check of exercise 08 accepts every right answer and names each known mistake."""

from statistics import NormalDist, mean

import numpy as np
import pytest
import torch
from scipy import stats

from minimoe.course.checks import WrongAnswer, check_profile_correlation, check_share_above


def curves(model, ddof=0):
    return np.stack([model[role].std(axis=(1, 2), ddof=ddof) for role in "qkvo"])


def is_flat(model):
    return bool((curves(model).std(1) / curves(model).mean(1) < 0.01).any())


def score_of(score, refuses=lambda a, b: is_flat(a) or is_flat(b)):
    """An answer that compares curves [4, L] in its own way, and refuses as it should, or not."""
    return lambda a, b: None if refuses(a, b) else score(curves(a), curves(b))


def by_corrcoef(a, b):
    return np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def by_scipy(a, b):
    return mean(stats.pearsonr(x, y).statistic for x, y in zip(a, b, strict=True))


def by_torch(a, b):
    if is_flat(a) or is_flat(b):
        return float("nan")
    found = []
    for role in "qkvo":
        x, y = (torch.from_numpy(model[role]).flatten(1).std(1) for model in (a, b))  # of a sample
        found.append(torch.corrcoef(torch.stack([x, y]))[0, 1])
    return torch.stack(found).mean()


def with_samples(a, b):
    """Weights and curves both as samples, and a flatness judged by them."""
    x, y = curves(a, ddof=1), curves(b, ddof=1)
    if any((each.std(1, ddof=1) / each.mean(1)).min() < 0.01 for each in (x, y)):
        return None
    return by_corrcoef(x, y)


def in_place(a, b):
    """Right, and it spoils what it was given."""
    found = score_of(by_scipy)(a, b)
    for model in (a, b):
        for matrices in model.values():
            matrices[:] = 0
    return found


RIGHT = [score_of(by_corrcoef), score_of(by_scipy), by_torch, with_samples, in_place]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_correlation_is_accepted(answer):
    assert check_profile_correlation(answer).startswith("Right")


def z(curve, ddof=0):
    return (curve - curve.mean(-1, keepdims=True)) / curve.std(-1, ddof=ddof, keepdims=True)


def r(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def cosine(a, b):
    return mean(x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True))


WRONG = [
    (score_of(cosine), "cosine"),
    (score_of(lambda a, b: (a * b).mean()), "Z-score"),
    (score_of(lambda a, b: np.mean([np.cov(x, y, ddof=0)[0, 1] for x, y in zip(a, b, strict=True)])), "covariance"),
    (score_of(lambda a, b: by_corrcoef(a.T, b.T)), "across the four roles"),
    (score_of(r), "at once"),
    (score_of(lambda a, b: r(a.mean(0), b.mean(0))), "averaged the curves"),
    (score_of(lambda a, b: r(z(a).mean(0), z(b).mean(0))), "averaged the z-scored"),
    (score_of(lambda a, b: (z(a, 1) * z(b, 1)).mean()), "sample"),
    (score_of(lambda a, b: 4 * by_corrcoef(a, b)), "sum"),
    (score_of(lambda a, b: by_corrcoef(a**2, b**2)), "variances"),
    (score_of(lambda a, b: np.mean([abs(r(x, y)) for x, y in zip(a, b, strict=True)])), "absolute"),
    (score_of(lambda a, b: by_corrcoef(a[:3], b[:3])), "Not yet"),
    (score_of(lambda a, b: stats.spearmanr(a.ravel(), b.ravel()).statistic), "Not yet"),
    (score_of(lambda a, b: [0.1, 0.2]), "one number|single number"),
    (score_of(by_scipy, refuses=lambda a, b: False), "noise"),
    (score_of(by_scipy, refuses=lambda a, b: is_flat(dict.fromkeys("qkvo", a["q"]))), "noise"),
    (score_of(by_scipy, refuses=lambda a, b: is_flat(a)), "one of the two"),
    (score_of(by_scipy, refuses=lambda a, b: is_flat(b)), "one of the two"),
    (score_of(by_scipy, refuses=lambda a, b: (curves(b).std(1) / curves(b).mean(1) < 0.05).any()), "1.4 %"),
    (score_of(by_scipy, refuses=lambda a, b: True), "returned nothing"),
    (lambda a, b: None, "return"),
    (lambda a, b: "0.5", "wanted a tensor of numbers"),
]


@pytest.mark.parametrize(("answer", "hint"), WRONG)
def test_wrong_correlations_are_rejected_with_a_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_profile_correlation(answer)


# --- the share above a threshold ---------------------------------------------------------------------------


def counted(scores, threshold):
    return sum(bool(score > threshold) for score in scores), len(scores)


def interval_of(method, confidence=0.95):
    def answer(scores, threshold):
        hits, trials = counted(scores, threshold)
        found = stats.binomtest(hits, trials).proportion_ci(confidence, method=method)
        return hits / trials, found.low, found.high

    return answer


def by_bisection(scores, threshold):
    """From the definition: the shares at which so few, or so many, hits are just not too rare."""
    hits, trials = counted(scores, threshold)

    def root(rare):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if rare(middle) < 0.025 else (low, middle)
        return low

    low = root(lambda p: stats.binom.sf(hits - 1, trials, p)) if hits else 0.0
    high = 1 - root(lambda q: stats.binom.cdf(hits, trials, 1 - q)) if hits < trials else 1.0
    return [hits / trials, low, high]


def as_tensors(scores, threshold):
    return tuple(torch.tensor(value, dtype=torch.float64) for value in by_bisection(scores, threshold))


exact = interval_of("exact")


@pytest.mark.parametrize("answer", [exact, by_bisection, as_tensors, lambda s, t: np.array(exact(s, t))])
def test_right_interval_is_accepted(answer):
    assert check_share_above(answer).startswith("Right")


def wald(scores, threshold):
    hits, trials = counted(scores, threshold)
    share = hits / trials
    half = NormalDist().inv_cdf(0.975) * (share * (1 - share) / trials) ** 0.5
    return share, share - half, share + half


def beta_alone(scores, threshold):
    hits, trials = counted(scores, threshold)
    return (
        hits / trials,
        stats.beta.ppf(0.025, hits, trials - hits + 1),
        stats.beta.ppf(0.975, hits + 1, trials - hits),
    )


WRONG_SHARES = [
    (lambda s, t: exact(s, t - 1e-9), "lies on the threshold"),
    (lambda s, t: exact(-s, -t), "below"),
    (lambda s, t: [100 * value for value in exact(s, t)], "per cent"),
    (wald, "normal approximation"),
    (interval_of("wilson"), "Wilson"),
    (interval_of("exact", 0.9), "each side"),
    (lambda s, t: [exact(s, t)[place] for place in (0, 2, 1)], "exchanged"),
    (lambda s, t: [len(s) * value for value in exact(s, t)], "counts"),
    (beta_alone, "NaN"),
    (interval_of("exact", 0.99), "Not yet"),
    (lambda s, t: exact(s, t)[1:], "shape"),
    (lambda s, t: exact(s, t)[0], "shape"),
    (lambda s, t: None, "return"),
]


@pytest.mark.parametrize(("answer", "hint"), WRONG_SHARES)
def test_wrong_shares_are_rejected_with_a_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_share_above(answer)
