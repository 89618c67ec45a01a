"""What the page "Explore a claim" shows: two models of the zoo, what strangers score, and three pairs to be judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from minimoe.fingerprints.anchors import shared_tokens
from minimoe.fingerprints.compare import background_of_the_zoo, compare, run_methods
from minimoe.fingerprints.verdict import RARE_P
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.frame import frame_neuron_order, frame_norms, frame_std_profile
from minimoe.lineage.gauge import mix_vo, permute_neurons, permute_residual, scale_neurons, scale_qk
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from workshop.packing import pack, pack_tokenizer

ORIGINAL, STRANGER = "alder", "stranger-13"
SHOWN = ("std_profile", "norm_profile", "csu", "virtual_response_whitened")  # of METHODS
_GAUGES = (permute_residual, scale_qk, mix_vo, permute_neurons, scale_neurons)


class Pair(NamedTuple):
    """A model to be judged beside ORIGINAL: a member of the zoo, what is done to it, and what is said afterwards."""

    member: str
    change: Callable[[MoEForCausalLM, MoEForCausalLM], MoEForCausalLM]
    truth: str


def _hide(model: MoEForCausalLM, _: MoEForCausalLM) -> MoEForCausalLM:
    for seed, gauge in enumerate(_GAUGES):
        model = gauge(model, seed=seed)
    return model


PAIRS = (
    Pair(
        "stranger-01",
        lambda model, original: frame_std_profile(frame_norms(model, original), original),
        "B is a stranger that was given A's norm weights and A's std profile. Both numbers can be forged; the two "
        "others are those of any stranger.",
    ),
    Pair(
        "alder-finetuned",
        _hide,
        "B is A, fine-tuned, then rewritten: its dimensions and neurons were shuffled, its attention and neurons "
        "scaled. Three numbers are gone. The whitened response looks at what the layers answer, and no rewrite "
        "changes that.",
    ),
    Pair(
        "birch",
        frame_neuron_order,
        "B is a stranger whose neurons were put in the order of those of A. The p-value assumes that nobody chose the "
        "order, so it may not decide alone; one expert taken over from A would look the same.",
    ),
)


def claim_data() -> dict[str, Any]:
    """All that the page needs, as plain values."""
    original, stranger = (Zoo().load(name) for name in (ORIGINAL, STRANGER))
    weights = open_weights(original)
    tokens = shared_tokens(weights, open_weights(stranger))
    return {
        "original": pack(original),
        "stranger": pack(stranger),
        "tokenizer": pack_tokenizer(original.tokenizer_json),
        "tokens": [weights.tokens[token] for token in tokens],
        "strangers": _strangers(original),
        "pairs": [_judged(original, pair) for pair in PAIRS],
    }


def _strangers(original: MoEForCausalLM) -> dict[str, float]:
    """The highest score of each method among strangers of the zoo; of csu, the p-value where evidence begins."""
    weights = open_weights(original)
    known = background_of_the_zoo(weights, weights).scores
    return {name: RARE_P if name == "csu" else max(known[name]) for name in SHOWN}


def _judged(original: MoEForCausalLM, pair: Pair) -> dict[str, Any]:
    """The scores, the verdict of `compare`, and the truth."""
    model = pair.change(Zoo().load(pair.member).double(), original.double())
    sides = open_weights(original), open_weights(model)
    found = run_methods(*sides, SHOWN)
    scores = {name: found[name].p_value if name == "csu" else found[name].score for name in SHOWN}
    return {"scores": scores, "verdict": compare(*sides).verdict, "truth": pair.truth}
