"""The zoo: models whose history is known, to test fingerprints on.

The tree stands in tree.py. A member that was trained lies in data/zoo, or in the folder that `minimoe zoo
build` fills: a complete Hugging Face folder in float16, with lineage.json beside it. The rounded weights
are the member, and what its descendants start from. What needs no training is made from its parents whenever it is
asked for.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.lineage.derive import Derivation
from minimoe.lineage.recipes import INSTANT
from minimoe.lineage.tree import MEMBERS, Member
from minimoe.model import MoEForCausalLM
from minimoe.training import Settings

HOME = Path("runs/zoo")
LINEAGE = "lineage.json"


class Zoo:
    """The members of the tree, by name; those that are not shipped lie in `home`.

    Raises ValueError: in every method, where there is no such member; in `load`, `make` and `build_one` also where it,
    or an ancestor, takes training and was not built.
    """

    def __init__(self, home: str | Path = HOME) -> None:
        self.home = Path(home)

    def folder(self, name: str) -> Path | None:
        """Where a member lies, shipped or built; None if it does not."""
        _find(name)
        places = (data_path("zoo") / name, self.home / name)
        return next((place for place in places if (place / "config.json").exists()), None)

    def has(self, name: str) -> bool:
        """Whether `load` can give it without training."""
        member = _find(name)
        return self.folder(name) is not None or (member.recipe in INSTANT and all(map(self.has, member.parents)))

    def load(self, name: str) -> MoEForCausalLM:
        """A member in float32, in evaluation mode."""
        folder = self.folder(name)
        if folder is not None:
            return MoEForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return self.make(name)

    def make(self, name: str) -> MoEForCausalLM:
        """A member in float32, made anew from its parents, without training."""
        member = _find(name)
        if member.recipe not in INSTANT:
            command = f"minimoe zoo build {name}" + (f" --home {self.home}" if self.home != HOME else "")
            raise ValueError(f"{name}: not shipped, and not built in {self.home}; run `{command}` in a clone")
        return INSTANT[member.recipe](*map(self.load, member.parents), **member.options)

    def build_one(self, name: str) -> None:
        """Make one member whose parents are there, and leave it as a folder in `home`."""
        self._write(name, self.make(name))

    def _write(self, name: str, model: MoEForCausalLM, **facts: Any) -> None:
        facts = {"name": name, **asdict(derivation(name)), "options": dict(MEMBERS[name].options), **facts}
        write_atomically(self.home / name / LINEAGE, (json.dumps(facts, indent=2) + "\n").encode())
        model.save_pretrained(self.home / name)  # config.json last: with it, the folder is whole


def derivation(name: str) -> Derivation:
    """Where a member comes from. Raises ValueError: there is no such member."""
    member = _find(name)
    options = ", ".join(f"{key}={value!r}" for key, value in member.options.items())
    return Derivation(
        parents=member.parents,
        recipe=f"{member.recipe}({options})",
        seed=member.options.get("seed", 0),
        tokens=member.options.get("steps", 0) * Settings.batch_size * Settings.seq_len,
        function_unchanged=member.exact,
    )


def ancestors(name: str) -> list[str]:
    """All members that a member was made from, whatever was taken from them, the oldest first."""
    found: dict[str, None] = {}
    for parent in _find(name).parents:
        found |= dict.fromkeys([*ancestors(parent), parent])
    return list(found)


def origins(name: str) -> frozenset[str]:
    """The members trained from random weights from which a member inherited weights.

    A student has none of its teacher, a framed model none of the one it imitates; parts that were planted, and do
    nothing, do not count.
    """
    member = _find(name)
    if member.recipe in ("from_scratch", "distil"):
        return frozenset([name])
    givers = member.parents[:1] if member.recipe.startswith(("frame", "plant")) else member.parents
    return frozenset().union(*map(origins, givers))


def relation(a: str, b: str) -> str:
    """What is true of two members: "shared lineage", "same first weights", "teacher and student" or "strangers".

    "same first weights" are twins: trained apart, on other text, from the same random weights. "teacher and student":
    one learnt from what the other, or a relative of it, predicts, and no weight was passed on.
    """
    if origins(a) & origins(b):
        return "shared lineage"
    if _beginnings(a) & _beginnings(b):
        return "same first weights"
    if _teachers(a) & origins(b) or _teachers(b) & origins(a):
        return "teacher and student"
    return "strangers"


def _beginnings(name: str) -> set[tuple[Any, ...]]:
    options = [MEMBERS[origin].options for origin in origins(name)]
    return {(o["weights"], o.get("shape"), o.get("initialisation")) for o in options}


def _teachers(name: str) -> set[str]:
    """The origins of the models that a member's origins were taught by."""
    students = [MEMBERS[origin] for origin in origins(name) if MEMBERS[origin].recipe == "distil"]
    return set().union(*(origins(parent) for student in students for parent in student.parents))


def _find(name: str) -> Member:
    if name not in MEMBERS:
        raise ValueError(f"{name!r}: not in the zoo; `minimoe zoo list` names its members")
    return MEMBERS[name]
