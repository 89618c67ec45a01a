"""The front page in a browser, held against Python: tokens, routes, logits, controls; and how it treats a reader."""

import base64
import functools
import http.server
import io
import re
import threading
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from minimoe import generate
from minimoe.course.figures.tokens import SHOWCASE, visible
from minimoe.course.shipped import tokenizer_of
from minimoe.inspection.ablation import _without
from minimoe.model import MoEForCausalLM
from minimoe.training.planted import DOMAINS, document
from tests.chromium import BROWSER_MARKS
from workshop.build import ROOT
from workshop.live import BALANCED, UNBALANCED, open_shipped
from workshop.packing import quantise
from workshop.recording import TARGET, record

pytestmark = BROWSER_MARKS

UNUSUAL = [
    "",
    " ",
    "  two  spaces,\ttabs and\n\n\nlines \r\n",
    "I'll say it's they've 12٣½Ⅷ",
    "<|endoftext|> is only text",
    "Two cats 🐈🐈 and 👩‍👩‍👧‍👦, 🇪🇺",
    "🍵",
    "naïve café, e\u0301, ﬁ, ǅ, \u200b\ufeff\u00a0\u0085\u2028",
    "机器学习模型。 日本語とハングル 한국어",
    "العربية עברית हिन्दी ไทย",
    "\x00\x01\x7f\ufffd\U0010ffff",
    SHOWCASE,
    "x" * 300,
    "def f(x):\n    return {'a': [1, 2.5e-3], **x}  # done",
]
TEXTS = [document(domain, index, seed=3)[:160] for domain in DOMAINS for index in range(2)] + UNUSUAL
MARGIN = 1e-3  # of logits, and of the scores of two experts that may change places
READ = """({text, model, controls}) => {
    const {ids = [], refusal = null} = minimoe.read(minimoe.tokenizer, text, minimoe[model].context)
    if (refusal) return {ids, refusal}
    const routing = minimoe.routingOf(minimoe[model], {...minimoe.asTrained(minimoe[model]), ...controls})
    const {logits, routes} = minimoe.finish(minimoe.forward(minimoe[model], ids, routing))
    const bytes = new Uint8Array(Float32Array.from(logits.flatMap(row => [...row])).buffer)
    const part = key => routes.map(layer => layer.map(token => [...token[key]]))
    return {ids, logits: btoa(bytes.reduce((all, byte) => all + String.fromCharCode(byte), "")),
            indices: part("indices"), weights: part("weights"), scores: part("scores")}
}"""


@pytest.fixture(scope="module")
def models() -> dict[str, MoEForCausalLM]:
    """The two mixtures with the weights that the page carries, in float64."""
    balanced, unbalanced = open_shipped(BALANCED).half().double(), open_shipped(UNBALANCED).double()
    with torch.no_grad():
        for name, weight in unbalanced.named_parameters():
            is_small = weight.dim() == 1 or name.endswith("gate.weight")
            rows, scales = quantise(weight)
            weight.copy_(weight.half() if is_small else torch.from_numpy(rows * scales.astype(np.float64)))
    return {"balanced": balanced, "unbalanced": unbalanced}


@pytest.fixture(scope="module")
def tokenizer(models) -> Tokenizer:
    return tokenizer_of(models["balanced"])


@pytest.fixture(scope="module")
def live(browser, site):
    """The front page, when it is ready."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    open_live(page, site)
    yield page
    page.close()


def read(page, text, model="balanced", **controls):
    """What the page gives for a text: ids, logits [T, V], and of each layer and token indices, weights and scores."""
    found = page.evaluate(READ, {"text": text, "model": model, "controls": controls})
    if "logits" in found:
        found["logits"] = np.frombuffer(base64.b64decode(found["logits"]), np.float32).reshape(len(found["ids"]), -1)
    return found


def is_alike(found, output):
    """Whether logits, and routes where no near tie decides, are those of a `CausalLMOutput`."""
    assert np.abs(found["logits"] - output.logits[0].numpy()).max() < MARGIN
    for layer, router in enumerate(output.router_outputs):
        scores, k = router.scores.numpy(), router.indices.shape[1]
        assert np.abs(np.array(found["scores"][layer]) - scores).max() < MARGIN
        choice = np.sort(scores)[:, ::-1]
        margins = choice[:, :k] - np.pad(choice, ((0, 0), (0, 1)))[:, 1 : k + 1]
        clear = margins > MARGIN
        assert (np.array(found["indices"][layer]) == router.indices.numpy())[clear].all()
        assert np.abs(np.array(found["weights"][layer]) - router.weights.numpy())[clear].max(initial=0) < MARGIN


def test_fifty_texts_are_read_as_in_python(live, models, tokenizer):
    assert len(TEXTS) >= 50 and max(len(tokenizer.encode(text).ids) for text in TEXTS) >= 100
    long = "".join(document(domain, 0, seed=3) for domain in DOMAINS)
    texts = [*TEXTS, tokenizer.decode(tokenizer.encode(long).ids[:300])]
    for text in texts:
        found, ids = read(live, text), tokenizer.encode(text).ids
        assert found["ids"] == ids, text
        if ids:
            with torch.no_grad():
                is_alike(found, models["balanced"](torch.tensor([ids]), output_router_logits=True))
        else:
            assert "empty" in found["refusal"]
    assert len(ids) >= 290


def test_every_character_is_cut_as_in_python(live, tokenizer):
    """All of the first 12,000 code points, and every 61st after them, between letters, spaces and digits."""
    points = [*range(12_000), *range(12_000, 0x110000, 61)]
    letters = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    for start in range(0, len(letters), 500):
        text = "".join(f"a{letter} {letter}7{letter}{letter}" for letter in letters[start : start + 500])
        cut = live.evaluate("text => minimoe.encode(minimoe.tokenizer, text)", text)
        assert cut == tokenizer.encode(text).ids, hex(ord(letters[start]))


def test_the_unbalanced_mixture_too(live, models, tokenizer):
    ids = torch.tensor([tokenizer.encode(SHOWCASE).ids])
    with torch.no_grad():
        is_alike(read(live, SHOWCASE, "unbalanced"), models["unbalanced"](ids, output_router_logits=True))


# --- the controls, each against the code that does the same in the package


CONTROLS = [
    {"k": 1},
    {"k": 5},
    {"k": 8},
    {"temperature": 0.3},
    {"temperature": 2.5, "layers": 1},
    {"off": [4]},
    {"off": [0, 3], "layers": 2},
    {"bias": [0.0, 0.35, 0.0, -0.2, 0.0, 0.0, 0.5, 0.0]},
    {"k": 3, "temperature": 1.7, "off": [6], "bias": [0.1, 0.0, -0.5, 0.0, 0.0, 0.25, 0.0, 0.0], "layers": 3},
]


def changed(model, controls, ids):
    """The output of a model whose routers have other settings, each set where the package has it."""
    layers = range(4) if controls.get("layers", "all") == "all" else [controls["layers"]]
    gates = [model.model.layers[layer].mlp.gate for layer in layers]
    before = [(gate.config, gate.weight.detach().clone()) for gate in gates]
    with torch.no_grad(), ExitStack() as stack:
        for gate in gates:
            gate.config = replace(gate.config, num_experts_per_tok=controls.get("k", 2))
            gate.weight /= controls.get("temperature", 1)
            if "bias" in controls:
                gate.e_score_correction_bias = torch.tensor(controls["bias"], dtype=torch.float64)
            for expert in controls.get("off", []):
                stack.enter_context(_without(gate, expert))
        output = model(ids, output_router_logits=True)
        for gate, (config, weight) in zip(gates, before, strict=True):
            gate.config, gate.e_score_correction_bias = config, None
            gate.weight.copy_(weight)
    return output


@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_a_control_does_what_the_package_does(live, models, tokenizer, controls):
    ids = torch.tensor([tokenizer.encode(SHOWCASE).ids])
    found, output = read(live, SHOWCASE, **controls), changed(models["balanced"], controls, ids)
    assert np.abs(found["logits"] - output.logits[0].numpy()).max() < MARGIN
    for layer, router in enumerate(output.router_outputs):
        by_expert = np.zeros((2, ids.shape[1], 9))  # the ninth are empty slots
        for side, (indices, weights) in enumerate(
            [(found["indices"][layer], found["weights"][layer]), (router.indices.numpy(), router.weights.numpy())]
        ):
            np.put_along_axis(by_expert[side], np.array(indices), np.array(weights), axis=1)
        assert np.abs(by_expert[0] - by_expert[1])[:, :8].max() < MARGIN


def open_live(page, site, name="index"):
    """The page, when it is ready."""
    page.goto((site / f"{name}.html").as_uri())
    settled(page)


def settled(page):
    """All that was asked for is drawn."""
    page.wait_for_selector(".live[aria-busy=false]")


def test_moved_controls_change_the_prediction_on_the_page(page, site, models, tokenizer):
    open_live(page, site)
    text = "The river was"
    page.fill("#text", text)
    page.fill("#k", "3")
    page.fill("#controls #temperature", "1.5")
    page.fill("#bias-2", "0.25")
    page.uncheck("#on-4")
    page.select_option("#where", "1")
    settled(page)
    settings = {"k": 3, "temperature": 1.5, "bias": [0, 0, 0.25, 0, 0, 0, 0, 0], "off": [4], "layers": 1}
    logits = changed(models["balanced"], settings, torch.tensor([tokenizer.encode(text).ids])).logits[0, -1]
    wanted = logits.softmax(-1).topk(8)
    label = page.locator("#prediction [role=img]").get_attribute("aria-label")
    found = re.findall(r"“(.+?)” (\d+) %, as trained", label)
    assert [name for name, _ in found] == [visible(tokenizer.decode([i])) for i in wanted.indices.tolist()]
    assert np.abs(np.array([int(share) for _, share in found]) - 100 * wanted.values.numpy()).max() <= 0.51
    page.click("#reset")
    page.wait_for_function("document.querySelector('#prediction p').textContent.includes('as the model was trained')")
    assert page.input_value("#k") == "2" and page.is_checked("#on-4")


def test_sampling_is_that_of_generate(page, site, models, tokenizer):
    open_live(page, site)
    probabilities = "([logits, t]) => minimoe.nextProbabilities(logits, t)"
    logits = [0.3, -2.0, 1.5, 1.4]
    for temperature in (0.2, 1.0, 1.9):
        wanted = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1)
        assert np.abs(np.array(page.evaluate(probabilities, [logits, temperature])) - wanted.numpy()).max() < 1e-12
    assert page.evaluate(probabilities, [logits, 0]) == [0, 0, 1, 0]
    page.fill("#text", "def mean(")
    page.fill("#sampling-temperature", "0")
    page.wait_for_function("document.querySelector('#status').textContent.startsWith('4 tokens')")
    page.click("#draw-many")
    wanted = generate(models["balanced"], "def mean(", 20)
    page.wait_for_function("text => document.querySelector('#text').value === text", arg=wanted)


# --- how it treats a reader


def test_bad_input_is_answered_and_good_input_works_afterwards(page, site):
    open_live(page, site)
    paste = """() => {
        const box = document.querySelector("#text")
        box.value = Array.from({length: 2e6}, (_, i) => String.fromCharCode((i * 7919) % 65536)).join("")
        box.dispatchEvent(new Event("input"))
    }"""
    page.evaluate(paste)
    page.wait_for_function("document.querySelector('#status').textContent.includes('2,000,000 characters')")
    page.fill("#text", "word " * 600)
    page.wait_for_function("document.querySelector('#status').textContent.includes('wanted 1 to 512')")
    page.fill("#text", "\ud800 half a pair")
    page.wait_for_function("document.querySelector('#status').textContent.includes('In layer')")
    page.fill("#text", "")
    page.wait_for_function("document.querySelector('#status').textContent.includes('empty')")
    page.fill("#text", "a b")
    page.wait_for_function("document.querySelector('#status').textContent.startsWith('2 tokens')")


def test_the_keyboard_moves_through_tokens_and_layers_and_words_follow(page, site):
    open_live(page, site)
    page.fill("#text", "The river was quiet")
    settled(page)
    page.locator("#strips [aria-selected=true]").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith("layer 1, token 2: ")
    assert "in layer 1" in page.locator("#token [role=img]").first.get_attribute("aria-label")
    label = page.locator("#path [role=img]").get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    assert page.locator("#path [role=img]").get_attribute("aria-label") != label
    assert page.locator("#strips [tabindex='0']").count() == 1


@pytest.mark.parametrize("width", [390, 1280, 1920])
@pytest.mark.parametrize("name", ["index", "claim"])
def test_pages_fit_and_have_names_for_all_that_can_be_moved(browser, site, tmp_path, name, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    open_live(page, site, name)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.screenshot(path=tmp_path / f"{name}-{width}.png", full_page=True)
    unnamed = """[...document.querySelectorAll('input, select, textarea, button')].filter(
        part => !part.labels?.length && !part.ariaLabel && !part.textContent.trim()).map(part => part.outerHTML)"""
    assert page.evaluate(unnamed) == []
    moving = (
        "[...document.querySelectorAll('*')].some(part => parseFloat(getComputedStyle(part).transitionDuration) > 0)"
    )
    assert not page.evaluate(moving)
    page.close()


def test_it_works_in_a_folder_of_a_static_host_and_asks_nobody_else(browser, site):
    handler = functools.partial(_Quiet, directory=site.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = f"http://127.0.0.1:{server.server_port}/{site.name}"
        page, asked = browser.new_page(), []
        page.on("response", lambda response: asked.append((response.url, response.status)))
        page.goto(f"{folder}/index.html")
        settled(page)
        page.close()
        server.shutdown()
    assert {status for _, status in asked} == {200}
    assert all(address.startswith((folder, "data:", "blob:")) for address, _ in asked)


def test_the_readme_begins_with_a_recording_of_this_page(browser, site):
    recording = record(browser, site.as_uri())
    assert len(recording) < 2e6
    made, shown = (Image.open(source) for source in (io.BytesIO(recording), TARGET))
    assert shown.n_frames == made.n_frames > 20, "python -m workshop.recording"
    assert (ROOT / "README.md").read_text(encoding="utf-8").index(f"](docs/{TARGET.name})") < 1000


def test_the_page_is_light(site):
    common = ("style.css", "live.css")
    loaded = {"index": (*common, "mixture.js", "explore.js"), "claim": (*common, "relatives.js", "claim.js")}
    for name, files in loaded.items():
        assert sum((site / file).stat().st_size for file in (f"{name}.html", *files)) < 5e6


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
