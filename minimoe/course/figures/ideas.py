"""Pictures of ideas: what a gauge does to two neurons, a way from token to token, the scale of the verdict (09)."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minimoe.course.figures.drawing import heatmap, new_panels
from minimoe.course.figures.hiding import load_double, rewrite
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.shipped import zoo_weights
from minimoe.course.style import EXPERT_COLOURS, INK, MAIN, PALE, QUIET
from minimoe.fingerprints.compare import METHODS, background_of_the_zoo
from minimoe.fingerprints.report import title_of
from minimoe.fingerprints.verdict import Evidence
from minimoe.fingerprints.weights import Weights
from minimoe.model import MoEForCausalLM

# Two neurons of an MLP on vectors of three numbers: their rows of gate and up, their columns of down, and a token.
_GATE, _UP = np.array([[1.0, -2.0, 0.5], [0.5, 1.0, 1.0]]), np.array([[2.0, 1.0, 0.0], [-1.0, 0.5, 2.0]])
_DOWN = np.array([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])
_TOKEN = np.array([1.0, -1.0, 2.0])


def _output(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    hidden = gate @ _TOKEN
    return down @ (hidden / (1 + np.exp(-hidden)) * (up @ _TOKEN))


@figure()
def gauge_of_neurons(factor: float = 2.0) -> Drawing:
    """What two gauges do to two neurons: another order, and a factor in one up row whose inverse is in the down column.
    Data: version, part, neuron, place, number; the last rows of a version are what the MLP writes for a token."""
    scale = np.array([factor, 1.0])
    versions = {
        "as it was": (_GATE, _UP, _DOWN, (0, 1)),
        "another order": (_GATE[::-1], _UP[::-1], _DOWN[:, ::-1], (1, 0)),
        f"up of A x {factor:g}, down of A / {factor:g}": (_GATE, _UP * scale[:, None], _DOWN / scale, (0, 1)),
    }
    rows = []
    drawn, panels = new_panels(3.0, 1, len(versions))
    for axes, (version, (gate, up, down, order)) in zip(panels, versions.items(), strict=True):
        written = _output(gate, up, down)
        for row, (neuron, parts) in enumerate(zip(order, zip(gate, up, down.T, strict=True), strict=True)):
            axes.text(-0.4, 4 * row + 1, "AB"[neuron], weight="bold", size=13, ha="right", va="center")
            for line, (part, numbers) in enumerate(zip(("gate", "up", "down"), parts, strict=True)):
                _draw_numbers(axes, numbers, 4 * row + line, EXPERT_COLOURS[neuron])
                axes.text(3.1, 4 * row + line, part, va="center", color=QUIET)
                rows += [(version, part, "AB"[neuron], *cell) for cell in enumerate(numbers)]
        _draw_numbers(axes, written, 8.3, "white")
        axes.text(3.1, 8.3, "written", va="center", weight="bold")
        rows += [(version, "written", "", *cell) for cell in enumerate(written)]
        axes.set_title(version.replace(", ", ",\n"))
        axes.set(xlim=(-0.9, 4.7), ylim=(9, -0.7))
        axes.axis("off")
    alt = f"""Two neurons, A and B, each with three numbers of gate, up and down: as they were, in the other order, and
        with a factor {factor:g} in an up row and its inverse in the down column. What the MLP writes is the same:
        {", ".join(f"{number:.2f}" for number in written)}."""
    return drawn, columns(("version", "part", "neuron", "place", "number"), rows), alt


def _draw_numbers(axes: Axes, numbers: np.ndarray, height: float, colour: str) -> None:
    for place, number in enumerate(numbers):
        axes.add_patch(Rectangle((place, height - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
        axes.text(place + 0.5, height, f"{number:z.2g}", ha="center", va="center")


@torch.no_grad()
def responses(model: MoEForCausalLM, tokens: list[int], layer: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The first coordinates of tokens [T, 6], and what each token's way through the ups and downs of one layer adds to
    the logit of each, gates left out [T, T]. Norm weights go into the matrices that read them."""
    block, embedding = model.model.layers[layer], model.model.embed_tokens.weight
    head = embedding if model.config.tie_word_embeddings else model.lm_head.weight
    x = F.rms_norm(embedding[tokens], embedding.shape[1:]) * block.post_attention_layernorm.weight
    written = x @ block.mlp.up_proj.weight.mT @ block.mlp.down_proj.weight.mT
    logits = (written * model.model.norm.weight) @ head[tokens].mT
    return embedding[tokens, :6].numpy(), logits.numpy()


@figure(model=partial(load_double, "alder"))
def from_token_to_token(model: MoEForCausalLM, tokens: tuple[int, ...] = (300, 400, 500, 600, 700)) -> Drawing:
    """Coordinates and a way from tokens to tokens, before and after a rotation of the residual stream.
    Data: version, what ("coordinate" or "response"), token, place, number."""
    rows, apart = [], {"coordinate": [], "response": []}
    drawn, panels = new_panels(5.0, 2, 2, width_ratios=[6, 5])
    versions = {"as it was": model, "turned": rewrite(model, "rotate_residual")}
    for line, (version, one) in enumerate(versions.items()):
        titles = f"{version}: coordinates of five tokens", f"{version}: from token to token"
        for axes, title, what, values in zip(
            panels[2 * line :], titles, apart, responses(one, list(tokens)), strict=False
        ):
            top = abs(values).max()
            heatmap(axes, values, "z.2f" if what == "coordinate" else "z.1f", shade=abs(values), top=top, size=11)
            axes.set_title(title)
            axes.set(xticks=[], yticks=[])
            rows += [(version, what, *place, value) for place, value in np.ndenumerate(values.round(9))]
            apart[what].append(values)
    far, near = (abs(first - second).max() for first, second in apart.values())
    alt = f"""Four tables. Left six coordinates of five tokens, before and after a rotation: up to {far:.2f} apart.
        Right what each token adds to the logit of each through one layer: up to {near:.2f} apart."""
    return drawn, columns(("version", "what", "token", "place", "number"), rows), alt


@figure(one=partial(zoo_weights, "alder"), other=partial(zoo_weights, "alder-continued-4"))
def verdict_scale(one: Weights, other: Weights, method: str = "aligned_neurons") -> Drawing:
    """How a score becomes a standing: 0 at the median stranger, .5 where evidence begins, 1 where nothing differs.
    Data: what, score, standing."""
    result, strangers = METHODS[method](one, other), background_of_the_zoo(one, other).scores[method]
    evidence = Evidence(result=result, strangers=strangers, scale=METHODS[method].scale)
    scores = {
        "median\nstranger": evidence.scale.usual(strangers),
        "highest\nstranger": max(strangers),
        "evidence\nbegins": evidence.level,
        "this pair": result.score,
        "nothing\ndiffers": 1.0,
    }
    rows = []
    for what, score in scores.items():
        standing = replace(evidence, result=replace(result, score=score)).standing
        rows.append((what.replace("\n", " "), score, standing))
    drawn, (axes,) = new_panels(3.9)
    bands = ((0.0, PALE, "no evidence of\nshared lineage"), (0.5, EXPERT_COLOURS[3], "shared lineage"))
    for left, colour, verdict in bands:
        axes.add_patch(Rectangle((left, -0.12), 0.5, 0.24, facecolor=colour, edgecolor="white"))
        axes.text(left + 0.25, 0, verdict, ha="center", va="center", weight="bold")
    heights = (0.72, 1.12, 0.72, 0.72, 0.72)  # two that are close stand one above the other
    for (what, score, standing), name, height in zip(rows, scores, heights, strict=True):
        mark, colour = ("D", MAIN) if what == "this pair" else ("o", INK)
        axes.annotate("", (standing, 0.13), (score, 0.62), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6})
        axes.plot(score, 0.64, mark, color=colour, ms=7)
        axes.vlines(score, 0.64, height, color=colour, linewidth=0.8)
        side = "right" if name.startswith("median") else "center"
        axes.text(score + 0.01, height, f"{name}\n{score:.2f}", ha=side, va="bottom", color=colour)
    axes.text(-0.13, 0.64, "score", va="center", ha="right", color=QUIET)
    axes.text(-0.13, 0.0, "standing", va="center", ha="right", color=QUIET)
    axes.hlines(0.64, -0.02, 1.02, color=QUIET, linewidth=1, zorder=0)
    axes.set(xlim=(-0.3, 1.08), ylim=(-0.2, 1.5), yticks=[], frame_on=False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title(f"{title_of(method)}, alder and alder-continued-4")
    told = ", ".join(f"{what} {score:.2f} to {standing:.2f}" for what, score, standing in rows)
    alt = f"How scores of {title_of(method)} become standings on the scale of the verdict: {told}."
    return drawn, columns(("what", "score", "standing"), rows), alt
