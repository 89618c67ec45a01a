"""Whether the neurons of one model are those of another, in a residual stream turned by an unknown rotation.

What it measures
    A neuron has three faces: its gate row, its up row and its down column. A rotation of the residual stream keeps the
    angles between them, and those with all other neurons. From such numbers, its traits, each neuron of one model gets
    a counterpart in the other; the rotation that brings counterparts together is found by orthogonal Procrustes, and
    both are improved in turn (iterative closest points). The score asks about what the rotation was not fitted to: in
    other layers, or for other neurons of the same MLP, a counterpart is chosen by two faces, and the cosine of the
    third one counts.
    `aligned_neurons` is the mean over all MLPs or experts: what is left of the whole body. `best_part` is the largest
    of one MLP or expert, with a rotation of its own: a single expert that was taken over.
What leaves them unchanged
    Every gauge; another tokenizer or embedding: no token is shared. Leaving layers out.
What they cannot see
    Stolen attention; experts of few neurons in a part that was rotated by itself. And of an MLP of which not all
    neurons are looked at, as in wide models, who undoes one that is.
What does nothing does not count
    A neuron counts by how much it writes for tokens of the model itself that no others undo; an expert by how it is
    chosen. "idle" is what the score were if all counted.
Source
    Ours. Orthogonal Procrustes: Schoenemann 1966; iterative closest points: Besl & McKay 1992.

No law says that strangers score 0; they do for a rotation that has nothing to do with the neurons in question, up to
what training gives every residual stream. The tables of strangers show how far that goes: width matters
little, but small parts of narrow, deep models have a `best_part` of up to .48.

Shapes: F faces, 3 or 2 where MLPs have no gate; H hidden size, I neurons; K traits.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.fingerprints.anchors import WIDE, align_layers
from minimoe.fingerprints.audible import ALIKE, counts_of, loudness
from minimoe.fingerprints.folded import each_part
from minimoe.fingerprints.result import Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights, read_once

MOST_NEURONS, MOST_EXPERTS = 512, 8  # of a part of a wide model, and of a layer: those with the longest rows
EXACT = 128  # the widest residual stream that is looked at in float64: further up it takes long
MOST_FITS, MOST_OWN = 8, 16  # parts, in even steps, from which one rotation is sought; and that get one of their own
STEPS = 8  # of iterative closest points
DIRECTIONS = 256  # of a wide residual stream, in which rotations are looked for
INPUTS = 2048  # for which neurons are heard, of wide models half; at least twice as many as neurons
QUIET = 1e-6  # the mean square of a combination of neurons, each of 1: those below are silent, half precision included
SILENT, FEWEST_SILENT = 0.01, 0.01  # a neuron that counts less does nothing; the share of them that is looked into
FAINTEST = 0.01  # of that of the loudest layer: a layer below counts less


class Part(NamedTuple):
    """An MLP or an expert."""

    layer: int
    name: str
    faces: Tensor  # [F, I, H], rows of norm 1
    narrow: Tensor  # the same in the directions in which rotations are looked for
    traits: Tensor  # [I, K]
    counts: Tensor  # [I], from 0 for a neuron that does nothing to 1


Pair = tuple[Part, Part]


class Alignment(NamedTuple):
    """How much of each part is found in the other model."""

    body: Tensor  # [parts], with one rotation, which was fitted to other layers
    best: Tensor  # [parts], with any
    names: list[str]
    silent: float  # the share of neurons that do nothing, in the model that has more of them


@explain_refusals
def aligned_neurons(a: Weights, b: Weights) -> Result:
    """Compare all neurons of two models of any shape.

    Returns:
        score: mean cosine over the parts of the model that has more of them, 1 where nothing differs.
        details: "parts"; "silent", the share of neurons that do nothing; if it is above 1 %, "idle": the score if all
            neurons counted alike.
        refused: there is no MLP; the neurons of one are 0 or not finite; only one of the models has gates.
    """
    found = align(a, b)
    idle = {} if found.silent < FEWEST_SILENT else {"idle": float(align(a, b, True).body.mean())}
    return Result(score=float(found.body.mean()), details={"parts": len(found.names), "silent": found.silent, **idle})


@explain_refusals
def best_part(a: Weights, b: Weights) -> Result:
    """Look for single MLPs or experts of one model in the other.

    Returns:
        score: the highest mean cosine of a part.
        details: that of each part, as "layer 0 expert 3" or "layer 0 mlp"; "silent" and "idle" as above.
        refused: as above.
    """
    found = align(a, b)
    details = dict(zip(found.names, found.best.tolist(), strict=True))
    idle = {} if found.silent < FEWEST_SILENT else {"idle": float(align(a, b, True).best.max())}
    return Result(score=float(found.best.max()), details={**details, "silent": found.silent, **idle})


@lru_cache(maxsize=2)  # both methods look at it
def align(a: Weights, b: Weights, all_count: bool = False) -> Alignment:
    """Look for each part of one of two models, the one of more experts or else of narrower ones, in the other.

    all_count: whether neurons count that do nothing.
    """
    first, second = sorted((a, b), key=_shape)
    left, right = _widen(read_parts(first, all_count), read_parts(second, all_count))
    pairs = _pair_parts(left, right)
    bodies = [_score_all(pairs, [None] * len(pairs))]
    pairs = [tuple(part._replace(faces=part.narrow) for part in pair) for pair in pairs]
    step = -(-len(pairs) // MOST_FITS)
    tried = [(source, _thin(found)) for source, found in pairs[::step]]
    if tried[0][1].layer != tried[-1][1].layer:
        bodies.append(_score_all(pairs, _fit_to_other_layers(pairs, tried)))
    best = torch.stack(bodies).max(0).values
    for place in sorted(range(len(pairs)), key=lambda place: -_likeness(*pairs[place]))[:MOST_OWN]:
        source, found = pairs[place]
        own = _score(source, _every(found, 2, 1), _fit(source, _thin(_every(found, 2, 0))))
        best[place] = max(best[place], own)
    names = [f"layer {part.layer} {'mlp' if part.name == 'mlp' else f'expert {part.name}'}" for _, part in pairs]
    silent = max(silent_share(left), silent_share(right))
    return Alignment(max(bodies, key=lambda scores: float(scores.mean())), best, names, silent)


def silent_share(layers: list[list[Part]]) -> float:
    """Of all neurons that `read_parts` looked at, how many do nothing."""
    counts = torch.cat([part.counts for parts in layers for part in parts])
    return float((counts < SILENT).double().mean())


def _shape(weights: Weights) -> tuple[int, int]:
    """By which the model comes first in which parts are looked for."""
    layers = [layer for layer in range(weights.num_layers) if weights.has("up", layer)]
    if not layers:
        raise Refusal(f"{weights.name} has no MLP")
    return weights.num_experts, -weights.shape("up", layers[0])[-2]


# --- what is read of a model ------------------------------------------------------------------------------


@read_once
@torch.no_grad()
def read_parts(weights: Weights, all_count: bool) -> list[list[Part]]:
    """The parts of each layer; of many experts, and of many neurons, those whose rows are the longest."""
    inputs = _inputs(weights)
    read = [_read_layer(weights, layer, inputs, all_count) for layer in weights.layers_with("up")]
    basis = _main_directions([parts for parts, _ in read]) if weights.hidden_size > WIDE else None
    faintest = FAINTEST * max(mean for _, mean in read)
    shares = [1.0 if all_count or not faintest else min(mean / faintest, 1.0) for _, mean in read]
    return [[_look(part, basis, share) for part in parts] for (parts, _), share in zip(read, shares, strict=True)]


def _main_directions(layers: Sequence[list[Part]]) -> Tensor:
    """Of the residual stream, those in which most of the faces lie; they turn as it turns: [H, DIRECTIONS]."""
    rows = torch.cat([part.faces[:, ::16].flatten(0, 1) for parts in layers for part in parts])
    basis = torch.randn(rows.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(rows)
    for _ in range(4):  # subspace iteration
        basis = torch.linalg.qr(rows.mT @ (rows @ basis)).Q
    return basis


def _look(part: Part, basis: Tensor | None, share: float) -> Part:
    """A part with its traits, in some directions of a wide residual stream; its neurons count by a share."""
    narrow = part.faces if basis is None else F.normalize(part.faces @ basis, dim=-1)
    return part._replace(narrow=narrow, traits=_traits(part.traits, narrow, part.counts), counts=part.counts * share)


def _read_layer(weights: Weights, layer: int, inputs: Tensor, all_count: bool) -> tuple[list[Part], float]:
    """The parts of a layer, with lengths for traits, and the root mean square of what its neurons write.

    Where all count, nobody listens, and that is infinite.
    """
    longest: list[tuple[float, str, list[Tensor]]] = []
    most = MOST_NEURONS if weights.hidden_size > WIDE else None

    def the_longest(rows: Tensor) -> Tensor:
        return rows.norm(dim=1).argsort(descending=True, stable=True)[:most]  # an order that no gauge changes

    for name, faces in each_part(weights, layer, the_longest):
        mean = float(faces[0].norm(dim=1).mean())
        longest.append((mean, name, [face.to(inputs) for face in faces]))
        longest = sorted(longest, key=lambda part: -part[0])[:MOST_EXPERTS]
    faces = [_faces(rows) for _, _, rows in longest]
    if all_count:
        counts, mean = [torch.ones_like(unit[0, :, 0]) for unit in faces], math.inf
    else:
        use = _use(weights, layer, inputs)
        heard = zip(longest, faces, strict=True)
        loud = [_loudness(rows, unit, inputs) * use.get(name, 1.0) for (_, name, rows), unit in heard]
        mean = float(torch.cat(loud).square().mean().sqrt())
        counts = [counts_of(each, mean) for each in loud]
    parts = [
        Part(layer, name, unit, unit, _lengths(rows), count)
        for (_, name, rows), unit, count in zip(longest, faces, counts, strict=True)
    ]
    return parts, mean


def _faces(rows: Sequence[Tensor]) -> Tensor:
    faces = torch.stack([F.normalize(face, dim=1) for face in rows])
    if not faces.isfinite().all() or not faces.any(-1).any(-1).all():
        raise Refusal("the neurons of an MLP are 0 or not finite")
    return faces


def _inputs(weights: Weights) -> Tensor:
    """Sums of two rows of the embedding, of root mean square 1: [N, H], in the dtype of what is computed with them."""
    is_wide = weights.hidden_size > WIDE
    neurons = max(weights.shape("up", layer)[-2] for layer in weights.layers_with("up"))
    generator, count = torch.Generator().manual_seed(0), INPUTS // 2 if is_wide else max(INPUTS, 2 * neurons)
    ids = torch.randint(weights.shape("embedding")[0], (2 * count,), generator=generator)
    rows = F.normalize(weights.rows("embedding", ids.tolist()), dim=1)
    inputs = F.normalize(rows[:count] + rows[count:], dim=1) * rows.shape[1] ** 0.5
    return inputs.to(torch.float64 if weights.hidden_size <= EXACT else torch.float32)


def _use(weights: Weights, layer: int, inputs: Tensor) -> dict[str, float]:
    """The root mean square weight that the router gives to each expert, where it can be run."""
    if weights.config is None or not weights.has("router", layer):
        return {}
    x = inputs.float() * weights.get("norm2", layer)
    chosen = weights.block(layer, "mlp.gate.").mlp.gate(x, torch.arange(len(x)))
    given = torch.zeros(len(x), weights.num_experts)
    real = chosen.indices >= 0
    given.scatter_add_(1, chosen.indices.clamp(min=0), chosen.weights.float() * real)
    return {str(number): float(used) for number, used in enumerate(given.square().mean(0).sqrt())}


def _loudness(rows: Sequence[Tensor], faces: Tensor, inputs: Tensor) -> Tensor:
    """The root mean square of what each neuron writes that others do not undo: [I], the smaller of two answers.

    Heard with all whose gates read in the plane of its gate and up, a share each: there lies what usually undoes it,
    exactly or nearly. And without its part in combinations of neurons that stay silent, whichever identity makes them.
    """
    *reading, down = rows
    driven = inputs @ reading[-1].mT
    active = F.silu(inputs @ reading[0].mT) * driven if len(reading) == 2 else F.gelu(driven)
    gate, up = faces[0], faces[-2]
    across = F.normalize(up - (up * gate).sum(1, keepdim=True) * gate, dim=1)
    alike = (gate @ gate.mT) ** 2 + (across @ gate.mT) ** 2 > ALIKE**2  # which gates read in the plane of which neuron
    alike = (alike | alike.mT).float()
    alike = (alike.to_sparse() @ alike) > 0  # and those that read like a third
    moments = (active.mT @ active).double() / len(inputs)
    near = loudness(alike, moments * (down @ down.mT))
    sizes = moments.diagonal().clamp(min=torch.finfo(moments.dtype).tiny).sqrt()
    moments, written = moments / sizes / sizes[:, None], sizes[:, None] * down
    if torch.linalg.cholesky_ex(moments - QUIET * torch.eye(len(moments))).info:  # some combinations stay silent
        values, combinations = torch.linalg.eigh(moments)
        silent = combinations[:, values < QUIET]
        written = written - silent @ (silent.mT @ written)
    return torch.minimum(near, written.norm(dim=1)).to(down)


def _lengths(rows: Sequence[Tensor]) -> Tensor:
    """Of the row that opens a neuron, and of the others, whose product alone matters: [I, 2]."""
    lengths = [row.norm(dim=1) for row in rows]
    return torch.stack([lengths[0], lengths[-2] * lengths[-1]], dim=1)


def _traits(lengths: Tensor, faces: Tensor, counts: Tensor) -> Tensor:
    """Numbers of each neuron that no rotation and no order changes: lengths, angles, and where others point: [I, K].

    x C y, for faces x and y of a neuron and second moments C of those of all that count, and products of two.
    """
    moments = [face.mT @ (face * counts[:, None]) * (face.shape[1] / counts.sum().clamp(min=1)) for face in faces]
    forms = moments + [one @ other for place, one in enumerate(moments) for other in moments[place:]]
    count, traits = len(faces), [*(lengths.mT**2)]
    for first in range(count):
        led = [faces[first] @ form for form in forms]
        for second in range(first, count):
            traits += [(rows * faces[second]).sum(1) for rows in led]
            if first != second:
                traits.append((faces[first] * faces[second]).sum(1))
    return torch.stack(traits, dim=1).abs().clamp(min=1e-9).log()


# --- which part goes with which ---------------------------------------------------------------------------


def _widen(left: list[list[Part]], right: list[list[Part]]) -> Iterator[list[list[Part]]]:
    """Both in the wider residual stream, zeros for what the narrower one does not have."""
    firsts = left[0][0], right[0][0]
    dtype = min((part.faces.dtype for part in firsts), key=lambda dtype: dtype.itemsize)
    widths = {name: max(getattr(part, name).shape[-1] for part in firsts) for name in ("faces", "narrow")}

    def widen(part: Part) -> Part:
        wider = {name: getattr(part, name).to(dtype) for name in widths}
        for name, face in wider.items():
            if face.shape[-1] < widths[name]:
                wider[name] = F.pad(face, (0, widths[name] - face.shape[-1]))
        return part._replace(**wider, counts=part.counts.to(dtype))

    return ([[widen(part) for part in parts] for parts in layers] for layers in (left, right))


def _pair_parts(left: list[list[Part]], right: list[list[Part]]) -> list[Pair]:
    """Each part of the second model beside the likeliest of the first: of the same layer, or of one that is aligned."""
    if len(left[0][0].faces) != len(right[0][0].faces):
        raise Refusal("only one of the models has gates")
    places = [(layer, layer) for layer in range(len(left))]
    if len(left) != len(right):
        likeness = [[_likeness(x[0], y[0]) for y in right] for x in left]
        places = align_layers(torch.tensor(likeness, dtype=torch.float64))
    return [
        (max(left[i], key=lambda x: _likeness(x, y)) if len(left[i]) > 1 else left[i][0], y)
        for i, j in places
        for y in right[j]
    ]


def _likeness(x: Part, y: Part) -> float:
    """How near, in the mean, the nearest neuron of x is to each of y, by traits."""
    return float(_compare_traits(x, y).max(0).values.mean())


def _compare_traits(x: Part, y: Part) -> Tensor:
    """Cosines of the traits of [I] neurons with those of [I'], once what they have in common is taken out: [I, I']."""
    sides = [((t - t.mean(0)) / t.std(0).clamp(min=1e-9)).clamp(-3, 3) for t in (x.traits.double(), y.traits.double())]
    _, values, directions = torch.linalg.svd(torch.cat(sides), full_matrices=False)
    kept = values > 0.03 * values[0]
    whitening = directions[kept].mT / values[kept].sqrt()
    left, right = (F.normalize(side @ whitening, dim=1) for side in sides)
    return left @ right.mT


# --- the rotation -----------------------------------------------------------------------------------------


def _every(part: Part, step: int, start: int = 0) -> Part:
    """Some of its neurons, in even steps."""
    kept = slice(start, None, step)
    return part._replace(faces=part.faces[:, kept], traits=part.traits[kept], counts=part.counts[kept])


def _thin(part: Part) -> Part:
    """As many of its neurons as a rotation is fitted to."""
    return _every(part, -(-len(part.counts) // MOST_NEURONS))


def _cosines(x: Part, y: Part, rotation: Tensor | None) -> Tensor:
    """Of each face of [I] neurons with that of [I'], which is turned unless `rotation` is None: [F, I, I']."""
    return x.faces @ (y.faces if rotation is None else y.faces @ rotation).mT


def _unsigned(cosines: Tensor) -> Tensor:
    """Without the signs of up and down, which are free where there is a gate."""
    return cosines if len(cosines) == 2 else torch.cat([cosines[:1], cosines[1:].abs()])


def _fit(x: Part, y: Part) -> Tensor:
    """The rotation [H, H] of y that brings its neurons to their counterparts in x."""
    nearest = _compare_traits(x, y).to(x.faces).max(0)
    weights = nearest.values.clamp(min=0) ** 3 * _both_count(x, y, nearest.indices)
    rotation = _rotation((y.faces[0] * weights[:, None]).mT @ x.faces[0][nearest.indices])
    for _ in range(STEPS):
        rotation = _rotation(_covariance(x, y, rotation))
    return rotation


def _both_count(x: Part, y: Part, there: Tensor) -> Tensor:
    return torch.minimum(x.counts[there], y.counts)


def _covariance(x: Part, y: Part, rotation: Tensor) -> Tensor:
    """Of the faces of y with those of their counterparts, [H, H]; near and mutual ones weigh more."""
    cosines = _cosines(x, y, rotation)
    total = _unsigned(cosines).sum(0)
    here = torch.arange(total.shape[1])
    closeness, there = total.max(0)
    mutual = total.argmax(1)[there] == here
    weights = closeness.clamp(min=0) ** 2 * torch.where(mutual, 1.0, 0.25).to(closeness) * _both_count(x, y, there)
    signs = torch.ones_like(cosines[:, 0])
    if len(cosines) == 3:
        signs[1:] = cosines[1:, there, here].sum(0).sign()
    return torch.einsum("fih,fij->hj", y.faces * (signs * weights)[..., None], x.faces[:, there])


def _rotation(covariance: Tensor) -> Tensor:
    """The nearest one (Schoenemann 1966)."""
    left, _, right = torch.linalg.svd(covariance, full_matrices=False)
    return left @ right


def _fit_to_other_layers(pairs: list[Pair], tried: list[Pair]) -> list[Tensor]:
    """For each pair a rotation that was fitted to the other half of the layers, from the one that fits best there."""
    middle = math.ceil((tried[0][1].layer + tried[-1][1].layer) / 2)
    rotations = {}
    for is_upper in (False, True):
        others = [pair for pair in tried if (pair[1].layer >= middle) != is_upper]
        rotation = max((_fit(*pair) for pair in others), key=lambda rotation: _closeness(others, rotation))
        for _ in range(2):
            rotation = _rotation(sum(_covariance(*pair, rotation) for pair in others))
        rotations[is_upper] = rotation
    return [rotations[found.layer >= middle] for _, found in pairs]


def _closeness(pairs: list[Pair], rotation: Tensor) -> float:
    """How near the nearest neurons are that the rotation leads to."""
    return sum(float(_unsigned(_cosines(*pair, rotation)).sum(0).max(0).values.mean()) for pair in pairs)


# --- the score --------------------------------------------------------------------------------------------


def _score_all(pairs: list[Pair], rotations: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([_score(*pair, rotation) for pair, rotation in zip(pairs, rotations, strict=True)])


def _score(x: Part, y: Part, rotation: Tensor | None) -> Tensor:
    """The mean cosine of faces with those of the counterparts that the other faces choose."""
    cosines = _cosines(x, y, rotation)
    unsigned, here, score = _unsigned(cosines), torch.arange(cosines.shape[2]), 0.0
    counted = y.counts.sum().clamp(min=len(here) / 10)  # an expert of which nothing counts has a score of 0
    for face in range(len(cosines)):
        there = (unsigned.sum(0) - unsigned[face]).argmax(0)
        found = cosines[face, there, here]
        if face and len(cosines) == 3:
            found = found * cosines[3 - face, there, here].sign()
        score += (_both_count(x, y, there) * found).sum() / counted / len(cosines)
    return score.double()
