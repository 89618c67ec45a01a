"""How the findings of the methods become a verdict: scales, levels, standings, and the words.

Verdicts
    "same weights"                   the files are equal, or every layer answers alike to rounding: a rewritten copy
    "shared lineage"                 some method's score is above its level, far above that of any stranger
    "no evidence of shared lineage"  every method that applies finds no more than it finds among strangers
    "cannot tell"                    no method applies; or the only evidence is the order of neurons, which can be
                                     forged; or a quick look finds nothing
How they are reached
    Each method that enters the verdict has a scale, which turns its score into a standing: 0 at the median stranger
    (of p-values, at p = 1), 0.5 at the level where evidence begins, 1 where nothing differs. The score of the report
    is the highest standing; above 0.5 the verdict is "shared lineage".
Correlations
    level = median + 5 (highest - median) of the strangers' scores, all on Fisher's scale of correlations, artanh. Which
    stranger is the highest depends on which ones there are: with 3 in place of 5, a second build of the zoo had a
    student that was called a relative; 5 costs no relative in either build. No gauge, that is, no rewrite of the
    weights that keeps the function, changes the scores of these methods.
P-values
    0.5 is p = 1e-6, on a scale of log p. The one method of this scale, csu, finds what the others miss: one
    transplanted expert among many. But anyone can forge it without changing what a stranger computes, by putting its
    neurons in the order of those of the other model that they resemble most (`minimoe.lineage.frame`). So a p-value
    raises the score of a report to 0.5 and no further, and where nothing else does, the verdict is "cannot tell".
Parts that do nothing
    Dead neurons or heads, those that undo each other, experts that no token meets: they do not count. Where they would
    have been evidence, the reason says so.

A verdict says that weights are shared. It does not say who had them first, by what right, or whether two teams began
from the same published model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from minimoe.fingerprints.result import SMALLEST_P, Result

SAME, SHARED = "same weights", "shared lineage"
NO_EVIDENCE, CANNOT_TELL = "no evidence of shared lineage", "cannot tell"

EVIDENCE = 0.5  # the standing at which it begins
MARGIN = 5  # times as far above the median stranger as the highest
HIGHEST_LEVEL = 0.999
RARE_P = 1e-6  # the p-value at which evidence begins
FEWEST_STRANGERS = 5  # pairs of them with a score, to set a level


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """The scale of scores that are 1 where nothing differs; their level is set by strangers."""

    same_from: float | None = None  # from this score on, two models of equal depth are the same
    most = 1.0  # to which it may raise the score of a report

    def position(self, result: Result) -> float:
        """Where a result lies on the scale."""
        return result.score

    def usual(self, strangers: Sequence[float]) -> float:
        """Where the median stranger lies."""
        return median(strangers)

    def level(self, strangers: Sequence[float]) -> float | None:
        """Where evidence begins; None: there are too few strangers."""
        if len(strangers) < FEWEST_STRANGERS:
            return None
        usual, highest = (math.atanh(min(score, HIGHEST_LEVEL)) for score in (median(strangers), max(strangers)))
        return min(math.tanh(usual + MARGIN * (highest - usual)), HIGHEST_LEVEL)

    def describe(self, name: str, evidence: "Evidence") -> str:
        """What was found, for the reason of a verdict."""
        return f"{name} of {evidence.result.score:.3f}, where strangers have up to {max(evidence.strangers):.3f}"


class PValue:
    """The scale of log p, 0 at p = 1 and 1 at the smallest that is told apart; its level needs no strangers."""

    same_from = None
    most = EVIDENCE

    def position(self, result: Result) -> float:
        return math.log10(result.p_value) / math.log10(SMALLEST_P)

    def usual(self, strangers: Sequence[float]) -> float:
        return 0.0

    def level(self, strangers: Sequence[float]) -> float:
        return math.log10(RARE_P) / math.log10(SMALLEST_P)

    def describe(self, name: str, evidence: "Evidence") -> str:
        return f"{name} has p = {evidence.result.p_value:.2g}"


Scale = Correlation | PValue
CORRELATION, P_VALUE = Correlation(), PValue()
ANSWERS = Correlation(same_from=0.9999)  # of whole layers; rounding to 16 bits leaves so much


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one method found, beside what it finds among strangers."""

    result: Result
    strangers: Sequence[float]
    scale: Scale | None  # None: the method does not enter the verdict

    @property
    def level(self) -> float | None:
        """Where evidence begins, on the scale; None: the method does not enter the verdict."""
        return None if self.scale is None else self.scale.level(self.strangers)

    @property
    def percentile(self) -> float | None:
        """The share of strangers with a lower score, in percent."""
        if self.result.score is None or not self.strangers:
            return None
        return 100 * sum(score < self.result.score for score in self.strangers) / len(self.strangers)

    @property
    def standing(self) -> float | None:
        """0 as the median stranger or below, 0.5 where evidence begins, 1 where nothing differs; linear between."""
        level = self.level
        if level is None or self.result.score is None:
            return None
        position = self.scale.position(self.result)
        if position < level:
            usual = self.scale.usual(self.strangers)
            standing = EVIDENCE * (position - usual) / (level - usual)
        else:
            standing = EVIDENCE + (1 - EVIDENCE) * (position - level) / (1 - level)
        return min(max(standing, 0.0), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON of a report."""
        known = sorted(self.strangers)
        return {
            "score": self.result.score,
            "p_value": self.result.p_value,
            "percentile": self.percentile,
            "strangers": {"pairs": len(known), "median": median(known), "highest": known[-1]} if known else None,
            "level": self.level,
            "standing": self.standing,
            "refused": self.result.refused,
            "details": dict(self.result.details),
        }


def judge(
    evidence: Mapping[str, Evidence], *, equal_files: bool = False, equal_depths: bool = True, is_quick: bool = False
) -> tuple[str, str, float | None]:
    """Verdict, reason and score from the evidence of each method, and from what is known of both files and models.

    is_quick: whether the methods looked at a small part of the models, and what they miss may lie in the rest.
    """
    if equal_files:
        return SAME, "the files hold the same bytes (sha256)", 1.0
    for name, found in evidence.items():
        same_from = found.scale.same_from if found.scale and equal_depths else None
        if same_from is not None and (found.result.score or 0) >= same_from:
            return SAME, f"every layer answers alike ({name} of {found.result.score:.5f})", 1.0

    applying = {name: found for name, found in evidence.items() if found.standing is not None}
    standings = {name: min(found.standing, found.scale.most) for name, found in applying.items()}
    decided = any(evidence[name].scale.most > EVIDENCE for name in standings)
    if not decided and max(standings.values(), default=0) < EVIDENCE:  # a rewritten copy escapes the p-values
        return CANNOT_TELL, "no method that sees through rewrites applies, or no strangers are known", None

    name = max(standings, key=standings.__getitem__)
    score, scale = standings[name], evidence[name].scale
    found = scale.describe(name, evidence[name])
    if score > EVIDENCE:
        return SHARED, f"{found}: out of reach for strangers", score
    if score == EVIDENCE == scale.most:
        alone = "a part that was taken over looks like this, and so does an order that somebody arranged"
        return CANNOT_TELL, f"{found} and stands alone: {alone}", score
    if is_quick:
        return CANNOT_TELL, f"{found}, comes closest; a quick look may miss what the whole comparison finds", score
    return NO_EVIDENCE, f"{found}, comes closest, and is no more than strangers may have{_idle_parts(applying)}", score


def _idle_parts(evidence: Mapping[str, Evidence]) -> str:
    """What is to be said of parts that would be evidence if they did anything."""
    for name, found in evidence.items():
        idle = found.result.details.get("idle")
        if idle is not None and found.level is not None and idle > found.level:
            return f"; one model holds parts of the other that do nothing ({name} would be {idle:.3f} if they counted)"
    return ""
