"""What is done in the zoo to make a model by training.

A recipe is called with the models it starts from and its options, all of them plain values, so that a line of the tree
says everything. It also takes `out`, a folder in which training keeps its state, or None; a `corpus`, "real" or
"planted"; and what `minimoe.training.Settings` has. It may change the model it starts from. What needs no training
stands in minimoe/lineage/recipes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minimoe.lineage.recipes import SHAPES
from minimoe.model import MoEForCausalLM
from minimoe.model.transformer import CausalLMOutput
from minimoe.training import Corpus, train


def from_scratch(
    *, out: Path | None, shape: str = "dense", initialisation: str = "usual", weights: int, **settings: Any
) -> MoEForCausalLM:
    """Train a model from random weights, drawn with the seed `weights`.

    Args:
        out: a folder for the state of training, or None.
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


def fresh_embeddings(
    parent: MoEForCausalLM, *, out: Path | None, weights: int, only: bool, **settings: Any
) -> MoEForCausalLM:
    """Draw embedding and output head anew and train: the layers of the parent, in a residual stream of new tokens.

    Args:
        weights: the seed of what is drawn, with the spread of a model's first weights.
        only: whether embedding and head alone are trained, and all layers and norms stay as they are.
    """
    fresh = MoEForCausalLM(parent.config, seed=weights)
    parent.requires_grad_(not only)
    for part, drawn in ((parent.model.embed_tokens, fresh.model.embed_tokens), (parent.lm_head, fresh.lm_head)):
        part.load_state_dict(drawn.state_dict())
        part.requires_grad_(True)
    return keep_training(parent, out=out, **settings).requires_grad_(True)


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


TRAINED: Mapping[str, Callable[..., MoEForCausalLM]] = {
    recipe.__name__: recipe for recipe in (from_scratch, keep_training, train_lora, distil, fresh_embeddings)
}
