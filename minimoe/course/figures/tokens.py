"""Tokens and the experts they meet in one model; and what real models store and use."""

from collections.abc import Mapping
from functools import cache
from unicodedata import east_asian_width

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from minimoe.course.figures.drawing import new_panels
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.published import REAL_MODELS
from minimoe.course.shipped import real_text_model, route_text
from minimoe.course.style import INK, MAIN, PALE, QUIET, expert_colour, token_fonts
from minimoe.model import MoEConfig, MoEForCausalLM, RouterOutput
from minimoe.model.config import require

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
_COLUMNS, _GAP, _PARAGRAPH = 46, 0.3, 0.4  # characters to a line of tokens and between two; lines left empty at a gap
_LINE = 0.46  # inches


def first_choices(router: RouterOutput) -> tuple[list[int], list[float], list[float]]:
    """For each token its first-choice expert, the probability of that, and the margin to the second choice."""
    first, second = router.scores.topk(2).values.T
    return router.indices[:, 0].tolist(), first.tolist(), (first - second).tolist()


@figure(model=real_text_model)
def token_map(text: str = SHOWCASE, layer: int = 0, *, model: MoEForCausalLM) -> Drawing:
    """Every token of `text` in the colour, and with the number, of its first-choice expert.

    Data: token, expert, probability (of that expert), margin (to the second choice).
    Raises what `route_text` raises, and ValueError where there is no such layer.
    """
    tokens, routers = route_text(text, model)
    require(layer in range(len(routers)), "layer", layer, f"0 to {len(routers) - 1}")
    title, height = f"First-choice expert of each token (layer {layer})", _LINE * _wrap(tokens)[1]
    drawn, (grid, legend) = new_panels(height + 0.95, 2, height_ratios=[height, 0.45], title=title)
    data = columns(("token", "expert", "probability", "margin"), _draw_tiles(grid, tokens, routers[layer]))
    shares = [data["expert"].count(expert) / len(tokens) for expert in range(routers[layer].scores.shape[1])]
    legend.set(xlim=(0, _COLUMNS), ylim=(-1, 1))
    legend.set_axis_off()
    for expert, share in enumerate(shares):
        left = expert * _COLUMNS / max(len(shares), 8)
        legend.add_patch(_rounded(left, -0.75, 1.9, 1.5, expert_colour(expert), aspect=0.65))
        legend.text(left + 0.95, 0, str(expert), weight="bold", ha="center", va="center")
        legend.text(left + 2.2, 0, f"{share:.0%}", ha="left", va="center", color=QUIET)
    start = " ".join(text.split())
    start = start if len(start) <= 60 else start[:57] + "..."
    parts = ", ".join(f"expert {expert} {share:.0%}" for expert, share in enumerate(shares))
    alt = f"""The text “{start}” cut into tokens, each a tile with the colour and the number of its first-choice expert
        in layer {layer}. Share of the tokens: {parts}."""
    return drawn, data, alt


@figure(model=real_text_model)
def token_layers(
    text: str = "The cat and the dog saw the boat.\nfor x in the_list: print(x)", *, model: MoEForCausalLM
) -> Drawing:
    """A short text once for each layer, every token in the colour of its first-choice expert there.

    Data: layer, token, expert, probability (of that expert), margin (to the second choice). Raises what `route_text`
    raises.
    """
    tokens, routers = route_text(text, model)
    drawn, panels = new_panels((_LINE * _wrap(tokens)[1] + 0.3) * len(routers), len(routers))
    rows, numbers = [], []
    for layer, (axes, router) in enumerate(zip(panels, routers, strict=True)):
        axes.set_title(f"layer {layer}")
        chosen = _draw_tiles(axes, tokens, router)
        rows += [(layer, *row) for row in chosen]
        numbers.append(f"layer {layer}: {' '.join(str(expert) for _, expert, *_ in chosen)}")
    alt = f"""The text “{text}” once for each layer, each token a tile with the colour and the number of its
        first-choice expert. The numbers in order, {"; ".join(numbers)}."""
    return drawn, columns(("layer", "token", "expert", "probability", "margin"), rows), alt


def visible(token: str) -> str:
    """`token` with marks for white space, and for what no font here can show."""
    marks = {" ": "·", "\n": "↵", "\t": "→", "\N{REPLACEMENT CHARACTER}": "▯"}
    return "".join(marks.get(letter) or (letter if _has_glyph(letter) else "▯") for letter in token) or "▯"


@cache
def _has_glyph(letter: str) -> bool:
    paths = [font_manager.findfont(name) for name in token_fonts()]
    return any(font_manager.get_font(path).get_char_index(ord(letter)) for path in paths)


def _width(token: str) -> int:
    """In columns of the font for tokens, where a Chinese character takes two."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in visible(token))


def _wrap(tokens: list[str]) -> tuple[list[tuple[float, float]], float]:
    """Where each token stands, (column, line), and the number of lines. A line ends after a line break in the text; an
    empty line is a gap, its mark stands at the end of the line before."""
    places, column, line, after = [], 0.0, 0.0, (0.0, 0.0)
    for token in tokens:
        width = _width(token) + _GAP
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


def _draw_tiles(axes: Axes, tokens: list[str], router: RouterOutput) -> list[tuple[str, int, float, float]]:
    """A tile for each token; returns the tokens with their `first_choices`."""
    places, lines = _wrap(tokens)
    axes.set(xlim=(0, _COLUMNS), ylim=(lines, 0))
    axes.set_axis_off()
    rows = list(zip(tokens, *first_choices(router), strict=True))
    for (token, expert, *_), (column, line) in zip(rows, places, strict=True):
        draw_tile(axes, column, line, _width(token), token, str(expert), expert_colour(expert))
    return rows


def draw_tile(axes: Axes, column: float, line: float, width: float, token: str, number: str, colour: str) -> None:
    """A token in a coloured box of `width` x 1, and a number below it."""
    axes.add_patch(_rounded(column, line + 0.04, width, 0.88, colour, aspect=0.32))
    style = {"x": column + width / 2, "ha": "center", "va": "center"}
    axes.text(y=line + 0.36, s=visible(token), family=token_fonts(), size=14, parse_math=False, **style)
    axes.text(y=line + 0.74, s=number, size=10, weight="bold", **style)


def _rounded(x: float, y: float, width: float, height: float, colour: str, aspect: float) -> FancyBboxPatch:
    """A filled box with round corners; `aspect` is the length of a unit of x over that of a unit of y."""
    style = "round,pad=0,rounding_size=0.35"
    return FancyBboxPatch((x, y), width, height, style, facecolor=colour, linewidth=0, mutation_aspect=aspect)


@figure(model=real_text_model)
def token_journey(text: str = "The river was", token: int = -1, layer: int = 1, *, model: MoEForCausalLM) -> Drawing:
    """One token in one layer: a probability for each expert, and the weights of the chosen ones.

    Data: expert, probability, weight (0 for an expert that is not chosen).
    Raises what `route_text` raises, and ValueError where there is no such layer.
    """
    tokens, routers = route_text(text, model)
    require(layer in range(len(routers)), "layer", layer, f"0 to {len(routers) - 1}")
    router, name = routers[layer], visible(tokens[token])
    scores, indices, weights = (part[token].numpy() for part in (router.scores, router.indices, router.weights))
    others = np.setdiff1d(range(len(scores)), indices)
    drawn, (left, right) = new_panels(3.4, 1, 2, width_ratios=[1.7, 1], title=f"The token {name!r} in layer {layer}")
    chosen = {"color": [expert_colour(expert) for expert in indices], "edgecolor": INK, "linewidth": 1.4}
    unused = {"color": "white", "edgecolor": QUIET, "linewidth": 0.8, "linestyle": ":"}
    number = {"fmt": "{:.2f}", "padding": 3, "size": 10}
    left.bar(others, scores[others], **unused)
    left.bar_label(left.bar(indices, scores[indices], **chosen), **number)
    left.set(title="1  the router scores all", xlabel="expert", ylabel="probability", ylim=(0, 1.12 * scores.max()))
    left.set_xticks(range(len(scores)))
    right.bar_label(right.bar(range(len(weights)), weights, **chosen), **number)
    right.set(title="2  the best stay", ylabel="weight, adding up to 1", ylim=(0, 1.1), xlim=(-0.7, len(weights) - 0.3))
    right.set_xticks(range(len(weights)), [f"expert {expert}" for expert in indices])
    weight_of = dict(zip(indices, weights, strict=True))
    parts = " and ".join(f"expert {expert} with weight {weight:.2f}" for expert, weight in weight_of.items())
    alt = f"""Two bar charts for the token {name!r} of “{text}” in layer {layer}. Left: the router's probability for
        each of {len(scores)} experts. Right: the token goes to {parts}."""
    rows = [(expert, score, weight_of.get(expert, 0.0)) for expert, score in enumerate(scores)]
    return drawn, columns(("expert", "probability", "weight"), rows), alt


@figure(configs=lambda: {name: model.config for name, model in REAL_MODELS.items()})
def parameters_total_active(configs: Mapping[str, MoEConfig]) -> Drawing:
    """Parameters of models, the largest first: all that must be stored, and those that are active for one token.
    Data: model, total and active (billions of parameters, embedding and output head included)."""
    rows = [(name, c.num_parameters() / 1e9, c.num_parameters(active=True) / 1e9) for name, c in configs.items()]
    rows.sort(key=lambda row: row[1], reverse=True)
    names, total, active = zip(*rows, strict=True)
    drawn, (axes,) = new_panels(0.5 * len(names) + 1.2, title="What a model stores, and what is active for one token")
    bars = axes.barh(names, total, 0.62, color=PALE, edgecolor=MAIN, hatch="///", label="stored")
    axes.barh(names, active, 0.62, color=MAIN, edgecolor=MAIN, label="active for one token")
    notes = [f"{t:.1f} B, dense" if a == t else f"{a:.1f} of {t:.1f} B" for _, t, a in rows]
    axes.bar_label(bars, notes, padding=6, size=10)
    axes.set(xlabel="parameters, billions", xlim=(0, 1.27 * max(total)))
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    shares = "; ".join(f"{name} {a:.1f} of {t:.1f}" for name, t, a in rows)
    alt = f"Bars of the parameters that are active for one token, within all that are stored, in billions: {shares}."
    return drawn, columns(("model", "total", "active"), rows), alt
