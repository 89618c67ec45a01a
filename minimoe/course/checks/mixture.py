"""The checks of the exercises on a mixture and its routers (notebooks 00 to 03).

Shapes: L layers, T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from minimoe.course.checks.answers import WrongAnswer, gradient, judge, loss_of, normal, numbers, seeded
from minimoe.model import RouterOutput, route_expert_choice, route_grouped, route_switch, route_topk
from minimoe.model.balance import apply_capacity, expert_capacity, load_balancing_loss


def check_first_choice_shares(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `shares(indices, num_experts)`: from the choices [T, K], best first, the share of tokens whose first choice
    each expert is, [E]."""
    count = torch.bincount
    # The last expert is nobody's choice, and still has a share.
    tries = [(normal(7, 4).topk(2).indices, 5), (normal(40, 7).topk(3).indices, 8)]
    mistakes = {
        "These are counts. A share is a part of all tokens.": lambda x, experts: count(x[:, 0], minlength=experts),
        "You counted every choice of a token. Only the first column of `indices` holds first "
        "choices.": lambda indices, experts: count(indices.flatten(), minlength=experts) / indices.numel(),
        "There are fewer shares than experts. An expert that no token chose has share 0; `torch.bincount` has an "
        "argument for that.": lambda indices, experts: count(indices[:, 0]) / len(indices),
    }
    praise = "Right: the shares are those of the first choices, and they add up to 1."
    return judge(answer, tries, lambda x, experts: count(x[:, 0], minlength=experts) / len(x), mistakes, praise)


def check_topk_weights(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `topk_weights(logits, k)`: from the logits [T, E], the weights [T, K] of the k best experts, best first,
    scaled to sum to 1. Softmax first and then dividing, or softmax over the k best logits: both are right."""
    tries = [(normal(5, 8), 2), (normal(6, 9), 4)]
    mistakes = {
        "The probabilities of the chosen do not add up to 1.": lambda logits, k: logits.softmax(-1).topk(k).values,
        "You took the softmax down the tokens. It is the experts that compete: use the last "
        "dimension.": lambda logits, k: _normalised(logits.softmax(0).topk(k).values),
        "You divided raw logits, which may be negative.": lambda logits, k: _normalised(logits.topk(k).values),
    }
    praise = "Right: the weights are positive, ordered, and add up to 1 for every token."
    return judge(answer, tries, lambda logits, k: route_topk(logits, k, norm_topk_prob=True).weights, mistakes, praise)


def check_grouped_choice(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    """Check `grouped_choice(logits, k, n_group)`: the ids [T, K] of the experts when each of n_group groups of
    neighbours gives its k / n_group best (Pangu Pro MoE, arXiv 2505.21411). The order within a token's row is free."""

    def starting_at(step: Callable[[int, int], int]) -> Callable[[Tensor, int, int], Tensor]:
        return lambda *inputs: choice_of_groups(*inputs, step)[1]

    tries = [(normal(6, 12), 4, 2), (normal(5, 8), 4, 4), (normal(9, 18), 6, 3)]
    mistakes = {
        "Some ids are off by a multiple. In which id does a group start? It depends on how many experts a group holds, "
        "not on how many it gives.": starting_at(lambda k, n_group: k // n_group),
        "These are places within the groups, and not ids of experts.": starting_at(lambda k, n_group: 0),
        "These are the best of all. Every group has to give some.": lambda logits, k, _: logits.topk(k).indices,
    }
    praise = "Right: every group gives the same number of experts, also where a group holds more than it gives."
    return judge(answer, tries, lambda *x: route_grouped(*x).indices, mistakes, praise, form=lambda x: x.sort().values)


def choice_of_groups(logits: Tensor, k: int, n_group: int, step: Callable[[int, int], int]) -> tuple[Tensor, Tensor]:
    """Probabilities and ids [T, K] of the best of each group, where one begins `step(k, n_group)` ids after another."""
    weights, within = logits.softmax(-1).unflatten(-1, (n_group, -1)).topk(k // n_group)
    indices = (within + step(k, n_group) * torch.arange(n_group)[:, None]) % logits.shape[-1]
    return weights.flatten(1), indices.flatten(1)


def check_biased_weights(answer: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Check `biased_weights(logits, bias, k)`: the weights [T, E], 0 for every expert that is not chosen, when the bias
    [E] has a say in the choice of k experts but none in their weights (DeepSeek-V3, arXiv 2412.19437, eq. 12-16)."""

    def kept(logits: Tensor, bias: Tensor, k: int, in_weights: float = 0.0) -> Tensor:
        """The scores of the k best, with a part of the bias in them or without; 0 elsewhere."""
        scores = logits.sigmoid()
        best = (scores + bias).topk(k).indices
        return torch.zeros_like(scores).scatter(1, best, (scores + in_weights * bias).gather(1, best))

    tries = [(normal(*size), torch.linspace(-0.4, 0.4, size[1]), k) for size, k in (((6, 5), 2), ((9, 8), 3))]
    mistakes = {
        "The bias got into the weights. It may only choose: take the weights from the scores without "
        "it.": lambda *inputs: _normalised(kept(*inputs, in_weights=1.0)),
        "The weights do not add up to 1 yet.": kept,
        "You returned a weight for each choice. Wanted one for each expert, 0 for those not chosen: `scatter` puts "
        "values into the places that an index "
        "names.": lambda x, bias, k: route_topk(x, k, score_func="sigmoid", norm_topk_prob=True, bias=bias).weights,
    }
    praise = "Right: the bias chooses, the scores weigh, and the weights of each token add up to 1."
    return judge(answer, tries, lambda *inputs: _normalised(kept(*inputs)), mistakes, praise)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def check_looks_ahead(answer: Callable[[Callable[[Tensor], Tensor], Tensor, int], bool]) -> str:
    """Check `looks_ahead(route, logits, position)`: whether `route`, which maps logits [T, E] to choices [T, K],
    chooses for the tokens before `position` by the logits from there on. Every router is tried with several logits and
    positions, always with the same random numbers: an answer that needs luck is rejected."""
    seeds = (2, 6, 8, 16)  # with these, a third or more of all edits of the later logits show each leak
    tries = [torch.randn(24, 5, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    with seeded():
        for (name, (looks, route, hint)), logits, position in product(_ROUTERS.items(), tries, (12, 16, 20)):
            found = numbers(answer(route, logits.clone(), position))
            if found.numel() != 1:
                raise WrongAnswer(f"The shape of your answer is {tuple(found.shape)}; wanted True or False.")
            if bool(found) != looks:
                raise WrongAnswer(f"You say that {name} {'does not look' if looks else 'looks'} ahead. {hint}")
    return "Right: you can tell which routers look ahead without knowing how they work."


def _top2(logits: Tensor) -> Tensor:
    return logits.topk(2).indices


_EDIT_ALL = "Replace all logits from `position` on in a copy, by really different ones, and compare all rows before."
_ROUTERS = {  # whether each looks ahead, the router itself, and what may have gone wrong where an answer differs
    "top-2": (False, _top2, "Only the tokens before `position` count, not those that you edited."),
    "Switch with a capacity": (
        False,
        lambda x: apply_capacity(route_switch(x), expert_capacity(*x.shape, 1, 1.0)).indices,
        "Its seats grow with the number of tokens: replace the later tokens, do not cut them off.",
    ),
    "expert choice": (True, lambda x: route_expert_choice(x, expert_capacity(*x.shape, 2, 1.0)).indices, _EDIT_ALL),
    "a router that gives each token the choice of the next one": (True, lambda x: _top2(x.roll(-1, 0)), _EDIT_ALL),
    "a router whose first token follows the last": (True, lambda x: _top2(torch.cat([x[-1:], x[1:]])), _EDIT_ALL),
    "a router that takes the worst experts where the last token likes expert 3 or 4 best": (
        True,
        lambda x: _top2(-x if x[-1].argmax() > 2 else x),
        "Many edits change nothing here. One may not be enough: try twenty, all different.",
    ),
}


def check_balance_per_layer(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `balance_loss(logits, indices)`: from the logits [L, T, E] and the choices [L, T, K] of L layers, the mean
    over layers of E * sum_i f_i P_i, as a tensor through which P, and only P, receives a gradient."""

    def right(logits: Tensor, indices: Tensor, across_layers: str = "mean") -> Tensor:
        outputs = [RouterOutput(x, x, x, chosen) for x, chosen in zip(logits, indices, strict=True)]
        return load_balancing_loss(outputs, across_layers=across_layers)

    tries = []
    for layers, tokens, experts, k in ((2, 6, 4, 2), (3, 40, 8, 3)):
        logits = 2 * normal(layers, tokens, experts)
        logits[..., -1] -= 9  # no token chooses the last expert, and it still has a probability
        bias = torch.linspace(-2, 2, experts).roll(1)  # so that the choices are not the best logits
        tries.append((logits, (logits + bias).topk(k).indices))
    mistakes = {
        "You averaged f and P over the layers first. Two layers that collapsed in opposite ways then look balanced: "
        "take a loss for each layer, and average them.": lambda x, indices: right(x, indices, "pooled"),
        "The factor E, the number of experts, is missing.": lambda x, indices: right(x, indices) / x.shape[-1],
        "Your f adds up to 1, not to K.": lambda logits, indices: right(logits, indices) / indices.shape[-1],
    }
    praise = "Right: the loss is K when the load is balanced, and a gradient pulls busy experts down and idle ones up."
    judge(answer, tries, right, mistakes, praise)
    for logits, indices in tries:
        logits.requires_grad_()
        found, wanted = (gradient(loss_of(function, logits, indices), [logits]) for function in (answer, right))
        if not found.any():
            raise WrongAnswer("The value is right, but no gradient comes back to the logits: it would train nothing.")
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-6):
            raise WrongAnswer("The value is right, not its gradient: P is a mean of softmax probabilities, f constant.")
    return praise


def check_bias_update(answer: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """Check `new_bias(bias, load, rate)`: the selection bias [E] after one step of Wang et al. 2024 (arXiv 2408.15664):
    `rate` more for experts with less than the mean load, `rate` less for those with more. The same number added to all
    experts changes no choice, so it is right with it and without."""

    def step(load: Tensor, rate: float) -> Tensor:
        return rate * torch.sign(load.mean() - load)

    loads = (torch.tensor(load) for load in ([10.0, 0, 2, 4, 4], [1.0, 2, 3, 30, 6, 6, 0, 16]))
    tries = [(torch.linspace(-0.02, 0.03, len(load)), load, 0.01) for load in loads]
    mistakes = {
        "The wrong way round: busy experts went up.": lambda bias, load, rate: bias - step(load, rate),
        "Your step grows with the distance from the mean. Only the sign counts: all steps have the size "
        "`rate`.": lambda bias, load, rate: bias + rate * (load.mean() - load),
        "You returned the step, not the new bias.": lambda bias, load, rate: step(load, rate),
    }
    praise = "Right: idle experts move up, busy ones down, all by the same step."
    return judge(answer, tries, lambda bias, *x: bias + step(*x), mistakes, praise, form=lambda x: x - x.mean())
