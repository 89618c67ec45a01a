"""Derivations of models that do not lie where the default device says: "meta", where no number could be kept."""

import torch

from minimoe.lineage import GAUGES, all_gauges, frame_neuron_order, frame_norms, frame_std_profile, upcycle
from minimoe.lineage.derive import (
    average,
    depth_upscale,
    extend_vocabulary,
    lerp,
    prune_heads,
    prune_layers,
    prune_neurons,
    quantise,
    slerp,
    ties,
)
from minimoe.lineage.gauge import obstacle
from minimoe.lineage.upcycling import METHODS, branch_train_mix, transplant_expert
from minimoe.model import MoEConfig, MoEForCausalLM

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def dense(seed: int = 0) -> MoEForCausalLM:
    config = MoEConfig(**SIZES, num_experts=0, num_key_value_heads=2, model_type="llama")
    with torch.device("cpu"):
        return MoEForCausalLM(config, seed=seed)


def mixture(seed: int = 0) -> MoEForCausalLM:
    with torch.device("cpu"):
        return MoEForCausalLM(MoEConfig(**SIZES, num_experts=4, model_type="mixtral"), seed=seed)


DERIVATIONS = {
    "average": lambda: average([dense(), dense(1)]),
    "lerp": lambda: lerp(dense(), dense(1), 0.3),
    "slerp": lambda: slerp(dense(), dense(1), 0.3),
    "ties": lambda: ties(dense(), [dense(1), dense(2)]),
    "prune_neurons": lambda: prune_neurons(mixture(), 0.5),
    "prune_heads": lambda: prune_heads(dense(), 1),
    "prune_layers": lambda: prune_layers(dense(), [1]),
    "depth_upscale": lambda: depth_upscale(dense(), 1),
    "extend_vocabulary": lambda: extend_vocabulary(dense(), 3),
    "quantise": lambda: quantise(mixture(), 4),
    "frame_norms": lambda: frame_norms(dense(), dense(1)),
    "frame_std_profile": lambda: frame_std_profile(dense(), dense(1)),
    "frame_neuron_order": lambda: frame_neuron_order(dense(), dense(1)),
    "branch_train_mix": lambda: branch_train_mix([dense(), dense(1)], num_experts_per_tok=1),
    "transplant_expert": lambda: transplant_expert(mixture(), dense(), layer=0, expert=1),
    "all_gauges": lambda: all_gauges(mixture(), 1),
}
DERIVATIONS |= {
    f"upcycle by {method}": lambda method=method: upcycle(
        dense(), num_experts=4, num_experts_per_tok=2, method=method, noise=0.1
    )
    for method in METHODS
}
DERIVATIONS |= {
    name: lambda gauge=gauge: gauge(mixture(), seed=1)
    for name, gauge in GAUGES.items()
    if obstacle(name, mixture().config) is None
}


def test_derivations_follow_their_models_and_not_the_default():
    """The models lie on the CPU; what is made of them has to come out there, with the same numbers."""
    for name, derive in DERIVATIONS.items():
        wanted = derive().state_dict()
        with torch.device("meta"):
            found = derive().state_dict()
        assert {tensor.device.type for tensor in found.values()} == {"cpu"}, name
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[key])
