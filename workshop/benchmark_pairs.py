"""Which pairs of the zoo the benchmark compares, and what for.

Uses of a pair
    calibration   strangers, both from the half that levels are taken from
    evaluation    strangers, none of which calibration has seen
    between       strangers, one from each half: for methods that are not calibrated
    positive      a descendant and its root, or two descendants of one root
    invariance    a model and a copy after one gauge
    forgery       a framed stranger and the model that it imitates
    planted       a stranger with parts that do nothing and the model that these are from
    twins         trained apart from the same random weights
    student       a distilled model and its teacher, or a relative of it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from minimoe.lineage.tree import FAMILIES, MEMBERS
from minimoe.lineage.zoo import relation
from workshop.family_tree import CALIBRATION, EVALUATION

# The share of neurons that is new in the experts of each transformation that makes a mixture of one root.
_SLICED = ("copy", "copy-qwen2_moe", "sliced", "virtual-groups")
_DROPPED = {f"drop-{rate}": rate for rate in (0.25, 0.5, 0.9)}
DROP_RATES = {
    f"{kind}{suffix}": rate
    for suffix in ("", "-trained", "-gauged", "-trained-gauged")
    for kind, rate in {**dict.fromkeys(_SLICED, 0.0), **_DROPPED}.items()
    if f"alder-{kind}{suffix}" in MEMBERS
}


@dataclass(frozen=True)
class Pair:
    """Two members of the zoo and what their scores are used for."""

    a: str
    b: str
    use: str
    kind: str  # what was done to the descendant, or what the strangers are


def pairs() -> list[Pair]:
    """All pairs of the benchmark."""
    strangers = [pair for pair in _strangers() if relation(pair.a, pair.b) == "strangers"]  # no donor of an expert
    return list(dict.fromkeys([*strangers, *_relatives(), *_rewrites(), *_forgeries(), *_plants(), *_borderline()]))


def _strangers() -> Iterator[Pair]:
    for use, roots in (("calibration", CALIBRATION), ("evaluation", EVALUATION)):
        yield from (Pair(a, b, use, "roots") for a, b in combinations(roots, 2))
        for place, root in enumerate(roots):
            others = [roots[(place + step) % len(roots)] for step in range(1, 1 + _OTHERS[use])]
            for member in _descendants(root):
                yield from (Pair(other, member, use, MEMBERS[member].kind) for other in others)
            yield from (Pair(f"{others[0]}-{x}", f"{root}-{y}", use, "mixtures") for x, y in _MIXTURES)
            yield Pair(f"{others[0]}-fewer-layers", f"{root}-copy", use, "mixture, other depth")
    yield from (Pair(a, b, "between", "roots") for a in CALIBRATION for b in EVALUATION)
    for kind in ("deep", "depth-init", "planted", "mixture"):
        yield from _among(kind)


_OTHERS = {"calibration": 1, "evaluation": 3}  # so that there are a thousand pairs to tell one in a thousand
_MIXTURES = (("copy", "drop-0.5"), ("noisy", "sliced"))


def _among(kind: str) -> Iterator[Pair]:
    """Roots of one kind with each other and with the usual ones: the first half calibrates, the second evaluates."""
    roots = [name for name in MEMBERS if name.removeprefix(f"{kind}-").isdigit()]
    half = len(roots) // 2
    for use, part, usual in (("calibration", roots[:half], CALIBRATION), ("evaluation", roots[half:], EVALUATION)):
        yield from (Pair(a, b, use, kind) for a, b in combinations(part, 2))
        yield from (Pair(a, b, use, kind) for a in usual[:3] for b in part)
        yield from (Pair(f"{a}-copy", b, use, kind) for a in usual[:3] for b in part)
    yield from (Pair(a, b, "between", kind) for a in roots[:half] for b in roots[half:])


def _relatives() -> Iterator[Pair]:
    for root in EVALUATION:
        yield from (Pair(root, member, "positive", MEMBERS[member].kind) for member in _descendants(root))
    for number in (1, 2):
        for kind in ("finetuned", "finetuned-gauged"):
            yield Pair(f"mixture-{number}", f"mixture-{number}-{kind}", "positive", f"mixture-{kind}")
    for root, other in (FAMILIES, FAMILIES[::-1]):
        yield from (Pair(other, f"{root}-{kind}", "positive", f"{kind}, donor") for kind in _TRANSPLANTED)
        for kind in ("continued-1", "finetuned-gauged", "drop-0.5-trained"):
            others = [name for name in _descendants(root) if name != f"{root}-{kind}"]
            yield from (_cousins(f"{root}-{kind}", other) for other in others[::4])


def _cousins(a: str, b: str) -> Pair:
    rewritten = ("", ", one gauged", ", both gauged")[("gauged" in a) + ("gauged" in b)]
    return Pair(a, b, "positive", f"cousins{rewritten}")


_TRANSPLANTED = ("transplant", "transplant-trained", "grafted", "grafted-gauged")
_TRANSPLANTED += ("grafted-trained", "grafted-trained-gauged")


def _rewrites() -> Iterator[Pair]:
    for member in MEMBERS.values():
        if member.recipe == "one_gauge":
            yield Pair(member.parents[0], member.name, "invariance", member.options["gauge"])


def _forgeries() -> Iterator[Pair]:
    for member in MEMBERS.values():
        if member.kind.startswith("framed"):
            yield Pair(member.parents[1], member.name, "forgery", member.kind)


def _plants() -> Iterator[Pair]:
    """Planted strangers with whom the parts are from; of one host also rewritten, and with whom they really are.

    A rewrite leaves their scores as they are, and parts that do nothing hide no relative: one host shows it.
    """
    for member in MEMBERS.values():
        if member.kind.startswith("planted"):
            kind, host = member.kind, member.name.removesuffix(f"-{member.kind}")
            target = MEMBERS[f"{host}-planted-dead"].parents[1]
            if host == "stranger-13" or not kind.endswith("gauged"):
                yield Pair(target, member.name, "planted", kind)
            if host == "stranger-13" and kind.endswith("gauged"):
                yield Pair(host, member.name, "positive", kind)


def _borderline() -> Iterator[Pair]:
    for root in FAMILIES:
        yield from (Pair(root, f"{root}-twin", "twins", "twin"), Pair(f"{root}-copy", f"{root}-twin", "twins", "twin"))
        for kind in ("distilled", "distilled-gauged"):
            yield from (Pair(parent, f"{root}-{kind}", "student", kind) for parent in (root, f"{root}-finetuned"))


def _descendants(root: str) -> list[str]:
    """What is called after a root and has weights of it, one by one gauges and frames left out."""
    return [
        name
        for name, member in MEMBERS.items()
        if name == f"{root}-{member.kind}"
        and member.recipe not in ("distil", "one_gauge")
        and not member.kind.startswith(("framed", "planted", "distilled"))
    ]
