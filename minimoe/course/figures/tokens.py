"""Tokens and the experts they meet, drawn from the shipped model; and what real models store and use.

Experts and layers count from 0, as in the code.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple
from unicodedata import east_asian_width

import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from tokenizers import Tokenizer

from minimoe.course.figures.register import Drawing, figure, styled
from minimoe.course.published import REAL_MODELS
from minimoe.course.style import INK, MAIN, PALE, QUIET, describe, expert_colour, new_figure, token_fonts
from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM

# Four kinds of text, written for this figure. The shipped model has met code, technical English and sums, and of French
# only the short messages of a program.
SHOWCASE = """\
def mean(values):
    total = sum(values)
    return total / len(values)

The river was quiet that morning,
and nobody on the bridge spoke.

12 + 30 = 42, 17 * 3 = 51
905 - 6 = 899, 64 / 4 = 16

Le matin, la rivière était calme
et personne ne parlait."""
LAYER = 0  # of the shipped model: the first, where the colours are easiest to read
MAX_TOKENS = 256
_COLUMNS, _GAP, _PARAGRAPH = 46, 0.3, 0.4  # characters to a line of tokens and between two; lines left empty at a gap
_LINE = 0.46  # inches


class Routed(NamedTuple):
    """One text as the shipped model's router saw it in one layer, S tokens."""

    tokens: list[str]  # S pieces of text; a piece of a character is a replacement character
    scores: torch.Tensor  # [S, E]
    weights: torch.Tensor  # [S, K]
    indices: torch.Tensor  # [S, K]


@cache
def shipped_model() -> tuple[MoEForCausalLM, Tokenizer]:
    """The trained mixture that comes with the kit, and its tokenizer."""
    folder = data_path("zoo/moe-real")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # what a person types is text
    return MoEForCausalLM.from_pretrained(folder), tokenizer


def route_text(text: str, layer: int = LAYER) -> Routed:
    """Run the shipped model on `text` and return what the router of `layer` decided.

    Raises:
        ValueError: the text is empty or longer than `MAX_TOKENS` tokens, or there is no such layer.
    """
    routed = route_layers(text)
    if layer not in range(len(routed)):
        raise ValueError(f"layer={layer}: wanted 0 to {len(routed) - 1}")
    return routed[layer]


def route_layers(text: str) -> list[Routed]:
    """Run the shipped model on `text` and return what the router of each layer decided.

    Raises:
        ValueError: the text is empty or longer than `MAX_TOKENS` tokens.
    """
    model, tokenizer = shipped_model()
    ids = tokenizer.encode(text).ids
    if not 1 <= len(ids) <= MAX_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens: wanted 1 to {MAX_TOKENS}")
    with torch.no_grad():
        routers = model(torch.tensor([ids]), output_router_logits=True).router_outputs
    tokens = [tokenizer.decode([i]) for i in ids]
    return [Routed(tokens, router.scores, router.weights, router.indices) for router in routers]


@styled()
def draw_tokens(text: str, layer: int = LAYER) -> Drawing:
    """Every token of `text` in the colour, and with the number, of its first-choice expert in the shipped model.

    Data: token, expert, probability (of that expert), margin (to the second choice).

    Raises:
        ValueError: as `route_text`.
    """
    routed = route_text(text, layer)
    experts, (first, second) = routed.indices[:, 0].tolist(), routed.scores.topk(2).values.T
    data = {
        "token": routed.tokens,
        "expert": experts,
        "probability": first.tolist(),
        "margin": (first - second).tolist(),
    }
    labels = [visible(token) for token in routed.tokens]
    places, lines = _wrap(routed.tokens, labels)
    drawn = new_figure(_LINE * lines + 0.95)
    grid, legend = drawn.subplots(2, height_ratios=[_LINE * lines, 0.45])
    grid.set(xlim=(0, _COLUMNS), ylim=(lines, 0), title=f"Which expert each token meets first (layer {layer})")
    _tiles(grid, labels, experts, places)
    shares = [experts.count(e) / len(experts) for e in range(routed.scores.shape[1])]
    _expert_legend(legend, shares)
    describe(drawn, _tokens_alt(text, layer, shares))
    return drawn, data


def visible(token: str) -> str:
    """`token` with marks for white space, and for what no font here can show."""
    marks = {" ": "·", "\n": "↵", "\t": "→", "\N{REPLACEMENT CHARACTER}": "▯"}
    return "".join(marks.get(letter) or (letter if _has_glyph(letter) else "▯") for letter in token) or "▯"


@cache
def _has_glyph(letter: str) -> bool:
    paths = [font_manager.findfont(name) for name in token_fonts()]
    return any(font_manager.get_font(path).get_char_index(ord(letter)) for path in paths)


def _columns(label: str) -> int:
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in label)


def _wrap(tokens: list[str], labels: list[str]) -> tuple[list[tuple[float, float]], float]:
    """Where each token stands, (column, line), and the number of lines.

    A line ends after a line break in the text; an empty line is a gap, its mark stands at the end of the line before.
    """
    places, column, line, after = [], 0.0, 0.0, (0.0, 0.0)
    for token, label in zip(tokens, labels, strict=True):
        width = _columns(label) + _GAP
        empty_line = places and not column and not token.strip("\n")
        if empty_line and after[0] + width <= _COLUMNS:
            places.append(after)
            line += _PARAGRAPH
        else:
            if column + width > _COLUMNS and column:
                column, line = 0.0, line + 1
            places.append((column, line))
            column += width
            if "\n" in token:
                column, line = 0.0, line + 1 + _PARAGRAPH * (token.count("\n") > 1)
        after = (places[-1][0] + width, places[-1][1])
    return places, places[-1][1] + 1


def _tiles(axes: Axes, labels: list[str], experts: list[int], places: list[tuple[float, float]]) -> None:
    axes.set_axis_off()
    for label, expert, (column, line) in zip(labels, experts, places, strict=True):
        tile(axes, column, line, _columns(label), label, str(expert), expert_colour(expert))


def tile(axes: Axes, column: float, line: float, width: float, label: str, number: str, colour: str) -> None:
    """A token in a coloured box of `width` x 1, and a number below it."""
    axes.add_patch(_rounded(column, line + 0.04, width, 0.88, colour, aspect=0.32))
    middle = column + width / 2
    axes.text(middle, line + 0.36, label, family=token_fonts(), size=14, ha="center", va="center", parse_math=False)
    axes.text(middle, line + 0.74, number, size=10, weight="bold", ha="center", va="center")


def _rounded(x: float, y: float, width: float, height: float, colour: str, aspect: float) -> FancyBboxPatch:
    """A filled box with round corners; `aspect` is the length of a unit of x over that of a unit of y."""
    style = "round,pad=0,rounding_size=0.35"
    return FancyBboxPatch((x, y), width, height, style, facecolor=colour, linewidth=0, mutation_aspect=aspect)


def _expert_legend(axes: Axes, shares: list[float]) -> None:
    axes.set(xlim=(0, _COLUMNS), ylim=(-1, 1))
    axes.set_axis_off()
    step = _COLUMNS / max(len(shares), 8)
    for expert, share in enumerate(shares):
        left = expert * step
        axes.add_patch(_rounded(left, -0.75, 1.9, 1.5, expert_colour(expert), aspect=0.65))
        axes.text(left + 0.95, 0, str(expert), weight="bold", ha="center", va="center")
        axes.text(left + 2.2, 0, f"{share:.0%}", ha="left", va="center", color=QUIET)


def _tokens_alt(text: str, layer: int, shares: list[float]) -> str:
    start = " ".join(text.split())
    start = start if len(start) <= 60 else start[:57] + "..."
    parts = ", ".join(f"expert {e} {share:.0%}" for e, share in enumerate(shares))
    return (
        f"The text “{start}” cut into tokens, each a tile with the colour and the number of its "
        f"first-choice expert in layer {layer}. Share of the tokens: {parts}."
    )


@figure()
def token_map() -> Drawing:
    """Code, prose, arithmetic and French, every token in the colour of its first-choice expert."""
    return draw_tokens(SHOWCASE)


@figure()
def token_layers(text: str = "The cat and the dog saw the boat.\nfor x in the_list: print(x)") -> Drawing:
    """A short text once for each layer, every token in the colour of its first-choice expert there.

    Data: layer, token, expert, probability (of that expert), margin (to the second choice).

    Raises:
        ValueError: as `route_text`.
    """
    routed = route_layers(text)
    labels = [visible(token) for token in routed[0].tokens]
    places, lines = _wrap(routed[0].tokens, labels)
    drawn = new_figure((_LINE * lines + 0.3) * len(routed))
    data = {"layer": [], "token": [], "expert": [], "probability": [], "margin": []}
    for layer, (axes, chosen) in enumerate(zip(drawn.subplots(len(routed)), routed, strict=True)):
        axes.set(xlim=(0, _COLUMNS), ylim=(lines, 0), title=f"layer {layer}")
        experts, (first, second) = chosen.indices[:, 0].tolist(), chosen.scores.topk(2).values.T
        _tiles(axes, labels, experts, places)
        columns = ([layer] * len(experts), chosen.tokens, experts, first.tolist(), (first - second).tolist())
        for name, column in zip(data, columns, strict=True):
            data[name] += column
    numbers = (" ".join(str(expert) for expert in chosen.indices[:, 0].tolist()) for chosen in routed)
    rows = "; ".join(f"layer {layer}: {row}" for layer, row in enumerate(numbers))
    describe(
        drawn,
        f"The text “{' '.join(text.split())}” once for each layer, each token a tile with the colour and the number of "
        f"its first-choice expert. The numbers in order, {rows}.",
    )
    return drawn, data


@figure()
def token_journey(text: str = "The river was", token: int = -1, layer: int = 1) -> Drawing:
    """One token in one layer: a probability for each expert, and the weights of the chosen ones.

    Data: expert, probability, weight (0 for an expert that is not chosen).
    """
    routed = route_text(text, layer)
    probabilities, chosen = routed.scores[token].tolist(), routed.indices[token].tolist()
    weights = dict(zip(chosen, routed.weights[token].tolist(), strict=True))
    data = {
        "expert": list(range(len(probabilities))),
        "probability": probabilities,
        "weight": [weights.get(expert, 0.0) for expert in range(len(probabilities))],
    }
    drawn = new_figure(3.4)
    left, right = drawn.subplots(1, 2, width_ratios=[1.7, 1])
    _probability_bars(left, probabilities, chosen)
    _weight_bars(right, weights)
    name = visible(routed.tokens[token])
    drawn.suptitle(f"The token {name!r} in layer {layer}", x=0.01, ha="left", size=12, weight="bold", parse_math=False)
    parts = " and ".join(f"expert {e} with weight {w:.2f}" for e, w in weights.items())
    describe(
        drawn,
        f"Two bar charts for the token {name!r} of “{text}” in layer {layer}. Left: the router's probability "
        f"for each of {len(probabilities)} experts. Right: the token goes to {parts}.",
    )
    return drawn, data


def _probability_bars(axes: Axes, probabilities: list[float], chosen: list[int]) -> None:
    for expert, probability in enumerate(probabilities):
        kept = expert in chosen
        axes.bar(
            expert,
            probability,
            color=expert_colour(expert) if kept else "white",
            edgecolor=INK if kept else QUIET,
            linewidth=1.4 if kept else 0.8,
            linestyle="-" if kept else ":",
        )
        if kept:
            _value(axes, expert, probability)
    axes.set(
        xlabel="expert", ylabel="probability", xticks=range(len(probabilities)), ylim=(0, 1.12 * max(probabilities))
    )
    axes.set_title("1  the router scores all", size=11, weight="normal")


def _weight_bars(axes: Axes, weights: dict[int, float]) -> None:
    for place, (expert, weight) in enumerate(weights.items()):
        axes.bar(place, weight, color=expert_colour(expert), edgecolor=INK, linewidth=1.4)
        _value(axes, place, weight)
    axes.set(ylim=(0, 1.1), xlim=(-0.7, len(weights) - 0.3), xticks=range(len(weights)))
    axes.set_xticklabels([f"expert {expert}" for expert in weights])
    axes.set_ylabel("weight, adding up to 1")
    axes.set_title("2  the best stay", size=11, weight="normal")


def _value(axes: Axes, x: float, y: float) -> None:
    axes.annotate(f"{y:.2f}", (x, y), (0, 3), textcoords="offset points", ha="center", size=10)


@figure()
def parameters_total_active() -> Drawing:
    """Parameters of real models: all that must be stored, and those that one token meets.

    Data: model, total and active (billions of parameters, embedding and output head included).
    """
    counts = {
        name: (model.config.num_parameters() / 1e9, model.config.num_parameters(active=True) / 1e9)
        for name, model in REAL_MODELS.items()
    }
    names = sorted(counts, key=lambda name: counts[name][0], reverse=True)
    total, active = (list(column) for column in zip(*(counts[name] for name in names), strict=True))
    drawn = new_figure(0.5 * len(names) + 1.2)
    axes = drawn.subplots()
    rows = range(len(names))
    axes.barh(rows, total, 0.62, color=PALE, edgecolor=MAIN, hatch="///", label="stored")
    axes.barh(rows, active, 0.62, color=MAIN, edgecolor=MAIN, label="met by one token")
    for row, (all_of_them, met) in enumerate(zip(total, active, strict=True)):
        note = f"{all_of_them:.1f} B, dense" if met == all_of_them else f"{met:.1f} of {all_of_them:.1f} B"
        axes.annotate(note, (all_of_them, row), (6, 0), textcoords="offset points", va="center", size=10)
    axes.set(yticks=rows, yticklabels=names, xlabel="parameters, billions", xlim=(0, 1.27 * max(total)))
    axes.set_title("What a model stores, and what one token meets")
    axes.invert_yaxis()
    axes.legend(loc="lower right", frameon=False)
    shares = "; ".join(f"{name} {a:.1f} of {t:.1f}" for name, a, t in zip(names, active, total, strict=True))
    describe(drawn, f"Bars of the parameters that one token meets, within all that are stored, in billions: {shares}.")
    return drawn, {"model": names, "total": total, "active": active}
