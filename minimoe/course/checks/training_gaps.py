"""The checks of the gaps inside the notebooks 04 to 06, where `trained_mixture` has none.

Shapes: T tokens, E experts, K experts per token, G groups of tokens, batches of B texts of S tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minimoe.course.checks.answers import WrongAnswer, judge
from minimoe.model import MoEConfig, MoEForCausalLM

_SHAPE = {"vocab_size": 24, "hidden_size": 8, "num_attention_heads": 2, "num_experts_per_tok": 2}
_TINY = MoEConfig(**_SHAPE, num_hidden_layers=2, num_experts=4, moe_intermediate_size=6, router_aux_loss_coef=0.5)


def _tiny() -> tuple[MoEForCausalLM, Tensor]:
    """A mixture whose experts differ enough to be missed, and batches [4, 2, 9] for it."""
    model, draw = MoEForCausalLM(_TINY, seed=0).double(), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=draw)
    return model, torch.randint(24, (4, 2, 9), generator=draw)


@torch.enable_grad()
def check_train_on(answer: Callable[[MoEForCausalLM, Sequence[Tensor], float], Sequence[float]]) -> str:
    """Check `train_on(model, batches, learning_rate)`: one step of AdamW for each batch [B, S]; the cross-entropies."""

    def steps(model: MoEForCausalLM, batches: Sequence[Tensor], rate: float, wrong: str = "") -> list[float]:
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=rate), []
        for ids in batches:
            output = model(ids, labels=ids)
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate) if wrong == "new" else optimizer
            if wrong != "kept":
                optimizer.zero_grad()
            output.loss.backward()
            if wrong != "still":
                optimizer.step()
            losses.append((output.loss if wrong == "both" else output.cross_entropy).item())
        return losses

    mistakes = {
        "The gradients of earlier batches are still there: `optimizer.zero_grad()`.": "kept",
        "The model does not learn. After `backward` the optimizer has to take its step.": "still",
        "Return the cross-entropy, without the balance loss: `output.cross_entropy`.": "both",
        "Make the optimizer once, before the loop: it remembers earlier gradients.": "new",
    }
    known = {hint: lambda *inputs, wrong=wrong: steps(*inputs, wrong=wrong) for hint, wrong in mistakes.items()}
    return judge(answer, [(*_tiny(), 0.01)], steps, known, "Right: a loop that trains.", atol=1e-4)


def check_dense_twin(answer: Callable[[MoEConfig], MoEConfig]) -> str:
    """Check `dense_twin(config)`: the same model with one MLP as wide as the K active experts of a token together."""
    for config in (_TINY, replace(_TINY, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=5)):
        twin, width = answer(config), config.moe_intermediate_size
        if not isinstance(twin, MoEConfig) or twin.num_experts:
            raise WrongAnswer("Wanted the settings of a dense model: `replace(config, num_experts=0, ...)`.")
        if twin.intermediate_size == config.num_experts * width:
            raise WrongAnswer("This MLP is as wide as all experts. Only `num_experts_per_tok` of them are active.")
        right = replace(config, num_experts=0, intermediate_size=config.num_experts_per_tok * width)
        if twin.num_parameters() != right.num_parameters():
            raise WrongAnswer(f"Not yet: it has {twin.num_parameters():,} weights; wanted {right.num_parameters():,}.")
    return "Right: as many active weights, but for the router."


def check_effective_experts(answer: Callable[[Tensor], Tensor]) -> str:
    """Check `effective_experts(weights)`: of weights [T, K] that sum to 1, the exponential of the entropy: [T]."""
    mistakes = {
        "This is the entropy. The number of experts is its exponential.": lambda w: torch.special.entr(w).sum(-1),
        "0 log 0 counts as 0: use `torch.xlogy(weights, weights)`.": lambda w: (-w * w.log()).sum(-1).exp(),
    }
    tries = [(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.7, 0.2, 0.1]]),)]
    return judge(answer, tries, lambda w: torch.special.entr(w).sum(-1).exp(), mistakes, "Right: K for K alike.")


def check_loss_without(answer: Callable[[MoEForCausalLM, Tensor, int, int], float]) -> str:
    """Check `loss_without(model, ids, layer, expert)`: the cross-entropy of a copy in which the expert is silent."""
    model, batches = _tiny()

    def loss(model: MoEForCausalLM, ids: Tensor, layer: int, expert: int, kept: float = 0.0) -> Tensor:
        model.model.layers[layer].mlp.experts.down_proj[expert] *= kept
        return model(ids, labels=ids).cross_entropy

    mistakes = {"Nothing was switched off.": lambda *inputs: loss(*inputs, kept=1.0)}
    mistakes["This is the expert of another layer."] = lambda m, ids, layer, expert: loss(m, ids, 1 - layer, expert)
    with torch.no_grad():
        before = loss(*(inputs := (model, batches[0], 1, 2)), kept=1.0)
        judge(answer, [inputs, (model, batches[1], 0, 3)], loss, mistakes, "")
        answer(*inputs)
        if not torch.isclose(before, loss(*inputs, kept=1.0), atol=1e-5):
            raise WrongAnswer("The model itself has lost the expert. Change a copy: `copy.deepcopy(model)`.")
    return "Right: the expert is silent in the copy, and the model is whole."


def check_divergence(answer: Callable[[np.ndarray], float]) -> str:
    """Check `divergence(use)`: of shares [G, E], the entropy of the mean row less the mean entropy, in bits."""

    def bits(use: np.ndarray) -> np.ndarray:
        return -(use * np.log2(np.where(use > 0, use, 1))).sum(-1)

    mistakes = {
        "These are nats. For bits take `np.log2`.": lambda use: np.log(2) * (bits(use.mean(0)) - bits(use).mean()),
        "Not a number: 0 log 0 counts as 0. Take the shares above 0 only.": lambda use: np.nan,
        "It is turned round: the entropy of the mean is the larger one.": lambda u: bits(u).mean() - bits(u.mean(0)),
    }
    use = np.array([[0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    return judge(answer, [(use,)], lambda u: bits(u.mean(0)) - bits(u).mean(), mistakes, "Right: 0 where all agree.")
