"""A descriptor is left alone by gauges, near for relatives and far for strangers, whatever their shapes."""

import numpy as np
import pytest
import torch

from minimoe.fingerprints import descriptor
from minimoe.fingerprints.descriptor import BITS, describe, similarity, sketch, summed, to_bits
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.virtual_response import TABLES
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.upcycling import upcycle
from tests.fingerprints.toys import KINDS, disturbed, random_model


class Vocabulary:
    """The tokens that are looked at, with spaces as another tokenizer writes them, `missing` of them left out."""

    def __init__(self, space="Ġ", missing=0, size=300):
        names = [text.replace(" ", space) for text in descriptor.tokens()]
        self._tokens = dict(list(zip(names, reversed(range(size)), strict=False))[missing:])

    def get_vocab(self):
        return self._tokens


def weights(model, **vocabulary):
    return open_weights(model, tokenizer=Vocabulary(**vocabulary))


def model_of(seed=0, **settings):
    return random_model(seed, **{"vocab_size": 300, "num_hidden_layers": 2} | settings)


@pytest.fixture(autouse=True)
def without_a_centre(monkeypatch):
    """Toys of random weights have nothing in common that the centre would take out."""
    monkeypatch.setattr(descriptor, "_centre", lambda: {name: torch.zeros(BITS) for name in TABLES})


@pytest.mark.parametrize("kind", ["dense, norm of each head", "mixture, every second layer", "mixture in groups"])
def test_gauges_leave_it_alone_and_strangers_are_far(kind):
    model = model_of(**KINDS[kind])
    code = describe(weights(model))
    assert code.shape == (128,) and code.dtype == np.uint64
    assert similarity(describe(weights(all_gauges(model, 1))), code) > 0.999
    assert abs(similarity(describe(weights(model_of(1, **KINDS[kind]))), code)) < 0.1


def test_relatives_of_other_shapes():
    model = model_of(num_hidden_layers=4)
    code = describe(weights(model))
    relatives = {
        "disturbed": (disturbed(model, 0.1), 0.6),
        "fewer layers": (prune_layers(model, [1]), 0.8),
        "upcycled": (upcycle(model, num_experts=4, num_experts_per_tok=2, model_type="minimoe"), 0.999),
    }
    for name, (relative, least) in relatives.items():
        assert similarity(describe(weights(relative)), code) > least, name


def test_other_vocabularies():
    """Words are the same whatever a tokenizer writes for a space; what is missing costs no more than its share."""
    model = model_of()
    code = describe(weights(model))
    assert similarity(describe(weights(model, space="▁")), code) > 0.9999
    lacking = similarity(describe(weights(model, missing=40)), code)
    assert 0.5 < lacking < 0.999
    with pytest.raises(Refusal, match="56 of the tokens looked at are known, wanted at least 64"):
        describe(weights(model, missing=200))


def test_a_sketch_keeps_cosines():
    """Against the tables that it was made of: products with signs that are as if drawn at random."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 256, 256, generator=generator) for _ in range(2))
    for shared in (0.0, 0.3, 0.9):
        pair = one, shared * one + (1 - shared**2) ** 0.5 * other
        tables = [{name: table / table.norm() for name, table in zip(TABLES, each, strict=True)} for each in pair]
        found = float(similarity(*(to_bits(sketch(each)) for each in tables)))
        assert found == pytest.approx(shared, abs=0.06)


def test_a_sketch_against_the_sum_that_it_stands_for():
    table = torch.zeros(256, 256)
    table[3, 5] = 1.0
    found = sketch({"A": table})["A"].view(-1, 256)
    row, column = torch.arange(BITS // 256), torch.arange(256)
    parity = [[bin(int(i) & at).count("1") % 2 for i in places] for places, at in ((row, 3), (column, 5))]
    expected = (1.0 - 2 * torch.tensor(parity[0]))[:, None] * (1.0 - 2 * torch.tensor(parity[1]))[None]
    assert torch.allclose(found / found[0, 0], expected)


def test_models_that_can_only_be_read():
    """By role, a dense model has the tables that it has when it is run."""
    opened = weights(model_of())
    run = summed(opened)
    opened.config, opened.reason = None, "a test"
    opened.kept.clear()
    for name, table in summed(opened).items():
        assert torch.allclose(table, run[name], atol=1e-4), name


def test_a_mixture_that_can_only_be_read_has_no_mlps():
    opened = weights(model_of(num_experts=4))
    opened.config, opened.reason = None, "a test"
    assert summed(opened).keys() == {"A", "OV"}
