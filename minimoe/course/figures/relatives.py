"""Who comes from whom in the zoo, and how far a model moved from another: the figures of notebook 07.

Two rulers. In weights: a layer reads from the residual stream with the rows of q, k, v, gate and up, and writes to it
with the columns of o and down; each such vector of a model is held against the most similar one of the other, in
degrees. In behaviour: the probability of the next token that lies elsewhere, from 0 to 1.

Shapes: H hidden size, V vocabulary, S sequence.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from minimoe.course.figures.register import Drawing, figure
from minimoe.course.held_out import stretches
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES, describe, new_figure
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import Zoo, ancestors, relation
from minimoe.model import MoEForCausalLM
from minimoe.training import Corpus

READ, WRITTEN = ("q", "k", "v", "gate", "up"), ("o", "down")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_FILL = LinearSegmentedColormap.from_list("white to main", ["white", MAIN])


# --- the two rulers ---------------------------------------------------------------------------------------


def vectors(weights: Weights, role: str, layer: int) -> Tensor:
    """The vectors of the residual stream in one of `ROLES`, of all experts, of length 1: [number, H] float64."""
    matrix = weights.get(role, layer).double()
    rows = (matrix if role in READ else matrix.mT).flatten(0, -2)
    return torch.nn.functional.normalize(rows, dim=-1)


def angles(child: Weights, parent: Weights, role: str, layer: int) -> Tensor:
    """How many degrees each vector of the child is from the most similar one in any layer of the parent: [number].

    Two vectors without connection are some 90 degrees apart; the most similar of hundreds is nearer than that, by
    chance alone.
    """
    known = torch.cat([vectors(parent, role, each) for each in range(parent.num_layers)])
    return (vectors(child, role, layer) @ known.mT).amax(-1).clamp(-1, 1).arccos().rad2deg()


@torch.no_grad()
def predictions(model: MoEForCausalLM, ids: Tensor) -> Tensor:
    """The probabilities of the next token after each token of [B, S]: [B, S, V]."""
    return model(ids).logits.softmax(-1)


def moved_probability(ours: Tensor, theirs: Tensor) -> float:
    """The share of the next token's probability that would have to be moved to make one prediction the other.

    That is the total variation distance, half the sum of the differences, averaged over all positions: 0 for the
    same function, 1 if no token is possible to both.

    Args:
        ours: predictions [B, S, V] of one model.
        theirs: those of another, for the same text.
    """
    return float((ours - theirs).abs().sum(-1).double().mean()) / 2


@cache
def home_text() -> Tensor:
    """Held-out text of the kind that the roots of the zoo were trained on, code and prose alike: [16, S]."""
    corpus = Corpus.real(domains=("code", "prose"))
    return torch.cat([stretches(corpus, domain, 8) for domain in corpus.domains])


# --- the family tree --------------------------------------------------------------------------------------

_RECIPES = {
    "trained further": ("keep_training", "train_lora"),
    "merged": ("lerp", "slerp", "merge_by_ties"),
    "reshaped": ("quantise", "prune_neurons", "prune_heads", "prune_layers", "depth_upscale", "extend_vocabulary"),
    "upcycled": ("upcycle",),
    "mixed of several": ("mix_branches", "transplant_expert"),
    "rewritten": ("one_gauge", "all_gauges"),
}
_DONE = {recipe: done for done, recipes in _RECIPES.items() for recipe in recipes}
_STYLE = {"shared lineage": "-", "teacher and student": (0, (4, 2)), "same first weights": (0, (1, 1.5))}
_PASSED_ON = dict(zip(_STYLE, ("weights", "predictions only", "first weights only"), strict=True))
_LEFT, _WIDE = (0.08, 2.3, 4.65), (1.75, 1.85, 2.07)  # of the boxes of each generation, in inches
_GAPS = (0.3, 0.14, 0.25)  # between them
_LINE, _PAD, _TOP = 0.172, 0.05, 0.42
Box = tuple[float, float, float, float]  # left, bottom, width, height


@figure
def family_tree(root: str = "alder") -> Drawing:
    """All members that are called after a root, in boxes by what was done, with arrows for what was passed on.

    An arrow into a box comes from its members' parents, and from the root only where they have no other. Members that
    come from a rewrite are only counted, and so are strangers.

    Data: name, group, relation (to the root), parents, and x and y of the name, in inches from the lower left corner.

    Raises:
        ValueError: the zoo has no family of that name.
    """
    family = _family(root)
    strangers = sum(relation(root, name) == "strangers" for name in MEMBERS)
    lines = {group: [_short(name, root) for name in names] for group, names in family.items()}
    lines |= {"rewritten": [f"{len(family['rewritten'])} members"], "strangers": [f"{strangers} members"]}
    places, height = _place(lines, {group: _generation(group, names) for group, names in family.items()})
    drawn = new_figure(height)
    drawn.set_layout_engine("none")  # every place is known
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawn.get_figwidth()), ylim=(0, height))
    axes.axis("off")
    axes.text(_LEFT[0], height - 0.22, f"The family of {root}", size=12, weight="bold", va="center")
    arrows = _arrows(family, root)
    for source, target in arrows:
        _arrow(axes, places[source], places[target], _STYLE[relation(root, family[target][0])])
    data: dict[str, list] = {name: [] for name in ("name", "group", "relation", "parents", "x", "y")}
    for group, (x, y, *size) in places.items():
        axes.add_patch(_outline(x, y, *size, PALE if group == root else "white"))
        for number, line in enumerate([group, *lines[group]]):
            at = x + _PAD, y + size[1] - _PAD - _LINE * (number + 0.5)
            axes.text(*at, line, size=10, va="center", weight="normal" if number else "bold")
            if number and group in family and group != "rewritten":
                name = family[group][number - 1]
                row = name, group, relation(root, name), " ".join(MEMBERS[name].parents), *at
                for column, cell in zip(data.values(), row, strict=True):
                    column.append(cell)
    _legend(axes, y=min(y for x, y, *_ in places.values() if x == _LEFT[0]))
    counts = ", ".join(f"{len(names)} {group}" for group, names in family.items() if group != root)
    described = "; ".join(
        f"{source} to {target} ({_PASSED_ON[relation(root, family[target][0])]})" for source, target in arrows
    )
    describe(
        drawn,
        f"The family of {root} as boxes of names: {counts}; {strangers} strangers besides. Arrows: {described}.",
    )
    return drawn, data


def _family(root: str) -> dict[str, list[str]]:
    """The members that are called after a root, by group; the first group is the root alone."""
    if root not in MEMBERS or MEMBERS[root].parents:
        raise ValueError(f"root={root!r}: wanted a member without parents, such as 'alder'")
    family: dict[str, list[str]] = {}
    for name in MEMBERS:
        if name == root or name.startswith(f"{root}-"):
            family.setdefault(_group(name, root), []).append(name)
    return family


def _group(name: str, root: str) -> str:
    """What was done to make a member; of one that has no weight of the root, how it is related to it."""
    if name == root:
        return root
    done = [_DONE.get(MEMBERS[each].recipe) for each in (name, *ancestors(name))]
    if "rewritten" in done:
        return "rewritten"
    if relation(root, name) != "shared lineage":
        return relation(root, name)
    of_mixture = {"upcycled", "mixed of several"} & set(done[1:])
    return "mixtures, trained" if done[0] == "trained further" and of_mixture else done[0]


def _generation(group: str, names: list[str]) -> int:
    """The column of a group: 0 for roots, and for what is only counted."""
    return 0 if group == "rewritten" else min(2, max(map(_depth, names)))


def _depth(name: str) -> int:
    return 1 + max(map(_depth, MEMBERS[name].parents), default=-1)


def _short(name: str, root: str) -> str:
    """Without the root's name, and with whichever parents the arrows do not show."""
    if name == root:
        return "from random weights"
    others = [parent for parent in MEMBERS[name].parents if not parent.startswith(root)]
    return " + ".join([name.removeprefix(f"{root}-"), *others])


def _place(lines: dict[str, list[str]], generations: dict[str, int]) -> tuple[dict[str, Box], float]:
    """Where each box goes, generation by generation from the left, and how high the figure is."""
    tops = [_TOP] * len(_LEFT)
    boxes = {}
    for group, entries in lines.items():
        column = generations.get(group, 0)
        height = _LINE * (len(entries) + 1) + 2 * _PAD
        boxes[group] = (_LEFT[column], tops[column], _WIDE[column], height)
        tops[column] += height + _GAPS[column]
    total = max(tops)
    return {group: (x, total - top - height, width, height) for group, (x, top, width, height) in boxes.items()}, total


def _arrows(family: dict[str, list[str]], root: str) -> list[tuple[str, str]]:
    """From group to group; those that are only counted have none."""
    group_of = {name: group for group, names in family.items() for name in names}
    found = []
    for target, names in family.items():
        parents = {group_of.get(parent) for name in names for parent in MEMBERS[name].parents} - {None, target}
        if target == "same first weights" or parents == {root}:
            sources = {root}
        else:
            sources = parents - {root}
        found += [(source, target) for source in family if source in sources and target not in (root, "rewritten")]
    return found


def _outline(x: float, y: float, width: float, height: float, fill: str) -> FancyBboxPatch:
    return FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.07", facecolor=fill, edgecolor=INK, linewidth=0.8
    )


def _arrow(axes: Axes, source: Box, target: Box, style: str | tuple) -> None:
    """To the side of the next column, or up and down within one."""
    (x, y, width, height), (to_x, to_y, to_width, to_height) = source, target
    if x < to_x:
        ends = (x + width, y + height / 2), (to_x, to_y + to_height / 2)
    elif y > to_y:
        ends = (x + width / 2, y), (to_x + to_width / 2, to_y + to_height)
    else:
        ends = (x + width / 2, y + height), (to_x + to_width / 2, to_y)
    bend = "arc,angleA=0,armA=0,angleB=180,armB=14,rad=5" if x < to_x else "arc3"
    look = {"arrowstyle": "-|>", "color": INK, "linestyle": style, "shrinkA": 0, "shrinkB": 0, "connectionstyle": bend}
    axes.annotate("", xytext=ends[0], xy=ends[1], arrowprops=look, zorder=0.5)


def _legend(axes: Axes, y: float) -> None:
    for number, (passed_on, style) in enumerate(zip(_PASSED_ON.values(), _STYLE.values(), strict=True)):
        height = y - 0.35 - 0.22 * number
        axes.plot([_LEFT[0], _LEFT[0] + 0.4], [height, height], color=INK, linestyle=style, linewidth=1.2)
        axes.text(_LEFT[0] + 0.48, height, passed_on, size=10, va="center", color=QUIET)


# --- what is left of the parent ---------------------------------------------------------------------------

DESCENDANTS = (
    "finetuned",
    "lora",
    "continued-1",
    "continued-4",
    "lerp",
    "int4",
    "fewer-neurons",
    "fewer-layers",
    "deepened",
    "copy",
    "copy-trained",
    "sliced",
    "drop-0.5",
    "drop-0.5-trained",
    "btx",
    "transplant",
    "distilled",
    "twin",
    "gauged",
)


@figure
def turned_vectors(descendant: str = "finetuned") -> Drawing:
    """How far the vectors of a member of alder's family are from the most similar ones of alder, by role and layer.

    Data: layer, role, degrees (the mean), same (the share of vectors less than one degree away).

    Raises:
        ValueError: there is no such member.
    """
    name = f"alder-{descendant}"
    found = _angles_of(name)
    layers = len(found) // len(ROLES)
    mean, same = (
        np.array([measure(values) for values in found.values()]).reshape(layers, len(ROLES))
        for measure in (np.mean, lambda values: (values < 1).mean())
    )
    drawn = new_figure(0.42 * layers + 1.9)
    left, right = drawn.subplots(1, 2, width_ratios=[1.7, 1])
    left.imshow(mean, cmap=_FILL, vmin=0, vmax=90, aspect="auto")
    for (layer, role), degrees in np.ndenumerate(mean):
        left.text(role, layer, f"{degrees:.0f}", ha="center", va="center", size=10)
    left.set(xticks=range(len(ROLES)), xticklabels=ROLES, yticks=range(layers), ylabel="layer")
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set_title("degrees, mean", weight="normal")
    for part, roles, style in zip(("attention", "MLP"), (ROLES[:4], ROLES[4:]), SERIES, strict=False):
        values = np.concatenate([values for (_, role), values in found.items() if role in roles])
        counts, edges = np.histogram(values, bins=np.arange(0, 95, 5))
        right.stairs(counts / len(values), edges, label=part, color=style["color"], linestyle=style["linestyle"], lw=2)
    right.set(xlim=(0, 90), ylim=(0, 1.02), xticks=(0, 30, 60, 90), xlabel="degrees", ylabel="share of the vectors")
    right.set_title("each vector", weight="normal")
    right.legend(frameon=False, fontsize=10)
    drawn.suptitle(f"{name}: how far from alder", x=0.01, ha="left", size=12, weight="bold")
    row, column = np.unravel_index(mean.argmax(), mean.shape)
    describe(
        drawn,
        f"Left a table of {layers} layers by seven roles, with the mean angle between a vector of {name} and the most "
        f"similar one of alder: {mean.min():.0f} to {mean.max():.0f} degrees, most in {ROLES[column]} of layer {row}. "
        f"Right the distribution of the angles, for attention and MLP; {np.concatenate([*found.values()]).mean():.0f} "
        f"degrees in the mean of all, {np.mean(np.concatenate([*found.values()]) < 1):.0%} of the vectors unchanged.",
    )
    return drawn, {
        "layer": [layer for layer, _ in found],
        "role": [role for _, role in found],
        "degrees": mean.flatten().tolist(),
        "same": same.flatten().tolist(),
    }


_member = cache(Zoo().load)


@cache
def _angles_of(name: str) -> dict[tuple[int, str], np.ndarray]:
    """The angles to alder, by layer and role."""
    return angles_by_role(_member(name), _member("alder"))


def angles_by_role(child: MoEForCausalLM, parent: MoEForCausalLM) -> dict[tuple[int, str], np.ndarray]:
    """`angles` of every layer and role of the child."""
    of_child, of_parent = open_weights(child), open_weights(parent)
    return {
        (layer, role): angles(of_child, of_parent, role, layer).numpy()
        for layer in range(of_child.num_layers)
        for role in ROLES
    }


# --- weights against behaviour ----------------------------------------------------------------------------

_COMPARED = {
    "trained further": ("finetuned", "lora", "continued-0.1", "continued-1", "continued-4"),
    "merged": ("lerp", "slerp", "ties"),
    "reshaped": ("int8", "int4", "fewer-neurons", "fewer-heads", "fewer-layers", "deepened"),
    "mixture": ("copy", "noisy", "sliced", "virtual-groups", "drop-0.25", "drop-0.5", "drop-0.9", "btx", "transplant"),
    "mixture, trained": ("copy-trained", "sliced-trained", "drop-0.5-trained", "btx-trained"),
}
_APART = ("alder-gauged", "alder-distilled", "alder-twin", "birch", "stranger-01", "stranger-13")
_NAMED = {  # what is written to the right of a point, or to the left of it
    "right": {
        "alder-finetuned": "finetuned",
        "alder-lora": "lora",
        "alder-copy": "copy",
        "alder-continued-4": "continued-4",
        "alder-fewer-heads": "fewer-heads",
        "alder-drop-0.9": "drop-0.9",
    },
    "left": {
        "alder-gauged": "gauged",
        "alder-distilled": "distilled",
        "alder-twin": "twin",
        "birch": "three strangers",
    },
}


@figure
def weights_and_behaviour() -> Drawing:
    """How far members are from alder in their weights and in what they predict, for text of the kind alder learnt from.

    Data: name, group, degrees (mean angle of a vector to the most similar one of alder), moved (`moved_probability`).
    """
    rows = [(f"alder-{kind}", group) for group, kinds in _COMPARED.items() for kind in kinds]
    rows += [(name, relation("alder", name)) for name in _APART]
    names, groups = map(list, zip(*rows, strict=True))
    degrees, moved = map(list, zip(*map(_distances, names), strict=True))
    drawn = new_figure(4.4)
    axes = drawn.subplots()
    for group, style in zip(_COMPARED, SERIES, strict=True):
        places = [place for place, each in enumerate(groups) if each == group]
        x, y = ([values[place] for place in places] for values in (degrees, moved))
        axes.plot(x, y, linestyle="", marker=style["marker"], color=style["color"], label=group)
    apart = [place for place, name in enumerate(names) if name in _APART]
    x, y = ([values[place] for place in apart] for values in (degrees, moved))
    axes.plot(x, y, linestyle="", marker="X", markersize=8, color=INK, label="no similar vector")
    found = dict(zip(names, zip(degrees, moved, strict=True), strict=True))
    for side, labels in _NAMED.items():
        for name, label in labels.items():
            offset, align = ((8, 0), "left") if side == "right" else ((-9, 0), "right")
            axes.annotate(label, found[name], offset, textcoords="offset points", ha=align, va="center", size=10)
    axes.set(xlim=(-2, 90), ylim=(-0.03, 1), xlabel="weights: degrees from the most similar vector, mean")
    axes.set_ylabel("behaviour: probability moved")
    axes.legend(frameon=False, fontsize=10, loc="upper left", ncols=2, handletextpad=0.2)
    drawn.suptitle("Distance from alder, twice", x=0.01, ha="left", size=12, weight="bold")
    named = _NAMED["right"] | _NAMED["left"]
    described = "; ".join(f"{name} {found[name][0]:.0f} and {found[name][1]:.2f}" for name in named)
    describe(
        drawn,
        f"A scatter plot of {len(names)} models: degrees from alder's weights, and share of the probability moved. "
        f"{described}.",
    )
    return drawn, {"name": names, "group": groups, "degrees": degrees, "moved": moved}


@cache
def _distances(name: str) -> tuple[float, float]:
    """Of a member from alder: the mean angle of all vectors, and the probability moved on the home text."""
    of_vectors = np.concatenate([*_angles_of(name).values()])
    ours, theirs = predictions(_member(name), home_text()), _predictions_of_alder()
    return float(of_vectors.mean()), moved_probability(ours, theirs)


@cache
def _predictions_of_alder() -> Tensor:
    return predictions(_member("alder"), home_text())
