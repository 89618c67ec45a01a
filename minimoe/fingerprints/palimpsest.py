"""Whether a model likes training examples the better, the later another model was trained on them.

What it measures
    Spearman's rho of the order in which the claimed parent met its training examples and the log-likelihood that the
    suspect gives them. Training writes over what it wrote before, so that later examples are remembered better. A
    reference model, if given, takes out how hard the text is: what it says of each example is subtracted. If the kind
    of text of each example is given, the mean of its kind is subtracted: in one draw, a kind may come later than
    another, and models like kinds differently.
What leaves it unchanged
    Every gauge; it needs no weights of the parent, only the order of its training.
What it cannot see
    A parent that long training has written over. Which way was taken: a model distilled from the parent remembers the
    order too, with no weight in common. What was met at a learning rate of nearly 0 leaves nothing.
Source
    Kuditipudi et al. 2025, arXiv 2510.19796. To subtract a reference is common in membership inference (Watson et al.
    2021, arXiv 2111.08440).

The p-value is exact if the order was drawn at random, whatever the examples are: had the suspect nothing from that run,
every order would be as likely as any other. All suspects that are asked about one run share one draw of its order.

Shapes: S tokens in each of n examples.
"""

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from minimoe.fingerprints.independence import spearman
from minimoe.fingerprints.result import Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights

FEWEST = 10  # examples
_BATCH = 16  # examples run at once


@explain_refusals
def palimpsest(
    weights: Weights,
    sequences: Tensor,
    *,
    reference: Weights | None = None,
    kinds: Tensor | None = None,
    trials: int = 9999,
    seed: int = 0,
) -> Result:
    """Test a suspect against the order of somebody's training.

    A part of the examples will do, if it is chosen without looking at the suspect: every tenth, say.

    Args:
        weights: the suspect.
        sequences: [n, S] int64, in the order of training, as ids of the suspect's vocabulary.
        reference: a model known to have nothing from that run, of the same vocabulary.
        kinds: [n] int64, which kind of text each example is.
        trials: T random orders are drawn, with `seed`.

    Returns:
        score: Spearman's rho, above 0 if later examples are likelier.
        p_value: (1 + how many random orders reach the score) / (T + 1).
        refused: an encoder; likelihoods that are all equal or not finite.

    Raises ValueError: there are fewer than 10 examples, or of fewer than 2 tokens; an id is outside a vocabulary.
    """
    if sequences.dim() != 2 or len(sequences) < FEWEST or sequences.shape[1] < 2:
        raise ValueError(f"sequences has shape {tuple(sequences.shape)}: wanted [>= {FEWEST}, >= 2]")
    liked = log_likelihoods(weights, sequences)
    if reference is not None:
        liked = liked - log_likelihoods(reference, sequences)
    return compare_order(liked, kinds=kinds, trials=trials, seed=seed)


def compare_order(liked: Tensor, *, kinds: Tensor | None = None, trials: int = 9999, seed: int = 0) -> Result:
    """What `palimpsest` says of likelihoods, [n] in the order of training."""
    if kinds is not None:
        sums = torch.zeros(int(kinds.max()) + 1, dtype=liked.dtype).index_add(0, kinds, liked)
        liked = liked - (sums / kinds.bincount().clamp(min=1))[kinds]
    if (liked == liked[0]).all():
        raise Refusal("all examples are equally likely")
    order, generator = torch.arange(len(liked)), torch.Generator().manual_seed(seed)
    ranks = torch.from_numpy(2 * stats.rankdata(liked.numpy())).long()  # whole numbers, ties too: sums are exact
    random_orders = (torch.randperm(len(liked), generator=generator) for _ in range(trials))
    reached = sum(bool(shuffled @ ranks >= order @ ranks) for shuffled in random_orders)
    details = {"examples": len(liked), "trials": trials}
    return Result(score=spearman(order, liked)[0], p_value=(1 + reached) / (trials + 1), details=details)


@torch.no_grad()
def log_likelihoods(weights: Weights, sequences: Tensor) -> Tensor:
    """Of each example [n, S], in nats, all tokens but the first together: [n] float64."""
    model, found = weights.model(), []
    distinct, places = sequences.unique(dim=0, return_inverse=True)  # equal examples are equally likely, to the bit
    for batch in distinct.split(_BATCH):
        nats = F.cross_entropy(model(batch).logits[:, :-1].mT, batch[:, 1:], reduction="none")
        found.append(-nats.double().sum(1))
    liked = torch.cat(found)[places]
    if not liked.isfinite().all():
        raise Refusal(f"{weights.name}: likelihoods are not finite")
    return liked
