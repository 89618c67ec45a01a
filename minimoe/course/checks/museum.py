"""The checks of the bug museum: one for each exhibit, in the order of the notebook.

A check only runs the repaired code. It looks at what comes back, at gradients and at what was computed on the way,
never at how the code is written.

Shapes: T tokens, E experts, K experts per token, H hidden size, I expert width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations, permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.course.checks.answers import WrongAnswer, compare, gradient, judge, loss_of, normal, numbers, seeded
from minimoe.course.checks.mixture import choice_of_groups
from minimoe.model import RouterOutput
from minimoe.model.balance import apply_capacity, load_balancing_loss
from minimoe.model.routing import route_expert_choice, route_grouped, route_noisy_topk, route_topk, route_topk_softmax

Choice = tuple[Tensor, Tensor]  # the weights [T, K] and the experts [T, K]


def _rows(choose: Callable[..., Choice | RouterOutput]) -> Callable[..., Tensor]:
    """From a function that chooses, one that returns a weight for every expert, [T, E], 0 for one that is not chosen:
    the same whatever the order of the choices. A gradient stays."""

    def rows(logits: Tensor, *others: object) -> Tensor:
        found = choose(*(value.clone() if isinstance(value, Tensor) else value for value in (logits, *others)))
        if isinstance(found, RouterOutput):
            found = found.weights, found.indices
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise WrongAnswer("Wanted two things: return the weights and the experts.")
        weights = found[0] if isinstance(found[0], Tensor) else numbers(found[0])
        indices, (tokens, experts) = numbers(found[1]).long(), logits.shape
        if indices.dim() != 2 or len(indices) != tokens or weights.shape != indices.shape:
            raise WrongAnswer(
                f"The weights have shape {tuple(weights.shape)}, the experts {tuple(indices.shape)}; "
                f"wanted {tokens} rows of each, one for each token, and equally long."
            )
        if indices.numel() and not (indices.min() >= 0 and indices.max() < experts):
            raise WrongAnswer(f"Experts {indices.min()} to {indices.max()} are chosen; wanted 0 to {experts - 1}.")
        return torch.zeros(tokens, experts, dtype=torch.double).scatter_add(1, indices, weights.double())

    return rows


def check_noisy_choice(answer: Callable[[Tensor, Tensor, int, bool], Choice]) -> str:
    """Check `noisy_choice(logits, noise_logits, k, training)`: the weights [T, K] and the experts [T, K] of the k best
    logits [T, E], which in training, and only there, carry noise of standard deviation softplus(noise_logits)
    (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5)."""
    rows = _rows(answer)
    with seeded():
        for tokens, experts, k in ((6, 5, 2), (9, 8, 3)):
            logits, noise = normal(tokens, experts), normal(tokens, experts, seed=1)
            found, again = (rows(logits, noise, k, False) for _ in range(2))
            if not torch.allclose(found, again):
                raise WrongAnswer("With training=False, one input still gets two answers.")
            compare(found, _rows(route_topk_softmax)(logits, k), what="the table of weights without training")
        _check_noise(rows)
    return "Right: noise in training, and in evaluation one answer for one input."


def _check_noise(rows: Callable[..., Tensor]) -> None:
    """In training: the size of the noise for every token and expert, and how often it decides a choice."""
    # All experts are chosen, and the last one has next to no noise, so that the logits can be had from the weights.
    noise_logits = torch.linspace(-1, 1, 5) + torch.tensor([[0.0], [1.5]]).repeat(2000, 1)
    noise_logits[:, -1] = -20
    logs = rows(torch.zeros(4000, 5), noise_logits, 5, True).log()
    noise = (logs - logs[:, -1:])[:, :-1].view(2000, 2, 4)  # [, kind of token, expert]
    for found, given in zip(noise.std(0).flatten(), noise_logits[:2, :-1].flatten(), strict=True):
        if not abs(found / F.softplus(given) - 1) < 0.1:
            raise WrongAnswer(
                f"With training=True and noise_logits of {given:.1f} the noise has standard deviation {found:.2f}; "
                f"wanted softplus({given:.1f}), which is {F.softplus(given):.2f}. Every token and expert has its own."
            )

    def habits(rows: Tensor) -> Tensor:
        """How often each expert is chosen, and the mean of the largest weight, [E + 1]."""
        return torch.cat([(rows > 0).double().mean(0), rows.amax(-1).mean()[None]])

    logits, noise_logits = (normal(1, 6, seed=seed).expand(4000, 6) for seed in (0, 1))  # one token, many times
    found, again = (rows(logits, noise_logits, 2, True) for _ in range(2))
    if torch.allclose(found, again):
        raise WrongAnswer("With training=True two calls get the same noise. It should be drawn anew each time.")
    right = _rows(partial(route_noisy_topk, training=True, generator=torch.Generator().manual_seed(0)))
    if (habits(found) - habits(right(logits, noise_logits, 2))).abs().max() > 0.05:
        raise WrongAnswer(
            "With training=True and k = 2 of 6 experts, some are chosen too often, or weigh too much. The noisy logits "
            "should decide who is chosen, and the same ones what a choice weighs."
        )


def check_moge_choice(answer: Callable[[Tensor, int, int], Choice]) -> str:
    """Check `moge_choice(logits, k, n_group)`: the probabilities [T, K] and the ids [T, K] of the experts when each of
    n_group groups of neighbours gives its k / n_group best (Pangu Pro MoE, arXiv 2505.21411). Their order is free."""
    sizes = ((6, 24, 4, 4), (5, 64, 8, 8), (6, 12, 4, 2), (9, 18, 6, 3), (5, 8, 4, 4))
    tries = [(normal(tokens, experts), k, n_group) for tokens, experts, k, n_group in sizes]
    starts = {
        "Still right only where a group holds as many experts as a token uses, 8 and 8. Here 24 experts form 4 groups, "
        "and a token uses 4.": lambda k, n_group: k,
        "Now each group starts where the choices of the last one end.": lambda k, n_group: k // n_group,
        "These are places within a group, the same in every group.": lambda k, n_group: 0,
    }
    mistakes = {hint: _rows(partial(choice_of_groups, step=start)) for hint, start in starts.items()}
    praise = "Right: a group starts in the right place, however many experts it holds and gives."
    return judge(_rows(answer), tries, _rows(route_grouped), mistakes, praise)


def check_fresh_layer(answer: Callable[[int, int, int, int], nn.Module]) -> str:
    """Check `fresh_layer(num_experts, hidden, width, seed)`: a module with a router [E, H] and E experts of two
    matrices each, `up` [I, H] and `down` [H, I], all random, centred, of a sensible size, and fixed by the seed. Fresh
    memory is filled with NaN meanwhile, so that what nobody initialised shows."""
    for experts, hidden, width in ((4, 64, 32), (6, 32, 96)):
        with seeded(), _nan_in_fresh_memory():
            first, again, other = (answer(experts, hidden, width, seed) for seed in (0, 0, 1))
        if not isinstance(first, nn.Module):
            raise WrongAnswer(f"The function returned {type(first).__name__}; wanted the layer, an nn.Module.")
        for name, parameter in first.named_parameters():
            if not parameter.isfinite().all():
                raise WrongAnswer(f"`{name}` holds numbers that nobody wrote (nan here; elsewhere, anything).")
            if parameter.dim() < 2:
                continue
            mean, spread = parameter.mean().item(), parameter.std().item()
            if not (abs(mean) <= spread / 2 and 0.005 < spread < 0.5):
                raise WrongAnswer(
                    f"`{name}` has mean {mean:.2f} and standard deviation {spread:.2g}; a layer that neither swells "
                    "nor silences its input has random numbers around 0 here, with a deviation of about 0.02 to 0.2."
                )
        for part, shape in {"router": (experts, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
            found = [tuple(matrix.shape) for name, matrix in _matrices(first) if part in name.split(".")]
            count = 1 if part == "router" else experts
            if found != [shape] * count:
                raise WrongAnswer(f"`{part}` has matrices of shapes {found}; wanted {count} of shape {shape}.")
        matrices, repeated, others = ([matrix for _, matrix in _matrices(layer)] for layer in (first, again, other))
        if any(a.shape == b.shape and torch.equal(a, b) for a, b in combinations(matrices, 2)):
            raise WrongAnswer("Two experts start out equal. What would ever make them differ?")
        if not all(map(torch.equal, matrices, repeated)):
            raise WrongAnswer("Two layers with the same seed differ.")
        if any(map(torch.equal, matrices, others)):
            raise WrongAnswer("A layer with another seed has a matrix that is the same.")
    return "Right: every matrix is finite, centred, of a sensible size, and fixed by the seed."


def _matrices(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every matrix of the layer with its name, those of fused experts one by one."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1:
            yield from ((name, matrix) for matrix in parameter.detach().reshape(-1, *parameter.shape[-2:]))


@contextmanager
def _nan_in_fresh_memory() -> Iterator[None]:
    """Whatever torch allocates holds NaN until it is written to: a promise of torch's deterministic mode."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def check_training_loss(answer: Callable[[Tensor, Tensor, Sequence[Tensor], int, float], Tensor]) -> str:
    """Check `training_loss(predictions, targets, router_logits, k, coef)`: the cross-entropy plus coef times the
    load-balancing loss E * sum_i f_i P_i, averaged over layers (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). Its sum
    over layers, and f divided by K, are right too."""
    for layers, experts, k in ((2, 6, 2), (1, 4, 1), (3, 8, 3)):
        predictions, targets, tilt = normal(32, 10), torch.arange(32) % 10, torch.linspace(-1, 1, experts)
        routers = [(normal(32, experts, seed=i) + tilt * (-1) ** i).requires_grad_() for i in range(layers)]
        outputs = [route_topk(logits, k) for logits in routers]
        balance, pooled = (load_balancing_loss(outputs, across_layers=how) for how in ("mean", "pooled"))
        cross_entropy = F.cross_entropy(predictions, targets)
        added = [loss_of(answer, predictions, targets, routers, k, c) - cross_entropy for c in (0.0, 0.1, 0.5)]
        if added[0].abs() > 1e-5:
            raise WrongAnswer("With coef = 0 only the cross-entropy should be left.")
        if added[2].abs() < 1e-5:
            raise WrongAnswer("The loss is the same whatever `coef` is, and whatever the routers do.")
        slope, wanted = gradient(added[2], routers), gradient(balance, routers)
        if not slope.any():
            raise WrongAnswer("The number has changed, but no gradient reaches the routers: they cannot learn from it.")
        if layers > 1 and _same_direction(slope, gradient(pooled, routers)):
            raise WrongAnswer(
                "You averaged over the layers first. Two layers that collapsed in opposite ways then look balanced: "
                "take the loss of each layer, then their mean."
            )
        for found in (added[1].item() / 0.1, added[2].item() / 0.5):
            _compare_balance(found, slope, balance.item(), wanted, (1, 1 / k, layers, layers / k))
    return "Right: an uneven router now costs something, and the gradient says which way is out."


def _compare_balance(found: float, slope: Tensor, right: float, wanted: Tensor, factors: Sequence[float]) -> None:
    """Accept the right loss times one of the factors, if its gradient points where it should."""
    if not (any(abs(found / right / factor - 1) < 1e-3 for factor in factors) and _same_direction(slope, wanted)):
        raise WrongAnswer(f"Not yet: your balance loss is {found:.3f}; wanted {right:.3f}, with a gradient to match.")


def _same_direction(a: Tensor, b: Tensor) -> bool:
    return F.cosine_similarity(a, b, dim=0).item() > 0.9999


def check_coactivation(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `coactivation(indices, num_experts)`: from the choices [T, K], of the tokens of expert i the share that go
    to expert j as well, [E, E], over all pairs (Muennighoff et al. 2024, arXiv 2409.02060, section 5). The diagonal is
    free, and so is the row of an expert without tokens."""

    def together(indices: Tensor, experts: int, furthest: int = 99) -> Tensor:
        """How often i and j are chosen together, at ranks that are at most so far apart, [E, E]."""
        ranks = enumerate(F.one_hot(indices, experts).double().unbind(1))  # K tensors [T, E]
        return sum(one.T @ other for (i, one), (j, other) in permutations(ranks, 2) if abs(i - j) <= furthest)

    def share(indices: Tensor, experts: int, furthest: int = 99) -> Tensor:
        tokens = torch.bincount(indices.flatten(), minlength=experts).clamp(min=1)
        return together(indices, experts, furthest) / tokens[:, None]

    def what_counts(table: Tensor) -> Tensor:
        """Without the diagonal, and without expert 0, whom nobody chooses."""
        return table.clone().fill_diagonal_(0).index_fill_(0, torch.tensor(0), 0)

    sizes = ((60, 6, 4), (50, 7, 2), (80, 9, 5), (40, 12, 3))
    tries = [(1 + normal(tokens, experts - 1).topk(k).indices, experts) for tokens, experts, k in sizes]
    mistakes = {
        "Two experts whose ranks are not next to each other still do not count as a pair.": partial(share, furthest=1),
        "These are counts. Of how many tokens of expert i is it the share?": together,
        "You divided by the tokens of the other expert.": lambda indices, experts: share(indices, experts).T,
    }
    praise = "Right: every pair in a token's choice counts, whatever the ranks."
    return judge(answer, tries, share, mistakes, praise, form=what_counts)


def check_router_weights(answer: Callable[[Tensor, int], Choice]) -> str:
    """Check `router_weights(logits, k)`: the weights [T, K] and the experts [T, K], where a weight is the expert's
    probability among all E (Fedus et al. 2021, arXiv 2101.03961, eq. 2) and carries a gradient at k = 1 too. For k > 1
    the weights may add up to 1 instead."""

    def pull(rows: Tensor, logits: Tensor) -> Tensor:
        """The gradient on the logits when every expert's weight pulls with a force of its own."""
        return gradient((rows * normal(*rows.shape, seed=1)).sum(), [logits])

    for tokens, experts, k in ((8, 5, 1), (6, 8, 2), (7, 9, 4)):
        logits = normal(tokens, experts).requires_grad_()
        found, right = _rows(answer)(logits, k), _rows(route_topk)(logits, k)
        if pull(found, logits).abs().max() < 1e-6:
            raise WrongAnswer(f"At k = {k} the router still gets no gradient.")
        if k > 1 and torch.allclose(found.sum(-1), torch.ones(tokens, dtype=torch.double), atol=1e-5):
            right = right / right.sum(-1, keepdim=True)
        compare(found, right, what=f"the table of weights at k = {k}")
        if not torch.allclose(pull(found, logits), pull(right, logits), rtol=0.01, atol=1e-5):
            raise WrongAnswer(f"At k = {k} the weights are right and their gradient is not. Is a part detached?")
    return "Right: also with one expert a token, the weight depends on the logits, and the router can learn."


def check_capacity(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    """Check `capacity_mask(indices, num_experts, capacity)`: which of the choices [T, K] find a place when an expert
    has `capacity` of them and serves every first choice before any second one (GShard, arXiv 2006.16668,
    algorithm 1). Who comes first among choices of equal rank is free."""
    for tokens, experts, k, capacity in ((16, 4, 2, 6), (9, 4, 1, 2), (12, 6, 3, 4), (5, 8, 4, 9)):
        output = route_topk(normal(tokens, experts) + torch.linspace(0, 1, experts), k)
        right = (apply_capacity(output, capacity).indices < experts).double()
        found = numbers(answer(output.indices.clone(), experts, capacity))
        if found.shape != right.shape or not ((found == 0) | (found == 1)).all():
            raise WrongAnswer(
                f"Wanted a yes or no for each choice, of shape {tuple(right.shape)}; "
                f"found shape {tuple(found.shape)}, values {found.unique().tolist()[:4]}."
            )
        # How many places each expert gives to choices of each rank, [K, E].
        kept, wanted = ((F.one_hot(output.indices, experts) * mask[..., None]).sum(0) for mask in (found, right))
        if torch.equal(kept, wanted):
            continue
        if torch.equal(found, right.T.reshape(right.shape)):
            raise WrongAnswer("Right places, for the wrong tokens: in which order do the rows of your mask stand?")
        expert = int((kept != wanted).any(0).nonzero()[0])
        raise WrongAnswer(
            f"Expert {expert} has {capacity} places. By rank, best first, it gives {kept[:, expert].int().tolist()} to "
            f"the choices; wanted {wanted[:, expert].int().tolist()}. No choice may take the place of a better one."
        )
    return "Right: nobody's second choice takes the place of a first one, and no place is wasted."


def check_balance_loss(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `balance_loss(logits, k)`: E * sum_i f_i P_i of logits [T, E], with f_i the share of tokens that chose
    expert i and P_i its mean probability among all experts (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). f may add
    up to K or to 1."""
    for tokens, experts, k in ((24, 6, 2), (40, 8, 1), (30, 9, 4)):
        logits = (normal(tokens, experts) - 5 * F.one_hot(torch.tensor(experts - 1), experts)).requires_grad_()
        right, loss = load_balancing_loss([route_topk(logits, k)]), loss_of(answer, logits, k)
        slope, wanted = (gradient(value, [logits]) for value in (loss, right))
        if not slope.any():
            raise WrongAnswer("No gradient reaches the router: it cannot learn from this loss.")
        of_last, wanted_of_last = (each.view_as(logits)[:, -1].abs().max() for each in (slope, wanted))
        if of_last < 0.01 * wanted_of_last:
            raise WrongAnswer(f"No token chose expert {experts - 1}, and no gradient reaches it: it stays unused.")
        _compare_balance(loss.item(), slope, right.item(), wanted, (1, 1 / k))
    return "Right: an expert that nobody chose is felt as well, and pulled back."


def check_expert_choice(answer: Callable[[Tensor, Tensor, Sequence[Callable], int], Tensor]) -> str:
    """Check `expert_choice(hidden, logits, experts, capacity)`: each expert takes the `capacity` tokens that score
    highest for it; a token gets the sum of probability * output over the experts that took it, [T, H]
    (Zhou et al. 2022, arXiv 2202.09368, section 3). The experts compute `capacity` tokens each, and no more."""
    for tokens, hidden_size, count, capacity in ((16, 6, 4, 5), (20, 5, 8, 3), (12, 4, 3, 12), (16, 4, 5, 1)):
        hidden, logits = normal(tokens, hidden_size), normal(tokens, count)
        computed: list[int] = []  # how many tokens, at each call of an expert
        experts = [partial(_expert, normal(hidden_size, hidden_size, seed=seed), computed) for seed in range(count)]
        found = answer(hidden.clone(), logits.clone(), [*experts], capacity)
        price = sum(computed)
        outputs = torch.stack([expert(hidden) for expert in experts], dim=1)  # [T, E, H]
        taken = route_expert_choice(logits, capacity).weights  # [T, E], 0 where nobody took a token
        last_one = taken * (taken.flip(1).cumsum(1).flip(1) == taken)
        mistakes = {
            "A token that several experts took has the output of one of them only. Wanted the sum.": last_one,
            "The outputs are not weighted by their probabilities.": (taken > 0).float(),
        }
        right, *wrong = (torch.einsum("te,teh->th", weights, outputs) for weights in (taken, *mistakes.values()))
        compare(found, right, dict(zip(mistakes, wrong, strict=True)))
        if price > count * capacity:
            raise WrongAnswer(
                f"The result is right, at too high a price: {count} experts with {capacity} places each computed "
                f"{price} tokens."
            )
    return "Right: the same result, and each expert computes only the tokens that it took."


def _expert(weight: Tensor, computed: list[int], hidden: Tensor) -> Tensor:
    """What one expert makes of some tokens; it notes how many they are."""
    computed.append(hidden.numel() // len(weight))
    return (hidden @ weight).tanh()
