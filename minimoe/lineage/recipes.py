"""What is done in the zoo, without training, to make one model from others, and the shapes of the roots.

A recipe is called with the models it starts from and its options, all of them plain values, so that a line of the tree
says everything. It may change the model it starts from.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from minimoe.lineage import derive, frame, plant, upcycling
from minimoe.lineage.gauge import GAUGES, all_gauges, fold_norms
from minimoe.model import MoEForCausalLM
from minimoe.training.presets import small_config

_DENSE = replace(small_config(experts=0), num_key_value_heads=2)
SHAPES = {
    "dense": _DENSE,
    "deep": replace(_DENSE, num_hidden_layers=8),
    "long": replace(_DENSE, num_hidden_layers=6),
    "wide": replace(_DENSE, hidden_size=128, intermediate_size=320),
    "untied": replace(_DENSE, tie_word_embeddings=False),
    "mixture": replace(
        _DENSE, num_experts=4, moe_intermediate_size=256, router_aux_loss_coef=0.01, model_type="mixtral"
    ),
}


def one_gauge(model: MoEForCausalLM, *, gauge: str, seed: int) -> MoEForCausalLM:
    """One of `GAUGES`; `rotate_residual` needs the norms folded first."""
    return GAUGES[gauge](fold_norms(model) if gauge == "rotate_residual" else model, seed=seed)


def frame_both(model: MoEForCausalLM, target: MoEForCausalLM) -> MoEForCausalLM:
    """The norms of `target` first, then its profile of standard deviations, which folding norms would change."""
    return frame.frame_std_profile(frame.frame_norms(model, target), target)


_PRUNED = derive.prune_neurons, derive.prune_heads, derive.prune_layers
_RESHAPED = derive.depth_upscale, derive.extend_vocabulary, derive.quantise
_MERGED = derive.lerp, derive.slerp, derive.graft_mlps, upcycling.upcycle, upcycling.transplant_expert
_REWRITTEN = one_gauge, all_gauges, frame.frame_std_profile, frame.frame_norms, frame_both, frame.frame_neuron_order
_PLANTED = plant.plant_dead_neurons, plant.plant_cancelling_neurons, plant.plant_dead_heads
_PLANTED += plant.plant_cancelling_heads, plant.plant_unreached_expert, plant.plant_embedding_rows
INSTANT: Mapping[str, Callable[..., MoEForCausalLM]] = {
    recipe.__name__: recipe for recipe in (*_PRUNED, *_RESHAPED, *_MERGED, *_REWRITTEN, *_PLANTED)
} | {  # which take their models as a list
    "merge_by_ties": lambda base, *models, density: derive.ties(base, models, density=density),
    "mix_branches": lambda *parents, **options: upcycling.branch_train_mix(parents, **options),
}
