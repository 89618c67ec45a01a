"""`compare(a, b)`: what evidence there is that two models share weights, every number beside its background.

Verdicts
    "same weights"                   the files are equal, or every layer answers alike to rounding: a rewritten copy
    "shared lineage"                 some method is further from strangers than chance among them explains
    "no evidence of shared lineage"  every method that applies finds what it finds among strangers
    "cannot tell"                    none applies, there are no strangers to compare with, or all that is found is an
                                     order of neurons, which can be arranged
How they are reached
    Four methods that no gauge changes enter: the whitened virtual response, aligned CKA, match and expert attribution.
    For each, strangers say where evidence begins: five times as far above their median as the highest of them is, on
    Fisher's scale of correlations, artanh. A score stands at 0 like the median stranger, at 0.5 where evidence begins,
    at 1 where nothing differs. The score of the report is the highest standing; above 0.5 the verdict is shared
    lineage.
Why five times
    The highest of some strangers depends on which they are. Beside those of a second build of the zoo, three times as
    far was not enough, and a student was called a relative; five times costs no relative in either build. Expert
    attribution counts neurons, of which strangers may share none, and five times nothing is nothing: there evidence
    begins at one in 50, if not higher.
What csu may say
    It enters by its exact p-value, on a scale of log p: 0.5 is p = 1e-6. It finds what the others miss, one
    transplanted expert among many; but whoever gives the neurons of a stranger the numbers of those that they resemble
    forges it without changing a function (`minimoe.lineage.frame`). So it can raise a score to 0.5 and no further.
    Where it stands there alone, the verdict is "cannot tell".
Background
    Pairs of strangers of the zoo, those it keeps for calibration, of the same kinds: dense or a mixture, of equal
    depths or not. For models of another size they are no measure: the levels move half the way to 1, and what stays
    below is "cannot tell". Name models that you know to be strangers to both instead: compare(..., background=[...]).

A verdict says that weights are shared. It does not say whether they do anything (notebook 09 plants dead neurons of
another model), who had them first, by what right, or whether two teams began from the same published model.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from minimoe.data_files import data_path
from minimoe.fingerprints.aligned_cka import aligned_cka
from minimoe.fingerprints.behaviour import hidden_cka, routing_agreement, token_agreement
from minimoe.fingerprints.expert_attribution import expert_attribution
from minimoe.fingerprints.fingerprint import Fingerprint, compare_kept, on_equal_terms
from minimoe.fingerprints.independence import csu, match, permutation_test
from minimoe.fingerprints.norm_profile import norm_profile
from minimoe.fingerprints.report import SMALLEST_P, Evidence, Report
from minimoe.fingerprints.result import Refusal, Result
from minimoe.fingerprints.spectral import spectral
from minimoe.fingerprints.std_profile import std_profile
from minimoe.fingerprints.virtual_response import virtual_response
from minimoe.fingerprints.weight_cosine import weight_cosine
from minimoe.fingerprints.weights import Weights, on_the_cpu, open_weights
from minimoe.model.transformer import MoEForCausalLM

Side = Weights | Fingerprint
SAME, SHARED = "same weights", "shared lineage"
NO_EVIDENCE, CANNOT_TELL = "no evidence of shared lineage", "cannot tell"

ENTERING = ("virtual_response_whitened", "aligned_cka", "match", "expert_attribution")
MARGIN = 5  # times as far above the median stranger as the highest: where evidence begins,
LEAST = {"expert_attribution": 0.02}  # if not below this
HIGHEST = 0.999  # nor above this
RARE_P = 1e-6  # of csu: where evidence begins
_ARRANGED = "and stands alone: a part that was taken over looks like this, and so does an order that somebody arranged"
EQUAL_ANSWERS = 0.9999  # of the whitened response: what rounding to 16 bits leaves
FEWEST_MODELS, FEWEST_STRANGERS = 3, 5  # of a background: models, and pairs of them with a score
WIDTH_OF_THE_ZOO = 96


def _parent_first(a: Weights, b: Weights) -> Result:
    """Expert attribution with the model of fewer experts as the parent."""
    return expert_attribution(*sorted((a, b), key=lambda weights: weights.num_experts))


METHODS: Mapping[str, Callable[[Weights, Weights], Result]] = {
    "std_profile": std_profile,
    "norm_profile": norm_profile,
    "weight_cosine": weight_cosine,
    "aligned_cka_plain": partial(aligned_cka, canonicalize=False),
    "aligned_cka": aligned_cka,
    "spectral": spectral,
    "virtual_response": virtual_response,
    "virtual_response_whitened": partial(virtual_response, whiten=True),
    "csu": csu,
    "permutation_test": permutation_test,
    "match": match,
    "expert_attribution": _parent_first,
    "token_agreement": token_agreement,
    "hidden_cka": hidden_cka,
    "routing_agreement": routing_agreement,
}


# --- strangers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Background:
    """The scores of pairs that share nothing, by method."""

    about: str
    scores: Mapping[str, Sequence[float]]
    fits: bool = True  # whether they are of the size of what is compared

    def level(self, method: str) -> float | None:
        """Where evidence begins: on Fisher's scale five times as far above the median as the highest, or at `LEAST`."""
        scores = self.scores.get(method, ())
        if len(scores) < FEWEST_STRANGERS:
            return None
        usual, highest = (math.atanh(min(score, HIGHEST)) for score in (median(scores), max(scores)))
        level = min(max(math.tanh(usual + MARGIN * (highest - usual)), LEAST.get(method, -1.0)), HIGHEST)
        return level if self.fits else (1 + level) / 2


def kind_of_pair(a: Side, b: Side) -> str:
    """What a background depends on: "dense, mixture, equal depths"."""
    kinds = sorted("mixture" if weights.num_experts else "dense" for weights in (a, b))
    return ", ".join([*kinds, "equal depths" if a.num_layers == b.num_layers else "other depths"])


def background_of_the_zoo(a: Side, b: Side) -> Background:
    """The strangers of the zoo that are of the same kind as the pair."""
    fits = {a.hidden_size, b.hidden_size} == {WIDTH_OF_THE_ZOO}
    return background_of_rows(_strangers_of_the_zoo(), kind_of_pair(a, b), fits=fits)


def background_of_rows(rows: Sequence[Mapping[str, Any]], shapes: str, *, fits: bool = True) -> Background:
    """Of strangers in the table of scores those with these `shapes`; where there are too few, all of them."""
    alike = [row for row in rows if row["shapes"] == shapes]
    kind, rows = (shapes, alike) if len(alike) >= FEWEST_STRANGERS else ("of all kinds", rows)
    scores = {method: [float(row[method]) for row in rows if row.get(method) not in ("", None)] for method in METHODS}
    size = "" if fits else f", of width {WIDTH_OF_THE_ZOO}: another size than these models"
    return Background(about=f"{len(rows)} pairs of strangers of the zoo ({kind}{size})", scores=scores, fits=fits)


@cache
def _strangers_of_the_zoo() -> list[dict[str, str]]:
    with open(data_path("zoo") / "benchmark" / "scores.csv", encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["use"] == "calibration"]


def background_of(strangers: Sequence[Side], a: Side, b: Side, methods: Collection[str]) -> Background:
    """The scores of `a` and of `b` with models known to be strangers to both."""
    found = [run_methods(model, stranger, methods) for model in (a, b) for stranger in strangers]
    scores = {
        method: [results[method].score for results in found if results[method].score is not None] for method in methods
    }
    return Background(about=f"both models with {len(strangers)} strangers of your choice", scores=scores)


# --- the verdict ------------------------------------------------------------------------------------------


@on_the_cpu()
def compare(
    a: str | Path | MoEForCausalLM | Side,
    b: str | Path | MoEForCausalLM | Side,
    *,
    methods: Collection[str] | None = None,
    background: Sequence[str | Path | MoEForCausalLM | Side] | None = None,
    tokenizer: Any = None,
) -> Report:
    """Gather the evidence that two models share weights.

    Args:
        a: a checkpoint in the Hugging Face layout, or a model (see `open_weights`); or the .npz file of a
            `Fingerprint`, for the methods that can do without weights.
        b: another.
        methods: names in `METHODS`; None: all. Without the four in `ENTERING`, the verdict is "cannot tell".
        background: models known to be strangers to both, at least three; None: strangers of the zoo.
        tokenizer: of the models in memory that come without one: whatever has a `get_vocab()`.

    Raises:
        CheckpointError: a file is missing or damaged.
        ValueError: there is no such method, there are too few strangers, a fingerprint is damaged, or a model is on the
            meta device.
    """
    if background is not None and len(background) < FEWEST_MODELS:
        raise ValueError(f"background: {len(background)} models, wanted at least {FEWEST_MODELS}")
    unknown = sorted(set(methods or ()) - METHODS.keys())
    if unknown:
        raise ValueError(f"methods={unknown}: wanted some of {', '.join(METHODS)}")
    names = [name for name in METHODS if methods is None or name in methods]
    a, b = (_open(model, tokenizer) for model in (a, b))
    if background is None:
        known = background_of_the_zoo(a, b)
    else:
        known = background_of([_open(model, tokenizer) for model in background], a, b, names)
    evidence = {name: weigh(result, known, name) for name, result in run_methods(a, b, names).items()}
    verdict, reason, score = judge(
        evidence, equal_files=_equal_files(a, b), equal_depths=a.num_layers == b.num_layers, fits=known.fits
    )
    return Report(
        a=a.name, b=b.name, verdict=verdict, reason=reason, score=score, background=known.about, methods=evidence
    )


def judge(
    evidence: Mapping[str, Evidence], *, equal_files: bool = False, equal_depths: bool = True, fits: bool = True
) -> tuple[str, str, float | None]:
    """Verdict, reason and score from the evidence of each method.

    Args:
        evidence: by name of the method.
        equal_files: whether both models are the same bytes.
        equal_depths: whether they have as many layers.
        fits: whether the strangers are of the size of the two models.
    """
    if equal_files:
        return SAME, "the files hold the same bytes (sha256)", 1.0
    answers = evidence.get("virtual_response_whitened")
    if answers is not None and equal_depths and (answers.result.score or 0) >= EQUAL_ANSWERS:
        return SAME, f"every layer answers alike (whitened response {answers.result.score:.5f})", 1.0
    standings = {name: entry.standing for name, entry in evidence.items() if entry.standing is not None}
    if "csu" in standings:
        standings["csu"] = min(standings["csu"], 0.5)  # an order of neurons can be arranged
    name = max(standings, key=standings.__getitem__, default=None)
    if name is None or (standings.keys() == {"csu"} and standings["csu"] < 0.5):  # a rewritten copy escapes csu
        return CANNOT_TELL, "no method that sees through rewrites applies, or no strangers are known", None
    score, found = standings[name], _found(name, evidence[name])
    if score > 0.5:
        return SHARED, f"{found}: out of reach for strangers", score
    if name == "csu" and score == 0.5:
        return CANNOT_TELL, f"{found} {_ARRANGED}", score
    if fits:
        return NO_EVIDENCE, f"{found}, comes closest, and is no more than strangers may have", score
    return CANNOT_TELL, f"{found}, comes closest; name strangers of the same size with `background` to tell more", score


def _found(name: str, evidence: Evidence) -> str:
    if name == "csu":
        return f"csu has p = {evidence.result.p_value:.2g}"
    return f"{name} of {evidence.result.score:.3f}, where strangers have up to {max(evidence.strangers):.3f}"


def weigh(result: Result, known: Background, method: str) -> Evidence:
    """A result beside its background."""
    level = known.level(method) if method in ENTERING else None
    if method == "csu":
        level = math.log10(RARE_P) / math.log10(SMALLEST_P)
    return Evidence(result=result, strangers=tuple(known.scores.get(method, ())), level=level)


@on_the_cpu()
def run_methods(a: Side, b: Side, methods: Collection[str]) -> dict[str, Result]:
    """What each method says of two models; from saved features, where one of them is a fingerprint."""
    if isinstance(a, Weights) and isinstance(b, Weights):
        return {name: METHODS[name](a, b) for name in methods}
    a, b = on_equal_terms(a, b)
    return {name: compare_kept(name, a, b) for name in methods}


def _equal_files(a: Side, b: Side) -> bool:
    """Whether both have the same hash; files elsewhere may have none."""
    try:
        first, second = (side.sha256() if isinstance(side, Weights) else side.sha256 for side in (a, b))
    except Refusal:
        return False
    return first is not None and first == second


def _open(source: str | Path | MoEForCausalLM | Side, tokenizer: Any) -> Side:
    if isinstance(source, Side):
        return source
    if isinstance(source, str | Path) and Path(source).suffix == ".npz":
        return Fingerprint.load(source)
    lacks_one = isinstance(source, MoEForCausalLM) and source.tokenizer_json is None
    weights = open_weights(source, tokenizer=tokenizer if lacks_one else None)
    weights.require_whole()
    return weights
