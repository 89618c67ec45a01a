"""`compare(a, b)`: what evidence there is that two models share weights, every number beside its background.

The methods of `METHODS` run; those with a scale enter the verdict, which verdict.py reaches, and the others teach: they
run where they are asked for. Those of `QUICK` look at a small part of the files, and come in their place: quick.py.

Background
    Pairs of strangers of the same kinds: dense or a mixture, of equal depths or not. For models as wide as those of
    the zoo, those that it keeps for calibration; for others, strangers of 48 to 384 dimensions and 2 to 16 layers. In
    wider and deeper models strangers resemble each other less. Or name models that you know to be strangers to both:
    compare(..., background=[...]).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minimoe.data_files import data_path
from minimoe.fingerprints.aligned_cka import aligned_cka
from minimoe.fingerprints.aligned_neurons import aligned_neurons, best_part
from minimoe.fingerprints.behaviour import hidden_cka, routing_agreement, token_agreement
from minimoe.fingerprints.direction import direction
from minimoe.fingerprints.expert_attribution import expert_attribution
from minimoe.fingerprints.fingerprint import Fingerprint, as_fingerprints, compare_fingerprints
from minimoe.fingerprints.independence import csu, match, permutation_test
from minimoe.fingerprints.norm_profile import norm_profile
from minimoe.fingerprints.quick import last_attention, last_csu, scores_of_strangers
from minimoe.fingerprints.report import Report
from minimoe.fingerprints.result import Refusal, Result
from minimoe.fingerprints.spectral import spectral
from minimoe.fingerprints.std_profile import std_profile
from minimoe.fingerprints.verdict import (
    ANSWERS,
    CORRELATION,
    P_VALUE,
    SAME,
    SHARED,
    Evidence,
    Scale,
    judge,
)
from minimoe.fingerprints.virtual_response import virtual_response
from minimoe.fingerprints.weight_cosine import weight_cosine
from minimoe.fingerprints.weights import Weights, on_the_cpu, open_weights
from minimoe.fingerprints.zoo_scores import Rows, read_table, scores, scores_of
from minimoe.model.transformer import MoEForCausalLM
from minimoe.progress import at_work

Side = Weights | Fingerprint
Source = str | Path | MoEForCausalLM | Side
FEWEST_MODELS = 3  # of a background
FEWEST_OF_A_KIND = 20  # pairs, to be a background without the others
WIDTH_OF_THE_ZOO = 96


class Method(NamedTuple):
    """A way to compare two models, and how the verdict reads its score."""

    compare: Callable[[Weights, Weights], Result]
    scale: Scale | None = None  # None: it does not enter the verdict

    def __call__(self, a: Weights, b: Weights) -> Result:
        return self.compare(a, b)


def _parent_first(a: Weights, b: Weights) -> Result:
    """Expert attribution with the model of fewer experts as the parent."""
    return expert_attribution(*sorted((a, b), key=lambda weights: weights.num_experts))


METHODS: Mapping[str, Method] = {
    "std_profile": Method(std_profile),
    "norm_profile": Method(norm_profile),
    "weight_cosine": Method(weight_cosine),
    "aligned_cka_plain": Method(partial(aligned_cka, canonicalize=False)),
    "aligned_cka": Method(aligned_cka, CORRELATION),
    "spectral": Method(spectral),
    "virtual_response": Method(virtual_response),
    "virtual_response_whitened": Method(partial(virtual_response, whiten=True), ANSWERS),
    "csu": Method(csu, P_VALUE),
    "aligned_neurons": Method(aligned_neurons, CORRELATION),
    "best_part": Method(best_part, CORRELATION),
    "permutation_test": Method(permutation_test),
    "match": Method(match),
    "expert_attribution": Method(_parent_first),
    "token_agreement": Method(token_agreement),
    "hidden_cka": Method(hidden_cka),
    "routing_agreement": Method(routing_agreement),
}
DECIDING = tuple(name for name, method in METHODS.items() if method.scale is not None)
QUICK: Mapping[str, Method] = {
    "last_attention": Method(last_attention, CORRELATION),
    "last_csu": Method(last_csu, P_VALUE),
}
_EVERY = METHODS | QUICK


@on_the_cpu()
def compare(
    a: Source,
    b: Source,
    *,
    methods: Collection[str] | Literal["all", "quick"] = DECIDING,
    background: Sequence[Source] | None = None,
    tokenizer: Any = None,
    ask_direction: bool = False,
) -> Report:
    """Gather the evidence that two models share weights.

    Args:
        a: a checkpoint in the Hugging Face layout, or a model (see `open_weights`); or the .npz file of a
            `Fingerprint`, for the methods that can do without weights.
        b: another.
        methods: names in `METHODS`, or "all"; those in `DECIDING` unless others are named, and without any of them the
            verdict is "cannot tell". Or "quick", those in `QUICK`, which never say "no evidence" or "same weights".
        background: models known to be strangers to both, at least three; None: strangers of the zoo.
        tokenizer: of the models in memory that come without one: whatever has a `get_vocab()`.
        ask_direction: say of models that share weights which is the ancestor (direction.py), which reads all of them.

    Raises:
        CheckpointError: a file is missing or damaged.
        ValueError: there is no such method, there are too few strangers, a fingerprint is damaged, or given where
            weights are wanted, or a model is on the meta device.
    """
    if background is not None and len(background) < FEWEST_MODELS:
        raise ValueError(f"background: {len(background)} models, wanted at least {FEWEST_MODELS}")
    names, is_quick = _names(methods), methods == "quick"
    a, b, *known = sides = [_open(model, tokenizer) for model in (a, b, *(background or ()))]
    asked = 'methods="quick"' if is_quick else "ask_direction=True" if ask_direction else None
    if asked and any(isinstance(side, Fingerprint) for side in sides):
        raise ValueError(f"{asked}: found a saved fingerprint, wanted the weights of all models")
    strangers = background_of(known, a, b, names) if known else background_of_the_zoo(a, b, is_quick=is_quick)
    evidence = strangers.beside(run_methods(a, b, names))
    equal_depths, equal_files = a.num_layers == b.num_layers, not is_quick and _equal_files(a, b)
    verdict, reason, score = judge(evidence, equal_files=equal_files, equal_depths=equal_depths, is_quick=is_quick)
    found = direction(a, b) if ask_direction and verdict in (SAME, SHARED) else None
    return Report(
        a=a.name,
        b=b.name,
        verdict=verdict,
        reason=reason,
        score=score,
        background=strangers.about,
        methods=evidence,
        is_quick=is_quick,
        direction=found,
        files={side: found for side, model in (("a", a), ("b", b)) if (found := getattr(model, "files", None))},
    )


def _names(methods: Collection[str]) -> list[str]:
    """Of the methods that are asked for, in the order in which they run."""
    if methods in ("all", "quick"):
        return list(METHODS if methods == "all" else QUICK)
    if unknown := sorted(set(methods) - METHODS.keys()):
        raise ValueError(f'methods={unknown}: wanted "all", "quick", or some of {", ".join(METHODS)}')
    return [name for name in METHODS if name in methods]


@on_the_cpu()
def run_methods(a: Side, b: Side, names: Collection[str]) -> dict[str, Result]:
    """What each method says of two models; from saved features, where one of them is a fingerprint."""
    if isinstance(a, Weights) and isinstance(b, Weights):
        with at_work(names) as shown:
            return {name: _EVERY[name](a, b) for name in shown}
    a, b = as_fingerprints(a, b)
    return {name: compare_fingerprints(name, a, b) for name in names}


def _equal_files(a: Side, b: Side) -> bool:
    """Whether both have the same hash; files elsewhere may have none."""
    if isinstance(a, Weights) and isinstance(b, Weights) and not a.begins_like(b):
        return False
    try:
        first, second = (side.sha256() if isinstance(side, Weights) else side.sha256 for side in (a, b))
    except Refusal:
        return False
    return first is not None and first == second


def _open(source: Source, tokenizer: Any) -> Side:
    if isinstance(source, Side):
        return source
    if isinstance(source, str | Path) and Path(source).suffix == ".npz":
        return Fingerprint.load(source)
    lacks_one = isinstance(source, MoEForCausalLM) and source.tokenizer_json is None
    weights = open_weights(source, tokenizer=tokenizer if lacks_one else None)
    weights.require_whole()
    return weights


# --- strangers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Background:
    """The scores of pairs that share nothing, by method."""

    about: str
    scores: Mapping[str, Sequence[float]]

    def beside(self, results: Mapping[str, Result]) -> dict[str, Evidence]:
        """Each result beside the strangers."""
        return {
            name: Evidence(result=result, strangers=tuple(self.scores.get(name, ())), scale=_EVERY[name].scale)
            for name, result in results.items()
        }


def kind_of_pair(a: Side, b: Side) -> str:
    """What a background depends on: "dense, mixture, equal depths"."""
    kinds = sorted("mixture" if weights.num_experts else "dense" for weights in (a, b))
    return ", ".join([*kinds, "equal depths" if a.num_layers == b.num_layers else "other depths"])


def background_of_the_zoo(a: Side, b: Side, *, is_quick: bool = False) -> Background:
    """Strangers of the same kind as the pair, of the zoo or of other sizes; of the methods in `QUICK`, of the zoo."""
    if is_quick:
        return background_of_rows(scores_of_strangers(), "", "the zoo")
    if {a.hidden_size, b.hidden_size} == {WIDTH_OF_THE_ZOO}:
        calibration = [row for row in scores() if row["use"] == "calibration"]
        return background_of_rows(calibration, kind_of_pair(a, b), "the zoo")
    rows = [row for row in read_table("scores", data_path("zoo/sizes")) if row["use"] == "stranger"]
    widths, depths = ([row[f"{size}_{side}"] for row in rows for side in "ab"] for size in ("width", "depth"))
    sizes = f"{min(widths):.0f} to {max(widths):.0f} dimensions and {min(depths):.0f} to {max(depths):.0f} layers"
    return background_of_rows(rows, kind_of_pair(a, b), sizes)


def background_of_rows(rows: Rows, shapes: str, which: str) -> Background:
    """Of strangers in a table of scores those with these `shapes`; where there are too few, all of them."""
    alike = [row for row in rows if row["shapes"] == shapes]
    kind, rows = (shapes, alike) if len(alike) >= FEWEST_OF_A_KIND else ("of all kinds", rows)
    about = f"{len(rows)} pairs of strangers of {which} ({kind})"
    return Background(about=about, scores={method: scores_of(rows, method) for method in _EVERY if method in rows[0]})


def background_of(strangers: Sequence[Side], a: Side, b: Side, methods: Collection[str]) -> Background:
    """The scores of `a` and of `b` with models known to be strangers to both."""
    found = [run_methods(model, stranger, methods) for model in (a, b) for stranger in strangers]
    known_scores = {
        method: [results[method].score for results in found if results[method].score is not None] for method in methods
    }
    return Background(about=f"both models with {len(strangers)} strangers of your choice", scores=known_scores)
