"""The checks of the exercises on evidence: scores, and what they are worth (notebooks 08, 10, 11 and 12)."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy import stats

from minimoe.course.checks.answers import judge

Model = dict[str, np.ndarray]  # "q", "k", "v", "o" -> [layers, out, in]
Curves = np.ndarray  # [4, layers]: the standard deviation of each role in each layer
Matrices = Sequence[np.ndarray]  # one a layer, all of one shape


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r along the last axis; the mean over the others."""
    return (stats.zscore(a, axis=-1) * stats.zscore(b, axis=-1)).mean()


def check_profile_correlation(answer: Callable[[Model, Model], float | None]) -> str:
    """Check `profile_correlation(a, b)`: the std profile's score of two models of equal depth, or None where the
    standard deviation of a role varies by less than 1 % of its mean over the layers of either model. Each model maps
    "q", "k", "v" and "o" to an array [layers, out, in]."""

    def or_nan(*models: Model) -> float:
        found = answer(*models)
        return np.nan if found is None else found

    def scored(*models: Model, by: Callable[[Curves, Curves], float] = _correlation, below: float = 0.0) -> float:
        """A score of curves; NaN where one varies by less than the part `below` of its mean."""
        curves = np.array([[model[role].std(axis=(1, 2)) for role in "qkvo"] for model in models])
        return np.nan if stats.variation(curves, axis=-1).min() < below else by(*curves)

    varied = [(_model(0, layers=4), _model(10, layers=4)), (_model(1, layers=6), _model(11, layers=6))]
    good, barely, flat = _model(2, 4), _model(3, 4, spread_of_v=0.014), _model(3, 4, spread_of_v=0.006)
    tries = [*varied, (good, barely), (good, flat), (flat, good)]
    mistakes = {
        "You correlated across the four roles within each layer, which finds that Q has larger weights than K. The "
        "question is how each role goes with depth.": partial(scored, by=lambda a, b: _correlation(a.T, b.T)),
        "You correlated all numbers of the two models at once. The roles differ in size, and that counts as "
        "agreement.": partial(scored, by=lambda a, b: _correlation(a.ravel(), b.ravel())),
        "You averaged the curves of the four roles, and then correlated. An average hides a role that "
        "disagrees.": partial(scored, by=lambda a, b: _correlation(a.mean(0), b.mean(0))),
        "You gave a score although the V of one of the two models varies by 0.6 % over its layers. Z-scored, such "
        "noise is as tall as any curve.": scored,
        "You refuse a model whose curves all vary by 1.4 % and more. The task asks to refuse only what is below "
        "1 %.": partial(scored, below=0.1),
        "You returned nothing for two models whose curves all vary by more than 10 %; written as a number, 1 % is "
        "0.01.": partial(scored, below=1.0),
    }
    praise = "Right: the mean of four correlations, and None where there is nothing to read."
    return judge(or_nan, tries, partial(scored, below=0.01), mistakes, praise)


def _model(seed: int, layers: int, spread_of_v: float | None = None) -> Model:
    """Random matrices; the standard deviations of a role vary by 12 % to 40 % of their mean, those of V as told. Those
    of q and k share a trend over depth, the others do not, so that some correlations are high, some negative."""
    rng = np.random.default_rng([seed, layers])
    model = {}
    for place, role in enumerate("qkvo"):
        curve = rng.standard_normal(layers) + (role in "qk") * np.arange(layers)
        spread = spread_of_v if role == "v" and spread_of_v else rng.uniform(0.12, 0.4)
        wanted = (2 + place) * (1 + spread * stats.zscore(curve))
        matrices = rng.standard_normal((layers, 6, 4 + 2 * place))
        model[role] = matrices / matrices.std(axis=(1, 2), keepdims=True) * wanted[:, None, None]
    return model


def check_share_above(answer: Callable[[np.ndarray, float], tuple[float, float, float]]) -> str:
    """Check `share_above(scores, threshold)`: the share of scores above a threshold, and the ends of its exact 95 %
    interval (Clopper & Pearson 1934, Biometrika 26)."""

    def exact(hits: np.ndarray, lowest: float = 0.0, highest: float = 1.0) -> np.ndarray:
        k, n = hits.sum(), len(hits)
        found = np.array([k / n, stats.beta.ppf(0.025, k, n - k + 1), stats.beta.ppf(0.975, k + 1, n - k)])
        return np.where(np.isnan(found), [0, lowest, highest], found)

    def by_normal(hits: np.ndarray) -> np.ndarray:
        return hits.mean() + stats.norm.ppf(0.975) * hits.std() / len(hits) ** 0.5 * np.array([0, -1, 1])

    usual = 0.05 * np.random.default_rng(0).integers(10, 20, size=40)  # coarse: some lie on the threshold
    tries = [(usual, 0.05 * 16), (usual[:15], 1.0), (usual[:15], 0.1)]
    mistakes = {
        "A score that lies on the threshold is not above it.": lambda scores, level: exact(scores >= level),
        "This is the normal approximation, which can leave 0 to 1 and has no width where nothing is above. The exact "
        "interval comes from the beta distribution.": lambda scores, level: by_normal(scores > level),
        "Your answer contains NaN: the beta distribution has no parameter 0. With no hits the interval begins at 0; "
        "with nothing but hits it ends at 1.": lambda scores, level: exact(scores > level, np.nan, np.nan),
    }
    praise = "Right: the share and its exact interval, also where nothing is above, or everything."
    return judge(answer, tries, lambda scores, threshold: exact(scores > threshold), mistakes, praise)


def check_permutation_p(answer: Callable[[float, np.ndarray], float]) -> str:
    """Check `permutation_p(score, shuffled)`: the p-value of a score beside those of T random orders [T],
    (1 + how many of them reach it) / (T + 1)."""
    rng = np.random.default_rng(0)
    # Halves and quarters: ties are exact.
    tries = [(score, rng.integers(-6, 7, size=trials) / 4) for score, trials in ((0.5, 99), (-0.25, 40), (3.0, 19))]
    mistakes = {
        "The order that was found is one of the possible orders too, among those that reach the score and among all. "
        "Without it a p-value can be 0.": lambda score, shuffled: (shuffled >= score).mean(),
        "A random order that reaches the score exactly has reached it: `>=`, not `>`. Else ties are counted for the "
        "claim.": lambda score, shuffled: (1 + (shuffled > score).sum()) / (len(shuffled) + 1),
        "This is two-sided: it counts orders far below 0 as well. Only a high score speaks for a common "
        "origin.": lambda score, shuffled: (1 + (abs(shuffled) >= abs(score)).sum()) / (len(shuffled) + 1),
    }
    praise = "Right: never 0, ties against the claim, and among strangers at most p as often as p says."
    return judge(answer, tries, lambda x, shuffled: (1 + (shuffled >= x).sum()) / (len(shuffled) + 1), mistakes, praise)


def check_upper_bound(answer: Callable[[int, float], float]) -> str:
    """Check `upper_bound(trials, confidence)`: the one-sided bound of Clopper and Pearson (1934, Biometrika 26) on a
    rate of which no event was seen: 1 - (1 - confidence) ** (1 / trials)."""
    tries = [(20, 0.95), (7, 0.8), (695, 0.99)]
    mistakes = {
        "None seen does not mean that there are none.": lambda trials, confidence: 0.0,
        "This is the upper end of a two-sided interval. Of 0 events there is no lower end to get wrong; all of the "
        "error may lie above.": lambda trials, confidence: 1 - ((1 - confidence) / 2) ** (1 / trials),
        "This is the rule of three, which is an approximation for 95 %.": lambda trials, confidence: 3 / trials,
    }
    praise = "Right: a higher rate would have shown itself with at least this confidence."
    return judge(answer, tries, lambda trials, confidence: 1 - (1 - confidence) ** (1 / trials), mistakes, praise)


def check_likelihood_ratio(answer: Callable[[np.ndarray, np.ndarray, float, float], float]) -> str:
    """Check `ratio(relatives, strangers, score, width)`: how much commoner scores within `width` of `score` are among
    relatives than among strangers, with 1 added to both counts and 2 to both numbers of pairs."""

    def ratio_of(share: Callable[[np.ndarray, float, float], float]) -> Callable[..., float]:
        return lambda relatives, strangers, *place: share(relatives, *place) / share(strangers, *place)

    def near(scores: np.ndarray, score: float, width: float) -> int:
        return (abs(scores - score) <= width).sum()

    rng = np.random.default_rng(0)
    relatives, strangers = 1 - rng.beta(1, 8, size=90), 1 - rng.beta(2, 5, size=140)
    far = strangers[strangers < 0.8]  # none is near the last score
    tries = [(relatives, strangers, 0.9, 0.03), (relatives[:31], strangers, 0.8, 0.05), (relatives, far, 0.93, 0.025)]
    mistakes = {
        "This counts every score from `score` upwards, which answers how many reach it. Here the score is known: count "
        "those near it, on both sides.": ratio_of(lambda x, score, _: ((x >= score).sum() + 1) / (len(x) + 2)),
        "Nothing was added. A share of 0 out of few pairs does not mean never: add 1 to each count, and 2 to each "
        "number of pairs.": ratio_of(lambda scores, *place: near(scores, *place) / len(scores)),
        "These are counts, and there are more pairs of one kind than of the other. Divide each count by its number of "
        "pairs first.": ratio_of(lambda scores, *place: near(scores, *place) + 1),
    }
    praise = "Right: how much commoner this score is among relatives, also where no stranger has it."
    return judge(answer, tries, ratio_of(lambda x, *place: (near(x, *place) + 1) / (len(x) + 2)), mistakes, praise)


def check_posterior(answer: Callable[[float, float], float]) -> str:
    """Check `posterior(prior, ratio)`: the probability after evidence, from the one before and a likelihood ratio."""
    tries = [(0.1, 6.0), (0.02, 0.3), (0.9, 2.5), (0.5, 4.0)]
    mistakes = {
        "These are odds. Turn them back into a probability.": lambda prior, ratio: ratio * prior / (1 - prior),
        "The belief before was not used; this is right for one half alone.": lambda _, ratio: ratio / (1 + ratio),
        "A ratio multiplies odds. A probability times a ratio may pass 1.": lambda prior, ratio: prior * ratio,
    }
    praise = "Right: the same evidence leads from different beliefs to different beliefs."
    return judge(answer, tries, lambda prior, ratio: prior * ratio / (prior * ratio + 1 - prior), mistakes, praise)


def check_cosine_table(answer: Callable[[Matrices, Matrices], np.ndarray]) -> str:
    """Check `cosine_table(shallow, deep)`: the cosine of each matrix of one model with each of another, [L, L']."""
    tries = [_two_models(offset=0.5)]
    mistakes = {
        "These are dot products. A large matrix then resembles everything.": _dots,
        "The table lies on its side: wanted a row for each shallow layer.": lambda a, b: _cosines(b, a),
        "This is Pearson's correlation: the mean was taken off first. The cosine leaves it in.": lambda shallow, deep: (
            _cosines([a - a.mean() for a in shallow], [b - b.mean() for b in deep])
        ),
    }
    return judge(answer, tries, _cosines, mistakes, "Right: every layer of one model beside every layer of the other.")


def check_layer_map(answer: Callable[[np.ndarray, int], Sequence[int]]) -> str:
    """Check `layer_map(table, size)`: for each row of a table of cosines the column of the largest one; -1 where that
    is not above 5 / sqrt(size), for matrices of `size` numbers."""

    def best(table: np.ndarray, size: int) -> np.ndarray:
        return np.where(table.max(1) > 5 / np.sqrt(size), table.argmax(1), -1)

    shallow, deep = _two_models(offset=0.0)
    table = np.vstack([_cosines(shallow, deep), np.full(len(deep), -0.3)])  # the last row: even its best is negative
    tries = [(table, shallow[0].size), (table[::-1].copy(), shallow[0].size), (table[:, :3].copy(), 10_000)]
    mistakes = {
        "A layer from elsewhere has a largest cosine, too. Is it above chance?": lambda table, _: table.argmax(1),
        "You looked along the columns. Wanted one answer for each row.": lambda x, size: best(x.T, size),
        "A large negative cosine does not count here, so no `abs`.": lambda x, size: best(abs(x), size),
    }
    return judge(answer, tries, best, mistakes, "Right: the layers that were taken, and none where there is none.")


def _two_models(offset: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A deep model of seven layers, and a shallow one of four of them, a little changed, and one layer from elsewhere.
    The last of the four layers is twice as large, and turned round."""
    rng = np.random.default_rng(0)
    deep = [scale * (rng.normal(size=(24, 16)) + offset) for scale in rng.uniform(0.5, 3, size=7)]
    shallow = [deep[layer] + 0.3 * deep[layer].std() * rng.normal(size=(24, 16)) for layer in (1, 2, 5, 0)]
    shallow[-1] = -2 * shallow[-1]
    return [*shallow, rng.normal(size=(24, 16)) + offset], deep


def _dots(shallow: Matrices, deep: Matrices) -> np.ndarray:
    return np.einsum("aij,bij->ab", shallow, deep)


def _cosines(shallow: Matrices, deep: Matrices) -> np.ndarray:
    return _dots(shallow, deep) / np.linalg.norm(shallow, axis=(1, 2))[:, None] / np.linalg.norm(deep, axis=(1, 2))
