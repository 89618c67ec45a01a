"""What each layer would answer if it were given single tokens (HuRef, corrected).

What it measures
    Per layer three N x N tables over shared tokens: A, how much each token attends to each, positions aside, by heads
    that count as much as they write; OV, what
    attending to a token says about the next one; M, the same for the MLP, where a mixture of experts is run as the
    function that it is. Inputs are normed embeddings, outputs are read by the head. Tables are compared by Pearson's r.
    `whiten=True` first gives all their directions equal weight: the strongest ones hold what strangers share.
What leaves it unchanged
    Every gauge, those of experts and routers included: it looks at functions, not at weights.
What it cannot see
    Models without shared tokens; layers moved into a model with other embeddings. It does see what strangers share: two
    models of one language answer alike, so that scores need a background of strangers trained on the same language.
Source
    Zeng et al. 2023, arXiv 2312.04828, which has A and OV without norms and biases; these, M and whitening are ours.

Shapes: D head size, H hidden size, L layers, N tokens.
"""

import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.fingerprints.anchors import mean_of_pairs, read_anchors, shared_tokens
from minimoe.fingerprints.audible import head_counts
from minimoe.fingerprints.result import Features, Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights, read_once

TABLES = ("A", "OV", "M")
SHRUNK = ("rows", "columns", "scale")  # what stands beside a table in float16
FEWEST_KEPT = 64  # tokens that two fingerprints must have in common
SMALLEST = 1e-4  # singular values below this share of the largest are rounding


@explain_refusals
def virtual_response(a: Weights, b: Weights, *, count: int | None = None, whiten: bool = False) -> Result:
    """Compare the answers of two models, of any shape.

    Args:
        count: how many shared tokens to use; None: as many as `shared_tokens` gives.
        whiten: compare the directions of the tables, whatever their weights.

    Returns:
        score: Pearson's r, mean of the three tables over paired layers.
        details: that mean for each table.
        refused: too few shared tokens; a layer answers all tokens alike.
    """
    tokens = shared_tokens(a, b, count)
    return compare_responses(*(read_responses(weights, tokens) for weights in (a, b)), whiten=whiten)


@read_once
@torch.no_grad()
def read_responses(weights: Weights, tokens: Sequence[str]) -> Features:
    """The tables "A", "OV" and "M" of every layer, [L, N, N] float32 each, and "tokens", in the bytes of JSON."""
    weights.require_config()
    anchors, block = read_anchors(weights, list(tokens)), None
    tables: dict[str, list[Tensor]] = {name: [] for name in TABLES}
    for layer in range(weights.num_layers):
        x = anchors.inputs * weights.get("norm1", layer)
        q, k = (_heads(weights, role, layer, x) for role in "qk")
        q = q * head_counts(weights)[layer][:, None]
        asked = q.unflatten(1, (weights.num_kv_heads, -1)).sum(2)  # the queries of a group share their key
        tables["A"].append(asked.flatten(1) @ k.flatten(1).mT)
        v = _heads(weights, "v", layer, x).repeat_interleave(weights.num_heads // weights.num_kv_heads, dim=1)
        tables["OV"].append(v.flatten(1) @ weights.get("o", layer).mT @ anchors.outputs.mT)
        x = (anchors.inputs * weights.get("norm2", layer))[None]
        block = weights.block(layer, "mlp.", over=block)
        written = block.mlp(x, anchors.ids[None])[0] if block.is_sparse else block.mlp(x)
        tables["M"].append(written[0] @ anchors.outputs.mT)
    names = np.frombuffer(json.dumps(list(tokens)).encode(), np.uint8)
    return {"tokens": names, **{name: torch.stack(found).numpy() for name, found in tables.items()}}


def tokens_of(responses: Features) -> list[str]:
    """The N tokens of the tables, in their order."""
    return json.loads(responses["tokens"].tobytes())


def shrink_responses(responses: Features) -> Features:
    """Tables in float16, as what is left of them without "A_rows" and "A_columns", their means, [L, N] float32.

    The means are where tables are large: rounded along with the rest, they would drown what whitening looks at.
    """
    small = {"tokens": responses["tokens"]}
    for name in TABLES:
        table = responses[name].astype(np.float64)
        rows, columns = table.mean(2), table.mean(1) - table.mean((1, 2))[:, None]
        left = table - rows[:, :, None] - columns[:, None]
        scale = np.abs(left).max((1, 2))
        small[name] = (left / np.where(scale > 0, scale, 1)[:, None, None]).astype(np.float16)
        for part, array in zip(SHRUNK, (rows, columns, scale), strict=True):
            small[f"{name}_{part}"] = array.astype(np.float32)
    return small


def compare_responses(a: Features, b: Features, *, whiten: bool = False) -> Result:
    """What `virtual_response` says of two models, from the tables of tokens that both have, at least 64."""
    ours, theirs = tokens_of(a), tokens_of(b)
    shared = [token for token in ours if token in set(theirs)]
    if len(shared) < FEWEST_KEPT:
        raise Refusal(f"{len(shared)} of the tokens looked at are the same: wanted at least {FEWEST_KEPT}")
    left, right = (
        directions(responses, [tokens.index(token) for token in shared], whiten=whiten)
        for responses, tokens in ((a, ours), (b, theirs))
    )
    scores = {name: left[name].double() @ right[name].double().mT for name in TABLES}  # of a quarter million products
    details = {name: mean_of_pairs(table) for name, table in scores.items()}
    score = mean_of_pairs(torch.stack(list(scores.values())).mean(0))
    return Result(score=score, details={"tokens": len(shared), **details})


def directions(responses: Features, kept: list[int], *, whiten: bool = False) -> dict[str, Tensor]:
    """The tables "A", "OV" and "M" of every layer, shrunk or not, flat, centred and of norm 1: [L, n * n] each.

    Args:
        kept: the places of n tokens among those of the tables.
        whiten: give all directions equal weight; rows and columns are centred too.
    """
    standardise, found = whitened if whiten else _standardise, {}
    for name in TABLES:
        tables = torch.from_numpy(responses[name]).double()
        if f"{name}_scale" in responses:
            rows, columns, scale = (torch.from_numpy(responses[f"{name}_{part}"]) for part in SHRUNK)
            tables = tables * scale[:, None, None] + rows[:, :, None] + columns[:, None]
        found[name] = torch.stack([standardise(name, table) for table in tables[:, kept][:, :, kept]])
    return found


def _heads(weights: Weights, role: str, layer: int, x: Tensor) -> Tensor:
    """Queries, keys or values [N, heads, D], normed and clipped as in the model."""

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights.get(f"{role}_norm", layer), config.rms_norm_eps)

    config, found = weights.config, x @ weights.get(role, layer).mT
    if weights.has(f"{role}_bias", layer):
        found = found + weights.get(f"{role}_bias", layer)
    normed = role != "v" and config.qk_norm
    if normed == "full":
        found = norm(found)
    if config.clip_qkv is not None:
        found = found.clamp(-config.clip_qkv, config.clip_qkv)
    heads = found.unflatten(1, (-1, weights.head_dim))
    return norm(heads) if normed == "head" else heads


def _standardise(name: str, table: Tensor) -> Tensor:
    flat = table.double().flatten()
    centred = flat - flat.mean()
    norm = centred.norm()
    if not norm > 1e-12 * flat.norm():
        raise Refusal(f"the response {name} of a layer is constant or not finite")
    return (centred / norm).float()


def whitened(name: str, table: Tensor) -> Tensor:
    """The sum of the products of left and right singular vectors, each pair weighing the same."""
    centred = _standardise(name, table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()).view_as(table)
    left, values, right = torch.linalg.svd(centred.double())
    kept = values > SMALLEST * values[0]
    flat = (left[:, kept] @ right[kept]).flatten()
    return (flat / flat.norm()).float()
