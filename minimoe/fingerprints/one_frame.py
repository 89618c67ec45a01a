"""The weights of several models in the frame of one of them, whatever gauges they were rewritten by.

Norms are folded. The residual streams are turned onto that of the first model by the rotation that fits the embeddings
of shared tokens best. Of attention, only the products over all heads are kept. Neurons are matched with those of the
first model, and up and down made equally long. What is then left of a difference is no choice of basis.

Shapes: H hidden size, I neurons, N tokens, M models.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.fingerprints.aligned_cka import procrustes
from minimoe.fingerprints.anchors import choose_tokens, read_anchors, read_embedding, read_inputs
from minimoe.fingerprints.folded import Neurons, mlps, query_key, value_output
from minimoe.fingerprints.matching import assign, thin_out
from minimoe.fingerprints.weights import Weights

MLPs = dict[str, Tensor]  # [3, I, H] each
FACES = ("gate", "up", "down")
SAME_NEURON = 0.5  # cosine of two neurons, from which on they are taken to be one
GLANCE = 32  # neurons of an expert that show which MLP of another model to match it with


class Part(NamedTuple):
    """One role of one layer in all models: rows that correspond."""

    layer: int | None  # None: embedding and head
    role: str  # "embedding", "head", "qk", "vo", "gate", "up", "down"; of a mixture "expert 0 gate" ...
    rows: Tensor  # [M, n, H] in float64: of the first model, and of the others in its frame


def in_one_frame(
    model: Weights, others: Sequence[Weights], layers: Mapping[int, int] | None = None, *, closely: bool = False
) -> Iterator[Part]:
    """Each role of each layer of `model`, beside the same of the others. Of wide MLPs some neurons are taken.

    An expert is matched with that of another model, or its MLP, which resembles it most.

    Args:
        layers: those of `model` that are wanted, and the layer of the others that goes with each; None: all, the same.
        closely: turn the residual streams a second time, so that matched neurons fit as well. A rotation from tokens
            alone is worse, and does not know what is compared after it.

    Raises Refusal: the models share fewer tokens than the largest H; there is no gated MLP, or no head.
    """
    layers = {layer: layer for layer in range(model.num_layers)} if layers is None else layers
    tokens, turns = turns_onto(model, others)
    if closely:
        turns = [_refine(model, other, tokens, turn, layers) for other, turn in zip(others, turns, strict=True)]
    pairs = list(zip([model, *others], [None, *turns], strict=True))
    yield _part(None, "embedding", (_turned(turn, read_embedding(one, tokens)) for one, turn in pairs))
    yield _part(None, "head", (_turned(turn, _read_outputs(one, tokens)) for one, turn in pairs))
    for layer, partner in layers.items():
        places = [(one, turn, layer if one is model else partner) for one, turn in pairs]
        for role, read in (("qk", query_key), ("vo", value_output)):
            yield _part(layer, role, (product(*read(one, at), turn) for one, turn, at in places))
        own, *sources = (_read_mlps(one, at, turn) for one, turn, at in places)
        yield from _match(layer, {name: thin_out(neurons) for name, neurons in own.items()}, sources)


def turns_onto(model: Weights, others: Sequence[Weights]) -> tuple[list[str], list[Tensor]]:
    """The tokens that all of them share, and the rotation [H', H] of each of the others onto the frame of `model`."""
    family = [model, *others]
    widest = max(weights.hidden_size for weights in family)
    tokens = choose_tokens(set.intersection(*(set(weights.tokens) for weights in family)), 4 * widest, widest)
    return tokens, [procrustes(read_inputs(other, tokens), read_inputs(model, tokens)) for other in others]


def _refine(model: Weights, other: Weights, tokens: list[str], turn: Tensor, layers: Mapping[int, int]) -> Tensor:
    """A rotation that fits more than `turn`: tokens in embedding and head, and neurons, each of length 1."""
    inputs, outputs = ([read(one, tokens) for one in (other, model)] for read in (read_inputs, _read_outputs))
    sides = [inputs, outputs]
    for layer, partner in layers.items():
        own = {name: thin_out(neurons) for name, neurons in _read_mlps(model, layer, None).items()}
        for name, (found, has_partner) in _partners(own, _read_mlps(other, partner, turn)).items():
            kept = has_partner & (F.cosine_similarity(own[name], found, dim=-1).mean(0) > SAME_NEURON)
            sides += [[theirs[kept] @ turn.mT, ours[kept]] for theirs, ours in zip(found, own[name], strict=True)]
    theirs, ours = (F.normalize(torch.cat(rows), dim=-1) for rows in zip(*sides, strict=True))
    return procrustes(theirs, ours)


def _read_outputs(weights: Weights, tokens: list[str]) -> Tensor:
    return read_anchors(weights, tokens).outputs


def _read_mlps(weights: Weights, layer: int, turn: Tensor | None) -> MLPs:
    """Neurons [3, I, H] by the name of the MLP or expert; what a router multiplies an expert by goes into them."""
    scales = weights.get("router_scale", layer).tolist() if weights.has("router_scale", layer) else []
    by_expert = {str(expert): scale for expert, scale in enumerate(scales)}
    return {
        name: _balanced(neurons._replace(down=neurons.down * by_expert.get(name, 1.0)), turn)
        for name, neurons in mlps(weights, layer).items()
    }


def _match(layer: int, own: MLPs, sources: list[MLPs]) -> Iterator[Part]:
    """Neurons beside those of the others that are most like them; in a narrower MLP some have no partner."""
    matched = [_partners(own, of_other) for of_other in sources]
    for name, neurons in own.items():
        found, has_partner = zip(*(of_other[name] for of_other in matched), strict=True)
        kept = torch.stack(has_partner).all(0)
        for face, role in enumerate(FACES):
            role = role if name == "mlp" else f"expert {name} {role}"
            yield _part(layer, role, (rows[face, kept] for rows in (neurons, *found)))


def _part(layer: int | None, role: str, rows: Iterable[Tensor]) -> Part:
    return Part(layer, role, torch.stack([*rows]).double())


def _turned(turn: Tensor | None, rows: Tensor) -> Tensor:
    return rows if turn is None else rows @ turn


def product(left: Tensor, right: Tensor, turn: Tensor | None = None) -> Tensor:
    """left^T right [H, H] of factors [n, H] whose columns are turned first."""
    return _turned(turn, left).double().mT @ _turned(turn, right).double()


def _balanced(neurons: Neurons, turn: Tensor | None = None) -> Tensor:
    """Gate, up and down [3, I, H], turned, up and down of each neuron equally long: only their product matters."""
    faces = _turned(turn, torch.stack(neurons))
    _, up, down = faces.norm(dim=-1)
    scale = torch.where((up > 0) & (down > 0), (down / up).sqrt(), 1.0)
    return faces * torch.stack([torch.ones_like(scale), scale, 1 / scale])[..., None]


def _partners(own: MLPs, sources: MLPs) -> dict[str, tuple[Tensor, Tensor]]:
    """For neurons [3, n, H] of each MLP those of another that are most like them, [3, n, H], and which have one, [n].

    Each MLP has another partner, unless there are too few.
    """
    glances = [F.normalize(thin_out(neurons, GLANCE), dim=-1) for neurons in own.values()]
    likeness = [[float(_similar(glance, mlp).amax(-1).mean()) for mlp in sources.values()] for glance in glances]
    table, mlps_there = torch.tensor(likeness), list(sources.values())
    chosen = assign(table) if len(own) <= len(sources) else table.argmax(1)
    partners = {}
    for place, (name, neurons) in zip(chosen.tolist(), own.items(), strict=True):
        columns = assign(_similar(F.normalize(neurons, dim=-1), mlps_there[place]))
        found = mlps_there[place][:, columns]
        sign = (neurons[1:] * found[1:]).sum((0, -1)).sign()
        partners[name] = torch.stack([found[0], *(found[1:] * sign[:, None])]), columns >= 0
    return partners


def _similar(own: Tensor, source: Tensor) -> Tensor:
    """Of each neuron of [3, n, H] with each of [3, I, H]: [n, I]."""
    source = F.normalize(source, dim=-1)
    products = torch.stack([ours.double() @ theirs.double().mT for ours, theirs in zip(own, source, strict=True)])
    return products[0] + products[1:].abs().sum(0)
