"""Labels of tokens: what the metrics compare the routing with."""

from typing import NamedTuple

import numpy as np

from minimoe.inspection.trace import RoutingTrace

DOCUMENT_LABELS = ("domain", "language", "topic")
LABELS = (*DOCUMENT_LABELS, "token", "position")


class Labels(NamedTuple):
    """One label per token."""

    values: np.ndarray  # [T] int64; -1: none
    names: tuple[str, ...]  # of the labels 0, 1, ...; empty for token ids, which name themselves


def labels(trace: RoutingTrace, of: str) -> Labels:
    """What each token is labelled with.

    Args:
        of: "domain"; "language" or "topic", the two halves of domains named "language/topic" (other domains have
            neither); "token", its id; "position", its place in the sequence, in buckets that double: 0, 1-2, 3-6...

    Raises ValueError: `of` is unknown, or no domain is named "language/topic".
    """
    if of not in LABELS:
        raise ValueError(f"label {of!r}: wanted one of {', '.join(LABELS)}")
    if of == "token":
        return Labels(np.asarray(trace.token_ids, dtype=np.int64), ())
    if of == "position":
        buckets = np.log2(np.asarray(trace.positions) + 1).astype(np.int64)
        starts = [2**bucket - 1 for bucket in range(buckets.max(initial=-1) + 1)]
        return Labels(buckets, tuple(f"{start}-{2 * start}" if start else "0" for start in starts))
    domains = np.asarray(trace.domains, dtype=np.int64)
    if of == "domain":
        return Labels(domains, tuple(trace.domain_names))
    half = ("language", "topic").index(of)
    parts = [name.split("/")[half] if name.count("/") == 1 else None for name in trace.domain_names]
    names = tuple(dict.fromkeys(part for part in parts if part is not None))
    if not names:
        raise ValueError(f"{of}: no domain is named 'language/topic' among {list(trace.domain_names)}")
    of_domain = np.array([-1 if part is None else names.index(part) for part in parts] + [-1])
    return Labels(of_domain[domains], names)  # a domain of -1 finds the last entry


def labelled(trace: RoutingTrace, label: np.ndarray, of: str, fewest: int = 2) -> np.ndarray:
    """Which tokens have a label, [T] bool. Raises ValueError for fewer than so many labels, or two in one document."""
    kept = label >= 0
    found = np.unique(label[kept])
    if len(found) < fewest:
        names = labels(trace, of).names
        shown = [names[index] if names else int(index) for index in found]
        raise ValueError(f"{of}: the labelled tokens have {len(found)} values {shown}, wanted at least {fewest}")
    if of in DOCUMENT_LABELS:
        ids, first, numbered = np.unique(trace.documents[kept], return_index=True, return_inverse=True)
        other = np.flatnonzero(label[kept] != label[kept][first][numbered])
        if len(other):
            raise ValueError(f"document {ids[numbered[other[0]]]} has two labels of {of}: wanted one for each document")
    return kept


def fixed_label(trace: RoutingTrace, of: str, within: str | None) -> np.ndarray:
    """The label that a null for `of` may not change, [T]: its number from 1, 0 for none."""
    if within is None:
        return np.zeros(len(trace.documents), dtype=np.int64)
    if within == of or within not in DOCUMENT_LABELS:
        others = [label for label in DOCUMENT_LABELS if label != of]
        raise ValueError(f"within={within!r}: wanted one of {', '.join(others)}, to keep fixed while {of} is measured")
    if of not in DOCUMENT_LABELS:
        raise ValueError(f"within={within!r} with {of}: wanted one of {', '.join(DOCUMENT_LABELS)} to measure")
    fixed = labels(trace, within).values + 1
    labelled(trace, np.where(labels(trace, of).values < 0, -1, fixed), within, fewest=1)
    return fixed


def number_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The pairs of two labels from 0, numbered in their order, [T]."""
    return np.unique(a * (b.max() + 1) + b, return_inverse=True)[1]
