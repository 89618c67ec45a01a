"""What the router of the shipped model does to whole texts: favourite tokens, repetitions, translations.

All is drawn from one trace, `planted_trace()`. Experts and layers count from 0, as in the code.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from minimoe.course.figures.register import Drawing, figure, in_style
from minimoe.course.figures.tokens import draw_tokens, route_layers, shipped_model, tile, visible
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES, describe, expert_colour, new_figure, token_fonts
from minimoe.inspection import RoutingTrace, record_routing
from minimoe.inspection.metrics import frequent_tokens, repetition, vocabulary_specialization
from minimoe.training.planted import DOMAINS, LANGUAGES, TOPICS, document

DOCUMENTS = 20  # of each planted domain
SEED = 3  # of the documents: with it no first choice is nearly a tie, so that another processor counts the same
FULL_STOPS = ("The boat is in the harbour.", "Le chat dort dans la maison.", "The value is 3.", "    self.")
_TICK = {"linestyle": "none", "marker": "|", "color": SERIES[3]["color"], "markersize": 17, "markeredgewidth": 3}
_COLUMNS = 5  # tokens to a row of favourites, at most


@cache
def planted_trace() -> RoutingTrace:
    """Planted documents through the shipped model, which was trained on none of them.

    Documents 0 to 19 of every domain, in the order of `DOMAINS`; labelled with the kind of text: the language, code or
    arithmetic.
    """
    model, tokenizer = shipped_model()
    with torch.no_grad(), record_routing(model) as trace:
        for domain in DOMAINS:
            trace.label(domain.split("/")[0])
            for index in range(DOCUMENTS):
                model(torch.tensor([tokenizer.encode(document(domain, index, seed=SEED)).ids]))
    return trace


# --- one token, several contexts ----------------------------------------------------------------------------


@figure
def token_path(texts: tuple[str, ...] = FULL_STOPS) -> Drawing:
    """The last token of each text on its way through the layers: the experts it meets, and with which weight.

    Data: text, layer, expert, weight; two rows for each text and layer, best first.

    Raises:
        ValueError: as `route_layers`.
    """
    data = {"text": [], "layer": [], "expert": [], "weight": []}
    rows = -(-len(texts) // 2)
    drawn = new_figure(2.2 * rows + 0.5)
    panels = drawn.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    for panel in panels[len(texts) :]:
        panel.set_axis_off()
    for text, axes in zip(texts, panels, strict=False):
        routed = route_layers(text)
        experts, layers = routed[0].scores.shape[1], len(routed)
        title = f"“{''.join(map(visible, routed[0].tokens))}”"
        axes.set_title(title, size=10, family=token_fonts(), weight="normal", parse_math=False)
        axes.set(xlim=(-0.6, experts - 0.4), ylim=(layers - 0.45, -0.55), xticks=range(experts), yticks=range(layers))
        axes.plot([chosen.indices[-1, 0] for chosen in routed], range(layers), color=INK, linewidth=1.2, zorder=1)
        for layer, chosen in enumerate(routed):
            pairs = zip(chosen.indices[-1].tolist(), chosen.weights[-1].tolist(), strict=True)
            for rank, (expert, weight) in enumerate(pairs):
                _cell(axes, expert, layer, weight, first=rank == 0)
                for name, value in zip(data, (text, layer, expert, weight), strict=True):
                    data[name].append(value)
    drawn.suptitle("The last token in each layer, with the weights in %", x=0.01, ha="left", size=12, weight="bold")
    drawn.supxlabel("expert", size=11)
    drawn.supylabel("layer", size=11)
    describe(drawn, _path_alt(data))
    return drawn, data


def _cell(axes: Axes, expert: int, layer: int, weight: float, first: bool) -> None:
    style = {"linewidth": 2.0} if first else {"linewidth": 0.8, "linestyle": ":"}
    corner = (expert - 0.42, layer - 0.4)
    axes.add_patch(Rectangle(corner, 0.84, 0.8, facecolor=expert_colour(expert), edgecolor=INK, zorder=2, **style))
    axes.text(expert, layer, f"{100 * weight:.0f}", ha="center", va="center", zorder=3)


def _path_alt(data: dict[str, list]) -> str:
    firsts = [row for place, row in enumerate(zip(*data.values(), strict=True)) if place % 2 == 0]
    paths = {text: ", ".join(str(row[2]) for row in firsts if row[0] == text) for text in data["text"]}
    parts = "; ".join(f"“{text.strip()}” {path}" for text, path in paths.items())
    return (
        "One panel for each text: layers downwards, experts across, and a box with the weight for each expert that the "
        f"last token meets. The first choices from the first layer to the last: {parts}."
    )


# --- favourite tokens ---------------------------------------------------------------------------------------


@figure
def favourite_tokens(layer: int = 0, min_count: int = 50) -> Drawing:
    """For each expert of a layer the tokens of which it gets the largest share of the occurrences, as first choice.

    A token of which an expert gets no more than of all tokens is not among them, so a row may be short or empty.

    Data: expert, load (its share of all tokens), token, count (occurrences), share (of these that go to the expert).

    Raises:
        ValueError: there is no such layer, or no token occurs `min_count` times.
    """
    loads, data = _favourites(layer, min_count)
    rows = list(zip(*data.values(), strict=True))
    drawn = new_figure(0.52 * len(loads) + 0.45)
    axes = drawn.subplots()
    axes.set_axis_off()
    axes.set(xlim=(-6, 8.4 * _COLUMNS), ylim=(len(loads), 0))
    axes.set_title(f"Favourite tokens of the experts in layer {layer}: share of n occurrences")
    for expert, load in enumerate(loads):
        axes.text(-6, expert + 0.36, f"expert {expert}", weight="bold", va="center")
        axes.text(-6, expert + 0.76, f"load {load:.0%}", size=10, va="center", color=QUIET)
        for column, (_, _, token, count, share) in enumerate(row for row in rows if row[0] == expert):
            tile(axes, 8.4 * column, expert, 8.1, visible(token), f"{share:.0%} of {count}", expert_colour(expert))
    describe(drawn, _favourites_alt(layer, min_count, loads, rows))
    return drawn, data


def _favourites_alt(layer: int, min_count: int, loads: list[float], rows: list[tuple]) -> str:
    nearly_all = sum(share >= 0.9 for *_, share in rows)
    parts = "; ".join(
        f"{expert} ({load:.0%}) {' '.join(visible(row[2]) for row in rows if row[0] == expert) or 'none'}"
        for expert, load in enumerate(loads)
    )
    return (
        f"Layer {layer}, tokens that occur at least {min_count} times: {nearly_all} of the {len(rows)} favourites "
        f"shown go to their expert first in nine places of ten or more. By expert, with its load: {parts}."
    )


def _favourites(layer: int, min_count: int) -> tuple[list[float], dict[str, list]]:
    """The load of every expert, and the rows of the picture."""
    trace, (_, tokenizer) = planted_trace(), shipped_model()
    if layer not in range(trace.num_layers):
        raise ValueError(f"layer={layer}: wanted 0 to {trace.num_layers - 1}")
    measured = vocabulary_specialization(trace, min_count=min_count, draws=0)
    frequent = frequent_tokens(trace, min_count)
    counts = np.bincount(trace.token_ids)[frequent]
    loads = measured.null[layer, 0].tolist()
    data = {"expert": [], "load": [], "token": [], "count": [], "share": []}
    for expert, (shares, load) in enumerate(zip(measured.value[layer].T, loads, strict=True)):
        best = np.lexsort((-counts, -shares))[:_COLUMNS]  # by share, then by count
        for place in best[shares[best] > load]:
            token = tokenizer.decode([int(frequent[place])])
            row = (expert, load, token, int(counts[place]), float(shares[place]))
            for name, value in zip(data, row, strict=True):
                data[name].append(value)
    return loads, data


# --- repetition ---------------------------------------------------------------------------------------------


@figure
def repetition_by_kind() -> Drawing:
    """How often neighbours share their first choice, by layer and kind of text, beside three levels of chance.

    Data: layer, kind, repetition, low, high (95 %, over documents), by_load (sum of p_i^2 of this kind of text),
    by_token (as `repetition_by_token`).
    """
    trace = planted_trace()
    kinds = trace.domain_names
    parts = [trace.select(kind) for kind in kinds]
    measured = [(*repetition(part), repetition_by_token(part)) for part in parts]
    data = {"layer": [], "kind": [], "repetition": [], "low": [], "high": [], "by_load": [], "by_token": []}
    drawn = new_figure(5.2)
    panels = drawn.subplots(2, 2, sharex=True, sharey=True).flatten()
    for layer, axes in enumerate(panels):
        at_layer = ([field[layer] for field in fields] for fields in measured)
        values, by_load, low, high, by_token = (np.array(column) for column in zip(*at_layer, strict=True))
        columns = ([layer] * len(kinds), kinds, values, low, high, by_load, by_token)
        for name, column in zip(data, columns, strict=True):
            data[name] += np.asarray(column).tolist()
        rows = np.arange(len(kinds))
        axes.barh(rows, 100 * by_load, 0.62, color=PALE, edgecolor=MAIN, hatch="///", label="from the load, Σp²")
        spread = 100 * np.stack([values - low, high - values])
        style = {"fmt": "o", "color": INK, "markersize": 6, "capsize": 3, "label": "counted"}
        axes.errorbar(100 * values, rows, xerr=spread, **style)
        axes.axvline(100 / trace.num_experts, color=INK, linestyle="--", linewidth=1.2, label="even load, 1/E")
        axes.plot(100 * by_token, rows, **_TICK, label="from each token by itself")
        axes.set_title(f"layer {layer}", size=11)
    panels[0].set(yticks=rows, yticklabels=kinds, xlim=(0, 75))
    panels[0].invert_yaxis()
    drawn.supxlabel("neighbours with the same first choice, % of pairs", size=11)
    handles, names = panels[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    describe(drawn, _repetition_alt(data))
    return drawn, data


def repetition_by_token(trace: RoutingTrace) -> np.ndarray:
    """How often neighbours would have the same first choice if every token chose by itself, [L].

    A token t draws its expert from s_t, the shares of the experts among all first choices for t in this trace. So this
    is the mean of sum_i s_t(i) s_u(i) over the neighbours t, u of a document. A token that occurs once can only draw
    what it has drawn, so rare tokens pull this level towards the count.
    """
    shares = vocabulary_specialization(trace, min_count=1, draws=0).value
    place = np.searchsorted(frequent_tokens(trace, 1), trace.token_ids)
    neighbours = np.diff(trace.documents) == 0
    one, next_one = place[:-1][neighbours], place[1:][neighbours]
    return (shares[:, one] * shares[:, next_one]).sum(-1).mean(-1)


def _repetition_alt(data: dict[str, list]) -> str:
    rows = list(zip(*data.values(), strict=True))
    above = [row for row in rows if row[3] > row[5]]
    below = [row for row in rows if row[4] < row[5]]
    extreme = max(rows, key=lambda row: row[2])
    over = [100 * (counted - by_token) for _, _, counted, *_, by_token in rows]
    here, later = over[: len(set(data["kind"]))], over[len(set(data["kind"])) :]
    return (
        f"Four panels, one a layer, with the repetition of {len(set(data['kind']))} kinds of text: "
        f"{min(data['repetition']):.0%} to {extreme[2]:.0%}, where an even load gives an eighth. Against the level of "
        f"the actual load, {len(above)} of {len(rows)} are above, {len(below)} below, by their whole interval. The "
        f"highest, {extreme[1]} in layer {extreme[0]}, compares with {extreme[5]:.0%} from its load. What each token "
        f"by itself would give is within {max(map(abs, here)):.1f} points of the count in the first layer, and "
        f"{min(later):.1f} to {max(later):.1f} points below it in the others."
    )


# --- translations -------------------------------------------------------------------------------------------


@in_style
def draw_translations(layer: int = 3) -> Drawing:
    """The first sentence of one story in every language, one after the other, as `draw_tokens` shows them.

    Raises:
        ValueError: there is no such layer.
    """
    lines = [document(f"{language}/{TOPICS[0]}", 0, seed=SEED).split(". ")[0] + "." for language in LANGUAGES]
    drawn, data = draw_tokens("\n".join(lines), layer)
    breaks = [place for place, token in enumerate(data["token"]) if token == "\n"]
    parts = np.split(data["expert"], breaks)
    busiest = ", ".join(
        f"{language.capitalize()} expert {counts.argmax()} ({counts.max() / counts.sum():.0%})"
        for language, counts in zip(LANGUAGES, map(np.bincount, parts), strict=True)
    )
    describe(
        drawn,
        "One sentence in English, French, German and Spanish, one after the other, every token a tile with the colour "
        f"and the number of its first-choice expert in layer {layer}. The busiest, and its share: {busiest}.",
    )
    return drawn, data


@figure
def language_agreement(shuffles: int = 1000, seed: int = 0) -> Drawing:
    """How far two documents use the same experts: translations, other documents in two languages, and in one.

    Data: layer; translations; other_meaning; one_language (two meanings in the same language), all means of
    `document_agreement`, within topics; and by_luck, the share of random pairings of texts with translations of others
    whose mean is no less than that of the translations.

    Args:
        shuffles: random pairings.
        seed: of these.
    """
    rng = np.random.default_rng(seed)
    one, another = np.triu_indices(len(LANGUAGES), k=1)
    other = ~np.eye(DOCUMENTS, dtype=bool)
    data = {name: [] for name in ("layer", "translations", "other_meaning", "one_language", "by_luck")}
    for layer, table in enumerate(document_agreement()):
        across, within = table[:, one, another], np.einsum("taaij->taij", table)
        same = across[..., ~other].mean()
        by_luck = np.mean([_mispaired(across, one, another, rng) >= same for _ in range(shuffles)])
        values = (same, across[..., other].mean(), within[..., other].mean(), by_luck)
        for name, value in zip(data, (layer, *map(float, values)), strict=True):
            data[name].append(value)
    drawn = new_figure(3.3)
    _agreement_dots(drawn.subplots(), data)
    describe(drawn, _agreement_alt(data))
    return drawn, data


def _mispaired(across: np.ndarray, one: np.ndarray, another: np.ndarray, rng: np.random.Generator) -> float:
    """Mean agreement when the stories of each topic and language change places, and no two languages agree on a place.

    across: [topics, pairs, documents, documents], of the languages one[pair] and another[pair].
    """
    order = rng.permuted(np.tile(np.arange(DOCUMENTS), (len(across), 1)), axis=1)
    moved = np.stack([np.roll(order, language, axis=1) for language in range(len(LANGUAGES))], axis=1)
    topics, pairs = np.ogrid[: across.shape[0], : across.shape[1]]
    return across[topics[..., None], pairs[..., None], moved[:, one], moved[:, another]].mean()


def document_agreement() -> np.ndarray:
    """sum_i min(p_i, q_i) of two documents, p and q being their shares of first choices on expert i: 1 when they use
    the experts alike, 0 when they have none in common. [layers, topics, languages, languages, documents, documents].
    """
    trace = planted_trace()
    prose = len(LANGUAGES) * len(TOPICS) * DOCUMENTS
    use = np.zeros((trace.num_layers, trace.documents[-1] + 1, trace.num_experts))
    for counts, chosen in zip(use, trace.indices, strict=True):
        np.add.at(counts, (trace.documents, chosen[:, 0]), 1)
    use = (use / use.sum(-1, keepdims=True))[:, :prose]
    use = use.reshape(trace.num_layers, len(LANGUAGES), len(TOPICS), DOCUMENTS, -1).swapaxes(1, 2)
    return np.minimum(use[:, :, :, None, :, None], use[:, :, None, :, None]).sum(-1)


def _agreement_dots(axes: Axes, data: dict[str, list]) -> None:
    rows = np.array(data["layer"])
    series = (
        ("one_language", "other text, same language", -0.22),
        ("translations", "translations", 0.0),
        ("other_meaning", "other text, other language", 0.22),
    )
    for (name, label, shift), style in zip(series, SERIES, strict=False):
        axes.plot(100 * np.array(data[name]), rows + shift, **style | {"linestyle": "none"}, markersize=8, label=label)
    axes.set(xlim=(60, 100), ylim=(rows[-1] + 0.5, -0.5), yticks=rows, yticklabels=[f"layer {layer}" for layer in rows])
    axes.grid(axis="x", color=PALE)
    axes.set_xlabel("agreement in the use of the experts, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=3, frameon=False, fontsize=10, columnspacing=1.2)
    axes.set_title("Do translations meet the same experts?")


def _agreement_alt(data: dict[str, list]) -> str:
    rows = (
        f"layer {layer}: {own:.1%}, {same:.1%} and {other:.1%}"
        for layer, same, other, own, _ in zip(*data.values(), strict=True)
    )
    meaning = max(100 * (a - b) for a, b in zip(data["translations"], data["other_meaning"], strict=True))
    language = min(100 * (a - b) for a, b in zip(data["one_language"], data["translations"], strict=True))
    return (
        "Agreement in the use of the experts: translations agree hardly more than two different texts in the same two "
        f"languages, by at most {meaning:.1f} points; different texts in one language agree by at least {language:.1f} "
        "points more than translations. Another text in the same language, translations, another text in another "
        f"language: {'; '.join(rows)}."
    )
