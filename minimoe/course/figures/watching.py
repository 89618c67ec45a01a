"""What a router does to whole texts: favourite tokens, repetitions, translations."""

import numpy as np
from matplotlib.patches import Rectangle
from tokenizers import Tokenizer

from minimoe.course.figures.drawing import label_rows, new_pairs, new_panels
from minimoe.course.figures.register import Drawing, cell_columns, columns, figure
from minimoe.course.figures.tokens import draw_tile, token_map, visible
from minimoe.course.shipped import PLANTED_SEED, planted_trace, real_text_model, route_text, shipped_model
from minimoe.course.style import INK, PALE, QUIET, SERIES, expert_colour, token_fonts
from minimoe.inspection import RoutingTrace
from minimoe.inspection.metrics import frequent_tokens, repetition, repetition_by_token, vocabulary_specialization
from minimoe.model import MoEForCausalLM
from minimoe.model.config import require
from minimoe.training.planted import DOMAINS, LANGUAGES, TOPICS, document

FULL_STOPS = ("The boat is in the harbour.", "Le chat dort dans la maison.", "The value is 3.", "    self.")
_TICK = {"linestyle": "none", "marker": "|", "color": SERIES[3]["color"], "markersize": 17, "markeredgewidth": 3}
_FAVOURITES = 5  # tokens to a row, at most


@figure(model=real_text_model)
def token_path(texts: tuple[str, ...] = FULL_STOPS, *, model: MoEForCausalLM) -> Drawing:
    """The last token of each text on its way through the layers: its experts, and with which weight.
    Data: text, layer, expert, weight; a row for each of its experts, best first. Raises what `route_text` raises."""
    title = "The last token in each layer: weights in %, first choice in a thick frame"
    drawn, panels = new_pairs(len(texts), 2.2, 0.5, title=title, xlabel="expert", ylabel="layer")
    rows, paths = [], []
    for text, axes in zip(texts, panels, strict=True):
        tokens, routers = route_text(text, model)
        experts, layers = routers[0].scores.shape[1], len(routers)
        axes.set_title(f"“{''.join(map(visible, tokens))}”", size=10, family=token_fonts(), parse_math=False)
        axes.set(xlim=(-0.6, experts - 0.4), ylim=(layers - 0.45, -0.55), xticks=range(experts), yticks=range(layers))
        firsts = [int(router.indices[-1, 0]) for router in routers]
        for layer, router in enumerate(routers):
            for expert, weight in zip(router.indices[-1].tolist(), router.weights[-1].tolist(), strict=True):
                rows.append((text, layer, expert, weight))
                line = {"linewidth": 2.0} if expert == firsts[layer] else {"linewidth": 0.8, "linestyle": ":"}
                style = {"facecolor": expert_colour(expert), "edgecolor": INK, "zorder": 2, **line}
                axes.add_patch(Rectangle((expert - 0.42, layer - 0.4), 0.84, 0.8, **style))
                axes.text(expert, layer, f"{100 * weight:.0f}", ha="center", va="center", zorder=3)
        paths.append(f"“{text.strip()}” {', '.join(map(str, firsts))}")
    alt = f"""One panel for each text: layers downwards, experts across, and a box with the weight for each expert of
        the last token, in a thick frame for the first choice. The first choices from the first layer to the last:
        {"; ".join(paths)}."""
    return drawn, columns(("text", "layer", "expert", "weight"), rows), alt


@figure(trace=planted_trace, tokenizer=lambda: shipped_model()[1])
def favourite_tokens(trace: RoutingTrace, layer: int = 0, min_count: int = 50, *, tokenizer: Tokenizer) -> Drawing:
    """For each expert of a layer the tokens of which it gets the largest share of the occurrences, as first choice.

    A token of which an expert gets no more than of all tokens is not among them, so a row may be short or empty.

    Data: expert, load (its share of all tokens), token, count (occurrences), share (of these that go to the expert).
    Raises ValueError where there is no such layer, or no token occurs `min_count` times.
    """
    require(layer in range(trace.num_layers), "layer", layer, f"0 to {trace.num_layers - 1}")
    measured = vocabulary_specialization(trace, min_count=min_count, draws=0)
    tokens, loads = frequent_tokens(trace, min_count), measured.null[layer, 0]
    counts = np.bincount(trace.token_ids)[tokens]
    title = f"Favourite tokens of the experts in layer {layer}: share of n occurrences"
    drawn, (axes,) = new_panels(0.52 * len(loads) + 0.45, title=title)
    axes.set_axis_off()
    axes.set(xlim=(-6, 8.4 * _FAVOURITES), ylim=(len(loads), 0))
    rows, parts = [], []
    for expert, (load, shares) in enumerate(zip(loads, measured.value[layer].T, strict=True)):
        axes.text(-6, expert + 0.36, f"expert {expert}", weight="bold", va="center")
        axes.text(-6, expert + 0.76, f"load {load:.0%}", size=10, va="center", color=QUIET)
        best = np.lexsort((-counts, -shares))[:_FAVOURITES]  # by share, then by count
        found = [(tokenizer.decode([int(tokens[n])]), counts[n], shares[n]) for n in best if shares[n] > load]
        for column, (token, count, share) in enumerate(found):
            draw_tile(axes, 8.4 * column, expert, 8.1, token, f"{share:.0%} of {count}", expert_colour(expert))
        rows += [(expert, load, *row) for row in found]
        parts.append(f"{expert} ({load:.0%}) {' '.join(visible(token) for token, *_ in found) or 'none'}")
    nearly_all = sum(share >= 0.9 for *_, share in rows)
    alt = f"""Layer {layer}, tokens that occur at least {min_count} times: {nearly_all} of the {len(rows)} favourites
        shown go to their expert first in nine places of ten or more. By expert, with its load: {"; ".join(parts)}."""
    return drawn, columns(("expert", "load", "token", "count", "share"), rows), alt


@figure(trace=planted_trace)
def repetition_by_kind(trace: RoutingTrace) -> Drawing:
    """How often neighbours share their first choice, by layer and kind of text, beside three levels of chance.

    Data: layer, kind (the labels of the trace), repetition, low, high (95 %, over documents), by_load (sum of p_i^2 of
    this kind of text), by_token (as `repetition_by_token`).
    """
    kinds = trace.domain_names
    measured = [(*repetition(part), repetition_by_token(part)) for part in map(trace.select, kinds)]
    value, by_load, low, high, by_token = np.array(measured).transpose(1, 2, 0)  # each [layers, kinds]
    height = np.arange(len(kinds))
    even = f" (even load: {100 / trace.num_experts:.4g})"
    drawn, panels = new_pairs(trace.num_layers, 2.6, xlabel=f"neighbours with the same first choice, % of pairs{even}")
    for layer, axes in enumerate(panels):
        axes.barh(height, 100 * by_load[layer], 0.62, color=PALE, label="from the load, Σp²")
        spread = 100 * np.stack([value - low, high - value])[:, layer]
        style = {"fmt": "o", "color": INK, "markersize": 6, "label": "counted"}
        axes.errorbar(100 * value[layer], height, xerr=spread, **style)
        axes.plot(100 * by_token[layer], height, **_TICK, label="from each token by itself")
        axes.set_title(f"layer {layer}")
    panels[0].set(yticks=height, yticklabels=kinds, xlim=(0, max(75, 105 * value.max())))
    panels[0].invert_yaxis()
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    layer, kind = np.unravel_index(value.argmax(), value.shape)
    away = [f"{100 * points:.1f}" for points in abs(value - by_token).max(1)]
    alt = f"""{trace.num_layers} panels, one a layer, with the repetition of {len(kinds)} kinds of text:
        {value.min():.0%} to {value.max():.0%}, where an even load gives {1 / trace.num_experts:.1%}. Against the level
        of the actual load, {(low > by_load).sum()} of {value.size} are above, {(high < by_load).sum()} below, by their
        whole interval. The highest, {kinds[kind]} in layer {layer}, compares with {by_load[layer, kind]:.0%} from its
        load. What each token by itself would give is up to {", ".join(away)} points away from the count, by layer."""
    levels = {"repetition": value, "low": low, "high": high, "by_load": by_load, "by_token": by_token}
    return drawn, cell_columns({"layer": range(trace.num_layers), "kind": kinds}, **levels), alt


@figure(listed=False, model=real_text_model)
def draw_translations(layer: int = 3, *, model: MoEForCausalLM) -> Drawing:
    """The first sentence of one story in every language, one after the other, as `token_map` shows them, which raises
    a ValueError where there is no such layer."""
    lines = [document(f"{language}/{TOPICS[0]}", 0, seed=PLANTED_SEED).split(". ")[0] + "." for language in LANGUAGES]
    drawn, data = token_map("\n".join(lines), layer, model=model)
    breaks = [place for place, token in enumerate(data["token"]) if token == "\n"]
    busiest = ", ".join(
        f"{language.capitalize()} expert {counts.argmax()} ({counts.max() / counts.sum():.0%})"
        for language, counts in zip(LANGUAGES, map(np.bincount, np.split(data["expert"], breaks)), strict=True)
    )
    alt = f"""One sentence in English, French, German and Spanish, one after the other, every token a tile with the
        colour and the number of its first-choice expert in layer {layer}. The busiest, and its share: {busiest}."""
    return drawn, data, alt


@figure(trace=planted_trace)
def language_agreement(trace: RoutingTrace, shuffles: int = 1000, seed: int = 0) -> Drawing:
    """How far two documents use the same experts: translations, other documents in two languages, and in one.

    Data: layer; translations; other_meaning; one_language (two meanings in the same language), all means of
    `document_agreement`, within topics; and by_luck, the share of random pairings of texts with translations of others
    whose mean is no less than that of the translations. The trace is one that `document_agreement` takes.
    """
    rng = np.random.default_rng(seed)
    pairs = np.triu_indices(len(LANGUAGES), k=1)
    rows = []
    for layer, table in enumerate(document_agreement(trace)):
        other = ~np.eye(table.shape[-1], dtype=bool)
        across, within = table[:, *pairs], np.einsum("taaij->taij", table)
        same = across[..., ~other].mean()
        by_luck = np.mean([_mispaired(across, *pairs, rng) >= same for _ in range(shuffles)])
        rows.append((layer, same, across[..., other].mean(), within[..., other].mean(), by_luck))
    layers, translations, other_meaning, one_language, _ = np.array(rows).T
    drawn, (axes,) = new_panels(3.3, title="Are translations routed to the same experts?")
    series = {
        "other text, same language": one_language,
        "translations": translations,
        "other text, other language": other_meaning,
    }
    for (label, values), shift, style in zip(series.items(), (-0.22, 0.0, 0.22), SERIES, strict=False):
        axes.plot(100 * values, layers + shift, **style | {"linestyle": "none"}, markersize=8, label=label)
    axes.set(xlim=(0, 100), xlabel="agreement in the use of the experts, %")
    label_rows(axes, [f"layer {layer:g}" for layer in layers])
    axes.grid(axis="x", color=PALE)
    drawn.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
    each = [f"layer {layer}: {own:.1%}, {same:.1%} and {other:.1%}" for layer, same, other, own, _ in rows]
    alt = f"""Agreement in the use of the experts: translations agree more than two different texts in the same two
        languages, by at most {100 * (translations - other_meaning).max():.1f} points; different texts in one language
        agree by at least {100 * (one_language - translations).min():.1f} points more than translations. Another text in
        the same language, translations, another text in another language: {"; ".join(each)}."""
    return drawn, columns(("layer", "translations", "other_meaning", "one_language", "by_luck"), rows), alt


def document_agreement(trace: RoutingTrace) -> np.ndarray:
    """sum_i min(p_i, q_i) of two documents, p and q being their shares of first choices on expert i: 1 when they use
    the experts alike, 0 when they have none in common. [layers, topics, languages, languages, documents, documents].
    The trace is of as many documents of every planted domain, in the order of `DOMAINS`."""
    number = (trace.documents[-1] + 1) // len(DOMAINS)
    prose = len(LANGUAGES) * len(TOPICS) * number
    use = np.zeros((trace.num_layers, trace.documents[-1] + 1, trace.num_experts))
    for counts, chosen in zip(use, trace.indices, strict=True):
        np.add.at(counts, (trace.documents, chosen[:, 0]), 1)
    use = (use / use.sum(-1, keepdims=True))[:, :prose]
    use = use.reshape(trace.num_layers, len(LANGUAGES), len(TOPICS), number, -1).swapaxes(1, 2)
    return np.minimum(use[:, :, :, None, :, None], use[:, :, None, :, None]).sum(-1)


def _mispaired(across: np.ndarray, one: np.ndarray, another: np.ndarray, rng: np.random.Generator) -> float:
    """Mean agreement when the stories of each topic and language change places, and no two languages agree on a place;
    across [topics, pairs, documents, documents], of the languages one[pair] and another[pair]."""
    documents = across.shape[-1]
    order = rng.permuted(np.tile(np.arange(documents), (len(across), 1)), axis=1)
    moved = np.stack([np.roll(order, language, axis=1) for language in range(len(LANGUAGES))], axis=1)
    topics, pairs = np.ogrid[: across.shape[0], : across.shape[1]]
    return across[topics[..., None], pairs[..., None], moved[:, one], moved[:, another]].mean()
