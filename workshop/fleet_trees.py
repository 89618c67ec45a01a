"""How often a forest of the zoo's members is right, and whether the case of the course comes out.

    python -m workshop.fleet_trees [--out data/zoo/benchmark] [--sketches runs/fleet_scale] [--home runs/zoo]

tree.csv, a row for each set of models: families of the evaluation half, one by one and all together, linked where
their descriptors say so; and the six models of data/cases, linked where `compare` says so. A link is right if it joins
a model and a parent, where models of one function count as one. Links within one function have no direction, and
are left out of the columns on directions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.fingerprints.descriptor import RELATED, similarity
from minimoe.fingerprints.weights import open_weights
from minimoe.fleet.forest import Forest, Side, direct, grow, tree_of
from minimoe.lineage.tree import FAMILIES, MEMBERS
from minimoe.lineage.zoo import HOME, Zoo
from minimoe.progress import progress_bar
from minimoe.training.tokenizer import load_tokenizer
from workshop.benchmark import to_csv
from workshop.family_tree import EVALUATION
from workshop.fleet_scale import code_of, sketches

CASE = {"a": "d", "b": None, "c": "f", "d": "f", "e": None, "f": None}  # docs/instructor.md

Parents = Mapping[str, set[str]]  # of every model of a set, those in the set


def of_one_function(name: str) -> str:
    """The oldest member that computes what a member computes."""
    while MEMBERS[name].exact:
        name = MEMBERS[name].parents[0]
    return name


def true_parents(names: Sequence[str]) -> Parents:
    """By function: whom each member inherited weights from. A student and a framed stranger have nothing of those that
    they imitate, and an ancestor that is not in the set is replaced by its own parents."""
    inside = {of_one_function(name) for name in names}

    def parents(name: str) -> set[str]:
        member, found = MEMBERS[name], set()
        if member.recipe in ("from_scratch", "distil"):
            return found
        for parent in member.parents[:1] if member.recipe.startswith("frame") else member.parents:
            function = of_one_function(parent)
            found |= {function} if function in inside else parents(function)
        return found

    return {name: parents(name) for name in inside}


def score(forest: Forest, parents: Parents, function: Mapping[str, str]) -> dict[str, Any]:
    """How many links a forest has and ought to have, how many are right, and of these how many directions."""
    links = [(function[node.parent], function[node.name], node.known) for node in forest.nodes if node.parent]
    steps = [link for link in links if link[0] != link[1]]
    right = [link for link in steps if link[0] in parents[link[1]] or link[1] in parents[link[0]]]
    down = [link for link in right if link[0] in parents[link[1]]]
    known = [link for link in right if link[2]]
    trees = sum(node.parent is None for node in forest.nodes)
    roots = {name for name in parents if not parents[name]}
    return {
        "models": len(forest.nodes),
        "functions": len(parents),
        "trees": trees,
        "true_trees": len(_components(parents)),
        "roots_right": sum(function[node.name] in roots for node in forest.nodes if node.parent is None),
        "links": len(steps),
        "links_right": len(right) / len(steps) if steps else None,
        "directions_right": len(down) / len(right) if right else None,
        "known": len(known) / len(right) if right else None,
        "known_right": sum(link in down for link in known) / len(known) if known else None,
    }


def _components(parents: Parents) -> list[set[str]]:
    """The models that hang together."""
    groups: list[set[str]] = []
    for name, above in parents.items():
        joined = [group for group in groups if group & {name, *above}]
        groups = [group for group in groups if group not in joined] + [{name, *above}.union(*joined)]
    return groups


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=data_path("zoo/benchmark"), help="a folder for the table")
    parser.add_argument("--sketches", type=Path, default=Path("runs/fleet_scale"), help="where fleet_scale keeps them")
    parser.add_argument("--home", type=Path, default=HOME, help="a folder with the members that are not shipped")
    arguments = parser.parse_args()
    zoo, tokenizer = Zoo(arguments.home), load_tokenizer()
    codes = {name: code_of(found) for name, found in sketches(zoo, arguments.sketches, 1).items()}
    told: dict[tuple[str, str], Side | None] = {}

    def forest_of(names: Sequence[str]) -> Forest:
        table = np.stack([codes[name] for name in names])
        similarities = np.array([similarity(table, code) for code in table])

        def ancestor(i: int, j: int) -> Side | None:
            pair = names[i], names[j]
            if pair not in told:
                told[pair] = direct(*(open_weights(zoo.load(name), tokenizer=tokenizer) for name in pair))
            return told[pair]

        return grow(names, similarities, lambda i, j: similarities[i, j] >= RELATED, ancestor)

    families = {root: [name for name in codes if name == root or name.startswith(f"{root}-")] for root in EVALUATION}
    sets = {root: families[root] for root in FAMILIES}
    sets["strangers 13 to 24, a family each"] = [
        n for root in EVALUATION if root not in FAMILIES for n in families[root]
    ]
    sets["all of these"] = [name for names in families.values() for name in names]
    rows = []
    for what, names in progress_bar(sets.items(), desc="trees"):
        function = {name: of_one_function(name) for name in names}
        rows.append({"set": what, "linked_by": "descriptors", **score(forest_of(names), true_parents(names), function)})
    case = tree_of([data_path("cases") / name for name in CASE], names=list(CASE))
    truth = {name: {parent} if parent else set() for name, parent in CASE.items()}
    rows.append({"set": "the case", "linked_by": "compare", **score(case, truth, {name: name for name in CASE})})
    print(case)
    write_atomically(arguments.out / "tree.csv", to_csv(rows).encode())


if __name__ == "__main__":
    main()
