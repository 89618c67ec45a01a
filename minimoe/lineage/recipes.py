"""What is done in the zoo to make one model from others.

A recipe is called with the models it starts from and its options, all of them plain values, so that a line of the tree
says everything. Those in `TRAINED` also take `out`, a folder in which training keeps its state, or None; a `corpus`,
"real" or "planted"; and what `minimoe.training.Settings` has. They may change the model they start from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minimoe.lineage.derive import (
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
from minimoe.lineage.frame import frame_neuron_order, frame_norms, frame_std_profile
from minimoe.lineage.gauge import GAUGES, all_gauges, fold_norms
from minimoe.lineage.upcycling import branch_train_mix, transplant_expert, upcycle
from minimoe.model import MoEForCausalLM
from minimoe.model.transformer import CausalLMOutput
from minimoe.training import Corpus, train
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


# --- with training ----------------------------------------------------------------------------------------


def from_scratch(
    *, out: Path | None, shape: str = "dense", initialisation: str = "usual", weights: int, **settings: Any
) -> MoEForCausalLM:
    """Train a model from random weights, drawn with the seed `weights`.

    Args:
        out: see the head of this file, as for **settings.
        shape: a key of `SHAPES`.
        initialisation: "usual", or "by depth": standard deviation 1 / sqrt(2 fan_in (l + 1)) in layer l from 0.
        weights: the seed of the random weights.
    """
    model = MoEForCausalLM(SHAPES[shape], seed=weights)
    if initialisation == "by depth":
        _scale_by_depth(model)
    return keep_training(model, out=out, **settings)


def keep_training(parent: MoEForCausalLM, *, out: Path | None, corpus: str = "real", **settings: Any) -> MoEForCausalLM:
    """Train all weights: fine-tuning on another corpus, continued pretraining on the same."""
    train(parent, open_corpus(corpus), out=out, **settings)
    return parent


def train_lora(
    parent: MoEForCausalLM, *, out: Path | None, corpus: str, rank: int, seed: int, **settings: Any
) -> MoEForCausalLM:
    """Train low-rank updates of the attention matrices and add them (LoRA: Hu et al. 2021, arXiv 2106.09685, 4).

    W + B A, with A [rank, in] random and B [out, rank] 0 at first. Everything else is frozen. `seed` is that of A and
    of the batches. `out` is not used: the updates are not a model, and so cannot be resumed.
    """
    parent.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    attentions = [block.self_attn for block in parent.model.layers]
    adapted = [linear for attention in attentions for linear in attention.children() if isinstance(linear, nn.Linear)]
    for linear in adapted:
        parametrize.register_parametrization(linear, "weight", _LowRank(linear.weight, rank, generator))
    train(parent, open_corpus(corpus), seed=seed, weight_decay=0.0, **settings)
    for linear in adapted:
        parametrize.remove_parametrizations(linear, "weight")
    return parent.requires_grad_(True)


def distil(teacher: MoEForCausalLM, *, out: Path | None, weights: int, **settings: Any) -> MoEForCausalLM:
    """Train a model from random weights on what the teacher predicts (Hinton et al. 2015, arXiv 1503.02531, section 2).

    The student has the teacher's shape and none of its weights; `weights` is the seed of its own. The temperature is 1.
    """
    return keep_training(_Student(teacher, weights), out=out, **settings)


class _LowRank(nn.Module):
    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class _Student(MoEForCausalLM):
    """Its loss is the cross-entropy with the teacher's probabilities of the next token."""

    def __init__(self, teacher: MoEForCausalLM, weights: int) -> None:
        super().__init__(teacher.config, seed=weights)
        self.tokenizer_json = teacher.tokenizer_json
        self._teacher = (teacher.eval(),)  # in a tuple, so that its weights are not taken for the student's

    def forward(self, input_ids: Tensor, *arguments: Any, **options: Any) -> CausalLMOutput:
        output = super().forward(input_ids, *arguments, **options)
        with torch.no_grad():
            wanted = self._teacher[0](input_ids).logits[:, :-1].softmax(-1)
        return output._replace(loss=F.cross_entropy(output.logits[:, :-1].flatten(0, 1), wanted.flatten(0, 1)))


@cache
def open_corpus(name: str) -> Corpus:
    """The corpus "real" or "planted"."""
    return {"real": Corpus.real, "planted": Corpus.planted}[name]()


@torch.no_grad()
def _scale_by_depth(model: MoEForCausalLM) -> None:
    for layer, block in enumerate(model.model.layers):
        for weight in block.parameters():
            if weight.dim() > 1:
                weight.mul_((2 * weight.shape[-1] * (layer + 1)) ** -0.5 / model.config.initializer_range)


# --- without -----------------------------------------------------------------------------------------------


def one_gauge(model: MoEForCausalLM, *, gauge: str, seed: int) -> MoEForCausalLM:
    """One of `GAUGES`; `rotate_residual` needs the norms folded first."""
    return GAUGES[gauge](fold_norms(model) if gauge == "rotate_residual" else model, seed=seed)


def merge_by_ties(base: MoEForCausalLM, *models: MoEForCausalLM, density: float) -> MoEForCausalLM:
    """`ties` of the models' differences from the first."""
    return ties(base, models, density=density)


def mix_branches(*parents: MoEForCausalLM, **options: Any) -> MoEForCausalLM:
    """`branch_train_mix` of the parents."""
    return branch_train_mix(parents, **options)


def frame_both(model: MoEForCausalLM, target: MoEForCausalLM) -> MoEForCausalLM:
    """The norms of `target` first, then its profile of standard deviations, which folding norms would change."""
    return frame_std_profile(frame_norms(model, target), target)


Recipes = Mapping[str, Callable[..., MoEForCausalLM]]
_WITHOUT_TRAINING = (
    quantise,
    prune_neurons,
    prune_heads,
    prune_layers,
    depth_upscale,
    extend_vocabulary,
    lerp,
    slerp,
    merge_by_ties,
    upcycle,
    mix_branches,
    transplant_expert,
    one_gauge,
    all_gauges,
    frame_std_profile,
    frame_norms,
    frame_both,
    frame_neuron_order,
)
TRAINED: Recipes = {recipe.__name__: recipe for recipe in (from_scratch, keep_training, train_lora, distil)}
INSTANT: Recipes = {recipe.__name__: recipe for recipe in _WITHOUT_TRAINING}
