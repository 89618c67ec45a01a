"""Who comes from whom in the zoo, and how far a model moved from another: the figures of notebook 07.

Shapes: B batch, S sequence.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.transforms import Bbox
from torch import Tensor

from minimoe.course.figures.drawing import heatmap, new_panels, note
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.held_out import stretches
from minimoe.course.shipped import zoo_model
from minimoe.course.style import INK, PALE, QUIET, SERIES, WIDTH, new_figure
from minimoe.fingerprints.behaviour import moved_probability, predictions
from minimoe.fingerprints.layer_cosines import ATTENTION, MLP, ROLES, angles
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import ancestors, relation
from minimoe.model import MoEForCausalLM
from minimoe.model.config import require
from minimoe.training import Corpus

DESCENDANTS = (
    *("finetuned", "lora", "continued-1", "continued-4", "lerp", "int4", "fewer-neurons", "fewer-layers", "deepened"),
    *("copy", "copy-trained", "sliced", "drop-0.5", "drop-0.5-trained", "btx", "transplant"),
    *("distilled", "twin", "gauged"),
)
_RECIPES = {
    "trained further": ("keep_training", "train_lora", "fresh_embeddings"),
    "merged": ("lerp", "slerp", "merge_by_ties"),
    "reshaped": ("quantise", "prune_neurons", "prune_heads", "prune_layers", "depth_upscale", "extend_vocabulary"),
    "upcycled": ("upcycle",),
    "mixed of several": ("mix_branches", "transplant_expert", "graft_mlps"),
    "rewritten": ("one_gauge", "all_gauges"),
}
_DONE = {recipe: done for done, recipes in _RECIPES.items() for recipe in recipes}
_COMPARED = {
    "trained further": ("finetuned", "lora", "continued-0.1", "continued-1", "continued-4"),
    "merged": ("lerp", "slerp", "ties"),
    "reshaped": ("int8", "int4", "fewer-neurons", "fewer-heads", "fewer-layers", "deepened"),
    "mixture": ("copy", "noisy", "sliced", "virtual-groups", "drop-0.25", "drop-0.5", "drop-0.9", "btx", "transplant"),
    "mixture, trained": ("copy-trained", "sliced-trained", "drop-0.5-trained", "btx-trained"),
}
_APART = ("alder-gauged", "alder-distilled", "alder-twin", "birch", "stranger-01", "stranger-13")
_LABELLED = ("finetuned", "lora", "copy", "continued-4", "fewer-heads", "drop-0.9", "gauged", "distilled", "twin")
_LABELS = {f"alder-{kind}": kind for kind in _LABELLED} | {"birch": "three strangers"}
_ARROWS = {  # relation: what was passed on, and its line
    "shared lineage": ("weights", "-"),
    "teacher and student": ("predictions only", (0, (4, 2))),
    "same first weights": ("first weights only", (0, (1, 1.5))),
}
_COUNTED = ("rewritten", "strangers")  # boxes with a number instead of names
_COLUMNS = ((0.08, 1.75, 0.3), (2.3, 1.85, 0.14), (4.65, 2.07, 0.25))  # left edge, width, gap between boxes: inches
_LINE, _PAD, _TOP = 0.172, 0.05, 0.42


class Relative(NamedTuple):
    """A model in a family tree: what is written for it in which box, its relation to the root, and its parents."""

    name: str
    label: str
    group: str
    relation: str
    parents: tuple[str, ...]


def family_of(root: str = "alder") -> list[Relative]:
    """A root of the zoo, the members that are called after it, and the strangers to it. Raises ValueError where the
    zoo has no family of that name."""
    is_root = root in MEMBERS and not MEMBERS[root].parents
    require(is_root, "root", root, "a member without parents, such as 'alder'")
    family = [Relative(root, "from random weights", root, "shared lineage", ())]
    for name in MEMBERS:
        parents, true = MEMBERS[name].parents, relation(root, name)
        if name.startswith(f"{root}-"):
            others = [parent for parent in parents if not parent.startswith(root)]
            label = " + ".join([name.removeprefix(f"{root}-"), *others])
            family.append(Relative(name, label, _group(name, true), true, parents))
        elif true == "strangers":
            family.append(Relative(name, name, true, true, parents))
    return family


def _group(name: str, true: str) -> str:
    """What was done to make a member; of one that has no weight of the root, how it is related to it."""
    done, *before = (_DONE.get(MEMBERS[each].recipe) for each in (name, *ancestors(name)))
    if "rewritten" in (done, *before):
        return "rewritten"
    if true != "shared lineage":
        return true
    return "mixtures, trained" if done == "trained further" and {"upcycled", "mixed of several"} & set(before) else done


@figure(family=family_of)
def family_tree(family: Sequence[Relative], groups: Collection[str] | None = None) -> Drawing:
    """A family in boxes by what was done, with arrows for what was passed on; of `groups` alone, if any are named.

    The root is the first, and its group its own name. An arrow into a box comes from its members' parents, and from
    the root only where they have no other. Rewritten members and strangers are only counted.
    Data: name, group, relation (to the root), parents, and x and y of the name, in inches from the lower left corner.
    """
    root = family[0].name
    family = [one for one in family if groups is None or one.group in (root, *groups)]
    groups = {}
    for one in sorted(family, key=lambda one: one.group == "strangers"):  # these last
        groups.setdefault(one.group, []).append(one)
    drawn = new_figure(1)  # as high as its boxes need
    drawn.set_layout_engine("none")
    axes = drawn.add_axes((0, 0, 1, 1), xlim=(0, WIDTH))
    axes.axis("off")
    axes.text(_COLUMNS[0][0], 0.22, f"The family of {root}", size=12, weight="bold", va="center")
    boxes, places, height = _draw_boxes(axes, groups)
    drawn.set_figheight(height)
    axes.set_ylim(height, 0)
    passed_on = []
    for source, target in arrows(groups):
        what, line = _ARROWS[groups[target][0].relation]
        passed_on.append(f"{source} to {target} ({what})")
        start, end, bend = _way(boxes[source], boxes[target])
        look = {"arrowstyle": "-|>", "color": INK, "linestyle": line, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xytext=start, xy=end, arrowprops=look | {"connectionstyle": bend}, zorder=0.5)
    below = max(box.y1 for box in boxes.values() if box.x0 == _COLUMNS[0][0])
    for number, (what, line) in enumerate(_ARROWS.values(), 1):
        y = below + 0.13 + 0.22 * number
        axes.plot([0.08, 0.48], [y, y], color=INK, linestyle=line, linewidth=1.2)
        axes.text(0.56, y, what, size=10, va="center", color=QUIET)
    counts = [f"{len(members)} {group}" for group, members in groups.items() if group not in (root, "strangers")]
    alt = f"""The family of {root} as boxes of names: {", ".join(counts)}; {len(groups.get("strangers", ()))} strangers
        besides. Arrows: {"; ".join(passed_on)}."""
    rows = [(one.name, one.group, one.relation, " ".join(one.parents), x, height - y) for one, x, y in places]
    return drawn, columns(("name", "group", "relation", "parents", "x", "y"), rows), alt


def _draw_boxes(
    axes: Axes, groups: Mapping[str, Sequence[Relative]]
) -> tuple[dict[str, Bbox], list[tuple[Relative, float, float]], float]:
    """A box a group, generation by generation from the left, the first in colour. In inches from the top: the boxes,
    where each member stands that is named, and how high all are."""
    made = {one.name for members in groups.values() for one in members if one.parents}
    boxes, tops, places = {}, [_TOP] * len(_COLUMNS), []
    for group, members in groups.items():
        parents = {parent for one in members for parent in one.parents}
        generation = 0 if group in _COUNTED or not parents else 2 if parents & made else 1
        left, width, gap = _COLUMNS[generation]
        labels = [f"{len(members)} members"] if group in _COUNTED else [one.label for one in members]
        fill = "white" if boxes else PALE
        box = boxes[group] = Bbox.from_bounds(left, tops[generation], width, _LINE * (len(labels) + 1) + 2 * _PAD)
        tops[generation] += box.height + gap
        axes.add_patch(FancyBboxPatch(box.p0, *box.size, "round,pad=0,rounding_size=0.07", fc=fill, ec=INK, lw=0.8))
        heights = [box.y0 + _PAD + _LINE * (number + 0.5) for number in range(len(labels) + 1)]
        for y, line in zip(heights, [group, *labels], strict=True):
            axes.text(left + _PAD, y, line, size=10, va="center", weight="bold" if y == heights[0] else "normal")
        if group not in _COUNTED:
            places += [(one, left + _PAD, y) for one, y in zip(members, heights[1:], strict=True)]
    return boxes, places, max(tops)


def _way(source: Bbox, target: Bbox) -> tuple[tuple[float, float], tuple[float, float], str]:
    """Where an arrow begins and ends, and its bend: to the side of a box in the next column, up or down within one."""
    (x, y), (to_x, to_y) = ((box.min + box.max) / 2 for box in (source, target))
    if source.x0 < target.x0:
        return (source.x1, y), (target.x0, to_y), "arc,angleA=0,armA=0,angleB=180,armB=14,rad=5"
    if y < to_y:
        return (x, source.y1), (to_x, target.y0), "arc3"
    return (x, source.y0), (to_x, target.y1), "arc3"


def arrows(groups: Mapping[str, Sequence[Relative]]) -> list[tuple[str, str]]:
    """From group to group, the first being the root's; groups that are only counted have none."""
    root, *targets = groups
    group_of = {one.name: group for group, members in groups.items() for one in members if group != "strangers"}
    found = []
    for target in targets:
        parents = {group_of.get(parent) for one in groups[target] for parent in one.parents} - {None, target}
        sources = {root} if groups[target][0].relation == "same first weights" else parents - {root} or parents
        found += [(source, target) for source in groups if source in sources and target not in _COUNTED]
    return found


@figure(child=partial(zoo_model, "alder-finetuned"), parent=partial(zoo_model, "alder"))
def turned_vectors(
    child: MoEForCausalLM, parent: MoEForCausalLM, *, name: str = "alder-finetuned", parent_name: str = "alder"
) -> Drawing:
    """How far the vectors of a model are from the most similar ones of another, by role and layer.
    Data: layer, role, degrees (the mean), same (the share of vectors less than one degree away)."""
    found = angles(open_weights(child), open_weights(parent))
    layers = child.config.num_hidden_layers
    degrees = np.array([values.mean() for values in found.values()]).reshape(layers, len(ROLES))
    title = f"{name}: how far from {parent_name}"
    drawn, (left, right) = new_panels(0.42 * layers + 1.9, 1, 2, width_ratios=[1.7, 1], title=title)
    heatmap(left, degrees, ".0f", columns=ROLES, shade=np.sqrt(degrees / 90), size=11)  # else small angles look alike
    left.set(title="degrees, mean", ylabel="layer")
    for line, (part, roles) in enumerate((("attention", ATTENTION), ("MLP", MLP))):
        style = SERIES[line]
        values = np.concatenate([found[layer, role] for layer in range(layers) for role in roles])
        counts, edges = np.histogram(values, bins=np.arange(0, 95, 5))
        right.stairs(counts / len(values), edges, color=style["color"], linestyle=style["linestyle"], lw=2.5)
        look = {"color": style["color"], "weight": "bold", "ha": "right"}
        right.text(0.97, 0.9 - 0.12 * line, part, transform=right.transAxes, **look)
    right.set(title="each vector", xlabel="degrees", ylabel="share of the vectors")
    right.set(xlim=(0, 90), ylim=(0, 1.02), xticks=(0, 30, 60, 90))
    row, column = np.unravel_index(degrees.argmax(), degrees.shape)
    every = np.concatenate([*found.values()])
    alt = f"""Left a table of {layers} layers by seven roles, with the mean angle between a vector of {name} and the
        most similar one of {parent_name}: {degrees.min():.0f} to {degrees.max():.0f} degrees, most in {ROLES[column]}
        of layer {row}. Right the distribution of the angles, for attention and MLP; {every.mean():.0f} degrees in the
        mean of all, {(every < 1).mean():.0%} of the vectors unchanged."""
    rows = ((layer, role, values.mean(), (values < 1).mean()) for (layer, role), values in found.items())
    return drawn, columns(("layer", "role", "degrees", "same"), rows), alt


class Place(NamedTuple):
    """Where a model lies: the mean angle of its vectors to those of another, and how much probability moved."""

    name: str
    group: str
    degrees: float
    moved: float


def measure_places(
    models: Iterable[tuple[str, str, MoEForCausalLM]], parent: MoEForCausalLM, ids: Tensor
) -> list[Place]:
    """Where models lie, given as (name, group, model), seen from a parent and measured on the text [B, S]."""
    of_parent, theirs = open_weights(parent), predictions(parent, ids)
    places = []
    for name, group, model in models:
        degrees = np.concatenate([*angles(open_weights(model), of_parent).values()])
        places.append(Place(name, group, float(degrees.mean()), moved_probability(predictions(model, ids), theirs)))
    return places


@cache
def places_of_the_zoo() -> list[Place]:
    """Members of the zoo by their distance from alder, for held-out text of the kind that it learnt from."""
    corpus = Corpus.real(domains=("code", "prose"))
    ids = torch.cat([stretches(corpus, domain, 8) for domain in corpus.domains])  # [16, S]
    groups = {f"alder-{kind}": group for group, kinds in _COMPARED.items() for kind in kinds}
    groups |= {name: relation("alder", name) for name in _APART}
    members = ((name, group, zoo_model(name)) for name, group in groups.items())
    return measure_places(members, zoo_model("alder"), ids)


@figure(places=places_of_the_zoo)
def weights_and_behaviour(
    places: Sequence[Place], *, parent: str = "alder", labels: Mapping[str, str] = _LABELS
) -> Drawing:
    """How far models are from their parent in their weights and in what they predict.

    Models whose group is their relation to the parent are drawn alike, the others by group. Labels are written beside
    the points of the models that they name. Data: the fields of `Place`.
    """
    drawn, (axes,) = new_panels(4.4, title=f"Distance from {parent}, twice")
    relations, apart = (*_ARROWS, "strangers"), "no similar vector"
    points: dict[str, list] = {}
    for one in places:
        points.setdefault(apart if one.group in relations else one.group, []).append((one.degrees, one.moved))
    styles = iter(SERIES)
    for group, of_group in points.items():
        look = {"marker": "X", "markersize": 8, "color": INK} if group == apart else next(styles)
        axes.plot(*zip(*of_group, strict=True), label=group, **look | {"linestyle": ""})
    named = [one for one in places if one.name in labels]
    for one in named:
        note(axes, labels[one.name], (one.degrees, one.moved), 10 if one.degrees < 65 else -9)
    axes.set(xlim=(-2, 90), ylim=(-0.03, 1), ylabel="behaviour: probability moved")
    axes.set_xlabel("weights: degrees from the most similar vector, mean")
    axes.legend(loc="upper left", ncols=2, handletextpad=0.2)
    described = "; ".join(f"{one.name} {one.degrees:.0f} and {one.moved:.2f}" for one in named)
    alt = f"""A scatter plot of {len(places)} models: degrees from {parent}'s weights, and share of the probability
        moved. {described}."""
    return drawn, columns(Place._fields, places), alt
