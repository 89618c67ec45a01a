"""The checks of the exercise on the std profile (notebook 08)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers

Model = dict[str, np.ndarray]  # "q", "k", "v", "o" -> [layers, out, in]
Curves = np.ndarray  # [4, layers]
_STEP = 0.05  # between the scores of a check: coarse enough for scores to lie on the threshold


def check_profile_correlation(answer: Callable[[Model, Model], float | None]) -> str:
    """Check `profile_correlation(a, b)`: the std profile's score of two models of equal depth, or None where the
    standard deviation of a role varies by less than 1 % of its mean over the layers of either model.

    Each model maps "q", "k", "v" and "o" to an array [layers, out, in].

    Raises:
        WrongAnswer: with a hint.
    """
    for seed, layers in ((0, 4), (1, 6)):
        models = _model(seed, layers), _model(seed + 10, layers)
        found = _ask(answer, *models)
        if _is_none(found):
            raise WrongAnswer(
                "You returned nothing for two models whose curves all vary by more than 10 %. Does the function end "
                "with `return ...`? The spread is the standard deviation of a curve over its mean, and 1 % is 0.01."
            )
        wanted = _score(*map(_curves, models))
        mistakes = {hint: _as_tensor(wrong) for hint, wrong in _MISTAKES.items()}
        compare(_number(found), torch.tensor(wanted), mistakes, tuple(map(_curves, models)))
    _check_refusals(answer)
    return "Right: the mean of four correlations, and None where there is nothing to read."


def _check_refusals(answer: Callable[[Model, Model], float | None]) -> None:
    good, barely, flat = _model(2, 4), _model(3, 4, flat={"v": 0.014}), _model(3, 4, flat={"v": 0.006})
    if _is_none(_ask(answer, good, barely)):
        raise WrongAnswer("You refuse a model whose curves vary by 1.4 % and more. The task asks to refuse below 1 %.")
    refused = [_is_none(_ask(answer, *pair)) for pair in ((good, flat), (flat, good))]
    if not any(refused):
        raise WrongAnswer(
            "You gave a score to a model whose V varies by 0.6 % over the layers: z-scoring made noise as tall as any "
            "curve. Return None if any one of the eight curves is that flat."
        )
    if not all(refused):
        raise WrongAnswer("You look for flat curves in one of the two models only. Either may be flat.")


def check_share_above(answer: Callable[[np.ndarray, float], tuple[float, float, float]]) -> str:
    """Check `share_above(scores, threshold)`: the share of scores above a threshold, and the ends of its exact 95 %
    interval (Clopper and Pearson).

    Raises:
        WrongAnswer: with a hint.
    """
    usual = np.random.default_rng(0).integers(10, 20, size=40) * _STEP
    for scores, threshold in ((usual, 16 * _STEP), (usual[:15], 1.0), (usual[:15], 0.1)):
        hits, trials = int((scores > threshold).sum()), len(scores)
        inputs = (hits, trials, int((scores >= threshold).sum()))
        found = numbers(answer, scores.copy(), threshold)
        if found.isnan().any():
            raise WrongAnswer(
                f"With {hits} of {trials} above the threshold, your answer contains NaN: the beta distribution has no "
                "parameter 0. With no hits the interval begins at 0; with nothing but hits it ends at 1."
            )
        wanted = torch.tensor([hits / trials, *stats.binomtest(hits, trials).proportion_ci()])
        compare(found, wanted, _INTERVALS, inputs)
    return "Right: the share and its exact interval, also where nothing is above, or everything."


# --- the correlation ---------------------------------------------------------------------------------------


def _model(seed: int, layers: int, flat: dict[str, float] | None = None) -> Model:
    """Random matrices; the standard deviations of a role vary by 12 % to 40 % of their mean, or as `flat` says.

    Those of q and k share a trend over depth, the others do not, so that some correlations are high, some negative.
    """
    rng = np.random.default_rng([seed, layers])
    model = {}
    for place, role in enumerate("qkvo"):
        course = rng.standard_normal(layers) + (role in "qk") * np.arange(layers)
        spread = (flat or {}).get(role, rng.uniform(0.12, 0.4))
        wanted = (2 + place) * (1 + spread * _z_score(course))
        matrices = rng.standard_normal((layers, 6, 4 + 2 * place))
        matrices /= matrices.std(axis=(1, 2), keepdims=True)
        model[role] = matrices * wanted[:, None, None]
    return model


def _curves(model: Model) -> Curves:
    return np.stack([model[role].std(axis=(1, 2)) for role in "qkvo"])


def _z_score(curves: np.ndarray) -> np.ndarray:
    return (curves - curves.mean(-1, keepdims=True)) / curves.std(-1, keepdims=True)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's r along the last axis."""
    return (_z_score(a) * _z_score(b)).mean(-1)


def _score(a: Curves, b: Curves) -> float:
    return float(_correlations(a, b).mean())


def _cosines(a: Curves, b: Curves) -> float:
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


_MISTAKES: dict[str, Callable[[Curves, Curves], float]] = {
    "Nothing was subtracted: this is the cosine of the curves, which is near 1 for any two positive ones. Take off the "
    "mean over the layers first.": _cosines,
    "This is the mean of the products of raw standard deviations. Z-score each curve first: take off its mean over the "
    "layers and divide by its standard deviation.": lambda a, b: float((a * b).mean()),
    "This is the covariance of the curves. Divide by the standard deviation of each.": lambda a, b: float(
        ((a - a.mean(-1, keepdims=True)) * (b - b.mean(-1, keepdims=True))).mean()
    ),
    "You correlated across the four roles within each layer: that Q has larger weights than K. The question is how "
    "each role goes with depth, so correlate along the layers.": lambda a, b: _score(a.T, b.T),
    "You correlated all numbers of the two models at once. The roles differ in size, and that counts as agreement: "
    "correlate each role by itself, then take the mean.": lambda a, b: float(_correlations(a.ravel(), b.ravel())),
    "You averaged the curves of the four roles, then correlated. Correlate each role first: an average hides a role "
    "that disagrees.": lambda a, b: float(_correlations(a.mean(0), b.mean(0))),
    "You averaged the z-scored curves of the four roles, then correlated. Correlate each role first: an average hides "
    "a role that disagrees.": lambda a, b: float(_correlations(_z_score(a).mean(0), _z_score(b).mean(0))),
    "You divided by the standard deviation of a sample (L - 1) and then took a mean over L layers: r is too small by "
    "(L - 1) / L. Use one or the other in both places.": lambda a, b: _score(a, b) * (1 - 1 / a.shape[-1]),
    "This is the sum of the four correlations. The score is their mean.": lambda a, b: 4 * _score(a, b),
    "This is the correlation of variances. The profile is made of standard deviations.": lambda a, b: _score(
        a**2, b**2
    ),
    "You took absolute values of the correlations. Curves that go opposite ways are not alike.": lambda a, b: float(
        np.abs(_correlations(a, b)).mean()
    ),
}


def _as_tensor(wrong: Callable[[Curves, Curves], float]) -> Callable[[Curves, Curves], Tensor]:
    return lambda a, b: torch.tensor(wrong(a, b), dtype=torch.float64)


def _ask(answer: Callable[[Model, Model], float | None], *models: Model) -> float | None:
    """What the answer says of two models, of which it gets copies."""
    return answer(*({role: matrices.copy() for role, matrices in model.items()} for model in models))


def _number(found: float) -> Tensor:
    return numbers(lambda: found)


def _is_none(found: float | None) -> bool:
    """Whether there is no score; not a number will do."""
    return found is None or bool(_number(found).isnan().all())


# --- the interval ------------------------------------------------------------------------------------------


def _normal(hits: int, trials: int, at_least: int) -> Tensor:
    share = hits / trials
    half = stats.norm.ppf(0.975) * (share * (1 - share) / trials) ** 0.5
    return torch.tensor([share, share - half, share + half], dtype=torch.float64)


def _with(method: str) -> Callable[[int, int, int], Tensor]:
    def found(hits: int, trials: int, at_least: int) -> Tensor:
        low, high = stats.binomtest(hits, trials).proportion_ci(method=method)
        return torch.tensor([hits / trials, low, high], dtype=torch.float64)

    return found


def _exact(hits: int, trials: int, confidence: float = 0.95) -> Tensor:
    return torch.tensor([hits / trials, *stats.binomtest(hits, trials).proportion_ci(confidence)], dtype=torch.float64)


_INTERVALS: Mistakes = {
    "A score that lies on the threshold is not above it: use >, not >=.": (
        lambda hits, trials, at_least: _exact(at_least, trials)
    ),
    "This is the share below the threshold, not above.": lambda hits, trials, at_least: _exact(
        trials - at_least, trials
    ),
    "These are per cent. The task asks for shares, from 0 to 1.": lambda hits, trials, at_least: (
        100 * _exact(hits, trials)
    ),
    "This interval is the normal approximation: share plus or minus 1.96 standard errors. It can leave 0 to 1, and it "
    "has no width where nothing is above. The exact one comes from the beta distribution.": _normal,
    "This is Wilson's interval, a good approximation. The task asks for the exact one, from the beta distribution.": (
        _with("wilson")
    ),
    "This interval leaves 5 % out on each side. One of 95 % leaves out 2.5 % on each.": (
        lambda hits, trials, at_least: _exact(hits, trials, 0.90)
    ),
    "The ends of the interval are exchanged: the lower one comes first.": (
        lambda hits, trials, at_least: _exact(hits, trials)[[0, 2, 1]]
    ),
    "These are the number of scores and an interval of counts. Divide by how many there are.": (
        lambda hits, trials, at_least: trials * _exact(hits, trials)
    ),
}
