"""A set of models as a forest: who is near whom, which of them share nothing, and which way descent runs.

Each model is linked with others so that all are connected by the nearest pairs (a minimum spanning tree, Kruskal 1956),
and links between strangers are cut. In each family that is left, descendants are often as near to a copy of their
ancestor as to itself, so its tree is made once more, with a preference for models that are near to the whole family,
and for the oldest of those. It hangs from the model that most of the known directions lead away from. Of M models all
pairs of descriptors are looked at, and some 2 M pairs of models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree

from minimoe.fingerprints.compare import WIDTH_OF_THE_ZOO, compare
from minimoe.fingerprints.descriptor import RELATED, WORDS, describe, similarity
from minimoe.fingerprints.verdict import SAME, SHARED
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.fleet.store import Store

Side = Literal["a", "b"]
Related, Ancestor = Callable[[int, int], bool], Callable[[int, int], Side | None]
MOST = 5_000  # models whose pairs are all looked at
# How much being near to the whole family counts beside being near to a child, from which similarity on models are taken
# for copies of one another, and how much being the oldest of these counts. Chosen by hand, on four families of the zoo.
PREFERENCE, NEAR, ELDER = 0.5, 0.9, 0.03


class Node(NamedTuple):
    """A model in a forest."""

    name: str
    parent: str | None  # None: a root
    similarity: float | None  # to the parent, of their descriptors
    known: bool  # whether the direction of this link was told; else it follows from others, or is a guess


@dataclass(frozen=True)
class Forest:
    """Models, every parent before its children."""

    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        """One model a line, indented below its parent; "?" where nothing tells which of the two came first."""
        depth: dict[str | None, int] = {None: -1}
        lines = []
        for node in self.nodes:
            depth[node.name] = depth[node.parent] + 1
            link = "" if node.parent is None else f"{'>' if node.known else '?'} {node.similarity:.2f}  "
            lines.append("    " * depth[node.name] + link + node.name)
        return "\n".join(lines)


def tree_of(models: Sequence[str | Path | Weights], *, names: Sequence[str] | None = None) -> Forest:
    """The forest of models at hand: links are those that `compare` calls related, directions those of `direction`.

    Raises:
        CheckpointError: a file is missing or damaged.
        Refusal: a model has no descriptor (see `describe`).
    """
    opened = [model if isinstance(model, Weights) else open_weights(model) for model in models]
    codes = [describe(weights) for weights in opened]

    def related(i: int, j: int) -> bool:
        return compare(opened[i], opened[j]).verdict in (SAME, SHARED)

    names = names or [weights.name for weights in opened]
    return grow(names, _similarities(codes), related, lambda i, j: direct(opened[i], opened[j]))


def tree_of_store(store: Store) -> Forest:
    """The forest of a store, by descriptors alone; directions of those whose files are here.

    The level of relatives was set by strangers of the zoo. For models of another width it moves half the way to 1, as
    in verdict.py: three real models of different makers have up to .28 (docs/fleet.md).

    Raises ValueError: it has more than 5,000 models.
    """
    found = store.models()
    names = list(found)
    if len(names) > MOST:
        raise ValueError(f"{store.folder}: {len(names)} models, wanted at most {MOST} for a tree")
    similarities = _similarities([one.code for one in found.values()])
    fits = [one.hidden_size == WIDTH_OF_THE_ZOO for one in found.values()]

    def ancestor(i: int, j: int) -> Side | None:
        here = all(Path(names[place]).exists() for place in (i, j))
        return direct(*(open_weights(names[place]) for place in (i, j))) if here else None

    def related(i: int, j: int) -> bool:
        return similarities[i, j] >= (RELATED if fits[i] and fits[j] else (1 + RELATED) / 2)

    return grow(names, similarities, related, ancestor)


def grow(names: Sequence[str], similarities: NDArray[np.float64], related: Related, ancestor: Ancestor) -> Forest:
    """A forest of M models.

    Args:
        similarities: of all pairs, [M, M].
        related: whether two models i < j share weights.
        ancestor: which of two related ones, i < j, is the ancestor; None: unknown.
    """
    related, ancestor = cache(related), cache(ancestor)
    graph = _graph(len(names), [link for link in _nearest_links(similarities) if related(*link)])
    trees, tree = connected_components(graph, directed=False) if len(names) else (0, None)
    nodes: list[Node] = []
    for number in range(trees):
        members = np.flatnonzero(tree == number)

        def older(i: int, j: int, members: NDArray = members) -> Side | None:
            return ancestor(int(members[i]), int(members[j]))

        nodes += _tree([names[member] for member in members], similarities[np.ix_(members, members)], older)
    return Forest(tuple(nodes))


def _tree(names: Sequence[str], similarities: NDArray[np.float64], ancestor: Ancestor) -> list[Node]:
    """The nodes of one family."""
    preferred = similarities.mean(1)
    preferred[_elder(similarities, ancestor)] += ELDER
    links = _nearest_links(similarities + PREFERENCE * np.maximum(preferred[:, None], preferred))
    known: dict[tuple[int, int], bool] = {}  # (one, other): whether one is the ancestor, where that is known
    for i, j in links:
        side = ancestor(i, j)
        if side is not None:
            known[i, j], known[j, i] = side == "a", side == "b"
    graph = _graph(len(names), links)
    orders = [breadth_first_order(graph, root, directed=False) for root in range(len(names))]

    def agreement(root: int) -> tuple[int, float]:
        """How many known directions lead away from a root; of equals, the one most like all others."""
        order, above = orders[root]
        agreeing = sum(known.get((int(above[place]), int(place)), False) for place in order[1:])
        return agreeing, float(similarities[root].sum())

    order, above = orders[max(range(len(names)), key=agreement)]
    return _depth_first(names, similarities, known, order.tolist(), above)


def _elder(similarities: NDArray[np.float64], ancestor: Ancestor) -> int:
    """The model that is near to the whole family, or whichever of those most like it came before."""
    elder = central = int(similarities.mean(1).argmax())
    for other in np.flatnonzero(similarities[central] > NEAR).tolist():
        if other != elder and ancestor(*sorted((elder, other))) == ("a" if other < elder else "b"):
            elder = other
    return elder


def _nearest_links(similarities: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The M - 1 pairs (i, j), i < j, that connect all models."""
    distances = np.triu(similarities.max(initial=0) - similarities + 1e-6, 1)  # scipy takes 0 for no link
    return [(int(i), int(j)) for i, j in zip(*minimum_spanning_tree(distances).nonzero(), strict=True)]


def _graph(count: int, links: Sequence[tuple[int, int]]) -> csr_array:
    ends = np.array(links, dtype=np.int64).reshape(-1, 2)
    ends = np.concatenate([ends, ends[:, ::-1]])
    return csr_array((np.ones(len(ends)), ends.T), shape=(count, count))


def _depth_first(
    names: Sequence[str], similarities: NDArray, older: dict[tuple[int, int], bool], order: list[int], above: NDArray
) -> list[Node]:
    """The nodes of one tree, each with all that hangs from it before the next one."""
    below: dict[int, list[int]] = {}
    for place in order[1:]:
        below.setdefault(int(above[place]), []).append(place)
    nodes, waiting = [], [order[0]]
    while waiting:
        place = waiting.pop()
        if place == order[0]:
            nodes.append(Node(names[place], None, None, known=False))
        else:
            up = int(above[place])
            nodes.append(Node(names[place], names[up], float(similarities[up, place]), older.get((up, place), False)))
        waiting += below.get(place, [])[::-1]
    return nodes


def _similarities(codes: Sequence[NDArray[np.uint64]]) -> NDArray[np.float64]:
    stacked = np.stack(codes) if codes else np.empty((0, WORDS), np.uint64)
    return np.array([similarity(stacked, code) for code in codes]).reshape(len(codes), len(codes))


def direct(a: Weights, b: Weights) -> Side | None:
    """Which of two relatives is the ancestor; None: nothing tells."""
    from minimoe.fingerprints.direction import direction

    return direction(a, b).ancestor
