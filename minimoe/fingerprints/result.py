"""What a method says about two models, and how it says that it does not apply to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps

import numpy as np

Features = dict[str, np.ndarray]  # what a method reads from one model, or the part of it that a fingerprint keeps
SMALLEST_P = 1e-300  # smaller p-values are not told apart


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one method found for two models. A score means something only beside the scores of strangers."""

    score: float | None = None  # None: refused
    p_value: float | None = None  # None: the method has none
    details: Mapping[str, float] = field(default_factory=dict)
    refused: str | None = None  # why there is no score


class Refusal(ValueError):
    """Why a method does not apply to two models.

    It is raised wherever something is read or computed for a method, and the method returns it as a `Result`. A file
    that is damaged is another matter: it stays a CheckpointError.
    """


def explain_refusals(method: Callable[..., Result]) -> Callable[..., Result]:
    """The method, with a `Refusal` inside it turned into a `Result` that gives the reason."""

    @wraps(method)
    def explained(*arguments, **options) -> Result:
        try:
            return method(*arguments, **options)
        except Refusal as reason:
            return Result(refused=str(reason))

    return explained
