"""Which of two relatives is the ancestor.

What it measures
    Steps that are taken one way only: a dense model becomes a mixture, neurons, heads and layers are pruned, layers are
    repeated, a vocabulary grows, weights are rounded to a grid. And what each model lacks of the other: in one frame,
    with x a weight of one and y the same of the other, 1 - <x, y> / <x, x> is the share of x that is not in y. What
    changes a model adds to it: nearly all of the ancestor is in the descendant, while part of the descendant is new.
    Of two descendants of a third model, each lacks what the other has learnt.
What leaves it unchanged
    Every gauge, but for the grid, which mixing weights hides.
What it cannot see
    Two models of one function: whether parts that do nothing were added to one, or left out of the other. A merged
    model: averaging takes out what its parents have of their own, so that it looks like their ancestor. A descendant
    that hardly differs from the ancestor stands in for it before its cousins. Training with a strong weight decay,
    which shrinks the ancestor away.
Source
    The share is ours. Weights lose or gain outliers while they are trained (Horwitz et al. 2024, arXiv 2405.18432),
    which alone decides nothing here: workshop/directions.py measures how often it is right.

The limits were chosen on descendants of alder and of strangers 01 to 12 (data/zoo/benchmark/direction.csv).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.fingerprints.aligned_neurons import FEWEST_SILENT, SILENT, read_parts, silent_share
from minimoe.fingerprints.audible import head_counts
from minimoe.fingerprints.folded import query_key, value_output
from minimoe.fingerprints.one_frame import SAME_NEURON, in_one_frame, product, turns_onto
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import Weights, on_the_cpu

Side = Literal["a", "b"]
NEITHER = "neither"  # each has what the other lacks
UNCHANGED = 1e-3  # the relative distance of what was only stored anew, or rewritten
RELATED = 0.4  # cosine of the attention of relatives; trained strangers of the zoo have up to .3
OTHER_NEURON = 0.4  # cosine of two neurons, up to which one of them was drawn anew
MOST_ALONE = 0.05  # share of neurons that others learn anew while they are trained
# What a descendant may lack of the ancestor, as a share of what the ancestor lacks of it; of attention, more. Below
# -LONGER, vectors have grown and little else.
LIMITS = {"gate": 0.1, "qk": 0.5, "qk alone": 0.3}
LONGER = 0.7
WORDS = {"gate": "neurons", "qk": "attention"}
BITS = (2, 3, 4, 5, 6, 7, 8)
CONFIDENCE = {"shapes": 0.93, "numbers": 0.67}  # measured by workshop/directions.py


class Lack(NamedTuple):
    """What each of two models lacks of the other, in shares; how far they are apart, and which distance says nothing:
    chance moves the shares by distance / sqrt(count), which has to stay well below distance^2."""

    by_b: float
    by_a: float
    distance: float
    blur: float


class Observation(NamedTuple):
    """One thing that was seen, and which model it makes the ancestor."""

    words: str
    ancestor: Side | Literal["neither"] | None  # None: it does not say
    is_shape: bool = False  # whether it was seen in shapes, not in numbers


@dataclass(frozen=True, kw_only=True)
class Direction:
    """Which of two relatives is the ancestor, and why."""

    ancestor: Side | None  # None: cannot tell
    evidence: tuple[Observation, ...]

    @property
    def by_shape(self) -> bool:
        """Whether shapes say it too, which are harder to be wrong about."""
        return any(seen.is_shape and seen.ancestor == self.ancestor for seen in self.evidence)

    @property
    def confidence(self) -> float | None:
        """How often such answers were right in the half of the zoo that limits were chosen on, cousins included."""
        return None if self.ancestor is None else CONFIDENCE["shapes" if self.by_shape else "numbers"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        evidence = [seen._asdict() for seen in self.evidence]
        return {"ancestor": self.ancestor, "confidence": self.confidence, "evidence": evidence}

    def __str__(self) -> str:
        verdict = "cannot tell" if self.ancestor is None else f"{self.ancestor} is the ancestor"
        sure = (
            "" if self.confidence is None else f" (such answers are right {self.confidence:.0%} of the time in the zoo)"
        )
        return "\n".join([f"Direction: {verdict}{sure}", *(f"  {seen.words}" for seen in self.evidence)])


@on_the_cpu()
def direction(a: Weights, b: Weights) -> Direction:
    """Say which of two relatives is the ancestor, from their weights alone.

    Of strangers it makes no sense to ask. Evidence that disagrees decides nothing; where a model cannot be looked at in
    this way, the evidence is the reason.
    """
    try:
        evidence = tuple(_observe(a, b))
    except Refusal as reason:
        evidence = (Observation(str(reason), None),)
    said = {seen.ancestor for seen in evidence} - {None}
    return Direction(ancestor=said.pop() if len(said) == 1 and NEITHER not in said else None, evidence=evidence)


def _observe(a: Weights, b: Weights) -> Iterator[Observation]:
    if a.hidden_size != b.hidden_size:
        raise Refusal(f"hidden sizes of {a.hidden_size} and {b.hidden_size}: wanted equal ones")
    layers = partners(a, b) if a.num_layers >= b.num_layers else partners(b, a)
    if not layers:
        raise Refusal("no layer of one resembles any of the other")
    yield from (seen._replace(is_shape=True) for seen in _structure(a, b, layers))
    yield from _changes(a, b, layers)


def _other(side: Side) -> Side:
    return "b" if side == "a" else "a"


# --- shapes -----------------------------------------------------------------------------------------------


def partners(deep: Weights, shallow: Weights) -> dict[int, int]:
    """For layers of the deeper model the layer of the other that its attention resembles, where one does."""
    if deep.num_layers == shallow.num_layers:
        return {layer: layer for layer in range(deep.num_layers)}
    (turn,) = turns_onto(deep, [shallow])[1]
    tables = [_attention(weights, turned) for weights, turned in ((deep, None), (shallow, turn))]
    found = (tables[0] @ tables[1].mT).max(1)
    return {layer: int(j) for layer, (cosine, j) in enumerate(zip(*found, strict=True)) if cosine > RELATED}


def _attention(weights: Weights, turn: Tensor | None, most: int = 64) -> Tensor:
    """What queries ask of keys, and what values write, in each layer, from some dimensions: [L, 2 n H] of norm 1."""
    rows = [
        torch.cat(
            [
                F.normalize(product(*read(weights, layer), turn)[:most].flatten(), dim=0)
                for read in (query_key, value_output)
            ]
        )
        for layer in range(weights.num_layers)
    ]
    return F.normalize(torch.stack(rows), dim=1)


def _structure(a: Weights, b: Weights, layers: dict[int, int]) -> Iterator[Observation]:
    """What shapes say."""
    sides = {"a": a, "b": b}
    layouts = {side: _layout(one) for side, one in sides.items()}
    if bool(a.num_experts) != bool(b.num_experts):
        dense = "b" if a.num_experts else "a"
        (wide,), (_, expert, _) = layouts[dense], layouts[_other(dense)]
        words = f"{dense} is dense, with {wide} neurons, {_other(dense)} a mixture with {expert} in each expert"
        yield Observation(words, dense if expert <= wide else NEITHER)
    elif a.num_experts and layouts["a"] != layouts["b"]:
        yield Observation("their experts differ in number or width: neither was made by training the other", NEITHER)
    yield from _larger("neurons", {side: layout[0] for side, layout in layouts.items() if len(layout) == 1})
    yield from _larger("heads", {side: one.num_heads for side, one in sides.items()})
    for what, share in SILENT_SHARES.items():
        silent = {side: share(one) for side, one in sides.items()}
        if abs(silent["a"] - silent["b"]) >= FEWEST_SILENT:
            side = max(silent, key=silent.__getitem__)
            words = f"{silent[side]:.0%} of the {what} of {side} do nothing, {silent[_other(side)]:.0%} of those of"
            yield Observation(f"{words} {_other(side)}: they were added by one, or left out by the other", NEITHER)
    depths, repeated = {side: one.num_layers for side, one in sides.items()}, len(set(layers.values())) < len(layers)
    if repeated:
        deep = max(depths, key=depths.__getitem__)
        words = f"{deep} has {depths[deep]} layers, some of them twice, of {depths[_other(deep)]} of {_other(deep)}"
        yield Observation(words, _other(deep) if len(layers) == depths[deep] else NEITHER)
    else:
        yield from _larger("layers", depths)
    rows = {side: one.shape("embedding")[0] for side, one in sides.items()}
    for seen in _larger("rows in the embedding", rows, "new"):
        yield seen._replace(ancestor=_other(seen.ancestor))


def _larger(what: str, counts: dict[Side, int], which: str = "pruned from the other") -> Iterator[Observation]:
    """Which has more of something that both have, for the ancestor."""
    if len(counts) == 2 and counts["a"] != counts["b"]:
        side = max(counts, key=counts.__getitem__)
        yield Observation(f"{side} has {counts[side]} {what}, {_other(side)} {counts[_other(side)]}: {which}", side)


def _layout(weights: Weights) -> tuple[int, ...]:
    """Neurons of an MLP; or how many experts, and the neurons of each and of the shared one."""
    layers = [layer for layer in range(weights.num_layers) if weights.has("gate", layer)]
    layer = next((layer for layer in layers if len(weights.shape("gate", layer)) == 3 or not weights.num_experts), None)
    if layer is None:
        raise Refusal(f"{weights.name} has no gated MLP")
    shared = weights.shape("shared_gate", layer)[0] if weights.has("shared_gate", layer) else 0
    width = weights.shape("gate", layer)[-2]
    return (weights.num_experts, width, shared) if weights.num_experts else (width,)


def _silent_heads(weights: Weights) -> float:
    return float((torch.cat([*head_counts(weights).values()]) < SILENT).double().mean())


SILENT_SHARES = {"neurons": lambda weights: silent_share(read_parts(weights, False)), "heads": _silent_heads}


# --- numbers ----------------------------------------------------------------------------------------------


def _grids(a: Weights, b: Weights) -> Iterator[Observation]:
    """Whether one of them was rounded to few values."""
    bits = {side: found for side, one in (("a", a), ("b", b)) if (found := _bits(one))}
    words = " and ".join(f"rows of {side} lie on a grid of {found} bits" for side, found in bits.items())
    if len(bits) == 1:
        yield Observation(f"{words}, those of the other do not", _other(*bits))
    elif bits.get("a") != bits.get("b"):
        yield Observation(words, NEITHER)


def _bits(weights: Weights) -> int | None:
    """Of the grid that the values of the first layer lie on, its step given by the largest number of each row."""
    rows = weights.first_rows("v", weights.layers_with("v")[0], 64).double()
    for bits in BITS:
        steps = rows / rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) * (2 ** (bits - 1) - 1)
        if (steps - steps.round()).abs().mean() < 0.02:
            return bits
    return None


def _changes(a: Weights, b: Weights, layers: dict[int, int]) -> Iterator[Observation]:
    """What each lacks of the other, by neurons and by attention."""
    is_swapped = _order(b) < _order(a)
    first, second = (b, a) if is_swapped else (a, b)
    roles = ("gate", "qk") if a.num_heads == b.num_heads else ("gate",)
    found: dict[str, list[Lack]] = {role: [] for role in roles}
    cosines = {role: [] for role in roles}
    for part in in_one_frame(first, [second], layers):
        role = part.role.split()[-1]
        if role in roles:
            x, y = part.rows.flip(0) if is_swapped else part.rows
            x, y = (x, y) if role == "gate" else (x.reshape(1, -1), y.reshape(1, -1))
            cosines[role].append(cosine := F.cosine_similarity(x, y))
            kept = cosine > SAME_NEURON if role == "gate" else slice(None)
            found[role].append(_lack(x[kept], y[kept]))
    if "qk" in roles and torch.cat(cosines["qk"]).mean() < RELATED:
        raise Refusal("their attention has little in common")
    lacks = {role: Lack(*torch.tensor(some).mean(0).tolist()) for role, some in found.items()}
    alone = float((torch.cat(cosines["gate"]) < OTHER_NEURON).double().mean())
    if alone > MOST_ALONE and bool(a.num_experts) == bool(b.num_experts):
        yield Observation(f"{alone:.0%} of the neurons of each have no counterpart in the other", NEITHER)
    changed = {role: lack for role, lack in lacks.items() if lack.distance > max(UNCHANGED, lack.blur)}
    said = {_ancestor(lack, LIMITS[role if "gate" in changed else "qk alone"]) for role, lack in changed.items()}
    words = "; ".join(
        f"of the {WORDS[role]} of a, b lacks {lack.by_b:.2%}, of those of b, a lacks {lack.by_a:.2%}"
        for role, lack in changed.items()
    )
    if any(lack.distance > UNCHANGED for lack in lacks.values()):
        yield from _grids(a, b)
    if changed:
        yield Observation(words, said.pop() if len(said) == 1 else NEITHER)
    else:
        yield Observation("what both have is equal, or nearly so", None)


def _order(weights: Weights) -> tuple[float, ...]:
    """Which model comes first in the common frame: the deeper, or the dense one, but neither by what it is called."""
    layer = weights.layers_with("v")[0]
    return -weights.num_layers, weights.num_experts, weights.statistics("v", layer).std


def _lack(x: Tensor, y: Tensor) -> Lack:
    both, of_x, of_y = (float((u * v).sum()) for u, v in ((x, y), (x, x), (y, y)))
    if not of_x or not of_y:
        return Lack(0.0, 0.0, 0.0, 0.0)
    return Lack(1 - both / of_x, 1 - both / of_y, float((x - y).norm()) / of_y**0.5, 4 / x.numel() ** 0.5)


def _ancestor(lack: Lack, limit: float) -> Side | Literal["neither"]:
    ancestor, less, more = ("a", lack.by_b, lack.by_a) if lack.by_b < lack.by_a else ("b", lack.by_a, lack.by_b)
    return ancestor if -LONGER * more < less < limit * more else NEITHER
