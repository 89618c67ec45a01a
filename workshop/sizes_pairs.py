"""Which pairs of the grid of sizes are compared, and how those of their models are made that no training takes.

Names say how: "64x4-1-copy-gauged" is the root 64x4-1, upcycled by copying, then rewritten by every gauge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import combinations, zip_longest
from pathlib import Path

from minimoe.lineage import derive, plant, upcycling
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.tree import MEMBERS, PLANTS
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from workshop.family_tree import MIXTURE, SLICED
from workshop.sizes_grid import GRID, is_there, load

ZOO_ROOTS = ("alder", "birch", "stranger-01", "stranger-13", "deep-1", "mixture-1")  # of width 96, all of them shipped
LAYER_PAIRS = 64  # of two models of different depths; more take too long
MANY_NEURONS = ("planted-squares", "planted-spans")  # what is left out where width times depth is above LARGE
LARGE = 512
OTHER_SIZES = 3  # of the pairs that differ in width and in depth, one in so many is compared


@dataclass(frozen=True)
class Pair:
    """Two models, and whether they share weights."""

    a: str
    b: str
    use: str  # "stranger", "relative", or "planted": a stranger that holds parts of the other, which do nothing
    kind: str  # what was done to the descendants, what was planted, or what the strangers are


# --- models -----------------------------------------------------------------------------------------------


def _drop_middle(model: MoEForCausalLM) -> MoEForCausalLM:
    return derive.prune_layers(model, layers=(model.config.num_hidden_layers // 2,))


MADE: Mapping[str, Callable[[MoEForCausalLM], MoEForCausalLM]] = {
    "gauged": lambda model: all_gauges(model, seed=1),
    "int8": lambda model: derive.quantise(model, bits=8),
    "int4": lambda model: derive.quantise(model, bits=4),
    "fewer-neurons": lambda model: derive.prune_neurons(model, keep=0.75),
    "fewer-heads": lambda model: derive.prune_heads(model, num_key_value_heads=1),
    "fewer-layers": _drop_middle,
    "deepened": lambda model: derive.depth_upscale(model, removed=1),
    "extended": lambda model: derive.extend_vocabulary(model, new_tokens=64, seed=1),
    "copy": lambda model: upcycling.upcycle(model, method="copy", seed=1, **MIXTURE),
    "noisy": lambda model: upcycling.upcycle(model, method="copy", noise=0.1, seed=1, **MIXTURE),
    "drop-0.5": lambda model: upcycling.upcycle(model, method="drop", drop_ratio=0.5, seed=1, **MIXTURE),
    "sliced": lambda model: upcycling.upcycle(model, method="split", seed=1, **SLICED),
}
# From the root and its two trained descendants.
MERGED: Mapping[str, Callable[..., MoEForCausalLM]] = {
    "lerp": lambda root, finetuned, continued: derive.lerp(finetuned, continued, t=0.5),
    "slerp": lambda root, finetuned, continued: derive.slerp(finetuned, continued, t=0.5),
    "ties": lambda root, finetuned, continued: derive.ties(root, [finetuned, continued], density=0.2),
    "btx": lambda root, *tuned: upcycling.branch_train_mix(
        [root, *tuned], num_experts_per_tok=2, router_aux_loss_coef=0.01, seed=1
    ),
}
TRAINED = ("finetuned", "continued")
TRANSPLANT = "transplant"
PLANTED: Mapping[str, Callable[..., MoEForCausalLM]] = {
    f"planted-{kind}": partial(getattr(plant, recipe), **options) for kind, (recipe, options) in PLANTS.items()
}  # from a root and the donor of its cell


class Models:
    """The models of the grid and of the zoo by name, trained or made on the spot."""

    def __init__(self, home: Path, zoo: Zoo) -> None:
        self.home, self.zoo = home, zoo

    def has(self, name: str) -> bool:
        """Whether all that it is made of was trained."""
        root, kinds = split_name(name)
        needed = [f"{root}-{kind}" for kind in TRAINED] if set(kinds) & MERGED.keys() else []
        needed.append(f"{root}-{kinds[0]}" if set(kinds) & set(TRAINED) else root)
        needed += [donor_of(root)] if {TRANSPLANT, *PLANTED} & set(kinds) else []
        return all(one in MEMBERS or is_there(self.home, one) for one in needed)

    def load(self, name: str) -> MoEForCausalLM:
        """In float32, in evaluation mode. Raises ValueError: the name is not one of a model."""
        if name in MEMBERS:
            return self.zoo.load(name)
        if name in GRID:
            return load(self.home, name)
        root, kinds = split_name(name)
        before = "-".join((root, *kinds[:-1]))
        if kinds[-1] in MERGED:
            return MERGED[kinds[-1]](*map(self.load, (root, *(f"{root}-{kind}" for kind in TRAINED))))
        if kinds[-1] == TRANSPLANT:
            donor, layer = self.load(donor_of(root)), GRID[root].depth // 2
            return upcycling.transplant_expert(self.load(before), donor, layer=layer, expert=1)
        if kinds[-1] in PLANTED:
            return PLANTED[kinds[-1]](self.load(before), self.load(donor_of(root)))
        return MADE[kinds[-1]](self.load(before))


def donor_of(root: str) -> str:
    """The first root of a cell, of which the others get parts: an expert that works, or parts that do nothing."""
    return f"{root.rpartition('-')[0]}-1"


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """The root, and what was done to it, one after the other. Raises ValueError: the name is not one of a model."""
    kinds: list[str] = []
    rest, known = name, (*TRAINED, *MERGED, *PLANTED, *MADE, TRANSPLANT)
    while rest not in MEMBERS and (rest not in GRID or GRID[rest].kind):
        found = next((kind for kind in known if rest.endswith(f"-{kind}")), None)
        if found is None:
            raise ValueError(f"{name!r}: wanted a root of the grid or the zoo, and what is done to it")
        kinds.insert(0, found)
        rest = rest.removesuffix(f"-{found}")
    return rest, tuple(kinds)


# --- pairs ------------------------------------------------------------------------------------------------


def pairs() -> list[Pair]:
    """All pairs, cheap ones first, strangers and relatives in turns: wherever scoring ends, there are both."""
    return [pair for both in zip_longest(_strangers(), _relatives()) for pair in both if pair] + [*_planted()]


def _relatives() -> Iterator[Pair]:
    """Of the first dense root of every cell: all that is made of it, cousins, and the mixture that holds its MLP."""
    for root in _first_roots():
        kinds = [kind for kind in MADE if _applies(kind, root)]
        kinds += [f"{kind}-gauged" for kind in ("copy", "drop-0.5", "sliced", "fewer-neurons", "int4")]
        if f"{root}-{TRAINED[0]}" in GRID:
            kinds += [*TRAINED, *MERGED, *(f"{kind}-gauged" for kind in TRAINED), "finetuned-copy-gauged"]
            cousins = [("finetuned", "continued"), ("finetuned-gauged", "drop-0.5"), ("continued", "sliced-gauged")]
        else:
            cousins = [("int4", "drop-0.5-gauged"), ("fewer-neurons", "sliced")]
        yield from (Pair(root, f"{root}-{kind}", "relative", kind) for kind in kinds)
        yield from (Pair(f"{root}-{x}", f"{root}-{y}", "relative", "cousins") for x, y in cousins)
        if (second := second_root(root)) is not None:
            yield from (Pair(root, f"{second}-copy-{kind}", "relative", f"{kind}, donor") for kind in _TRANSPLANTED)


def _planted() -> Iterator[Pair]:
    """Of every cell with two dense roots: the first, and the second with parts of it that do nothing, rewritten."""
    for root in _first_roots():
        if (host := second_root(root)) is not None:
            is_large = GRID[root].width * GRID[root].depth > LARGE  # to hear so many neurons takes minutes
            for kind in [kind for kind in PLANTED if not (is_large and kind in MANY_NEURONS)]:
                made = f"{host}-copy-{kind}" if kind == "planted-expert" else f"{host}-{kind}"
                yield Pair(root, f"{made}-gauged", "planted", kind)


_TRANSPLANTED = (TRANSPLANT, f"{TRANSPLANT}-gauged")


def second_root(first: str) -> str | None:
    """Of the same cell; None if it has one alone."""
    second = f"{first.removesuffix('-1')}-2"
    return second if second in GRID else None


def _applies(kind: str, root: str) -> bool:
    """Whether there are heads to leave out, and layers enough to repeat."""
    config = GRID[root].config
    return {"fewer-heads": config.num_key_value_heads > 1, "deepened": config.num_hidden_layers > 2}.get(kind, True)


def _first_roots() -> list[str]:
    return [name for name in _roots() if name.endswith("-1") and not GRID[name].experts]


def _roots() -> list[str]:
    return [name for name, model in GRID.items() if not model.kind]


# What is compared with another root of the same cell, and with what was made of it.
_AGAINST_A_ROOT = ("gauged", "copy", "drop-0.5-gauged", "sliced", "fewer-layers", "int4")
_AGAINST_EACH_OTHER = (("copy", "drop-0.5"), ("noisy", "sliced-gauged"), ("fewer-neurons", "copy-gauged"))


def _strangers() -> Iterator[Pair]:
    roots = _roots()
    for first in _first_roots():
        if (second := second_root(first)) is not None:
            yield from (Pair(second, f"{first}-{kind}", "stranger", kind) for kind in _AGAINST_A_ROOT)
            yield from (Pair(f"{second}-{x}", f"{first}-{y}", "stranger", "both made") for x, y in _AGAINST_EACH_OTHER)
    shapes = {name: (GRID[name].width, GRID[name].depth) for name in roots}
    shapes |= {name: (96, 8 if name == "deep-1" else 4) for name in ZOO_ROOTS}
    found = [pair for pair in combinations(shapes, 2) if _is_compared(*pair, shapes)]
    cost = {pair: shapes[pair[0]][0] * shapes[pair[1]][0] * shapes[pair[0]][1] * shapes[pair[1]][1] for pair in found}
    yield from (Pair(a, b, "stranger", "roots") for a, b in sorted(found, key=cost.__getitem__))


def _is_compared(a: str, b: str, shapes: Mapping[str, tuple[int, int]]) -> bool:
    (width, depth), (other_width, other_depth) = shapes[a], shapes[b]
    if depth == other_depth:
        return True
    if depth * other_depth > LAYER_PAIRS:
        return False
    return width == other_width or sha256(f"{a} {b}".encode()).digest()[0] % OTHER_SIZES == 0
