"""A quick look at two models: what a small part of their files tells, for files that are large or far away.

What it measures
    `last_attention`: how strongly some shared tokens attend to one another in the last layer, without positions: the
    table A of virtual_response.py, whitened, without its diagonal.
    `last_csu`: csu (independence.py) of the first 256 up rows of the last MLP; in a mixture, of their mean over the
    experts.
    Of a dense model of 7 billion parameters they read 1 byte in 200: the queries and keys of one layer, and some rows.
What leaves it unchanged
    last_attention: every gauge, any change of MLPs, and layers in the middle that are changed, added or left out.
    last_csu: what leaves csu unchanged.
What it cannot see
    Whatever lies elsewhere: where it finds nothing, the verdict is "cannot tell".

Shapes: H hidden size, I neurons of an MLP or expert, N tokens.
"""

from functools import cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from minimoe.data_files import data_path
from minimoe.fingerprints.anchors import FEWEST, USUAL, read_inputs
from minimoe.fingerprints.independence import compare_ups
from minimoe.fingerprints.result import Features, Refusal, Result, explain_refusals
from minimoe.fingerprints.virtual_response import whitened
from minimoe.fingerprints.weights import Weights, open_weights, read_once
from minimoe.fingerprints.zoo_scores import Rows

NEURONS = 256
LEAST = 1e-3  # of a whitened table of norm 1
STRANGERS = ("stranger-01", "stranger-13", "deep-1", "depth-init-1", "depth-init-2", "mixture-1")  # of the zoo


@explain_refusals
def last_attention(a: Weights, b: Weights) -> Result:
    """Compare whom tokens attend to in the last layers of two models, of any shape.

    Returns:
        score: Pearson's r of the whitened tables.
        refused: too few shared tokens; the layer answers all tokens alike, or each with itself.
    """
    tokens = neighbours(a, b)
    left, right = (read_attention(weights, tokens) for weights in (a, b))
    return Result(score=float(left @ right), details={"tokens": len(tokens)})


@explain_refusals
def last_csu(a: Weights, b: Weights) -> Result:
    """Test the order of up rows in the last layers of two models; what it returns and refuses is as of `csu`."""
    return compare_ups(read_last_ups(a), read_last_ups(b))


def neighbours(a: Weights, b: Weights, count: int = USUAL) -> list[str]:
    """Shared tokens of small ids, which stand side by side in both embeddings if the vocabularies are the same.

    The first eighth is left out: single bytes and tokens for special uses, some of which no text holds.
    """
    shared = sorted(a.tokens.keys() & b.tokens.keys(), key=lambda token: (a.tokens[token] + b.tokens[token], token))
    found = shared[len(shared) // 8 :][:count]
    if len(found) < FEWEST:
        raise Refusal(f"{len(shared)} shared tokens: wanted more, to look at {FEWEST} of them")
    return found


@read_once
@torch.no_grad()
def read_attention(weights: Weights, tokens: list[str]) -> Tensor:
    """How much each of the tokens attends to each other one in the last layer, whitened: [N * N - N], of norm 1.

    Each to itself is left out: whitened, the tables of any two models whose queries are like their keys have nothing
    but that.
    """
    layer = weights.layers_with("k")[-1]
    x, sides = read_inputs(weights, tokens), []
    if weights.has("norm1", layer):
        x = x * weights.get("norm1", layer)
    for role in "qk":
        found = x @ weights.get(role, layer).mT
        if weights.has(f"{role}_bias", layer):
            found = found + weights.get(f"{role}_bias", layer)
        if weights.has(f"{role}_norm", layer):
            norm = weights.get(f"{role}_norm", layer)
            found = found * norm.repeat(found.shape[1] // len(norm))  # of one head, or of all
        sides.append(found)
    heads, kv_heads = weights.heads(layer)
    asked = sides[0].unflatten(1, (kv_heads, heads // kv_heads, -1)).sum(2)  # the queries of a group share their key
    table = whitened("A", asked.flatten(1) @ sides[1].mT).view(len(tokens), -1)
    others = table[~torch.eye(len(tokens), dtype=torch.bool)].double()
    centred = others - others.mean()
    if centred.norm() < LEAST:
        raise Refusal(f"{weights.name}: in layer {layer}, tokens attend to themselves and to no other")
    return centred / centred.norm()


def read_last_ups(weights: Weights) -> Features:
    """The shape [I, H] of the last up matrix, and its first rows; the mean over the experts, if there are any."""
    layer = max((layer for layer in range(weights.num_layers) if weights.has("up", layer)), default=None)
    if layer is None:
        raise Refusal(f"{weights.name} has no MLP")
    rows = weights.first_rows("up", layer, NEURONS)
    if weights.has("norm2", layer):
        rows = rows * weights.get("norm2", layer)
    rows = rows if rows.dim() == 2 else rows.mean(0)
    return {"shapes": np.array([weights.shape("up", layer)[-2:]]), "0": rows.numpy()}


@cache
def scores_of_strangers() -> Rows:
    """Of every pair of shipped strangers of the zoo, all trained on the same text; their shapes make no difference."""
    models = [open_weights(data_path("zoo") / name) for name in STRANGERS]
    pairs = combinations(models, 2)
    return [{"shapes": "of all kinds", "last_attention": last_attention(*pair).score} for pair in pairs]
