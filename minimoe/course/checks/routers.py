"""The checks of the exercises on routers (notebook 02)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers, seeded
from minimoe.model import route_expert_choice, route_switch, route_topk
from minimoe.model.balance import apply_capacity, expert_capacity

Route = Callable[[Tensor], Tensor]


def check_biased_weights(answer: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Check `biased_weights(logits, bias, k)`: the weights [T, E], 0 for every expert that is not chosen, when the bias
    [E] has a say in the choice of k experts but none in their weights (DeepSeek-V3, arXiv 2412.19437, eq. 12-16).

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "The bias got into the weights. It may only choose: take the weights from the scores without it.": (
            lambda logits, bias, k: _keep(logits.sigmoid() + bias, logits.sigmoid() + bias, k)
        ),
        "The bias has no effect. Add it to the scores before you take the best k.": (
            lambda logits, bias, k: _keep(logits.sigmoid(), logits.sigmoid(), k)
        ),
        "You added the bias to the logits. It belongs to the scores, after the sigmoid.": (
            lambda logits, bias, k: _keep(logits + bias, logits.sigmoid(), k)
        ),
        "You took a softmax. Here every expert is scored by itself: use the sigmoid.": (
            lambda logits, bias, k: _keep(logits.softmax(-1) + bias, logits.softmax(-1), k)
        ),
        "The weights of a token do not add up to 1 yet: divide by the sum of the chosen ones.": (
            lambda logits, bias, k: _keep(logits.sigmoid() + bias, logits.sigmoid(), k, normalise=False)
        ),
        "You divided by the sum over all experts. Divide by the sum over the chosen ones, so that they add up to 1.": (
            lambda logits, bias, k: (
                _keep(logits.sigmoid() + bias, logits.sigmoid(), k, normalise=False)
                / logits.sigmoid().sum(-1, keepdim=True)
            )
        ),
    }
    for tokens, experts, k in ((6, 5, 2), (9, 8, 3)):
        generator = torch.Generator().manual_seed(experts)
        logits = torch.randn(tokens, experts, generator=generator)
        bias = torch.linspace(-0.4, 0.4, experts)
        chosen = route_topk(logits, k, score_func="sigmoid", norm_topk_prob=True, bias=bias)
        wanted = torch.zeros(tokens, experts).scatter(1, chosen.indices, chosen.weights)
        found = numbers(answer, logits, bias, k)
        if found.shape == (tokens, k):
            raise WrongAnswer(
                "You returned a weight for each choice. Wanted one for each expert, 0 for those not chosen: `scatter` "
                "puts values into the places that an index names."
            )
        compare(found, wanted, mistakes, (logits, bias, k))
    return "Right: the bias chooses, the scores weigh, and the weights of each token add up to 1."


def check_looks_ahead(answer: Callable[[Route, Tensor, int], bool]) -> str:
    """Check `looks_ahead(route, logits, position)`: whether `route`, which maps logits [T, E] to choices [T, K],
    chooses for the tokens before `position` by the logits from there on.

    Every router is tried with several logits and positions, and torch's random numbers are the same at each check: an
    answer that needs luck is rejected, and a right one does not depend on it.

    Raises:
        WrongAnswer: with a hint.
    """
    seeds = (2, 6, 8, 16)  # with these, a third or more of all edits of the later logits show each leak
    tries = [torch.randn(24, 5, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    with seeded():
        for ((name, looks, hint), route), logits, position in product(_ROUTES.items(), tries, (12, 16, 20)):
            found = numbers(answer, _refuse_edits_without_number(route), logits, position)
            if found.numel() != 1:
                raise WrongAnswer(f"Your answer has shape {tuple(found.shape)}; wanted True or False.")
            if found and not looks:
                raise WrongAnswer(f"You say that {name} looks ahead. {hint}")
            if looks and not found:
                raise WrongAnswer(
                    f"You say that {name} does not look ahead. {hint} One edit may not be enough: try twenty, all "
                    "different."
                )
    return "Right: you can tell which routers look ahead without knowing how they work."


def _refuse_edits_without_number(route: Route) -> Route:
    def refusing(logits: Tensor) -> Tensor:
        if not logits.isfinite().all():
            bad = logits[~logits.isfinite()][0].item()
            raise WrongAnswer(f"You gave the router a logit of {bad}. An edit may be large, but must be a number.")
        return route(logits)

    return refusing


def _top2(logits: Tensor) -> Tensor:
    return logits.topk(2).indices


def _switch_with_capacity(logits: Tensor) -> Tensor:
    return apply_capacity(route_switch(logits), expert_capacity(*logits.shape, 1, 1.0)).indices


def _top2_with_capacity(logits: Tensor) -> Tensor:
    return apply_capacity(route_topk(logits, 2), expert_capacity(*logits.shape, 2, 1.0)).indices


def _expert_choice(logits: Tensor) -> Tensor:
    return route_expert_choice(logits, expert_capacity(*logits.shape, 2, 1.0)).indices


def _running_mean(logits: Tensor) -> Tensor:
    """A made-up router that looks at the tokens so far. So are the others below."""
    count = torch.arange(1, len(logits) + 1)[:, None]
    return (logits - logits.cumsum(0) / count).topk(2).indices


def _choice_of_the_next(logits: Tensor) -> Tensor:
    return _top2(torch.cat([logits[1:], logits[-1:]]))


def _led_by_the_last(logits: Tensor) -> Tensor:
    return _top2(logits + logits[-1])


def _first_follows_the_last(logits: Tensor) -> Tensor:
    return _top2(torch.cat([logits[-1:], logits[1:]]))


def _worst_on_a_signal(logits: Tensor) -> Tensor:
    """Two experts of five are a signal when the last token likes one of them best."""
    signal = logits[-1, -2:].max() > logits[-1, :-2].max()
    return _top2(-logits if signal else logits)


_EDITS = "Replace all logits from `position` on in a copy, by really different ones, and compare all the rows before."
_ROUTES = {  # a name, whether it looks ahead, and what may have gone wrong if the answer is another
    ("top-2", False, "Only the choices of the tokens before `position` count, not those that you edited."): _top2,
    (
        "a router that compares with the mean of the tokens so far",
        False,
        "It looks back, and nothing before `position` may be edited.",
    ): _running_mean,
    (
        "Switch with a capacity",
        False,
        "Its seats grow with the number of tokens, and here the question is about their logits: replace the later "
        "tokens, do not cut them off.",
    ): _switch_with_capacity,
    ("expert choice", True, _EDITS): _expert_choice,
    ("top-2 with a capacity", True, _EDITS): _top2_with_capacity,
    (
        "a router that gives each token the choice of the next one",
        True,
        "The token at `position` may matter: edit all from there on, and compare all rows before.",
    ): _choice_of_the_next,
    (
        "a router that adds the last token's logits to all",
        True,
        "The last token may be the one that matters: edit all from `position` on.",
    ): _led_by_the_last,
    (
        "a router whose first token follows the last",
        True,
        "A token far back may be the one that is rerouted: compare all rows before `position`.",
    ): _first_follows_the_last,
    (
        "a router that reacts to some logits of the last token only",
        True,
        "Many edits change nothing here.",
    ): _worst_on_a_signal,
}


def _keep(choice: Tensor, scores: Tensor, k: int, normalise: bool = True) -> Tensor:
    """The scores of the k best by `choice`, 0 elsewhere."""
    best = choice.topk(k).indices
    kept = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
    return kept / kept.sum(-1, keepdim=True) if normalise else kept
