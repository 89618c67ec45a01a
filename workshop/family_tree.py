"""The family tree of the zoo: every member, what it was made from, and how.

    python -m workshop.family_tree

writes data/zoo/members.json, one member a line, from which the package reads them.

    alder, birch        two roots that carry every kind of descendant
    stranger-01 to -24  roots of the same architecture and recipe, other seeds: what chance looks like
    others              deeper, wider and untied roots, mixtures from scratch, other data, the same first weights

Strangers 01 to 12 are there to calibrate on, all the rest to evaluate. Read it from top to bottom; `minimoe zoo show
NAME` prints, step by step, how a member was made. Recipes are the functions in minimoe/lineage/recipes.py and in
training_recipes.py, with these arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.lineage.gauge import GAUGES
from minimoe.lineage.tree import FAMILIES, FRAMES, MEMBERS_FILE, PLANTS, Member

STRANGERS = tuple(f"stranger-{number:02}" for number in range(1, 25))
CALIBRATION, EVALUATION = STRANGERS[:12], (*FAMILIES, *STRANGERS[12:])
SEEDS = {name: number for number, name in enumerate((*FAMILIES, *STRANGERS), 1)}

OF_MIXTURES = ("permute_experts", "shift_router", "exchange_router_scale")  # gauges that a dense model does not have
FINE_TUNING = {"corpus": "planted", "steps": 250, "learning_rate": 1e-3, "warmup_steps": 20}
CONTINUING = {"learning_rate": 2e-3, "warmup_steps": 20}  # half the rate of the first training
AFTER_UPCYCLING = {**CONTINUING, "steps": 250}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
# Tokens that occur in neither corpus: most are bytes of which no character of their text has one.
UNUSED = (125, 126, *range(131, 137), 138, *range(141, 159), 160, *range(167, 172), *range(173, 199), 200)
UNUSED += (*range(203, 221), 222, 572, 583, 801, 869, 893, 895, 898)
SLICED = {**MIXTURE, "num_experts": 8, "num_experts_per_tok": 4, "granularity": 4}


# --- roots ------------------------------------------------------------------------------------------------


def _root(name: str, seed: int, *, shipped: bool = False, **options: Any) -> Member:
    options = {"weights": seed, "seed": seed, "steps": 800, **options}
    return Member(name=name, recipe="from_scratch", options=options, shipped=shipped)


def _roots() -> Iterator[Member]:
    for name, seed in SEEDS.items():
        yield _root(name, seed, shipped=name in (*FAMILIES, "stranger-01", "stranger-13"))
    for name in FAMILIES:  # the same first weights as the root, other text in another order
        yield _root(f"{name}-twin", SEEDS[name], corpus="planted", shipped=True)
    for number in range(1, 7):
        yield _root(f"deep-{number}", 40 + number, shape="deep", shipped=number == 1)
    for number in (1, 2):
        yield _root(f"depth-init-{number}", 50 + number, shape="deep", initialisation="by depth", shipped=True)
        yield _root(f"planted-{number}", 60 + number, corpus="planted", shipped=number == 1)
    for number, shape in enumerate(("wide", "long", "untied"), 70):
        yield _root(shape, number, shape=shape)
    for number in range(1, 5):
        yield _root(f"mixture-{number}", 80 + number, shape="mixture", shipped=number == 1)


# --- descendants ------------------------------------------------------------------------------------------


def _made(
    root: str,
    kind: str,
    recipe: str,
    *,
    of: Sequence[str] = (),
    exact: bool = False,
    shipped: bool = False,
    **options: Any,
) -> Member:
    """A member called after its root and what was done; made from the root unless it is made `of` others."""
    return Member(
        name=f"{root}-{kind}",
        kind=kind,
        parents=tuple(of) or (root,),
        recipe=recipe,
        options=options,
        exact=exact,
        shipped=shipped,
    )


def _trained(root: str) -> Iterator[Member]:
    """Dense descendants that saw text."""
    seed = 100 * SEEDS[root]
    yield _made(root, "finetuned", "keep_training", seed=seed, shipped=True, **FINE_TUNING)
    yield _made(root, "lora", "train_lora", rank=8, seed=seed + 1, shipped=True, **FINE_TUNING)
    for number, (times, steps) in enumerate({"0.1": 80, "1": 800, "4": 3200}.items(), 2):
        yield _made(
            root, f"continued-{times}", "keep_training", seed=seed + number, steps=steps, shipped=True, **CONTINUING
        )
    yield _made(root, "distilled", "distil", weights=seed + 5, seed=seed + 5, steps=800, shipped=True)


def _merged(root: str) -> Iterator[Member]:
    both = f"{root}-finetuned", f"{root}-continued-1"
    yield _made(root, "lerp", "lerp", of=both, t=0.5)
    yield _made(root, "slerp", "slerp", of=both, t=0.5)
    yield _made(root, "ties", "merge_by_ties", of=(root, *both), density=0.2)


def _reshaped(root: str) -> Iterator[Member]:
    yield _made(root, "int8", "quantise", bits=8)
    yield _made(root, "int4", "quantise", bits=4)
    yield _made(root, "fewer-neurons", "prune_neurons", keep=0.75)
    yield _made(root, "fewer-heads", "prune_heads", num_key_value_heads=1)
    yield _made(root, "fewer-layers", "prune_layers", layers=(2,))
    yield _made(root, "deepened", "depth_upscale", removed=1)
    yield _made(root, "extended", "extend_vocabulary", new_tokens=64, seed=SEEDS[root])


def _upcycled(root: str) -> Iterator[Member]:
    seed = SEEDS[root]
    yield _made(root, "copy", "upcycle", method="copy", seed=seed, exact=True, **MIXTURE)
    yield _made(
        root, "copy-qwen2_moe", "upcycle", method="copy", model_type="qwen2_moe", seed=seed, exact=True, **MIXTURE
    )
    yield _made(root, "copy-pangu", "upcycle", method="copy", model_type="pangu_pro_moe", seed=seed, **MIXTURE)
    yield _made(root, "noisy", "upcycle", method="copy", noise=0.2, seed=seed, **MIXTURE)
    yield _made(root, "sliced", "upcycle", method="split", seed=seed, **SLICED)
    yield _made(root, "virtual-groups", "upcycle", method="virtual_groups", seed=seed, exact=True, **SLICED)
    for rate in (0.25, 0.5, 0.9):
        yield _made(root, f"drop-{rate}", "upcycle", method="drop", drop_ratio=rate, seed=seed, **MIXTURE)


def _mixed(root: str, other: str) -> Iterator[Member]:
    """Mixtures of more than one parent."""
    branches = [f"{root}-{kind}" for kind in ("finetuned", "continued-1", "lora")]
    settings = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01, "seed": SEEDS[root]}
    yield _made(root, "btx", "mix_branches", of=branches, **settings)
    yield _made(root, "transplant", "transplant_expert", of=(f"{root}-copy", other), layer=1, expert=2)


def _trained_mixtures(root: str) -> Iterator[Member]:
    kinds = ("copy", "noisy", "sliced", "virtual-groups", "drop-0.25", "drop-0.5", "drop-0.9", "btx", "transplant")
    for seed, kind in enumerate(kinds, 100 * SEEDS[root] + 10):
        shipped = root == "alder" and kind in ("copy", "sliced", "drop-0.5", "btx")
        untrained = (f"{root}-{kind}",)
        yield _made(
            root, f"{kind}-trained", "keep_training", of=untrained, seed=seed, shipped=shipped, **AFTER_UPCYCLING
        )


def _rehoused(root: str, seed: int) -> Iterator[Member]:
    """The layers of a root under embeddings drawn anew, which are trained alone, or with all the rest."""
    drawn = {"weights": seed, "seed": seed, "steps": 400, "warmup_steps": 20}
    yield _made(root, "fresh-only", "fresh_embeddings", only=True, learning_rate=4e-3, **drawn)
    drawn |= {"weights": seed + 1, "seed": seed + 1}
    yield _made(root, "fresh", "fresh_embeddings", only=False, learning_rate=2e-3, shipped=root == "alder", **drawn)


def _grafted(root: str, other: str, seed: int) -> Iterator[Member]:
    """The MLPs of another under the attention, the norms and the embeddings of a root, then trained to be of use."""
    yield _made(root, "grafted", "graft_mlps", of=(root, other))
    trained = {"seed": seed, "shipped": root == "alder", **AFTER_UPCYCLING}
    yield _made(root, "grafted-trained", "keep_training", of=(f"{root}-grafted",), **trained)


# --- rewrites ---------------------------------------------------------------------------------------------


def _gauged(member: Member, seed: int) -> Member:
    """A member rewritten. Each takes a seed of its own: what was rewritten alike keeps resembling each other."""
    root = member.name.removesuffix(f"-{member.kind}")
    kind = f"{member.kind}-gauged".removeprefix("-")
    return _made(root, kind, "all_gauges", of=(member.name,), seed=seed, exact=True)


def _rewritten(root: str) -> Iterator[Member]:
    """A root rewritten, then upcycled."""
    seed, gauged = SEEDS[root], (f"{root}-gauged",)
    yield _made(root, "gauged", "all_gauges", seed=seed, exact=True)
    yield _made(root, "gauged-copy", "upcycle", of=gauged, method="copy", seed=seed, exact=True, **MIXTURE)
    yield _made(root, "gauged-drop-0.5", "upcycle", of=gauged, method="drop", drop_ratio=0.5, seed=seed, **MIXTURE)


def _one_by_one(name: str, gauges: Iterable[str]) -> Iterator[Member]:
    for gauge in gauges:
        yield _made(name, gauge, "one_gauge", gauge=gauge, seed=3, exact=True)


def _framed(stranger: str, target: str) -> Iterator[Member]:
    """The same function, with fingerprints of a model it has nothing from."""
    for kind, recipe in FRAMES.items():
        yield _made(stranger, f"framed-{kind}", recipe, of=(stranger, target), exact=True)


def _planted(stranger: str, target: str, seed: int) -> Iterator[Member]:
    """The same function, with parts of a model that it has nothing from; then all kinds again, rewritten."""
    kinds = [
        _made(stranger, f"planted-{kind}", recipe, of=(stranger, target), exact=True, **options)
        for kind, (recipe, options) in PLANTS.items()
    ]
    heads = (f"{stranger}-planted-loud-heads", target)
    kinds.append(_made(stranger, "planted-both", "plant_cancelling_neurons", of=heads, exact=True, way="products"))
    kinds.append(_made(stranger, "planted-rows", "plant_embedding_rows", of=(stranger, target), tokens=UNUSED))
    yield from kinds
    yield from (_gauged(member, seed + number) for number, member in enumerate(kinds))


# Who gets parts of whom: two from the half that calibrates, whose targets are from it too, and the others.
_HOSTS = {"stranger-01": "stranger-02", "stranger-03": "stranger-04", "mixture-1": "stranger-05"}
_HOSTS |= {"stranger-13": "alder", "stranger-14": "birch", "stranger-15": "alder", "stranger-16": "birch"}
_HOSTS |= {"stranger-13-copy": "birch", "mixture-3": "alder", "mixture-4": "birch"}


# --- the tree ---------------------------------------------------------------------------------------------


def grow() -> Iterator[Member]:
    """Every member, parents before their children."""
    yield from _roots()
    for root, other in (FAMILIES, FAMILIES[::-1]):
        family = [*_trained(root), *_merged(root), *_reshaped(root), *_upcycled(root), *_mixed(root, other)]
        family += _trained_mixtures(root)
        family += [*_rehoused(root, 100 * SEEDS[root] + 30), *_grafted(root, other, 100 * SEEDS[root] + 32)]
        yield from family
        yield from _rewritten(root)
        yield from (_gauged(member, seed) for seed, member in enumerate(family, 1000 * SEEDS[root]))
    for stranger in STRANGERS:
        yield from _reshaped(stranger)
        yield from _upcycled(stranger)
        yield from _rewritten(stranger)
    for stranger, target in zip(EVALUATION[2:], 6 * FAMILIES, strict=True):
        yield from _framed(stranger, target)
    for number, (host, target) in enumerate(_HOSTS.items()):
        yield from _planted(host, target, 5000 + 100 * number)
    rehoused = [*_rehoused("stranger-13", 400)]
    yield from (*rehoused, *(_gauged(member, seed) for seed, member in enumerate(rehoused, 4000)))
    for number in (1, 2):
        tuned = _made(f"mixture-{number}", "finetuned", "keep_training", seed=300 + number, **FINE_TUNING)
        yield from (tuned, _gauged(tuned, number))
    yield from _one_by_one("alder", (gauge for gauge in GAUGES if gauge not in OF_MIXTURES))
    yield from _one_by_one("alder-copy-pangu", GAUGES)


def to_json(members: Iterable[Member]) -> str:
    """A list of members, one a line, without what is left at its default."""
    rows = [{key: value for key, value in asdict(member).items() if value not in ("", (), False)} for member in members]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


if __name__ == "__main__":
    write_atomically(data_path(MEMBERS_FILE), to_json(grow()).encode())
