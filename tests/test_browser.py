"""What people meet in a browser: widgets in JupyterLab, the pages of the site, slides."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbconvert import SlidesExporter
from playwright.sync_api import Page, expect

from tests.chromium import BROWSER_MARKS, PATIENCE
from workshop.build import NOTEBOOKS, read
from workshop.slides import PAGE

pytestmark = BROWSER_MARKS


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The address of a notebook called {} in a JupyterLab that serves a copy of the course; it ends with the tests."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks")
    token, port = secrets.token_hex(16), _free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--port-retries=0"]
    command += [
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    ]
    command += [f"--ServerApp.root_dir={folder / 'notebooks'}"]
    private = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with open(folder / "lab.log", "wb") as log:  # nobody's own Jupyter settings are read, or written
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=os.environ | private)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, folder / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        server.terminate()  # JupyterLab shuts its kernels down on this signal
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")


def open_and_run(page: Page, address: str) -> None:
    """Open a notebook, see what is committed, and run it from top to bottom."""
    page.goto(address)
    expect(page.locator(".jp-OutputArea img[alt]").first).to_be_visible()  # before anything ran
    page.wait_for_function("window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')")
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def no_cell_failed(page: Page) -> None:
    expect(page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)


def test_a_typed_sentence_changes_the_picture(lab, page):
    open_and_run(page, lab.format("00_start_here.ipynb"))
    box = page.locator(".jp-OutputArea .widget-text input")
    picture = page.locator(".jp-OutputArea .widget-html img")
    expect(picture).to_be_visible()
    before = picture.get_attribute("src")
    box.fill("Un chat noir, 3 + 4 = 7")
    box.press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("Un chat noir"))
    assert picture.get_attribute("src") != before
    no_cell_failed(page)


def test_the_model_runs_in_a_page_inside_the_notebook(lab, page):
    open_and_run(page, lab.format("00_start_here.ipynb"))
    live = page.frame_locator("iframe[title='Live page']")
    expect(live.locator("#strips [role=row]")).to_have_count(4)
    live.locator("#text").fill("Un chat noir")
    expect(live.locator("#strips [role=gridcell]").first).to_have_attribute("aria-label", re.compile("token 1: U,"))
    no_cell_failed(page)


# The playground, and the simulator of devices.
@pytest.mark.parametrize("notebook", ["02_routers.ipynb", "03_load_balance.ipynb"])
def test_a_moved_slider_changes_the_picture(lab, page, notebook):
    open_and_run(page, lab.format(notebook))
    panel = page.locator(".jp-OutputArea .widget-vbox").filter(has=page.locator(".widget-html img")).first
    handle, picture = panel.locator(".noUi-handle").first, panel.locator(".widget-html img")
    expect(picture).to_be_visible()
    image, words = picture.get_attribute("src"), picture.get_attribute("alt")
    handle.focus()
    handle.press("ArrowRight")
    expect(picture).not_to_have_attribute("alt", words)
    assert picture.get_attribute("src") != image
    no_cell_failed(page)


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "colours"), [(390, "light"), (1280, "dark")])
def test_pages_fit_the_screen_and_ask_nobody_for_anything(site, browser, width, colours):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=colours)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for path in sorted(site.glob("*.html")):
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width, path.name
    page.close()
    assert asked and all(address.startswith((site.as_uri(), "data:")) for address in asked)


# --- slides ----------------------------------------------------------------------------------------------------------

# The height of each page, with each of its folded parts open in turn.
HEIGHTS = """async () => {
    await Reveal.initialize({width: 960, height: 700})
    return Reveal.getSlides().map(page => {
        const place = Reveal.getIndices(page)
        Reveal.slide(place.h, place.v)
        const folded = [...page.querySelectorAll(":scope > .jp-Cell details")]
        return Math.max(page.scrollHeight, ...folded.map(part => {
            part.open = true
            const height = page.scrollHeight
            part.open = false
            return height
        }))
    })
}"""


@pytest.mark.skipif("MINIMOE_REVEAL" not in os.environ, reason="MINIMOE_REVEAL names no folder with reveal.js 4")
def test_slides_fit_their_page(page, tmp_path):
    reveal = Path(os.environ["MINIMOE_REVEAL"])
    exporter = SlidesExporter(reveal_url_prefix=reveal.as_uri())
    page.route(re.compile("^https?:"), lambda route: route.abort())
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        deck = tmp_path / f"{path.stem}.html"
        deck.write_text(exporter.from_notebook_node(read(path))[0], encoding="utf-8")
        page.goto(deck.as_uri(), wait_until="domcontentloaded")
        page.add_script_tag(path=reveal / "dist" / "reveal.js")
        heights = page.evaluate(HEIGHTS)
        assert len(heights) > 5 and max(heights) <= PAGE, path.name
