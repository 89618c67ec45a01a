"""What two models do with the same random prompts: the tokens they choose, their hidden states, their routing.

What it measures
    Prompts are random sequences of shared tokens. `token_agreement`: after how many of them both models choose the
    same next token. `hidden_cka`: unbiased linear CKA of the hidden states after each layer, at the last position.
    `routing_agreement`, of two mixtures: adjusted mutual information of the experts that their routers prefer, token
    by token: 1 if they agree up to the names of experts, 0 on average if they agree by chance.
What leaves it unchanged
    Every gauge: it looks at what models do.
What it cannot see
    Why models do the same. Strangers trained on the same text agree; a model distilled from another shares no weight
    with it and agrees more than most descendants; fine-tuned on other text, a descendant agrees less than strangers.
    Models without shared tokens.
Source
    token_agreement: Nikolic et al. 2025, arXiv 2502.00706, with a paired exact test for their z-test. hidden_cka:
    Zhang et al. 2024, arXiv 2410.14273 (REEF), made unbiased. routing_agreement is ours; adjusted mutual information:
    Vinh et al. 2010, JMLR 11.

Shapes: B texts, H hidden size, L layers, L' sparse layers, N shared tokens, P prompts, S tokens in each, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from minimoe.fingerprints.aligned_cka import cka_of_all
from minimoe.fingerprints.anchors import FEWEST, candidate_pairs, is_wide, mean_of_pairs
from minimoe.fingerprints.result import Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights, read_once
from minimoe.model import MoEForCausalLM
from minimoe.model.attention import rotary_angles, visible_keys

USUAL, USUAL_OF_WIDE, LENGTH = 256, 64, 8  # prompts, and tokens in each: longer ones tell no more
FEWEST_PROMPTS = 4  # for an unbiased CKA
_BATCH = 64  # prompts run at once


class Behaviour(NamedTuple):
    """What one model does with the prompts."""

    choices: Tensor  # [P] int64: which of the shared tokens it finds likeliest next
    states: Tensor  # [L, P, H]: after each layer, at the last position
    routes: Tensor  # [L', P * S] int64: the expert that each router scores highest


@explain_refusals
def token_agreement(
    a: Weights, b: Weights, controls: Sequence[Weights] = (), *, prompts: int | None = None, seed: int = 0
) -> Result:
    """Compare the next tokens that two models choose, among those that all models share.

    The p-value is about prompts, not about lineage. Its null: were all possible prompts asked, some control would agree
    with `a` as often as `b` does, or more. It is exact over the draw of the prompts, for these very models (unless
    their routing depends on which prompts are run together, as with a capacity). That `b` and the controls are equally
    related to `a` is another null, and enough prompts reject the first one for whichever of them happens to come
    closest; `rank_p` is the p-value of that, if `b` and the controls are strangers drawn alike.

    Args:
        a: the suspect.
        b: its supposed parent.
        controls: models known to be strangers to both.
        prompts: P of them are drawn, with `seed`; None: 256, or 64 of wide models, where shares are known to .06.

    Returns:
        score: the share of prompts after which `a` and `b` choose the same token.
        p_value: with controls, the largest of their sign tests against `b` (McNemar's, exact), after Holm's correction,
            without which it would be valid too, as every control must be beaten.
        details: "closest_control", the largest share of a control; "rank_p", (1 + controls with the share of `b` or
            more) / (1 + controls).
        refused: too few tokens shared by all; an encoder; a model that chooses one token always, or is not finite.
    """
    choices = torch.stack([found.choices for found in _observe((a, b, *controls), prompts, seed)])
    prompts = choices.shape[1]
    for model, of_model in zip((a, b, *controls), choices, strict=True):
        if (of_model == of_model[0]).all():
            raise Refusal(f"{model.name} chooses the same token after every prompt")
    agrees, *others = choices[1:] == choices[0]
    score, details = float(agrees.double().mean()), {"prompts": prompts}
    if not others:
        return Result(score=score, details=details)
    shares = [float(other.double().mean()) for other in others]
    details |= {"closest_control": max(shares), "rank_p": (1 + sum(s >= score for s in shares)) / (1 + len(shares))}
    p_value = holm([sign_test(agrees, other) for other in others])[-1]
    return Result(score=score, p_value=p_value, details=details)


@explain_refusals
def hidden_cka(a: Weights, b: Weights, *, prompts: int | None = None, seed: int = 0) -> Result:
    """Compare hidden states at the last position, with the P prompts as samples, in models of any shape.

    Returns:
        score: the mean over paired layers, at most 1, about 0 for random weights.
        refused: too few shared tokens; an encoder; states that are 0 or not finite.
    """
    ours, theirs = (list(found.states) for found in _observe((a, b), prompts, seed))
    scores = cka_of_all(ours, theirs)
    if not scores.isfinite().all():
        raise Refusal("the hidden states of a layer are all 0, or not finite")
    return Result(score=mean_of_pairs(scores), details={"layers": min(scores.shape), "prompts": len(ours[0])})


@explain_refusals
def routing_agreement(a: Weights, b: Weights, *, prompts: int | None = None, seed: int = 0) -> Result:
    """Compare which expert the routers of two mixtures score highest for each token of the P prompts.

    The numbers of experts and of sparse layers may differ.

    Returns:
        score: adjusted mutual information, mean over paired sparse layers. A pair of routers that both prefer one
            expert always counts 0.
        refused: a model is dense; as for `hidden_cka`.
    """
    for model in (a, b):
        if not model.num_experts:
            raise Refusal(f"{model.name} is dense: it has no routers")
    ours, theirs = (found.routes for found in _observe((a, b), prompts, seed))
    scores = torch.zeros(len(ours), len(theirs), dtype=torch.float64)
    for i, j in candidate_pairs(*scores.shape):
        scores[i, j] = adjusted_information(ours[i], theirs[j])
    details = {"layers": min(scores.shape), "tokens": ours.shape[1]}
    return Result(score=mean_of_pairs(scores), details=details)


def _observe(models: Sequence[Weights], prompts: int | None, seed: int) -> list[Behaviour]:
    """What each model does with the same prompts, token by token the same strings."""
    if prompts is None:
        prompts = USUAL_OF_WIDE if is_wide(*models) else USUAL
    if prompts < FEWEST_PROMPTS:
        raise ValueError(f"prompts={prompts}: wanted at least {FEWEST_PROMPTS}")
    tokens = sorted(set.intersection(*(set(weights.tokens) for weights in models)))
    if len(tokens) < FEWEST:
        raise Refusal(f"{len(tokens)} shared tokens: wanted at least {FEWEST}, to ask all models the same")
    return [_observe_one(weights, tokens, prompts, seed) for weights in models]


@read_once
def _observe_one(weights: Weights, tokens: list[str], prompts: int, seed: int) -> Behaviour:
    drawn = torch.randint(len(tokens), (prompts, LENGTH), generator=torch.Generator().manual_seed(seed))
    return behaviour(weights, tokens, drawn)


@torch.no_grad()
def behaviour(weights: Weights, tokens: Sequence[str], prompts: Tensor) -> Behaviour:
    """Run a model on prompts, [P, S] int64 from 0 to N - 1: which of `tokens`, N strings that it knows.

    All prompts pass a layer before the next one is read, so that it takes memory for one.
    """
    config, ids = weights.require_config(), torch.tensor([weights.tokens[token] for token in tokens])
    embedding, head = (weights.rows(role, ids.tolist()) for role in ("embedding", "head"))
    length = prompts.shape[1]
    cos, sin = rotary_angles(config, torch.arange(length), embedding)
    batches = prompts.split(_BATCH)
    hidden, states, routes, block = [embedding[batch] for batch in batches], [], [], None
    for layer in range(weights.num_layers):
        block = weights.block(layer, over=block)
        options = {"cos": cos, "sin": sin, "visible": visible_keys(length, 0, None, cos.device, config.window(layer))}
        outputs = (block(x, ids[batch], **options) for x, batch in zip(hidden, batches, strict=True))
        hidden, chosen, _ = zip(*outputs, strict=True)
        states.append(torch.cat([x[:, -1] for x in hidden]))
        if block.is_sparse:
            routes.append(torch.cat([one.scores.argmax(-1) for one in chosen]))
    last = F.rms_norm(states[-1], states[-1].shape[-1:], weights.get("norm_final"), config.rms_norm_eps)
    if not last.isfinite().all():
        raise Refusal("what a model computes is not finite")
    none = ids.new_empty(0, prompts.numel())
    return Behaviour((last @ head.mT).argmax(-1), torch.stack(states), torch.stack(routes) if routes else none)


@torch.no_grad()
def predictions(model: MoEForCausalLM, ids: Tensor) -> Tensor:
    """The probabilities of the next token after each token of [B, S]: [B, S, V]."""
    return model(ids).logits.softmax(-1)


def moved_probability(ours: Tensor, theirs: Tensor) -> float:
    """The share of the next token's probability that would have to be moved to make one prediction the other.

    That is the total variation distance of predictions [B, S, V] for one text, half the sum of the differences,
    averaged over all positions: 0 for the same function, 1 if no token is possible to both.
    """
    return float((ours - theirs).abs().sum(-1).double().mean()) / 2


def sign_test(wins: Tensor, losses: Tensor) -> float:
    """How likely it is by chance that one of two booleans [P] is true alone at least as often as it is."""
    alone, together = int((wins & ~losses).sum()), int((wins ^ losses).sum())
    return float(stats.binom.sf(alone - 1, together, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values in ascending order, adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6)."""
    return list(accumulate((min(1.0, (len(p_values) - i) * p) for i, p in enumerate(sorted(p_values))), max))


def adjusted_information(x: Tensor, y: Tensor) -> float:
    """What two labellings [T] tell of each other: 1 if they are the same up to names, 0 on average by chance.

    Two that are constant count 0: they would be the same by chance as well.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    if (x == x[0]).all() and (y == y[0]).all():
        return 0.0
    return float(adjusted_mutual_info_score(x.numpy(), y.numpy()))
