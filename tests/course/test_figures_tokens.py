"""Figures of tokens: what a model of the test's own chooses, read off the tiles, bars and lines that are drawn."""

import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures.tokens import SHOWCASE, first_choices
from minimoe.course.shipped import route_text, shipped_model
from minimoe.course.style import render
from minimoe.course.widgets import controls
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.course.test_figures import small_model

TEXT = "for x in 12:"


@pytest.fixture(scope="module")
def model() -> MoEForCausalLM:
    return small_model()


def scores(model, text):
    """What the router of each layer of `model` says of a text: softmax of gate times input, by hooks."""
    seen, hooks = [], []
    for layer in model.model.layers:
        gate = layer.mlp.gate
        hooks.append(
            layer.mlp.register_forward_hook(lambda _, inputs, __, gate=gate: seen.append(inputs[0][0] @ gate.weight.T))
        )
    with torch.no_grad():
        model(torch.tensor([shipped_model()[1].encode(text).ids]))
    for hook in hooks:
        hook.remove()
    return [logits.softmax(-1) for logits in seen]


def numbers(axes):
    """The numbers on the tiles of a panel, in the order of the tokens."""
    return [int(text.get_text()) for text in axes.texts if text.get_weight() == "bold"]


def test_the_routing_of_a_text_is_that_of_the_model(model):
    tokens, routers = route_text(TEXT, model)
    assert "".join(tokens) == TEXT
    for router, wanted in zip(routers, scores(model, TEXT), strict=True):
        torch.testing.assert_close(router.scores, wanted, rtol=1e-4, atol=1e-5)
        assert first_choices(router)[0] == wanted.argmax(-1).tolist()


def test_token_map_numbers_and_colours_each_token_by_its_first_choice(model):
    drawn, data = figures.token_map(TEXT, layer=1, model=model)
    wanted = scores(model, TEXT)[1]
    assert data["expert"] == numbers(drawn.axes[0]) == wanted.argmax(-1).tolist()
    assert "".join(data["token"]) == TEXT
    assert data["probability"] == pytest.approx(wanted.max(-1).values.tolist(), rel=1e-4)
    best, second = wanted.topk(2).values.T
    assert data["margin"] == pytest.approx((best - second).tolist(), abs=1e-4)
    colours = [tile.get_facecolor() for tile in drawn.axes[0].patches]
    assert len(set(zip(data["expert"], colours, strict=True))) == len(set(colours)) == len(set(data["expert"]))
    shares = [text.get_text() for text in drawn.axes[1].texts if text.get_text().endswith("%")]
    assert shares == [f"{data['expert'].count(e) / len(data['expert']):.0%}" for e in range(4)]


def test_token_layers_has_a_panel_for_each_layer(model):
    drawn, data = figures.token_layers(TEXT, model=model)
    wanted = [layer.argmax(-1).tolist() for layer in scores(model, TEXT)]
    assert [numbers(axes) for axes in drawn.axes] == wanted
    assert data["expert"] == [*wanted[0], *wanted[1]]
    assert data["layer"] == [0] * len(wanted[0]) + [1] * len(wanted[1])


def test_token_journey_draws_probabilities_and_the_weights_of_the_chosen(model):
    drawn, data = figures.token_journey("a b", token=0, layer=1, model=model)
    wanted = scores(model, "a b")[1][0]
    assert data["probability"] == pytest.approx(wanted.tolist(), rel=1e-4)
    best = wanted.topk(2)
    weights = dict(zip(best.indices.tolist(), (best.values / best.values.sum()).tolist(), strict=True))
    assert data["weight"] == pytest.approx([weights.get(expert, 0) for expert in range(4)], rel=1e-4)
    left, right = drawn.axes
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in left.patches}
    assert heights == pytest.approx(dict(enumerate(data["probability"])))
    assert [bar.get_height() for bar in right.patches] == pytest.approx(list(weights.values()), rel=1e-4)
    assert [label.get_text() for label in right.get_xticklabels()] == [f"expert {expert}" for expert in weights]


def test_parameters_are_bars_of_the_met_within_the_stored():
    sparse, dense = MoEConfig(num_experts=16), MoEConfig(num_experts=0)
    drawn, data = figures.parameters_total_active({"small": dense, "large": sparse})
    assert data["model"] == ["large", "small"]  # the largest first, and at the top
    assert data["total"] == [sparse.num_parameters() / 1e9, dense.num_parameters() / 1e9]
    assert data["active"] == [config.num_parameters(active=True) / 1e9 for config in (sparse, dense)]
    (axes,) = drawn.axes
    assert [bar.get_width() for bar in axes.patches] == [*data["total"], *data["active"]]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == data["model"]
    assert axes.texts[1].get_text().endswith("dense")


def test_no_shipped_choice_is_a_near_tie():
    """Another CPU must not flip the colour of a token."""
    for data in (figures.token_map()[1], figures.token_layers()[1]):
        assert min(data["margin"]) > 1e-4
    probabilities = sorted(figures.token_journey()[1]["probability"])
    assert min(b - a for a, b in zip(probabilities[-3:], probabilities[-2:], strict=False)) > 1e-4
    assert "".join(figures.token_map()[1]["token"]) == SHOWCASE


@pytest.mark.filterwarnings("error")
def test_any_text_can_be_drawn():
    for text in (" ", "\n", "a\n\n\tb", "<|endoftext|>", "$x$ $$ \\n <b>", "路由器选择专家", "🙂", "x" * 200, "\x00"):
        drawn, data = figures.token_map(text)
        assert render(drawn, "png").startswith(b"\x89PNG") and data["token"], text


def test_what_cannot_be_drawn_is_refused(model):
    for text in ("", "long " * 400):
        with pytest.raises(ValueError, match=r"the text has \d+ tokens: wanted 1 to 256"):
            figures.token_map(text)
    with pytest.raises(ValueError, match="layer=2: wanted 0 to 1"):
        figures.token_map("a", layer=2, model=model)
    with pytest.raises(ValueError, match="tokenizer_json=None: wanted a tokenizer"):
        figures.token_map("a", model=MoEForCausalLM(model.config))


def test_the_controls_of_the_notebook_redraw():
    text, layer, picture = controls(figures.token_map, text="a 1", layer=(0, 3)).children
    shown = [picture.value]
    layer.value = 3
    shown.append(picture.value)
    text.value = "b 2"
    assert len({*shown, picture.value}) == 3 and "layer 3" in picture.value
