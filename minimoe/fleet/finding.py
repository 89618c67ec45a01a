"""The relatives of one model in a store: the nearest by descriptor, the best of these compared as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minimoe.fingerprints.compare import Source, compare
from minimoe.fingerprints.descriptor import describe
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.fleet.store import Near, Store

NOT_COMPARED, NOT_AT_HAND = "not compared", "not at hand"


@dataclass(frozen=True, kw_only=True)
class Relative:
    """A model of the store, and what is known of it and the model that was asked about."""

    near: Near
    verdict: str  # of `compare`; or why there is none
    reason: str = ""


def find(store: Store, model: Source, *, count: int = 20, compared: int = 3) -> list[Relative]:
    """The `count` nearest models of a store; the first `compared` of them whose files are here get a verdict.

    Raises:
        CheckpointError: a file is missing or damaged.
        Refusal: the model has no descriptor (see `describe`).
    """
    weights = model if isinstance(model, Weights) else open_weights(model)
    relatives, left = [], compared
    for near in store.nearest(describe(weights), count):
        here = _at_hand(near.names)
        if left and here is not None:
            report = compare(weights, here)
            relatives.append(Relative(near=near, verdict=report.verdict, reason=report.reason))
            left -= 1
        else:
            relatives.append(Relative(near=near, verdict=NOT_COMPARED if here else NOT_AT_HAND))
    return relatives


def _at_hand(names: Sequence[str]) -> str | None:
    return next((name for name in names if Path(name).exists()), None)
