"""The checks of notebooks 08, 10, 11 and 12 accept every right answer and name each known mistake."""

from fractions import Fraction
from math import exp, log

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.spatial.distance import cdist

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer

# --- the std profile ---------------------------------------------------------------------------------------


def curves(model, ddof=0):
    return np.stack([model[role].std(axis=(1, 2), ddof=ddof) for role in "qkvo"])


def is_flat(model, below=0.01):
    return bool((curves(model).std(1) / curves(model).mean(1) < below).any())


def score_of(score, refuses=lambda a, b: is_flat(a) or is_flat(b)):
    """An answer that compares curves [4, L] in its own way, and refuses as it should, or not."""
    return lambda a, b: None if refuses(a, b) else score(curves(a), curves(b))


def by_corrcoef(a, b):
    return np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def with_samples(a, b):
    """Weights and curves both as samples, and a flatness judged by them; in torch, and nan where it refuses."""
    x, y = curves(a, ddof=1), curves(b, ddof=1)
    if any((each.std(1, ddof=1) / each.mean(1)).min() < 0.01 for each in (x, y)):
        return float("nan")
    return torch.stack(
        [torch.corrcoef(torch.from_numpy(np.stack(pair)))[0, 1] for pair in zip(x, y, strict=True)]
    ).mean()


def spoiling(a, b):
    """Right, and it spoils what it was given."""
    found = score_of(by_corrcoef)(a, b)
    for model in (a, b):
        for matrices in model.values():
            matrices[:] = 0
    return found


def r(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def interval_by(method, compare=np.greater):
    def answer(scores, threshold):
        hits, trials = int(compare(scores, threshold).sum()), len(scores)
        found = stats.binomtest(hits, trials).proportion_ci(method=method)
        return hits / trials, found.low, found.high

    return answer


def interval_by_bisection(scores, threshold):
    """From the definition: the shares at which so few, or so many, hits are just not too rare."""
    hits, trials = sum(bool(score > threshold) for score in scores), len(scores)

    def root(rare):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if rare(middle) < 0.025 else (low, middle)
        return low

    low = root(lambda p: stats.binom.sf(hits - 1, trials, p)) if hits else 0.0
    high = 1 - root(lambda q: stats.binom.cdf(hits, trials, 1 - q)) if hits < trials else 1.0
    return tuple(torch.tensor(value, dtype=torch.float64) for value in (hits / trials, low, high))


def interval_by_normal(scores, threshold):
    hits = scores > threshold
    half = 1.959964 * (hits.mean() * (1 - hits.mean()) / len(hits)) ** 0.5
    return hits.mean(), hits.mean() - half, hits.mean() + half


def interval_by_beta_alone(scores, threshold):
    hits, trials = (scores > threshold).sum(), len(scores)
    low, high = stats.beta.ppf(0.025, hits, trials - hits + 1), stats.beta.ppf(0.975, hits + 1, trials - hits)
    return hits / trials, low, high


# --- p-values and bounds -----------------------------------------------------------------------------------


def p_one_by_one(score, shuffled):
    reached = sum(other >= score for other in [score, *shuffled.tolist()])
    shuffled[:] = 0
    return Fraction(int(reached), len(shuffled) + 1)


def p_by_sorting(score, shuffled):
    return [1 - np.searchsorted(np.sort(np.append(shuffled, score)), score, side="left") / (len(shuffled) + 1)]


def bound_by_scipy(trials, confidence):
    return stats.beta.ppf(confidence, 1, trials)


def bound_by_binomtest(trials, confidence, alternative="less"):
    interval = stats.binomtest(0, trials, alternative=alternative).proportion_ci(confidence_level=confidence)
    return torch.tensor(interval.high)


# --- the worth of a number ---------------------------------------------------------------------------------


def share(scores, score, width, hit=1, more=2):
    return (np.sum(abs(scores - score) <= width) + hit) / (len(scores) + more)


def ratio_by_counting(relatives, strangers, score, width):
    near = [sum(1 for one in scores if abs(one - score) <= width) for scores in (relatives, strangers)]
    relatives[:] = strangers[:] = 0
    return Fraction(near[0] + 1, len(relatives) + 2) / Fraction(near[1] + 1, len(strangers) + 2)


def ratio_by_appending(relatives, strangers, score, width):
    """One more hit and one more miss, literally."""
    more = [np.append(scores, [score, score + 9 * width]) for scores in (relatives, strangers)]
    return torch.tensor([share(more[0], score, width, 0, 0) / share(more[1], score, width, 0, 0)])


def ratio_without_addition(a, b, score, width):
    return share(a, score, width, 0, 0) / share(b, score, width, 0, 0)


def ratio_of_tails(a, b, score, width):
    return (np.sum(a >= score) + 1) / (len(a) + 2) / ((np.sum(b >= score) + 1) / (len(b) + 2))


def posterior_by_log_odds(prior, ratio):
    return 1 / (1 + exp(-(log(prior) - log(1 - prior) + log(ratio))))


# --- the layers of a shallow descendant --------------------------------------------------------------------


def cosines_by_scipy(shallow, deep):
    return 1 - cdist([m.ravel() for m in shallow], [m.ravel() for m in deep], "cosine")


def cosines_by_torch(shallow, deep):
    rows = [torch.tensor(np.stack(side)).flatten(1)[:, None] for side in (shallow, deep)]
    return F.cosine_similarity(rows[0], rows[1].transpose(0, 1), dim=2)


def cosines_in_place(shallow, deep):
    """Right, and it changes what it was given."""
    for matrices in (shallow, deep):
        for place, matrix in enumerate(matrices):
            matrices[place] = matrix / np.linalg.norm(matrix)
    return [[float(np.vdot(a, b)) for b in deep] for a in shallow]


def map_one_by_one(table, size):
    found = []
    for row in table.tolist():
        best = max(row)
        found.append(row.index(best) if best * size**0.5 > 5 else -1)
    return found


def map_with_torch(table, size):
    value, place = torch.from_numpy(table).max(1)
    place[value <= 5 / size**0.5] = -1
    return place


RIGHT = [
    (checks.check_profile_correlation, score_of(by_corrcoef)),
    (checks.check_profile_correlation, with_samples),
    (checks.check_profile_correlation, spoiling),
    (checks.check_share_above, interval_by("exact")),
    (checks.check_share_above, interval_by_bisection),
    (checks.check_permutation_p, p_one_by_one),
    (checks.check_permutation_p, p_by_sorting),
    (checks.check_upper_bound, bound_by_scipy),
    (checks.check_upper_bound, bound_by_binomtest),
    (checks.check_likelihood_ratio, ratio_by_counting),
    (checks.check_likelihood_ratio, ratio_by_appending),
    (checks.check_posterior, posterior_by_log_odds),
    (checks.check_posterior, lambda p, ratio: [p / (1 - p) * ratio / (1 + p / (1 - p) * ratio)]),
    (checks.check_cosine_table, cosines_by_scipy),
    (checks.check_cosine_table, cosines_by_torch),
    (checks.check_cosine_table, cosines_in_place),
    (checks.check_layer_map, map_one_by_one),
    (checks.check_layer_map, map_with_torch),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_right_answers_are_accepted(check, answer):
    assert check(answer).startswith("Right")


WRONG = [
    (checks.check_profile_correlation, score_of(lambda a, b: by_corrcoef(a.T, b.T)), "across the four roles"),
    (checks.check_profile_correlation, score_of(r), "at once"),
    (checks.check_profile_correlation, score_of(lambda a, b: r(a.mean(0), b.mean(0))), "averaged the curves"),
    (checks.check_profile_correlation, score_of(lambda a, b: by_corrcoef(a[:3], b[:3])), "Not yet"),
    (checks.check_profile_correlation, score_of(by_corrcoef, lambda a, b: False), "noise"),
    (checks.check_profile_correlation, score_of(by_corrcoef, lambda a, b: is_flat(a)), "one of the two models"),
    (checks.check_profile_correlation, score_of(by_corrcoef, lambda a, b: is_flat(b)), "one of the two models"),
    (checks.check_profile_correlation, score_of(by_corrcoef, lambda a, b: is_flat(b, 0.05)), "1.4 %"),
    (checks.check_profile_correlation, lambda a, b: None, "returned nothing"),
    (checks.check_share_above, interval_by("exact", np.greater_equal), "lies on the threshold"),
    (checks.check_share_above, interval_by_normal, "normal approximation"),
    (checks.check_share_above, interval_by_beta_alone, "NaN"),
    (checks.check_share_above, interval_by("wilson"), "Not yet"),
    (checks.check_permutation_p, lambda s, other: np.mean(other >= s), "can be 0"),
    (checks.check_permutation_p, lambda s, other: (1 + np.sum(other > s)) / (len(other) + 1), "counted for the claim"),
    (checks.check_permutation_p, lambda s, other: (1 + sum(abs(other) >= abs(s))) / (len(other) + 1), "two-sided"),
    (checks.check_permutation_p, lambda s, other: 1 - stats.norm.cdf(s, other.mean(), other.std()), "Not yet"),
    (checks.check_upper_bound, lambda n, c: 0.0, "None seen"),
    (checks.check_upper_bound, lambda n, c: bound_by_binomtest(n, c, "two-sided"), "two-sided"),
    (checks.check_upper_bound, lambda n, c: 3 / n, "rule of three"),
    (checks.check_upper_bound, lambda n, c: round(bound_by_scipy(n, c), 2), "Not yet"),
    (checks.check_likelihood_ratio, ratio_of_tails, "from `score` upwards"),
    (checks.check_likelihood_ratio, ratio_without_addition, "Nothing was added"),
    (
        checks.check_likelihood_ratio,
        lambda a, b, s, w: float(ratio_by_counting(a, b, s, w)) if (abs(b - s) <= w).any() else np.float64(1) / 0,
        "Nothing was added",
    ),
    (
        checks.check_likelihood_ratio,
        lambda a, b, s, w: (np.sum(abs(a - s) <= w) + 1) / (np.sum(abs(b - s) <= w) + 1),
        "These are counts",
    ),
    (checks.check_posterior, lambda p, ratio: p / (1 - p) * ratio, "These are odds"),
    (checks.check_posterior, lambda p, ratio: ratio / (1 + ratio), "was not used"),
    (checks.check_posterior, lambda p, ratio: p * ratio, "may pass 1"),
    (
        checks.check_cosine_table,
        lambda shallow, deep: [[np.vdot(a, b) for b in deep] for a in shallow],
        "dot products",
    ),
    (checks.check_cosine_table, lambda shallow, deep: cosines_by_scipy(shallow, deep).T, "on its side"),
    (checks.check_cosine_table, lambda shallow, deep: [[r(a, b) for b in deep] for a in shallow], "Pearson"),
    (checks.check_cosine_table, lambda shallow, deep: abs(cosines_by_scipy(shallow, deep)), "Not yet: entry 3"),
    (checks.check_layer_map, lambda table, size: table.argmax(1), "above chance"),
    (checks.check_layer_map, lambda table, size: map_one_by_one(table.T, size), "along the columns"),
    (checks.check_layer_map, lambda table, size: map_one_by_one(abs(table), size), "no `abs`"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)
