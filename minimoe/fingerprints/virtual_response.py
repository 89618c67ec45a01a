"""What each layer would answer if it were given single tokens (HuRef, corrected).

What it measures
    Per layer three N x N tables over shared tokens: A, how much each token attends to each, positions aside; OV, what
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

There is no p-value: compare the score with those of strangers. Shapes: D head size, H hidden size, L layers, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimoe.fingerprints.anchors import USUAL, Anchors, mean_of_pairs, read_anchors, shared_tokens
from minimoe.fingerprints.result import Refusal, Result
from minimoe.fingerprints.weights import Weights

SMALLEST = 1e-4  # singular values below this share of the largest are rounding


def virtual_response(a: Weights, b: Weights, *, count: int = USUAL, whiten: bool = False) -> Result:
    """Compare the answers of two models.

    Args:
        a: one model.
        b: the other, of any shape.
        count: how many shared tokens to use.
        whiten: compare the directions of the tables, whatever their weights.

    Returns:
        score: Pearson's r, mean of the three tables over paired layers.
        details: that mean for each table.
        refused: too few shared tokens; a layer answers all tokens alike.
    """
    method = "virtual_response_whitened" if whiten else "virtual_response"
    try:
        tokens = shared_tokens(a, b, count)
        ours, theirs = (responses(weights, read_anchors(weights, tokens), whiten=whiten) for weights in (a, b))
    except Refusal as reason:
        return Result(method=method, refused=str(reason))
    scores = {name: ours[name] @ theirs[name].mT for name in ours}
    details = {name: mean_of_pairs(table) for name, table in scores.items()}
    score = mean_of_pairs(torch.stack(list(scores.values())).mean(0))
    return Result(method=method, score=score, details={"tokens": len(tokens), **details})


@torch.no_grad()
def responses(weights: Weights, anchors: Anchors, *, whiten: bool = False) -> dict[str, Tensor]:
    """The tables "A", "OV" and "M" of every layer, flat, centred and of norm 1: [L, N * N] each.

    Whitened, rows and columns are centred too.

    Raises:
        Refusal: a table is constant or not finite.
    """
    model = weights.model()
    tables: dict[str, list[Tensor]] = {"A": [], "OV": [], "M": []}
    for layer, block in enumerate(model.model.layers):
        x = anchors.inputs * weights.get("norm1", layer)
        tables["A"].append(_attention(weights, layer, x))
        tables["OV"].append(_values(weights, layer, x) @ anchors.outputs.mT)
        x = (anchors.inputs * weights.get("norm2", layer))[None].to(model.model.embed_tokens.weight)
        written = block.mlp(x, anchors.ids[None])[0] if block.is_sparse else block.mlp(x)
        tables["M"].append(written[0].to(anchors.outputs) @ anchors.outputs.mT)
    standardise = _whiten if whiten else _standardise
    return {name: torch.stack([standardise(name, table) for table in found]) for name, found in tables.items()}


def _attention(weights: Weights, layer: int, x: Tensor) -> Tensor:
    """Sum over heads of the products of queries and keys at one position, [N, N]."""
    q, k = (_heads(weights, role, layer, x) for role in "qk")
    return q.unflatten(1, (weights.num_kv_heads, -1)).sum(2).flatten(1) @ k.flatten(1).mT


def _values(weights: Weights, layer: int, x: Tensor) -> Tensor:
    """What attention writes if each token attends to itself, [N, H]."""
    v = _heads(weights, "v", layer, x)
    return v.repeat_interleave(weights.num_heads // weights.num_kv_heads, dim=1).flatten(1) @ weights.get("o", layer).mT


def _heads(weights: Weights, role: str, layer: int, x: Tensor) -> Tensor:
    """Queries, keys or values [N, heads, D], normed and clipped as in the model."""
    config, found = weights.config, x @ weights.get(role, layer).mT
    if weights.has(f"{role}_bias", layer):
        found = found + weights.get(f"{role}_bias", layer)
    normed = role != "v" and config.qk_norm
    if normed == "full":
        found = _norm(found, weights, role, layer)
    if config.clip_qkv is not None:
        found = found.clamp(-config.clip_qkv, config.clip_qkv)
    heads = found.unflatten(1, (-1, weights.head_dim))
    return _norm(heads, weights, role, layer) if normed == "head" else heads


def _norm(x: Tensor, weights: Weights, role: str, layer: int) -> Tensor:
    return torch.nn.functional.rms_norm(
        x, x.shape[-1:], weights.get(f"{role}_norm", layer), weights.config.rms_norm_eps
    )


def _standardise(name: str, table: Tensor) -> Tensor:
    flat = table.double().flatten()
    centred = flat - flat.mean()
    norm = centred.norm()
    if not norm > 1e-12 * flat.norm():
        raise Refusal(f"the response {name} of a layer is constant or not finite")
    return (centred / norm).float()


def _whiten(name: str, table: Tensor) -> Tensor:
    """The sum of the products of left and right singular vectors, each pair weighing the same."""
    centred = _standardise(name, table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()).view_as(table)
    left, values, right = torch.linalg.svd(centred.double())
    kept = values > SMALLEST * values[0]
    flat = (left[:, kept] @ right[kept]).flatten()
    return (flat / flat.norm()).float()
