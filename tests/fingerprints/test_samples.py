"""Wide models are looked at by samples. The zoo is not wide: here samples are made so small that they count there."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

from minimoe.data_files import data_path
from minimoe.fingerprints import aligned_cka, anchors, behaviour, expert_attribution, independence, matching
from minimoe.fingerprints.behaviour import hidden_cka
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.folded import even_steps
from minimoe.fingerprints.independence import match
from minimoe.fingerprints.verdict import NO_EVIDENCE, SHARED
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.gauge import all_gauges
from minimoe.model import MoEForCausalLM
from minimoe.training.tokenizer import load_tokenizer
from tests.fingerprints.toys import random_model, weights

SMALL = {
    anchors: {"WIDE": 64},
    aligned_cka: {"MOST_SAMPLES": 48},
    matching: {"WIDE": 64, "MOST": 64, "MOST_OF_A_LAYER": 128, "FEWEST": 32},
    expert_attribution: {"GLANCE_OF_WIDE": 16},
    independence: {"MOST_NEURONS": 100, "MOST_EXPERTS": 2},
    behaviour: {"USUAL_OF_WIDE": 64},
}


@pytest.fixture
def small_samples():
    with ExitStack() as stack:
        for module, sizes in SMALL.items():
            stack.enter_context(patch.multiple(module, **sizes))
        yield


def rewritten(name):
    """A member of the zoo after all gauges: heads, neurons, experts and the residual stream are permuted or turned."""
    model = MoEForCausalLM.from_pretrained(data_path("zoo") / name, dtype=torch.float32)
    return open_weights(all_gauges(model, 4), tokenizer=load_tokenizer())


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("alder", "alder-finetuned", SHARED),
        ("alder", "alder-sliced-trained", SHARED),
        ("alder", "alder-drop-0.5-trained", SHARED),
        ("alder", "stranger-13", NO_EVIDENCE),
        ("alder", "deep-1", NO_EVIDENCE),
        ("birch", "alder-drop-0.5-trained", NO_EVIDENCE),
    ],
)
def test_small_samples_lead_to_the_same_verdicts(a, b, verdict, small_samples):
    """These are the verdicts of all neurons, tokens and dimensions."""
    for other in (data_path("zoo") / b, rewritten(b)):
        assert compare(data_path("zoo") / a, other).verdict == verdict


def test_few_prompts_tell_what_many_do(small_samples):
    """Unbiased, so that a quarter of the prompts gives the same but for noise."""
    root, others = data_path("zoo") / "alder", [data_path("zoo") / name for name in ("alder-finetuned", "stranger-13")]
    for other in map(open_weights, others):
        few, many = (hidden_cka(open_weights(root), other, **prompts) for prompts in ({}, {"prompts": 256}))
        assert few.details["prompts"] == 64
        assert few.score == pytest.approx(many.score, abs=0.1)


def test_of_the_narrower_mlps_as_many_neurons_are_read_as_are_looked_for(small_samples):
    """Of a mixture of three and a shared expert 42, or of each, in even steps; of the dense model all."""
    mixture, dense = (
        weights(random_model(seed, intermediate_size=96, **settings))
        for seed, settings in enumerate(
            ({"num_experts": 3, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 80}, {})
        )
    )
    tokens = anchors.shared_tokens(mixture, dense)
    whole = [matching.read_token_features(side, tokens) for side in (mixture, dense)]
    thin, full = matching.read_both_features(mixture, dense, tokens)
    for place, features in thin.items():
        assert torch.equal(features, whole[0][place][:, even_steps(whole[0][place].shape[1], 42)])
    assert all(torch.equal(features, whole[1][place]) for place, features in full.items())
    assert [found.keys() for found in matching.read_both_features(dense, mixture, tokens)] == [full.keys(), thin.keys()]
    assert match(dense, mixture).score is not None


def test_dimensions_that_are_samples_give_what_all_of_them_give(small_samples):
    """Of random weights, whose CKA is 0 whatever the samples are, and of equal ones, where it is 1."""
    one, other = (weights(random_model(seed, hidden_size=96, vocab_size=400)) for seed in (1, 2))
    with patch.object(aligned_cka, "MOST_SAMPLES", 40):
        for canonicalize in (True, False):
            assert aligned_cka.aligned_cka(one, one, canonicalize=canonicalize).score == pytest.approx(1, abs=1e-4)
            assert abs(aligned_cka.aligned_cka(one, other, canonicalize=canonicalize).score) < 0.1
