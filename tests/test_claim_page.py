"""The page "Explore a claim" in a browser, held against Python: rewrites by their weights, methods by their scores."""

import base64
import math
import re

import numpy as np
import pytest
import torch

from minimoe.fingerprints.anchors import shared_tokens
from minimoe.fingerprints.audible import head_counts
from minimoe.fingerprints.compare import METHODS, compare
from minimoe.fingerprints.std_profile import read_std_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage import frame
from minimoe.lineage.gauge import GAUGES, fold_norms
from minimoe.lineage.zoo import Zoo
from tests.chromium import BROWSER_MARKS
from tests.test_live import open_live, settled
from workshop.claims import ORIGINAL, PAIRS, SHOWN, STRANGER, claim_data

pytestmark = BROWSER_MARKS
SEED = 3  # of the gauges on the page
REWRITES = [
    {},
    {"fold_norms": True},
    {"rotate_residual": 0.6},
    {"permute_residual": True},
    {"scale_qk": 1.4},
    {"mix_vo": 0.8},
    {"permute_neurons": True},
    {"scale_neurons": 1.5},
    {"frame_norms": True},
    {"frame_std_profile": 1},
    {"frame_std_profile": 0.4},
    {"frame_neuron_order": True},
    {"permute_residual": True, "scale_qk": 2, "mix_vo": 1, "permute_neurons": True, "scale_neurons": 2},
    {"rotate_residual": 1, "frame_norms": True, "frame_std_profile": 1, "frame_neuron_order": True},
]
ASK = """async ([start, amounts]) => {
    const {original} = minimoe.models
    const b = minimoe.rewrite(minimoe.models[start], amounts, original)
    const bytes = data => new Uint8Array(Float64Array.from(data).buffer)
    const send = data => btoa(bytes(data).reduce((all, byte) => all + String.fromCharCode(byte), ""))
    const names = ["q", "k", "v", "o", "gate", "up", "down"]
    const weights = Object.fromEntries(b.layers.flatMap((layer, n) => [
        ...names.map(name => [`${n}.${name}`, send(layer[name].data)]),
        [`${n}.norm1`, send(layer.norm1)], [`${n}.norm2`, send(layer.norm2)]]))
    Object.assign(weights, {embedding: send(b.embedding.data), head: send(b.head.data), norm: send(b.norm)})
    const order = minimoe.finish(minimoe.csu(original, b))
    const [ours, theirs] = [original, b].map(model => minimoe.finish(minimoe.readResponses(model, RELATIVES.tokens)))
    const answers = minimoe.compareResponses(ours, theirs)
    const scores = {std_profile: minimoe.stdProfile(original, b), norm_profile: minimoe.normProfile(original, b)}
    scores.virtual_response_whitened = answers.reduce((sum, r) => sum + r / answers.length, 0)
    return {weights, scores: {...scores, csu: order.rho}, p: order.p}
}"""


@pytest.fixture(scope="module")
def live(browser, site):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    open_live(page, site, "claim")
    yield page
    page.close()


def rewritten(start, amounts):
    """A member of the zoo after the functions of these names, in the order of the page."""
    model, original = Zoo().load(start).double(), Zoo().load(ORIGINAL).double()
    for name in (
        "fold_norms",
        "rotate_residual",
        "permute_residual",
        "scale_qk",
        "mix_vo",
        "permute_neurons",
        "scale_neurons",
    ):
        if name in amounts:
            model = fold_norms(model) if name == "rotate_residual" else model
            degrees = {} if amounts[name] is True else {"amount": amounts[name]}
            model = GAUGES[name](model, seed=SEED, **degrees)
    for name in ("frame_norms", "frame_std_profile", "frame_neuron_order"):
        if name == "frame_std_profile" and name in amounts:
            own, goal = (read_std_profile(open_weights(each)) for each in (model, original))
            degree = amounts[name]
            model = frame.frame_std_profile(
                model, {role: own[role] ** (1 - degree) * goal[role] ** degree for role in own}
            )
        elif name in amounts:
            model = getattr(frame, name)(model, original)
    return model


def named(model):
    """The tensors of a model by the names of the page."""
    tensors = {
        "embedding": model.model.embed_tokens.weight,
        "head": model.lm_head.weight,
        "norm": model.model.norm.weight,
    }
    for number, layer in enumerate(model.model.layers):
        tensors |= {f"{number}.{role}": getattr(layer.self_attn, f"{role}_proj").weight for role in "qkvo"}
        tensors |= {f"{number}.{role}": getattr(layer.mlp, f"{role}_proj").weight for role in ("gate", "up", "down")}
        tensors |= {
            f"{number}.norm1": layer.input_layernorm.weight,
            f"{number}.norm2": layer.post_attention_layernorm.weight,
        }
    return tensors


@pytest.mark.parametrize("amounts", REWRITES, ids=str)
@pytest.mark.parametrize("start", [ORIGINAL, STRANGER])
def test_a_rewrite_gives_the_weights_and_the_scores_of_python(live, start, amounts):
    found = live.evaluate(ASK, ["original" if start == ORIGINAL else "stranger", amounts])
    model = rewritten(start, amounts)
    for name, tensor in named(model).items():
        data = np.frombuffer(base64.b64decode(found["weights"][name]), np.float64)
        wanted = tensor.detach().numpy().ravel()
        assert np.abs(data - wanted).max() < 1e-6 * np.abs(wanted).max(), name  # std profiles are read in float32

    original = open_weights(Zoo().load(ORIGINAL))
    for name, method in ((name, METHODS[name]) for name in SHOWN):
        wanted, score = method(original, open_weights(model)), found["scores"][name]
        if wanted.score is None:
            assert score is None and "folded" in wanted.refused
        elif name == "csu":  # of strangers, rounding decides some near ties of the assignment
            assert abs(score - wanted.score) < 0.03
            assert abs(math.log10(found["p"]) - math.log10(wanted.p_value)) < max(
                0.4, 0.02 * -math.log10(wanted.p_value)
            )
        else:
            assert abs(score - wanted.score) < 2e-3, name


def test_random_numbers_are_those_of_torch(live):
    for seed in (0, 3, 12345):
        generator = torch.Generator().manual_seed(seed)
        wanted = [
            torch.rand(700, generator=generator, dtype=torch.float64).tolist(),
            torch.rand(5, generator=generator).tolist(),
            torch.randperm(96, generator=generator).tolist(),
            torch.randint(2, (9,), generator=generator).tolist(),
        ]
        asked = """seed => {
            const generator = new minimoe.Generator(seed), times = (n, draw) => Array.from({length: n}, draw)
            return [times(700, () => generator.double()), times(5, () => generator.single()), generator.permutation(96),
                    times(9, () => generator.integer(2))]
        }"""
        assert live.evaluate(asked, seed) == wanted


def test_every_head_counts_in_full_which_the_page_relies_on():
    for name in (ORIGINAL, STRANGER):
        assert all((counts == 1).all() for counts in head_counts(open_weights(Zoo().load(name))).values())


def test_the_tokens_and_the_pairs_are_those_of_the_package():
    data = claim_data()
    original, stranger = (open_weights(Zoo().load(name)) for name in (ORIGINAL, STRANGER))
    assert data["tokens"] == [original.tokens[token] for token in shared_tokens(original, stranger)]
    assert {pair["verdict"] for pair in data["pairs"]} == {
        "shared lineage",
        "no evidence of shared lineage",
        "cannot tell",
    }
    for pair, shown in zip(PAIRS, data["pairs"], strict=True):
        untouched = compare(original, open_weights(Zoo().load(pair.member))).verdict
        assert (untouched == "shared lineage") == (shown["verdict"] == "shared lineage"), pair.member


def score(page, method):
    return page.locator(f"#scores [data-method={method}] output").inner_text()


def test_moved_controls_show_what_hides_and_what_stays(page, site):
    open_live(page, site, "claim")
    assert {score(page, method) for method in SHOWN} == {"1.00", "p ≤ 10⁻³⁰⁰"}
    page.check("#permute_residual")
    page.check("#permute_neurons")
    page.fill("#mix_vo", "1")
    settled(page)
    assert (
        score(page, "virtual_response_whitened") == "1.00"
        and abs(float(score(page, "norm_profile").replace("−", "-"))) < 0.3
    )
    assert float(page.locator("#moved").inner_text()) < 1e-9
    assert "p =" in page.locator("#order [role=img]").get_attribute("aria-label")
    page.select_option("#start", "stranger")
    page.click("#as-it-was")
    page.fill("#frame_std_profile", "1")
    page.check("#frame_norms")
    settled(page)
    assert score(page, "std_profile") == score(page, "norm_profile") == "1.00"
    assert float(score(page, "virtual_response_whitened")) < 0.1 and float(page.locator("#moved").inner_text()) < 1e-9


def test_a_judged_pair_is_answered(live):
    card = live.locator(".card").first
    card.get_by_label("No evidence that they do").check()
    assert re.match("So says the package too. B is a stranger", card.locator(".answer").inner_text())
    card.get_by_label("Cannot tell").check()
    assert card.locator(".answer").inner_text().startswith("The package says: no evidence that they do.")
