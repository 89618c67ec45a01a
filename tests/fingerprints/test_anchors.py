"""Anchors go by token string, not by id; layers are aligned as brute force aligns them."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from minimoe.fingerprints.anchors import align_layers, mean_of_pairs, pair_layers, read_anchors, shared_tokens
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import open_weights
from tests.fingerprints.toys import Vocabulary, random_model, weights


class Renamed(Vocabulary):
    def __init__(self, tokens):
        self._tokens = tokens


def test_tokens_are_matched_by_string():
    """The rows of another order are read as the same anchors."""
    model = random_model()
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    moved = random_model()
    with torch.no_grad():
        for rows in (moved.model.embed_tokens.weight, moved.lm_head.weight):
            rows.copy_(rows[order].clone())
    a = weights(model)
    b = open_weights(moved, tokenizer=Renamed({f"t{int(old)}": new for new, old in enumerate(order)}))
    tokens = shared_tokens(a, b, 140)
    assert tokens == shared_tokens(b, a, 140) and len(set(tokens)) == 140
    assert tokens[:130] == shared_tokens(a, b, 130)
    ours, theirs = read_anchors(a, tokens), read_anchors(b, tokens)
    assert_close(ours.inputs, theirs.inputs)
    assert_close(ours.outputs, theirs.outputs)
    assert not torch.equal(ours.ids, theirs.ids)


def test_what_anchors_are():
    model = random_model()
    anchors = read_anchors(weights(model), ["t7", "t3"])
    assert anchors.ids.tolist() == [7, 3]
    assert_close(anchors.inputs.square().mean(1), torch.ones(2))
    hidden = torch.randn(24, dtype=torch.float64)
    assert_close(anchors.outputs.double() @ hidden, (model.lm_head.weight @ (model.model.norm.weight * hidden))[[7, 3]])


def test_refusals():
    a = weights(random_model())
    with pytest.raises(Refusal, match="0 shared tokens: wanted at least 128"):
        shared_tokens(a, weights(random_model(), prefix="other"))
    empty = random_model()
    empty.model.embed_tokens.weight.data[5] = 0
    assert not read_anchors(weights(empty), ["t5", "t6"]).inputs[0].any()  # as padding often is
    with pytest.raises(Refusal, match=r"embedding of .*: 0 or not finite"):
        read_anchors(weights(empty), ["t5"])
    empty.model.embed_tokens.weight.data[6, 0] = torch.nan
    with pytest.raises(Refusal, match=r"embed_tokens\.weight: nan at \[6, 0\], wanted finite numbers"):
        read_anchors(weights(empty), ["t5", "t6"])


def brute_force(scores, gap):
    """The best value over all monotone pairings."""
    rows, columns = scores.shape
    values = []
    for size in range(min(rows, columns) + 1):
        for left in combinations(range(rows), size):
            for right in combinations(range(columns), size):
                matched = sum(float(scores[pair]) for pair in zip(left, right, strict=True))
                values.append(matched - gap * (rows + columns - 2 * size))
    return max(values)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), gap=st.floats(0, 0.5), seed=st.integers(0, 999))
def test_alignment_against_brute_force(rows, columns, gap, seed):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    pairs = align_layers(scores, gap)
    assert all(i < k and j < m for (i, j), (k, m) in pairwise(pairs))
    value = sum(float(scores[pair]) for pair in pairs) - gap * (rows + columns - 2 * len(pairs))
    assert value == pytest.approx(brute_force(scores, gap), abs=1e-6)


def test_depths_that_differ():
    scores = torch.eye(5)[[0, 2, 3]]
    assert pair_layers(scores) == [(0, 0), (1, 2), (2, 3)] and mean_of_pairs(scores) == 1
    assert pair_layers(scores[:, :3]) == [(0, 0), (1, 1), (2, 2)]  # of equal depth: not aligned
    assert mean_of_pairs(-torch.ones(2, 3)) == 0  # nothing is worth pairing
