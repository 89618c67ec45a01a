"""What two models have in common before any is known to descend from the other: tokens, and an order of layers.

A token that both vocabularies hold under the same string is an anchor. Its embedding row is where the residual stream
starts, its row of the head is where it ends: what a layer does between anchors can be compared whatever basis either
model keeps its weights in.

Shapes: H hidden size, L layers, N anchors, V vocabulary.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import Weights, read_once

FEWEST, USUAL = 128, 256
WIDE = 512  # models of a larger hidden size are looked at by smaller samples


class Anchors(NamedTuple):
    """The anchors as one model sees them."""

    ids: Tensor  # [N] int64
    inputs: Tensor  # Z [N, H]: rows of the embedding, each divided by its root mean square
    outputs: Tensor  # U [N, H]: rows of the head, times the weight of the final norm


def is_wide(*models: Weights) -> bool:
    """Whether one of them is wider than all of the zoo by far, and takes long."""
    return max(weights.hidden_size for weights in models) > WIDE


def shared_tokens(a: Weights, b: Weights, count: int | None = None, *, fewest: int = FEWEST) -> list[str]:
    """Up to `count` token strings that both models have, in an order that depends on the strings alone.

    None: 256; 128 of wide models, where correlations over tokens are known to .09 instead of .06.

    The order is that of their hashes: frequent and rare tokens are taken alike, the same ones whichever model comes
    first, and nearly the same ones whatever else the other vocabulary holds.

    Raises:
        Refusal: fewer than `fewest` are shared.
    """
    if count is None:
        count = FEWEST if is_wide(a, b) else USUAL
    return choose_tokens(a.tokens.keys() & b.tokens.keys(), count, fewest)


def choose_tokens(shared: Iterable[str], count: int, fewest: int) -> list[str]:
    """Up to `count` of some tokens, those with the smallest hashes; fewer than `fewest` are refused."""
    shared = sorted(shared, key=_hash)
    if len(shared) < fewest:
        raise Refusal(f"{len(shared)} shared tokens: wanted at least {fewest}, to compare what the models do with them")
    return shared[:count]


@lru_cache(maxsize=2**18)  # of a vocabulary, several methods ask for the same
def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


@read_once
def read_anchors(weights: Weights, tokens: list[str]) -> Anchors:
    """The rows of `tokens` in embedding and head; a model without a head, such as an encoder, is refused."""
    weights.require_decoder()
    if not weights.has("head"):
        raise Refusal(f"{weights.name} has no head")
    ids = [weights.tokens[token] for token in tokens]
    outputs = weights.rows("head", ids)
    if weights.has("norm_final"):  # the norm of the first OLMo has no weights
        outputs = outputs * weights.get("norm_final")
    return Anchors(torch.tensor(ids), read_inputs(weights, tokens), outputs)


def read_embedding(weights: Weights, tokens: list[str]) -> Tensor:
    """The rows of `tokens` in the embedding, [N, H]."""
    return weights.rows("embedding", [weights.tokens[token] for token in tokens])


def read_inputs(weights: Weights, tokens: list[str]) -> Tensor:
    """`read_embedding`, each row divided by its root mean square: Z [N, H].

    A row of 0, such as that of padding, stays as it is; if all are 0, they are refused.
    """
    rows = read_embedding(weights, tokens)
    sizes = rows.square().mean(1, keepdim=True).sqrt()
    if not sizes.isfinite().all() or not sizes.any():
        raise Refusal(f"embedding of {weights.name}: 0 or not finite")
    return rows / sizes.where(sizes > 0, 1.0)


def candidate_pairs(depth: int, other: int) -> list[tuple[int, int]]:
    """The pairs of layers whose scores `pair_layers` looks at: the same index, or all of them if depths differ."""
    return [(i, j) for i in range(depth) for j in range(other) if i == j or depth != other]


def pair_layers(scores: Tensor) -> list[tuple[int, int]]:
    """Which layer goes with which, given `scores` [L, L'] of all pairs: the same index, or aligned if L != L'."""
    rows, columns = scores.shape
    return [(layer, layer) for layer in range(rows)] if rows == columns else align_layers(scores)


def mean_of_pairs(scores: Tensor) -> float:
    """The mean score of paired layers; a layer of the shallower model that is left without a partner counts 0."""
    return sum(float(scores[pair]) for pair in pair_layers(scores)) / min(scores.shape)


def align_layers(scores: Tensor, gap: float = 0.05) -> list[tuple[int, int]]:
    """Pairs of layers, in order in both models, of the largest sum of `scores` [L, L'] less `gap` per layer left out.

    Dynamic programming over prefixes (Needleman & Wunsch 1970), as used on layers by GhostSpec (arXiv 2511.06390).
    """
    rows, columns = scores.shape
    best = torch.zeros(rows + 1, columns + 1, dtype=torch.float64)  # of the first i and the first j layers
    best[:, 0] = -gap * torch.arange(rows + 1)
    best[0, :] = -gap * torch.arange(columns + 1)
    for i in range(rows):
        for j in range(columns):
            left_out = torch.maximum(best[i, j + 1], best[i + 1, j]) - gap
            best[i + 1, j + 1] = torch.maximum(best[i, j] + scores[i, j], left_out)
    pairs, i, j = [], rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j] - gap:
            i -= 1
        elif best[i, j] == best[i, j - 1] - gap:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]
