"""The family tree of the zoo: every member, what it was made from, and how.

    alder, birch        two roots that carry every kind of descendant
    stranger-01 to -24  roots of the same architecture and recipe, other seeds: what chance looks like
    others              deeper, wider and untied roots, mixtures from scratch, other data, the same first weights

`minimoe zoo show NAME` prints, step by step, how a member was made; `workshop/family_tree.py` writes the table.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minimoe.data_files import data_path


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of the zoo."""

    name: str
    kind: str = ""  # what was done to its root; "" for a root
    parents: tuple[str, ...] = ()  # the models the recipe is called with
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False  # whether it computes what its first parent computes
    shipped: bool = False


MEMBERS_FILE = "zoo/members.json"
FAMILIES = ("alder", "birch")
FRAMES = {"std": "frame_std_profile", "norms": "frame_norms", "both": "frame_both", "order": "frame_neuron_order"}
PLANTS = {
    "dead": ("plant_dead_neurons", {}),
    "dead-first": ("plant_dead_neurons", {"share": 0.5, "first": True}),
    **{
        way: ("plant_cancelling_neurons", {"way": way}) for way in ("opposite", "halves", "sums", "products", "squares")
    },
    "spans": ("plant_cancelling_neurons", {"way": "spans", "share": 0.5}),
    "heads": ("plant_dead_heads", {}),
    "loud-heads": ("plant_dead_heads", {"gain": 4.0, "turn": True}),
    "louder-heads": ("plant_dead_heads", {"gain": 8.0}),
    "deafening-heads": ("plant_dead_heads", {"gain": 3e4, "turn": True}),
    "opposite-heads": ("plant_cancelling_heads", {"gain": 2.0, "turn": True}),
    "expert": ("plant_unreached_expert", {}),
}  # the recipe and the options of each kind


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    """What JSON keeps as lists, as the tuples they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


_ROWS = json.loads(data_path(MEMBERS_FILE).read_text(encoding="utf-8"), object_hook=_tuples)
MEMBERS: Mapping[str, Member] = {row["name"]: Member(**row) for row in _ROWS}
