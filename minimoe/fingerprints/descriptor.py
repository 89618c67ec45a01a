"""A model in one kilobyte, to find its relatives among millions: bits of which relatives share more than strangers.

What it measures
    The tables A, OV and M of virtual_response.py over 256 fixed tokens, whitened and summed over layers: of two models
    that share layers, the sums share them too, whatever their number and order. The tables are multiplied by random
    signs and turned by Hadamard's matrix, which mixes all their numbers evenly; of each of 8192 of the numbers that
    result, the descriptor keeps whether it is above what it is in the mean stranger of the zoo. Such bits of two models
    agree with probability 1 - angle / pi (Charikar 2002, Similarity estimation techniques from rounding algorithms).
What leaves it unchanged
    Every gauge, up to bits whose number lies at the threshold; layers in another order.
What it cannot see
    What virtual responses cannot: layers moved into a model with other embeddings. One expert of many that was taken
    over is too little. Of models that can be read and not run, A and OV are read by role, and M where MLPs are dense;
    of mixtures among these M is left out.
Tokens
    Strings of ASCII that the tokenizer of the zoo and that of SmolLM2 both have, those with the smallest hashes. A
    model may lack some: their rows and columns are 0. Spaces are looked up as "Ġ" and as "▁".

Shapes: L layers, N = 256 tokens, n of them known to a model.
"""

import hashlib
import json
import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import hadamard
from torch import Tensor

from minimoe.data_files import data_path
from minimoe.fingerprints.anchors import read_anchors
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.virtual_response import FEWEST_KEPT, TABLES, read_responses, whitened
from minimoe.fingerprints.weights import Weights, on_the_cpu

VERSION = 1  # of all that a descriptor depends on: those of two versions are not to be compared
N, BITS = 256, 8192
WORDS = BITS // 64
RELATED = 0.32  # similarity from which on two models are related: the rule of verdict.py, from strangers 01 to 12
TOKENS, CENTRE = "fleet/tokens.json", "fleet/centre.npy"


def describe(weights: Weights) -> NDArray[np.uint64]:
    """The descriptor of a model, [128] uint64.

    Raises:
        CheckpointError: a file is missing or damaged.
        Refusal: fewer than 64 of the tokens are known, there is no head or no attention, or a table has no numbers.
    """
    return to_bits(sketch(summed(weights)))


def similarity(codes: NDArray[np.uint64], code: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The cosine that bits tell of: descriptors [..., 128] against one [128]; among strangers 0 give or take .017."""
    differing = np.bitwise_count(codes ^ code).sum(-1, dtype=np.int64)
    return np.cos(math.pi * differing / BITS)


@on_the_cpu()
@torch.no_grad()
def summed(weights: Weights) -> dict[str, Tensor]:
    """The tables that can be read of a model: whitened, summed over layers and of norm 1, [N, N] each."""
    known = _known_tokens(weights)
    places, names = torch.tensor(list(known)), list(known.values())
    if weights.config is not None:
        responses = read_responses(weights, names)
        tables = {name: torch.from_numpy(responses[name]) for name in TABLES}
    else:
        tables = _by_role(weights, names)
    found = {}
    for name, layers in tables.items():
        total = sum(whitened(name, table) for table in layers).view(len(names), -1)
        found[name] = torch.zeros(N, N)
        found[name][places[:, None], places] = total / total.norm()
    return found


def sketch(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """8192 numbers of each table, products with random vectors of signs [8192]."""
    turn = torch.from_numpy(hadamard(N)).float()
    return {name: (turn[: BITS // N] @ (_signs(name) * table) @ turn).flatten() for name, table in tables.items()}


def to_bits(sketches: dict[str, Tensor]) -> NDArray[np.uint64]:
    """Which of the sums over tables are above those of the mean stranger."""
    above = sum(found - _centre()[name] for name, found in sketches.items()) > 0
    return np.packbits(above.numpy()).view(np.uint64)


@cache
def _signs(name: str) -> Tensor:
    digest = hashlib.shake_256(f"minimoe descriptor {name}".encode()).digest(N * N // 8)
    return 2.0 * torch.from_numpy(np.unpackbits(np.frombuffer(digest, np.uint8)).reshape(N, N)).float() - 1


@cache
def _centre() -> dict[str, Tensor]:
    """The mean sketch of strangers of the zoo, by table (workshop/fleet_scale.py)."""
    centre = np.load(data_path(CENTRE)).astype(np.float32)
    return dict(zip(TABLES, torch.from_numpy(centre), strict=True))


@cache
def tokens() -> list[str]:
    """The N strings, as text."""
    return json.loads(data_path(TOKENS).read_text(encoding="utf-8"))


def _known_tokens(weights: Weights) -> dict[int, str]:
    """Place among the N -> what the model calls the token, of those that it has."""
    known = {}
    for place, text in enumerate(tokens()):
        names = (text.replace(" ", space) for space in "Ġ▁ ")
        name = next((name for name in names if name in weights.tokens), None)
        if name is not None:
            known[place] = name
    if len(known) < FEWEST_KEPT:
        raise Refusal(f"{weights.name}: {len(known)} of the tokens looked at are known, wanted at least {FEWEST_KEPT}")
    return known


def _by_role(weights: Weights, names: list[str]) -> dict[str, list[Tensor]]:
    """The tables as far as the roles of weights tell them, without positions, windows and norms within layers."""
    anchors = read_anchors(weights, names)
    tables: dict[str, list[Tensor]] = {name: [] for name in TABLES}

    def normed(role: str, layer: int) -> Tensor:
        return anchors.inputs * weights.get(role, layer) if weights.has(role, layer) else anchors.inputs

    for layer in weights.layers_with("k"):
        x = normed("norm1", layer)
        q, k, v = (_projected(weights, role, layer, x) for role in "qkv")
        heads, kv_heads = weights.heads(layer)
        asked = q.unflatten(1, (kv_heads, heads // kv_heads, -1)).sum(2)
        tables["A"].append(asked.flatten(1) @ k.mT)
        values = v.unflatten(1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=1)
        tables["OV"].append(values.flatten(1) @ weights.get("o", layer).mT @ anchors.outputs.mT)
    for layer in range(weights.num_layers):
        if all(weights.has(role, layer) and len(weights.shape(role, layer)) == 2 for role in ("gate", "up", "down")):
            x = normed("norm2", layer)
            inner = F.silu(x @ weights.get("gate", layer).mT) * (x @ weights.get("up", layer).mT)
            tables["M"].append(inner @ weights.get("down", layer).mT @ anchors.outputs.mT)
    return {name: layers for name, layers in tables.items() if layers}


def _projected(weights: Weights, role: str, layer: int, x: Tensor) -> Tensor:
    found = x @ weights.get(role, layer).mT
    return found + weights.get(f"{role}_bias", layer) if weights.has(f"{role}_bias", layer) else found
