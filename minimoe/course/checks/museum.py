"""The checks of the bug museum: one for each exhibit, in the order of the notebook.

A check only runs the repaired code. It looks at what comes back, at gradients and at what was computed on the way,
never at how the code is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers, seeded
from minimoe.model import route_expert_choice, route_grouped, route_noisy_topk, route_topk, route_topk_softmax
from minimoe.model.balance import apply_capacity, load_balancing_loss


def check_noisy_choice(answer: Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]) -> str:
    """Check `noisy_choice(logits, noise_logits, k, training)`: the weights [T, K] and the experts [T, K] of the k best
    logits [T, E], which in training, and only there, carry noise of standard deviation softplus(noise_logits)
    (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5).

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "In evaluation the weights no longer add up to 1. The softmax is over the k best logits, as in training.": (
            lambda logits, k: _rows(*logits.softmax(-1).topk(k), logits.shape[-1])
        ),
    }
    with seeded():
        for tokens, experts, k in ((6, 5, 2), (9, 8, 3)):
            logits, noise_logits = _normal(tokens, experts), _normal(tokens, experts, seed=1)
            found, again, louder = (
                _rows(*_choice(answer, logits, noise, k, False), experts)
                for noise in (noise_logits, noise_logits, noise_logits + 3)
            )
            if not torch.allclose(found, again):
                raise WrongAnswer("With training=False, one input still gets two answers.")
            if not torch.allclose(found, louder):
                raise WrongAnswer(
                    "With training=False the answer repeats itself, but it still depends on `noise_logits`. "
                    "Noise that is the same each time is noise as well."
                )
            right = route_topk_softmax(logits, k)
            compare(found, _rows(right.weights, right.indices, experts), mistakes, (logits, k))
        _check_noise_of_each_entry(answer)
        _check_that_noise_decides(answer)
    return "Right: noise in training, and in evaluation one answer for one input."


def _check_noise_of_each_entry(answer: Callable) -> None:
    """All experts are chosen, and the last one has next to no noise, so that the logits can be had from the weights."""
    tokens, experts = 4000, 5
    noise_logits = torch.linspace(-1, 1, experts) + torch.tensor([[0.0], [1.5]]).repeat(tokens // 2, 1)
    noise_logits[:, -1] = -20
    weights = _rows(*_choice(answer, torch.zeros(tokens, experts), noise_logits, experts, True), experts)
    noise = (weights.log() - weights.log()[:, -1:])[:, :-1].view(tokens // 2, 2, -1)  # [, kind of token, expert]
    found, wanted = noise.std(0), F.softplus(noise_logits[:2, :-1])
    if found.max() < wanted.min() / 100:
        raise WrongAnswer("With training=True there should be noise in the weights, and there is none.")
    off = (found / wanted - 1).abs()
    if not off.max() < 0.1:
        token, expert = divmod(int(off.nan_to_num(torch.inf).argmax()), experts - 1)
        raise WrongAnswer(
            f"With training=True and noise_logits of {noise_logits[token, expert]:.1f} the noise has standard "
            f"deviation {found[token, expert]:.2f}; wanted softplus({noise_logits[token, expert]:.1f}), which is "
            f"{wanted[token, expert]:.2f}. Every token and expert has its own."
        )


def _check_that_noise_decides(answer: Callable) -> None:
    """Experts are chosen, and the weights are divided, as often as by the rule: one token, many times."""
    tokens, experts, k = 4000, 6, 2
    logits, noise_logits = (row.expand(tokens, experts) for row in (_normal(1, experts), _normal(1, experts, seed=1)))
    found, again = (_rows(*_choice(answer, logits, noise_logits, k, True), experts) for _ in range(2))
    if torch.allclose(found, again):
        raise WrongAnswer("With training=True two calls get the same noise. It should be drawn anew each time.")
    if ((found > 0) == (found > 0)[0]).all():
        raise WrongAnswer("With training=True the noise is in the weights only. It should decide who is chosen, too.")
    generator = torch.Generator().manual_seed(0)
    right = route_noisy_topk(logits, noise_logits, k, training=True, generator=generator)
    wanted = _rows(right.weights, right.indices, experts)
    if (_habits(found) - _habits(wanted)).abs().max() > 0.05:
        raise WrongAnswer(
            f"With training=True and k = {k} of {experts} experts, some are chosen too often, or weigh too much. The "
            "noisy logits that choose are the ones to weigh with."
        )


def _habits(rows: Tensor) -> Tensor:
    """How often each expert is chosen, and the mean of the largest weight, [E + 1]."""
    return torch.cat([(rows > 0).double().mean(0), rows.amax(-1).mean()[None]])


def check_moge_choice(answer: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]) -> str:
    """Check `moge_choice(logits, k, n_group)`: the probabilities [T, K] and the ids [T, K] of the experts when each of
    n_group groups of neighbours gives its k / n_group best (Pangu Pro MoE, arXiv 2505.21411). Their order is free.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "Still right only where a group holds as many experts as a token uses, 8 and 8. Here 24 experts form 4 groups, "
        "and a token uses 4. Which id does the second group start with?": (
            lambda logits, k, n_group: _from_groups(logits, k, n_group, step=k)
        ),
        "Now each group starts where the choices of the last one end. Which ids live in the second group, whatever a "
        "token chooses?": lambda logits, k, n_group: _from_groups(logits, k, n_group, step=k // n_group),
        "These are places within a group, the same in every group.": (
            lambda logits, k, n_group: _from_groups(logits, k, n_group, step=0)
        ),
        "These are the best experts of all. Every group has to give the same number.": (
            lambda logits, k, n_group: _rows(*logits.softmax(-1).topk(k), logits.shape[-1])
        ),
    }
    for tokens, experts, k, n_group in ((6, 24, 4, 4), (5, 64, 8, 8), (6, 12, 4, 2), (9, 18, 6, 3), (5, 8, 4, 4)):
        logits = _normal(tokens, experts)
        right = route_grouped(logits, k, n_group)
        found = _rows(*_choice(answer, logits, k, n_group), experts)
        compare(found, _rows(right.weights, right.indices, experts), mistakes, (logits, k, n_group))
    return "Right: a group starts in the right place, however many experts it holds and gives."


def _from_groups(logits: Tensor, k: int, n_group: int, step: int) -> Tensor:
    probability, within = logits.softmax(-1).unflatten(-1, (n_group, -1)).topk(k // n_group)
    indices = (within + step * torch.arange(n_group)[:, None]) % logits.shape[-1]
    return _rows(probability.flatten(-2), indices.flatten(-2), logits.shape[-1])


def check_fresh_layer(answer: Callable[[int, int, int, int], nn.Module]) -> str:
    """Check `fresh_layer(num_experts, hidden, width, seed)`: a module with a router [E, H] and E experts of two
    matrices each, `up` [I, H] and `down` [H, I], all random, centred, of a sensible size, and fixed by the seed.

    Fresh memory is filled with NaN meanwhile, so that what nobody initialised shows.

    Raises:
        WrongAnswer: with a hint.
    """
    for experts, hidden, width in ((4, 64, 32), (6, 32, 96)):
        with seeded(), _nan_in_fresh_memory():
            first, again, other = (answer(experts, hidden, width, seed) for seed in (0, 0, 1))
        if not isinstance(first, nn.Module):
            raise WrongAnswer(f"The function returned {type(first).__name__}; wanted the layer, an nn.Module.")
        for name, parameter in first.named_parameters():
            _check_fresh(name, parameter.detach())
        matrices, repeated, others = (_matrices(layer) for layer in (first, again, other))
        found, wanted = sum(matrix.numel() for matrix in matrices), experts * hidden * (1 + 2 * width)
        if found != wanted:
            raise WrongAnswer(f"The matrices of the layer have {found} entries; wanted {wanted}. Is a part missing?")
        shapes = {"router": (experts, hidden), "up": (width, hidden), "down": (hidden, width)}
        for part, shape in shapes.items():
            _check_shape(first, part, shape)
        if any(a.shape == b.shape and torch.equal(a, b) for a, b in combinations(matrices, 2)):
            raise WrongAnswer("Two experts start out equal. What would ever make them differ?")
        if not all(map(torch.equal, matrices, repeated)):
            raise WrongAnswer("Two layers with the same seed differ.")
        if any(map(torch.equal, matrices, others)):
            raise WrongAnswer("A layer with another seed has a matrix that is the same.")
    return "Right: every matrix is finite, centred, of a sensible size, and fixed by the seed."


def _check_fresh(name: str, parameter: Tensor) -> None:
    if not parameter.isfinite().all():
        raise WrongAnswer(f"`{name}` holds numbers that nobody wrote (nan here; elsewhere it could be anything).")
    if parameter.dim() < 2:
        return
    spread = parameter.std().item()
    if spread == 0:
        raise WrongAnswer(f"All entries of `{name}` are equal, so its experts would learn the same thing.")
    if abs(parameter.mean().item()) > spread / 2:
        raise WrongAnswer(f"`{name}` has mean {parameter.mean().item():.2f}: wanted as much below 0 as above.")
    if not 0.005 < spread < 0.5:
        raise WrongAnswer(
            f"`{name}` has standard deviation {spread:.2g}; a layer that neither swells nor silences its input "
            "has about 0.02 to 0.2 here."
        )


def _check_shape(layer: nn.Module, part: str, wanted: tuple[int, int]) -> None:
    """Every matrix of this part, by its name, is as wanted: the last two sizes, where all experts are in one tensor."""
    named = {name: matrix for name, matrix in layer.named_parameters() if matrix.dim() > 1 and part in name.split(".")}
    if not named:
        raise WrongAnswer(f"The layer has no `{part}`.")
    for name, matrix in named.items():
        if matrix.shape[-2:] != wanted:
            raise WrongAnswer(f"`{name}` has shape {tuple(matrix.shape)}; wanted {wanted} at the end.")


def _matrices(layer: nn.Module) -> list[Tensor]:
    """Every matrix of the layer, those of fused experts one by one."""
    parameters = [parameter.detach() for parameter in layer.parameters() if parameter.dim() > 1]
    return [matrix for parameter in parameters for matrix in parameter.reshape(-1, *parameter.shape[-2:])]


def check_training_loss(answer: Callable[[Tensor, Tensor, Sequence[Tensor], int, float], Tensor]) -> str:
    """Check `training_loss(predictions, targets, router_logits, k, coef)`: the cross-entropy plus coef times the
    load-balancing loss E * sum_i f_i P_i, averaged over layers (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). Its sum
    over layers, and f divided by K, are right too.

    Raises:
        WrongAnswer: with a hint.
    """
    for layers, experts, k in ((2, 6, 2), (1, 4, 1), (3, 8, 3)):
        predictions, targets = _normal(32, 10), torch.arange(32) % 10
        tilt = torch.linspace(-1, 1, experts)
        routers = [
            (_normal(32, experts, seed=layer) + tilt * (-1) ** layer).requires_grad_() for layer in range(layers)
        ]
        cross_entropy = F.cross_entropy(predictions, targets)
        balance, pooled = (
            load_balancing_loss([route_topk(logits, k) for logits in routers], across_layers=how)
            for how in ("mean", "pooled")
        )
        without, little, much = (_scalar(answer, predictions, targets, routers, k, c) for c in (0.0, 0.1, 0.5))
        if not torch.isclose(without, cross_entropy, atol=1e-5):
            raise WrongAnswer(
                f"With coef = 0 only the cross-entropy should be left, {cross_entropy.item():.3f}; "
                f"your loss is {without.item():.3f}."
            )
        if torch.isclose(much, cross_entropy, atol=1e-5):
            raise WrongAnswer("The loss is the same whatever `coef` is, and whatever the routers do.")
        if not torch.isclose(much - cross_entropy, 5 * (little - cross_entropy), rtol=1e-3):
            raise WrongAnswer("Five times the `coef` should add five times as much to the cross-entropy.")
        slope = _gradient(much, routers)
        if not slope.any():
            raise WrongAnswer("The number has changed, but no gradient reaches the routers: they cannot learn from it.")
        if _same_direction(slope, -_gradient(balance, routers)):
            raise WrongAnswer("This loss falls when a router becomes more uneven. Mind the sign.")
        if layers > 1 and _same_direction(slope, _gradient(pooled, routers)):
            raise WrongAnswer(
                "You averaged over the layers first. Two layers that collapsed in opposite ways then look balanced: "
                "take the loss of each layer, then their mean."
            )
        added = ((much - cross_entropy) / 0.5).item()
        allowed = [balance.item() * factor for factor in (1, 1 / k, layers, layers / k)]
        if not (_any_close(added, allowed) and _same_direction(slope, _gradient(balance, routers))):
            raise WrongAnswer(
                f"Your balance loss, without coef, is {added:.3f} for {layers} layers, {experts} experts and k = {k}; "
                f"wanted {balance.item():.3f}, with a gradient to match."
            )
    return "Right: an uneven router now costs something, and the gradient says which way is out."


def check_coactivation(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `coactivation(indices, num_experts)`: from the choices [T, K], of the tokens of expert i the share that go
    to expert j as well, [E, E], over all pairs (Muennighoff et al. 2024, arXiv 2409.02060, section 5). The diagonal is
    free, and so is the row of an expert without tokens.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "Two experts whose ranks are not next to each other still do not count as a pair.": (
            lambda indices, experts: _pairs(indices, experts, lambda i, j: abs(i - j) == 1)
        ),
        "Only pairs with a token's first choice are counted.": (
            lambda indices, experts: _pairs(indices, experts, lambda i, j: i != j and 0 in (i, j))
        ),
        "Each pair is counted in one direction: if i goes with j, j goes with i.": (
            lambda indices, experts: _pairs(indices, experts, lambda i, j: i < j)
        ),
        "These are counts. Of how many tokens of expert i is it the share?": (
            lambda indices, experts: _pairs(indices, experts, per="pair")
        ),
        "You divided by the number of all tokens; wanted the share among the tokens of expert i.": (
            lambda indices, experts: _pairs(indices, experts, per="pair") / len(indices)
        ),
        "You divided by the tokens of the other expert: rows and columns have changed places.": (
            lambda indices, experts: _pairs(indices, experts).T
        ),
    }
    for tokens, experts, k in ((60, 6, 4), (50, 7, 2), (80, 9, 5), (40, 12, 3)):
        tilt = torch.linspace(0, 1, experts)
        indices = (_normal(tokens, experts) + tilt).index_fill(1, torch.tensor(0), -9).topk(k).indices
        found, wanted = numbers(answer, indices, experts), _pairs(indices, experts)
        if found.shape == wanted.shape:
            found = found.clone().fill_diagonal_(0)
            found[0] = 0  # nobody chooses expert 0: its row has no meaning
        compare(found, wanted, mistakes, (indices, experts))
    return "Right: every pair in a token's choice counts, whatever the ranks."


def _pairs(
    indices: Tensor, experts: int, counts: Callable[[int, int], bool] = int.__ne__, per: str = "expert"
) -> Tensor:
    """Pairs of ranks (i, j) for which `counts` is true, as a share of the tokens of the first expert."""
    ranks = F.one_hot(indices, experts).double().unbind(1)  # K tensors [T, E]
    k = range(len(ranks))
    found = torch.zeros(experts, experts, dtype=torch.double)
    for i in k:
        for j in k:
            if counts(i, j):
                found += ranks[i].T @ ranks[j]
    tokens = sum(ranks).sum(0).clamp(min=1)
    return found if per == "pair" else found / tokens[:, None]


def check_router_weights(answer: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> str:
    """Check `router_weights(logits, k)`: the weights [T, K] and the experts [T, K], where a weight is the expert's
    probability among all E (Fedus et al. 2021, arXiv 2101.03961, eq. 2) and carries a gradient at k = 1 too. For k > 1
    the weights may add up to 1 instead.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "At k = 1 every weight is 1, whatever the router says.": lambda logits, k: (
            _best(logits.softmax(-1), k) > 0
        ).double(),
        "The probabilities are taken over tokens. It is the experts that compete.": (
            lambda logits, k: _best(logits.softmax(0), k)
        ),
    }
    for tokens, experts, k in ((8, 5, 1), (6, 8, 2), (7, 9, 4)):
        logits = _normal(tokens, experts).requires_grad_()
        weights, indices = _choice(answer, logits, k)
        slope = _pull(weights, indices, logits)
        if slope.abs().max() < 1e-6:
            raise WrongAnswer(f"At k = {k} the router still gets no gradient.")
        found = _rows(weights, indices, experts)
        forms = [route_topk(logits, k), route_topk(logits, k, norm_topk_prob=True)][: 1 if k == 1 else 2]
        same = [form for form in forms if torch.allclose(found, _rows(form.weights, form.indices, experts), atol=1e-5)]
        if not same:
            compare(found, _best(logits.softmax(-1), k), mistakes, (logits, k))
        elif not torch.allclose(slope, _pull(same[0].weights, same[0].indices, logits), rtol=0.01, atol=1e-5):
            raise WrongAnswer(
                f"At k = {k} the weights are right and their gradient is not. Is a part of the calculation detached?"
            )
    return "Right: also with one expert a token, the weight depends on the logits, and the router can learn."


def _pull(weights: Tensor, indices: Tensor, logits: Tensor) -> Tensor:
    """The gradient on the logits when every expert's weight pulls with a force of its own."""
    force = _normal(*logits.shape, seed=1)
    return _gradient((weights * force.gather(1, indices)).sum(), [logits])


def _best(scores: Tensor, k: int) -> Tensor:
    return _rows(*scores.topk(k), scores.shape[-1])


def check_capacity(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    """Check `capacity_mask(indices, num_experts, capacity)`: which of the choices [T, K] find a place when an expert
    has `capacity` of them and serves every first choice before any second one (GShard, arXiv 2006.16668,
    algorithm 1). Who comes first among choices of equal rank is free.

    Raises:
        WrongAnswer: with a hint.
    """
    for tokens, experts, k, capacity in ((16, 4, 2, 6), (9, 4, 1, 2), (12, 6, 3, 4), (5, 8, 4, 9)):
        logits = _normal(tokens, experts) + torch.linspace(0, 1, experts)
        output = route_topk(logits, k)
        right = apply_capacity(output, capacity).indices < experts
        found = numbers(answer, output.indices, experts, capacity)
        if found.shape != right.shape or not ((found == 0) | (found == 1)).all():
            raise WrongAnswer(
                f"Wanted a yes or no for each choice, of shape {tuple(right.shape)}; "
                f"found shape {tuple(found.shape)}, values {found.unique().tolist()[:4]}."
            )
        kept, wanted = (_places(output.indices, mask, experts) for mask in (found, right))  # [K, E]
        if torch.equal(kept, wanted):
            continue
        if torch.equal(found, right.T.reshape(right.shape).double()):
            raise WrongAnswer("Right places, for the wrong tokens: in which order do the rows of your mask stand?")
        for expert, places in enumerate(kept.sum(0).int().tolist()):
            if places > capacity:
                raise WrongAnswer(f"Expert {expert} has {capacity} places and takes {places} tokens.")
            if places < wanted[:, expert].sum():
                raise WrongAnswer(f"Expert {expert} turns tokens away although some of its {capacity} places are free.")
        expert = int((kept != wanted).any(0).nonzero()[0])
        raise WrongAnswer(
            f"With k = {k}, expert {expert} turns away a token that wants it more, and takes one that wants it less."
        )
    return "Right: nobody's second choice takes the place of a first one, and no place is wasted."


def _places(indices: Tensor, mask: Tensor, experts: int) -> Tensor:
    """How many places each expert gives to choices of each rank, [K, E]."""
    return (F.one_hot(indices, experts) * mask.double()[..., None]).sum(0)


def check_balance_loss(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `balance_loss(logits, k)`: E * sum_i f_i P_i of logits [T, E], with f_i the share of tokens that chose
    expert i and P_i its mean probability among all experts (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). f may add
    up to K or to 1.

    Raises:
        WrongAnswer: with a hint.
    """
    for tokens, experts, k in ((24, 6, 2), (40, 8, 1), (30, 9, 4)):
        logits = (_normal(tokens, experts) - 5 * F.one_hot(torch.tensor(experts - 1), experts)).requires_grad_()
        right = load_balancing_loss([route_topk(logits, k)])
        loss = _scalar(answer, logits, k)
        slope, wanted = (_gradient(value, [logits]).view_as(logits) for value in (loss, right))
        if not slope.any():
            raise WrongAnswer("No gradient reaches the router: it cannot learn from this loss.")
        if slope[:, -1].abs().max() < 0.01 * wanted[:, -1].abs().max():
            raise WrongAnswer(
                f"No token chose expert {experts - 1}, and no gradient reaches it: your loss will never bring it back."
            )
        _name_known_loss(loss.item(), logits.detach(), k)
        if not (_any_close(loss.item(), (right.item(), right.item() / k)) and _same_direction(slope, wanted)):
            raise WrongAnswer(
                f"For {experts} experts and k = {k} your loss is {loss.item():.3f}; wanted {right.item():.3f}, "
                "with a gradient to match."
            )
    return "Right: an expert that nobody chose is felt as well, and pulled back."


def _name_known_loss(loss: float, logits: Tensor, k: int) -> None:
    experts = logits.shape[-1]
    scores = logits.softmax(-1)
    chosen = _best(scores, k)
    share, probability = (chosen > 0).double().mean(0), scores.double().mean(0)
    mistakes = {
        "The probabilities that you average no longer add up to 1 for a token. Which are missing?": (
            experts * (share * chosen.mean(0)).sum()
        ),
        "You multiply probabilities with probabilities. One of the two factors is a share of tokens.": (
            experts * probability.square().sum()
        ),
        "Perfect balance should give k (or 1), however many experts there are. What is missing?": (
            (share * probability).sum()
        ),
    }
    for hint, value in mistakes.items():
        if _any_close(loss, (value.item(), value.item() / k)):
            raise WrongAnswer(hint)


def check_expert_choice(answer: Callable[[Tensor, Tensor, Sequence[Callable], int], Tensor]) -> str:
    """Check `expert_choice(hidden, logits, experts, capacity)`: each expert takes the `capacity` tokens that score
    highest for it; a token gets the sum of probability * output over the experts that took it, [T, H]
    (Zhou et al. 2022, arXiv 2202.09368, section 3). The experts compute `capacity` tokens each, and no more.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "A token that several experts took has the output of one of them only. Wanted the sum.": (
            lambda taken, outputs: _weighted(taken * (taken.flip(1).cumsum(1).flip(1) == taken), outputs)
        ),
        "The outputs are not weighted by their probabilities.": (
            lambda taken, outputs: _weighted((taken > 0).double(), outputs)
        ),
        "The outputs are averaged. Wanted their sum, each weighted by its probability.": (
            lambda taken, outputs: _weighted(taken / taken.sum(-1, keepdim=True).clamp(min=1e-20), outputs)
        ),
    }
    for tokens, hidden_size, count, capacity in ((16, 6, 4, 5), (20, 5, 8, 3), (12, 4, 3, 12), (16, 4, 5, 1)):
        hidden, logits = _normal(tokens, hidden_size), _normal(tokens, count)
        experts = [_CountedExpert(_normal(hidden_size, hidden_size, seed=expert)) for expert in range(count)]
        found = numbers(answer, hidden, logits, experts, capacity)
        computed = sum(expert.rows for expert in experts)
        outputs = torch.stack([expert(hidden).double() for expert in experts], dim=1)
        taken = route_expert_choice(logits, capacity).weights.double()
        compare(found, _weighted(taken, outputs), mistakes, (taken, outputs))
        if computed > count * capacity:
            raise WrongAnswer(
                f"The result is right, at too high a price: {count} experts with {capacity} places each computed "
                f"{computed} tokens."
            )
    return "Right: the same result, and each expert computes only the tokens that it took."


class _CountedExpert:
    """An expert that counts the tokens it computes."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.rows = weight, 0

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows += hidden.numel() // len(self.weight)
        return (hidden @ self.weight).tanh()


def _weighted(weights: Tensor, outputs: Tensor) -> Tensor:
    return torch.einsum("te,teh->th", weights, outputs)


def _choice(answer: Callable, *inputs: object) -> tuple[Tensor, Tensor]:
    """The weights and the experts that the reader's function returns, two tensors [T, K]; a gradient stays."""
    found = answer(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise WrongAnswer("Wanted two things: return the weights and the experts.")
    weights = found[0] if isinstance(found[0], Tensor) else numbers(lambda: found[0])
    indices = numbers(lambda: found[1]).long()
    wanted, experts = (len(inputs[0]), indices.shape[-1] if indices.dim() else 0), inputs[0].shape[-1]
    if weights.shape != wanted or indices.shape != wanted:
        raise WrongAnswer(
            f"The weights have shape {tuple(weights.shape)}, the experts {tuple(indices.shape)}; "
            f"wanted {wanted[0]} rows of each, one for each token, and equally long."
        )
    if indices.numel() and not (indices.min() >= 0 and indices.max() < experts):
        raise WrongAnswer(
            f"Experts {indices.min()} to {indices.max()} are chosen, and there are only {experts}: 0 to {experts - 1}."
        )
    return weights, indices


def _rows(weights: Tensor, indices: Tensor, experts: int) -> Tensor:
    """A weight for every expert, [T, E], 0 for one that is not chosen: the same whatever the order of the choices."""
    rows = torch.zeros(len(indices), experts, dtype=torch.double)
    return rows.scatter_add(1, indices, weights.detach().double())


def _scalar(answer: Callable, *inputs: object) -> Tensor:
    found = answer(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise WrongAnswer(
            f"The function returned {type(found).__name__}; wanted a tensor with one number, "
            "which `backward` can start from."
        )
    return found.reshape(())


def _gradient(value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The gradient on all inputs in one row; 0 where there is none."""
    if not value.requires_grad:
        return torch.zeros(sum(x.numel() for x in inputs))
    gradients = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    pieces = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return torch.cat([piece.flatten() for piece in pieces])


def _same_direction(a: Tensor, b: Tensor) -> bool:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() > 0.9999


def _any_close(found: float, wanted: Sequence[float]) -> bool:
    return any(abs(found - value) <= 1e-4 * abs(value) for value in wanted)


def _normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 * seed + columns))


@contextmanager
def _nan_in_fresh_memory() -> Iterator[None]:
    """Whatever torch allocates holds NaN until it is written to: a promise of torch's deterministic mode."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill
