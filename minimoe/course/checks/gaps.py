"""The checks of the gaps inside the notebooks 07 to 12: a few lines each, which the notebook goes on with.

Shapes: T tokens, H hidden size, I width of an MLP, E experts, L layers.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

from minimoe.course.checks.answers import WrongAnswer, judge, normal, numbers

Experts = Sequence[Callable[[Tensor], Tensor]]


# --- 07: making relatives ---------------------------------------------------------------------------------------------


def check_nearest_angles(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `nearest_angles(child, parent)`: of each row of child [N, H] the angle, in degrees, to the most similar row
    of parent [M, H]: [N]."""

    def angles(child: Tensor, parent: Tensor, pick: Callable[[Tensor], Tensor] = lambda x: x.amax(1)) -> Tensor:
        return pick(F.normalize(child.double(), dim=1) @ F.normalize(parent.double(), dim=1).mT).clamp(-1, 1).arccos()

    child, parent = 3 * normal(7, 12), normal(9, 12, seed=1)
    child[0] = 2 * parent[4]
    mistakes = {
        "These are radians. `rad2deg` turns them into degrees.": angles,
        "This is the angle to the row in the same place. Look for the most similar one, wherever it stands.": (
            lambda child, parent: angles(child, parent[: len(child)], torch.diagonal).rad2deg()
        ),
        "This is the least similar row. The largest cosine belongs to the smallest angle.": (
            lambda child, parent: angles(child, parent, lambda x: x.amin(1)).rad2deg()
        ),
        "For each row of the parent you looked for one of the child. It is the other way round.": (
            lambda child, parent: angles(parent, child).rad2deg()
        ),
    }
    tries = [(child, parent), (parent, normal(5, 12, seed=2))]
    praise = "Right: 0 degrees for what is there, whatever its length."
    # Near 0 degrees, the arccos of float32 is good to a few tenths of a degree.
    return judge(answer, tries, lambda *rows: angles(*rows).rad2deg(), mistakes, praise, atol=0.3)


def check_mixture(answer: Callable[[Tensor, Experts, Tensor, int, bool], Tensor]) -> str:
    """Check `mixture(x, experts, router, k, normalise)`: x [T, H] through the k experts with the highest scores of
    softmax(x router^T), router [E, H], weighted by these scores, which sum to 1 where `normalise` is true."""

    def mix(x: Tensor, experts: Experts, router: Tensor, k: int, normalise: bool, wrong: str = "") -> Tensor:
        scores = x @ router.T
        weights, chosen = scores.softmax(-1).topk(k)
        if wrong == "softmax":
            weights = scores.topk(k)[0]
        if normalise != (wrong == "turned"):
            weights = weights / weights.sum(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in experts], 1).gather(
            1, chosen[..., None].expand(-1, -1, len(x[0]))
        )
        return outputs.mean(1) if wrong == "mean" else (weights[..., None] * outputs).sum(1)

    experts = [lambda x, n=n: (n + 1) * x.roll(n, 1) for n in range(4)]
    tries = [(normal(6, 5), experts, normal(4, 5, seed=1), 2, normalise) for normalise in (True, False)]
    mistakes = {
        "The outputs of the chosen experts are averaged. Weigh each by what the router gives it.": "mean",
        "The scores are weights only after a softmax over all experts.": "softmax",
        "The weights are divided by their sum where they should not be, and the other way round.": "turned",
    }
    return judge(
        answer,
        tries,
        mix,
        {hint: lambda *inputs, wrong=wrong: mix(*inputs, wrong=wrong) for hint, wrong in mistakes.items()},
        "Right: each token through its experts, weighted by the router.",
    )


# --- 08: a first fingerprint ------------------------------------------------------------------------------------------


def check_profile(answer: Callable[[Mapping[str, Sequence]], np.ndarray]) -> str:
    """Check `profile(matrices)`: role -> the matrices of L layers becomes their standard deviations, z-scored over the
    layers, [4, L], in the order q, k, v, o."""

    def curves(matrices: Mapping[str, Sequence], axis: int | None = 1, spread: bool = True) -> np.ndarray:
        std = np.array([[matrix.std() for matrix in matrices[role]] for role in "qkvo"])
        centred = std - std.mean(axis, keepdims=True)
        return centred / std.std(axis, keepdims=True) if spread else centred

    rng = np.random.default_rng(0)
    matrices = {role: [(1 + rng.random()) * rng.standard_normal((8, 9)) for _ in range(5)] for role in "vkqo"}
    mistakes = {
        "You z-scored over the four roles. Each curve goes over the layers.": lambda x: curves(x, axis=0),
        "You z-scored all numbers at once. Each of the four curves has a mean and a spread of its own.": (
            lambda x: curves(x, axis=None)
        ),
        "The mean is gone, the spread is not 1. Divide each curve by its standard deviation over the layers.": (
            lambda x: curves(x, spread=False)
        ),
        "The curves stand in the order of the dictionary. Wanted q, k, v, o.": lambda x: curves(x)[[2, 1, 0, 3]],
    }
    # A standard deviation of a sample or of a population: the curves differ by one factor that z-scoring takes away.
    return judge(answer, [(matrices,)], curves, mistakes, "Right: four curves, each with mean 0 and spread 1.")


def check_score(answer: Callable[[np.ndarray, np.ndarray], float]) -> str:
    """Check `score(one, other)`: the mean over four z-scored curves [4, L] of their correlations."""
    one, other = (np.random.default_rng(seed).standard_normal((4, 6)) for seed in (0, 1))
    one, other = ((x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (one, other))
    mistakes = {
        "Products were summed. A correlation of z-scores is the mean of their products.": lambda x, y: (
            (x * y).sum(1).mean()
        ),
        "This is one correlation a role. Wanted their mean, one number.": lambda x, y: (x * y).mean(1),
    }
    return judge(answer, [(one, other), (one, -one)], lambda x, y: (x * y).mean(), mistakes, "Right: -1 to 1.")


def check_auc(answer: Callable[[Sequence[float], Sequence[float]], float]) -> str:
    """Check `auc(relatives, strangers)`: how often a relative scores higher than a stranger, of all pairs of one of
    each; a tie counts a half."""

    def share(relatives: Sequence[float], strangers: Sequence[float], tie: float = 0.5) -> float:
        more = np.subtract.outer(np.array(relatives), np.array(strangers))
        return (more > 0).mean() + tie * (more == 0).mean()

    mistakes = {
        "A tie counts a half: neither of the two scores higher.": lambda x, y: share(x, y, tie=0.0),
        "A tie counts a half, not a whole.": lambda x, y: share(x, y, tie=1.0),
        "This is how often the stranger scores higher.": lambda x, y: share(y, x),
    }
    tries = [([0.9, 0.5, 0.5], [0.1, 0.5, 0.7, 0.3]), ([0.2], [0.1, 0.3])]
    return judge(
        answer, tries, share, mistakes, "Right: 1 where every relative is above every stranger, .5 for a coin."
    )


# --- 09: hiding and framing -------------------------------------------------------------------------------------------


def check_reorder(answer: Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]) -> str:
    """Check `reorder(gate, up, down, order)`: the neurons of an MLP, gate and up [I, H], down [H, I], in another
    order."""
    gate, up, down, order = normal(6, 4), normal(6, 4, seed=1), normal(4, 6, seed=2), torch.tensor([2, 0, 5, 1, 4, 3])
    found = answer(gate, up, down, order)
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise WrongAnswer("The function should return three matrices: gate, up and down.")
    hints = (
        "Gate: a neuron is a row of it, and row n of the new one is row `order[n]` of the old one.",
        "Up: it takes the same order as gate, or each gate opens for another up.",
        "Down: a neuron is a *column* of it: `down[:, order]`.",
    )
    for matrix, wanted, hint in zip(found, (gate[order], up[order], down[:, order]), hints, strict=True):
        if numbers(matrix).shape != wanted.shape or not torch.equal(numbers(matrix), wanted.double()):
            raise WrongAnswer(hint)
    return "Right: the three parts of a neuron stay together."


def check_fold(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `fold(weight, matrix)`: the matrix that does to x what `matrix` does to weight * x."""
    weight, matrix = normal(4).abs() + 0.5, normal(4, 4, seed=1)
    mistakes = {
        "You multiplied the rows: that changes what comes out. What flows in meets the columns.": (
            lambda weight, matrix: matrix * weight[:, None]
        ),
        "You divided. The norm's weight multiplies x, so it multiplies the columns.": (
            lambda weight, matrix: matrix / weight
        ),
        "This is one vector, matrix times weight. Wanted a matrix, each column times one number.": (
            lambda weight, matrix: matrix @ weight
        ),
    }
    right = "Right: the norm's weight can be 1 from now on."
    return judge(answer, [(weight, matrix)], lambda weight, matrix: matrix * weight, mistakes, right)


def check_frame(answer: Callable[[Tensor, Tensor, float], Sequence[Tensor]]) -> str:
    """Check `frame(queries, keys, wanted)`: both multiplied so that the queries have the wanted standard deviation and
    all products of a query with a key stay."""
    queries, keys, wanted = normal(6, 4), normal(3, 4, seed=1), 0.3
    found = answer(queries.clone(), keys.clone(), wanted)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise WrongAnswer("The function should return two matrices: queries and keys.")
    new_queries, new_keys = (numbers(matrix) for matrix in found)
    if not abs(float(new_queries.std()) - wanted) < 1e-3:
        raise WrongAnswer(f"The queries have a standard deviation of {float(new_queries.std()):.3f}; wanted {wanted}.")
    if not torch.allclose(new_queries @ new_keys.mT, (queries @ keys.mT).double(), atol=1e-4):
        raise WrongAnswer("The products changed. What multiplies the queries has to divide the keys.")
    return "Right: the queries have the wanted spread, and no product moved."


# --- 10: tests --------------------------------------------------------------------------------------------------------


def check_pairing(answer: Callable[[Tensor, Tensor], Sequence[int]]) -> str:
    """Check `pair_neurons(one, other)`: for each row of `one` [I, H] the row of `other` [I, H] that it is paired with,
    so that the sum of the cosines is largest and each is taken once."""

    def paired(one: Tensor, other: Tensor, scaled: bool = True) -> np.ndarray:
        one, other = (F.normalize(rows, dim=1) if scaled else rows for rows in (one, other))
        return linear_sum_assignment((one @ other.mT).numpy(), maximize=True)[1]

    def nearest(one: Tensor, other: Tensor) -> Tensor:
        return (F.normalize(one, dim=1) @ F.normalize(other, dim=1).mT).argmax(1)

    lengths = torch.linspace(0.2, 5, 12)[:, None]
    tries = [(normal(12, 3), normal(12, 3, seed=seed) * lengths) for seed in (1, 2)]
    mistakes = {
        "Two neurons share a partner. Each is to be taken once, and the sum is to be largest: "
        "`linear_sum_assignment(..., maximize=True)`.": nearest,
        "These are dot products: long rows attract more than their share. Scale every row to length 1.": (
            lambda one, other: paired(one, other, scaled=False)
        ),
        "This is the pairing with the smallest sum. `linear_sum_assignment` minimises unless it is told not to.": (
            lambda one, other: paired(one, -other)
        ),
    }
    return judge(answer, tries, paired, mistakes, "Right: every neuron has a partner, and no two the same.")


def check_order_p(answer: Callable[[np.ndarray, np.random.Generator], float]) -> str:
    """Check `order_p(partner, rng)`: the p-value, with 999 random orders, of the rank correlation of the numbers of
    partners: (1 + how many random orders reach it) / 1000."""

    def p_of(partner: Sequence[int], seed: int) -> float:
        return _number(answer(np.array(partner), np.random.default_rng(seed)))

    kept, turned, random = np.arange(40), np.arange(40)[::-1], np.random.default_rng(3).permutation(40)
    if p_of(kept, 0) == 0:
        raise WrongAnswer("The p-value is 0. The order that was found is one of the 1,000 orders: count it.")
    if not abs(p_of(kept, 0) - 0.001) <= 1e-9:
        raise WrongAnswer(f"Not yet: where every neuron kept its number, p is {p_of(kept, 0):.4g}; wanted 1 / 1000.")
    if p_of(turned, 0) < 0.9:
        raise WrongAnswer("An order that is turned round is not evidence: count the random orders that are at least "
                          "as high, not those that are as far from 0.")  # fmt: skip
    exact = _normal_tail(np.corrcoef(rankdata(random), np.arange(40))[0, 1] * np.sqrt(39))
    if not abs(p_of(random, 1) - exact) <= 0.06:
        raise WrongAnswer(f"For an order drawn at random p is {p_of(random, 1):.2f}; about {exact:.2f} is right.")
    return "Right: 1 in 1,000 at the least, and anything for a random order."


def _number(returned: object) -> float:
    """The single number that the reader's function returns."""
    found = numbers(returned)
    if found.numel() != 1:
        raise WrongAnswer(f"The function returned {found.numel()} numbers; wanted one.")
    return float(found)


def _normal_tail(z: float) -> float:
    return float(torch.special.ndtr(torch.tensor(-z)))


def check_share_right(answer: Callable[[float, float, float], float]) -> str:
    """Check `share_right(one_in, found, flagged)`: the share of pairs called related that are, if one in so many pairs
    is related, and the method finds this share of the related and flags this share of the others."""

    def share(one_in: float, found: float, flagged: float) -> float:
        return found / (found + (one_in - 1) * flagged)

    mistakes = {
        "You left out how rare related pairs are: there are one_in - 1 strangers for each relative.": (
            lambda one_in, found, flagged: found / (found + flagged)
        ),
        "This is the share of verdicts that are wrong.": lambda *rates: 1 - share(*rates),
        "Of one_in pairs one is related, and so one_in - 1 are strangers.": (
            lambda one_in, found, flagged: found / (found + one_in * flagged)
        ),
    }
    praise = "Right: Bayes' rule, in counts."
    return judge(answer, [(10, 0.9, 0.05), (1_000, 1.0, 0.002)], share, mistakes, praise)


def check_recapture(answer: Callable[[int, int], tuple[float, float]]) -> str:
    """Check `recapture(three, two)`: (s, q) from s q^3 = three and 3 s q^2 (1 - q) = two."""

    def solve(three: int, two: int) -> tuple[float, float]:
        q = 3 * three / (3 * three + two)
        return three / q**3, q

    mistakes = {
        "q is right, and s is the naive count, three. Divide it by the chance that all three faces find a neuron.": (
            lambda three, two: (three, solve(three, two)[1])
        ),
        "This is (q, s). Wanted (s, q).": lambda three, two: solve(three, two)[::-1],
        "There are three ways for exactly two faces to agree, so it is 3 three against two.": (
            lambda three, two: (three / (three / (three + two)) ** 3, three / (three + two))
        ),
    }
    return judge(answer, [(113, 17), (80, 60)], solve, mistakes, "Right: two counts, two unknowns.", rtol=1e-4)


# --- 11: the dispute --------------------------------------------------------------------------------------------------


def check_ratio(answer: Callable[[np.ndarray, np.ndarray, Callable], float]) -> str:
    """Check `likelihood_ratio(relatives, strangers, counts)`: the share of relatives whose score counts, divided by the
    share of strangers; `counts` says of an array of scores which count."""

    def ratio(relatives: np.ndarray, strangers: np.ndarray, counts: Callable) -> float:
        return counts(relatives).mean() / counts(strangers).mean()

    rng = np.random.default_rng(0)
    scores = 1 - rng.beta(1, 8, size=90), 1 - rng.beta(2, 5, size=140)
    mistakes = {
        "These are counts, and the groups are of different sizes. Divide each by its number of pairs.": (
            lambda relatives, strangers, counts: counts(relatives).sum() / counts(strangers).sum()
        ),
        "It stands on its head: above 1 is to say that the score is commoner among relatives.": (
            lambda relatives, strangers, counts: 1 / ratio(relatives, strangers, counts)
        ),
    }
    tries = [(*scores, lambda x: x >= 0.9), (*scores, lambda x: abs(x - 0.8) <= 0.05)]
    praise = "Right: how many times commoner among relatives."
    return judge(answer, tries, ratio, mistakes, praise)


def check_trend(answer: Callable[[int, float, np.random.Generator], float]) -> str:
    """Check `chance_score(layers, share, rng)`: the score of two models whose four curves each have a share of their
    variance from one line over the layers, and the rest from chance."""
    for layers, share in ((400, 0.9), (400, 0.5), (400, 0.0)):
        found = float(np.mean([_number(answer(layers, share, np.random.default_rng(seed))) for seed in range(20)]))
        if abs(found - share**2) < 0.02 and share not in (0.0, 1.0):
            raise WrongAnswer("The score is the square of the share. A standard deviation is the root of a variance: "
                              "the line counts with sqrt(share), the noise with sqrt(1 - share).")  # fmt: skip
        if not abs(found - share) <= 0.05:
            raise WrongAnswer(
                f"Not yet: with a share of {share} the score is {found:.2f} on average, in 400 layers; wanted {share}."
            )
    return "Right: deep curves score as much as they share."


# --- 12: provenance in practice ---------------------------------------------------------------------------------------


def check_digest(answer: Callable[[Path], str]) -> str:
    """Check `digest(path)`: the sha256 of a file of any size, as 64 hexadecimal digits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights")
        for content in (b"", b"\r\nmixture\n" * 300_000):
            path.write_bytes(content)
            found, wanted = answer(path), hashlib.sha256(content).hexdigest()
            if not isinstance(found, str):
                raise WrongAnswer(f"The function returned {type(found).__name__}; wanted text: `.hexdigest()`.")
            if found == hashlib.sha256(str(path).encode()).hexdigest():
                raise WrongAnswer("This is the hash of the file's name. Read the file: `open(path, 'rb')`.")
            if found != wanted:
                raise WrongAnswer(
                    "Not yet: another number. Open the file as bytes ('rb') and feed all of them, in order."
                )
    return "Right: one number for all bytes, in order."


def check_nearest(answer: Callable[[np.ndarray, Mapping[str, np.ndarray]], Sequence[str]]) -> str:
    """Check `nearest(bits, store)`: the names in a store, those first whose bits agree with `bits` in most places."""
    rng = np.random.default_rng(0)
    bits = rng.random(200) < 0.5
    store = {
        name: np.where(rng.random(200) < flipped, ~bits, bits)
        for name, flipped in zip("dbca", (0.4, 0.2, 0.3, 0.0), strict=True)
    }
    found = answer(bits, store)
    if not isinstance(found, list | tuple):
        raise WrongAnswer(f"The function returned {type(found).__name__}; wanted a list of names.")
    found = list(found)
    if found == list("dcba"):
        raise WrongAnswer("The farthest comes first. Sort so that the most equal bits come first.")
    if found == list("dbca"):
        raise WrongAnswer("This is the order of the store. Sort by the number of equal bits.")
    if found != list("abcd"):
        raise WrongAnswer(f"Not yet: {found}; wanted the names by their number of equal bits, ['a', 'b', 'c', 'd'].")
    return "Right: the nearest first."
