"""A set of models as a forest: who is near whom, which of them share nothing, and which way descent runs.

Each model is linked with others so that all are connected by the nearest pairs (a minimum spanning tree, Kruskal 1956);
links between strangers are cut, and what is left hangs from the model that most of the known directions agree on. Of M
models all pairs of descriptors are looked at, and M - 1 pairs of models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree

from minimoe.fingerprints.compare import WIDTH_OF_THE_ZOO, compare
from minimoe.fingerprints.descriptor import RELATED, WORDS, describe, similarity
from minimoe.fingerprints.verdict import SAME, SHARED
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.fleet.store import Store

Side = Literal["a", "b"]
Related, Ancestor = Callable[[int, int], bool], Callable[[int, int], Side | None]
MOST = 10_000  # models whose pairs are all looked at


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
    return grow(names, _similarities(codes), related, lambda i, j: _ancestor(opened[i], opened[j]))


def tree_of_store(store: Store) -> Forest:
    """The forest of a store, by descriptors alone; directions of those whose files are here.

    The level of relatives was set by strangers of the zoo. For models of another width it moves half the way to 1, as
    in verdict.py: three real models of different makers have up to .28 (docs/fleet.md).

    Raises ValueError: it has more than 10,000 models.
    """
    found = store.models()
    names = list(found)
    if len(names) > MOST:
        raise ValueError(f"{store.folder}: {len(names)} models, wanted at most {MOST} for a tree")
    similarities = _similarities([one.code for one in found.values()])
    fits = [one.hidden_size == WIDTH_OF_THE_ZOO for one in found.values()]

    def ancestor(i: int, j: int) -> Side | None:
        here = all(Path(names[place]).exists() for place in (i, j))
        return _ancestor(*(open_weights(names[place]) for place in (i, j))) if here else None

    def related(i: int, j: int) -> bool:
        return similarities[i, j] >= (RELATED if fits[i] and fits[j] else (1 + RELATED) / 2)

    return grow(names, similarities, related, ancestor)


def grow(names: Sequence[str], similarities: NDArray[np.float64], related: Related, ancestor: Ancestor) -> Forest:
    """A forest of M models.

    Args:
        similarities: of all pairs, [M, M].
        related: whether two models share weights; it is asked of M - 1 pairs.
        ancestor: which of two related ones is the ancestor; None: unknown.
    """
    count = len(names)
    distances = np.triu(np.maximum(1 - similarities, 0) + 1e-6, 1)  # scipy takes a distance of 0 for no link
    links = [
        (int(i), int(j)) for i, j in zip(*minimum_spanning_tree(distances).nonzero(), strict=True) if related(i, j)
    ]
    graph = np.zeros((count, count))
    older: dict[tuple[int, int], bool] = {}  # (one, other): whether one is the ancestor, where that is known
    for i, j in links:
        graph[i, j] = graph[j, i] = 1
        side = ancestor(i, j)
        if side is not None:
            older[i, j], older[j, i] = side == "a", side == "b"
    nodes: list[Node] = []
    trees, tree = connected_components(graph, directed=False) if count else (0, None)
    for number in range(trees):
        members = np.flatnonzero(tree == number)
        orders = [breadth_first_order(graph, root, directed=False) for root in members]
        closeness = similarities[np.ix_(members, members)].sum(1)

        def agreement(place: int, orders: list = orders, closeness: NDArray = closeness) -> tuple[int, float]:
            """How many known directions lead away from a root; of equals, the one most like all others."""
            order, above = orders[place]
            return sum(older.get((int(above[i]), int(i)), False) for i in order[1:]), float(closeness[place])

        order, above = orders[max(range(len(members)), key=agreement)]
        nodes += _depth_first(names, similarities, older, order.tolist(), above)
    return Forest(tuple(nodes))


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


def _ancestor(a: Weights, b: Weights) -> Side | None:
    from minimoe.fingerprints.direction import direction

    return direction(a, b).ancestor
