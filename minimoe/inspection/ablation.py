"""What each expert is worth: the loss of a model without it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.inspection.nulls import Measured, Resamples, measured
from minimoe.model.moe import MoELayer
from minimoe.model.routing import RouterOutput
from minimoe.model.transformer import MoEForCausalLM


@torch.no_grad()
def ablate(
    model: MoEForCausalLM,
    batches: Iterable[tuple[Tensor, Tensor]],
    domain_names: Sequence[str],
    *,
    draws: int = 200,
    seed: int = 0,
) -> Measured:
    """Cross-entropy lost by removing one expert, in nats per token, [L, E, domains]: for every expert, one at a time.

    A removed expert's slots become empty. The other weights of a token stay as they are (they are not renormalised),
    and nothing takes its place; a shared expert goes on working. The null is the mean over the experts of the layer:
    what removing a random one costs this domain. In the interval, `draws` resamples of sequences stand for documents.

    Args:
        model: in evaluation mode during the call; left as it was, whatever happens.
        batches: input_ids [B, S] and the domain of each sequence [B], such as `Corpus.batch` gives; -1: none.
        domain_names: what the domains index.

    Raises ValueError where the model is dense, a domain has no sequence, or one has no name.
    """
    gates = [module.gate for module in model.modules() if isinstance(module, MoELayer)]
    if not gates:
        raise ValueError("num_experts=0: a dense model has no expert to remove")
    batches = list(batches)
    domains = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(domain) for _, domain in batches)])
    if domains.max(initial=-1) >= len(domain_names):
        raise ValueError(f"domain {domains.max()}: wanted less than {len(domain_names)}, the number of domain_names")
    for index, name in enumerate(domain_names):
        if index not in domains:
            raise ValueError(f"domain {name!r} has no sequence in the batches: wanted at least one")
    intact = _sequence_losses(model, batches)
    experts = model.config.num_experts
    increase = np.empty((len(gates), experts, len(domains)))
    for layer, gate in enumerate(gates):
        for expert in range(experts):
            with _without(gate, expert):
                increase[layer, expert] = _sequence_losses(model, batches) - intact
    resamples = Resamples.draw(np.arange(len(domains)), draws, seed)
    in_domain = (domains[:, None] == np.arange(len(domain_names))).astype(float)  # [sequences, domains]
    with np.errstate(invalid="ignore"):  # a resample may lack a domain
        means = np.einsum("les,sd,sw->lwed", increase, in_domain, resamples.weights, optimize=True)
        means /= (resamples.weights.T @ in_domain)[:, None]
    means[:, 1:, :, in_domain.sum(0) < 2] = np.nan
    return measured(means, means[:, 0].mean(1, keepdims=True))


@contextmanager
def _without(gate: nn.Module, expert: int) -> Iterator[None]:
    """Empty the slots of an expert in all that a router returns inside the block."""

    def remove(_module: nn.Module, _inputs: object, chosen: RouterOutput) -> RouterOutput:
        removed = chosen.indices == expert
        return chosen._replace(
            weights=chosen.weights.masked_fill(removed, 0),
            indices=chosen.indices.masked_fill(removed, chosen.logits.shape[-1]),
        )

    with gate.register_forward_hook(remove):  # the block's end takes the hook away
        yield


def _sequence_losses(model: MoEForCausalLM, batches: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Mean cross-entropy of every sequence, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        losses = [_losses(model(ids).logits, ids) for ids, _ in batches]
    finally:
        model.train(was_training)
    return torch.cat(losses).cpu().double().numpy()


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].mT.float(), ids[:, 1:], reduction="none").mean(1)
