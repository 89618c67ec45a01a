"""Gradient accumulation: the gradient of a batch that is too large for memory, from pieces of it.

Shapes: L sparse layers, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minimoe.model.balance import chosen_experts, expert_load, load_balancing_loss, router_z_loss
from minimoe.model.routing import RouterOutput
from minimoe.model.transformer import CausalLMOutput, MoEForCausalLM, next_token_loss, next_token_targets

MicroBatch = Mapping[str, Tensor]  # arguments of `MoEForCausalLM.forward`
Shares = Callable[[Sequence[RouterOutput]], Tensor]  # of what routers chose: the `shares` of `load_balancing_loss`


class BatchLosses(NamedTuple):
    """Of a whole batch, without gradients; named as in `CausalLMOutput`."""

    loss: Tensor
    cross_entropy: Tensor
    aux_loss: Tensor | None  # None: the model is dense, or several micro-batches and no coefficient that asks for it
    load: list[Tensor]  # of each sparse layer: how many slots each expert received, [E] int64


class Size(NamedTuple):
    """What the means of a loss are taken over; padding does not count."""

    labels: int
    tokens: int
    sequences: int


def accumulate_gradients(model: MoEForCausalLM, micro_batches: Sequence[MicroBatch]) -> BatchLosses:
    """Add to every `.grad` what one backward pass of the whole batch would, with one micro-batch in memory at a time.

        accumulate_gradients(model, [{"input_ids": ids, "labels": ids} for ids in batch.split(2)])
        optimizer.step()

    The loss of a batch is not the mean of those of its parts: these may hold different numbers of tokens, and the
    balance loss is a product of two means over the batch (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6). One of them,
    the share f of the tokens that chose each expert, has no gradient. So it is counted first, in a forward pass without
    gradients. With `seq_aux`, or without a balance loss, no such pass is needed.

    Equal to one backward pass up to rounding, unless tokens compete: a capacity holds within a micro-batch, and the
    noise of a router is drawn for each.

    Args:
        model: in training mode, for the router losses to count.
        micro_batches: of each, "input_ids" and "labels" [B, S], and "attention_mask" where there is padding.

    Raises ValueError: there is no micro-batch; or as `MoEForCausalLM.forward`.
    """
    if not micro_batches:
        raise ValueError("micro_batches is empty: wanted at least one")
    if len(micro_batches) == 1:
        (batch,) = micro_batches
        mask, labels = batch.get("attention_mask"), batch["labels"]
        output = model(batch["input_ids"], mask, labels=labels, output_router_logits=True)
        output.loss.backward()
        return _batch_losses(output.loss, output.cross_entropy, output.aux_loss, output)
    sizes = [size_of(batch) for batch in micro_batches]
    whole = Size(*map(sum, zip(*sizes, strict=True)))
    if not whole.labels:
        raise ValueError("labels are -100 or padding everywhere: wanted at least one to score in some micro-batch")
    config = model.config
    sparse = any(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    balanced = sparse and config.router_aux_loss_coef > 0
    counted = _shares(model, micro_batches, whole.tokens) if balanced and not config.seq_aux else None
    pairs = zip(micro_batches, sizes, strict=True)
    parts = [add_gradients(model, batch, size, whole, lambda _: counted) for batch, size in pairs]
    losses, cross_entropies, aux_losses, loads = zip(*parts, strict=True)
    load = [sum(of_layer) for of_layer in zip(*loads, strict=True)]
    return BatchLosses(sum(losses), sum(cross_entropies), sum(aux_losses) if balanced else None, load)


def size_of(batch: MicroBatch) -> Size:
    """What the losses of a micro-batch are taken over."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = int((next_token_targets(batch["labels"], mask) != -100).sum())
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    return Size(labels, int(there.sum()), int(there.any(1).sum()))


@torch.no_grad()
def _shares(model: MoEForCausalLM, micro_batches: Sequence[MicroBatch], tokens: int) -> Tensor:
    """The share of all tokens that chose each expert, [L, E]. Random states are left as they were found."""
    counts = []
    with torch.random.fork_rng():
        for batch in micro_batches:
            output = model(batch["input_ids"], batch.get("attention_mask"), output_router_logits=True)
            counts.append(torch.stack([chosen_experts(chosen).sum(0) for chosen in output.router_outputs]))
    return sum(counts) / tokens


def add_gradients(model: MoEForCausalLM, batch: MicroBatch, size: Size, whole: Size, shares: Shares) -> BatchLosses:
    """Backward of one micro-batch's part of the losses of the whole batch: the parts add up to it.

    Args:
        shares: which shares of the tokens chose each expert in the whole batch; not asked with `seq_aux`.
    """
    config, mask = model.config, batch.get("attention_mask")
    output = model(batch["input_ids"], mask, output_router_logits=True)
    loss = cross_entropy = next_token_loss(output.logits, batch["labels"], mask, reduction="sum") / whole.labels
    chosen, aux_loss, tokens = output.router_outputs, None, size.tokens / whole.tokens
    if chosen and config.router_aux_loss_coef:
        sequences, share, counted = 1, tokens, None if config.seq_aux else shares(chosen)
        if config.seq_aux:
            sequences, share = len(batch["input_ids"]), size.sequences / whole.sequences
        aux_loss = share * load_balancing_loss(chosen, sequences=sequences, attention_mask=mask, shares=counted)
        loss = loss + config.router_aux_loss_coef * aux_loss if model.training else loss
    if chosen and config.router_z_loss_coef and model.training:
        loss = loss + config.router_z_loss_coef * tokens * router_z_loss(chosen, attention_mask=mask)
    loss.backward()
    return _batch_losses(loss, cross_entropy, aux_loss, output)


def _batch_losses(loss: Tensor, cross_entropy: Tensor, aux_loss: Tensor | None, output: CausalLMOutput) -> BatchLosses:
    load = [expert_load(chosen.indices, chosen.logits.shape[-1]) for chosen in output.router_outputs]
    return BatchLosses(loss.detach(), cross_entropy.detach(), None if aux_loss is None else aux_loss.detach(), load)
