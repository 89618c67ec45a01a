"""What a method says about two models, and how it says that it does not apply to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Features = dict[str, np.ndarray]  # what a method reads from one model, or the part of it that a fingerprint keeps


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one method found for two models. A score means something only beside the scores of strangers."""

    method: str
    score: float | None = None  # None: refused
    p_value: float | None = None  # None: the method has none
    details: Mapping[str, float] = field(default_factory=dict)
    refused: str | None = None  # why there is no score


class Refusal(ValueError):
    """Why a method does not apply to two models. Methods return it as a `Result`; damaged files stay errors."""
