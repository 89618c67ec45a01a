"""The first notebook where people meet it: JupyterLab in a headless browser."""

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

from minimoe.course.build import NOTEBOOKS

CHROMIUM = next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "google-chrome"))), None)
PATIENCE = 40  # seconds, for any one thing to happen on a busy machine

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("MINIMOE_REQUIRE_BROWSER"),
        reason="no chromium and no google-chrome on this machine",
    ),
]


@pytest.fixture
def lab(tmp_path) -> Iterator[str]:
    """The address of a JupyterLab that serves a copy of the notebooks; the server ends with the test."""
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    token, port = secrets.token_hex(16), _free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--port-retries=0"]
    command += [
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    ]
    command += [f"--ServerApp.root_dir={tmp_path / 'notebooks'}"]
    private = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with open(tmp_path / "lab.log", "wb") as log:  # nobody's own Jupyter settings are read, or written
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=os.environ | private)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, tmp_path / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/00_start_here.ipynb?token={token}&reset"
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
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def test_a_typed_sentence_changes_the_picture(lab):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(lab)
        committed = page.locator(".jp-OutputArea img[alt*='first-choice expert']")
        expect(committed.first).to_be_visible()  # before anything ran: what is committed can be seen

        page.wait_for_function("window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')")
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")

        box = page.locator(".jp-OutputArea .widget-text input")
        picture = page.locator(".jp-OutputArea .widget-html img")
        expect(picture).to_be_visible()
        before = picture.get_attribute("src")
        box.fill("Un chat noir, 3 + 4 = 7")
        box.press("Enter")
        expect(picture).to_have_attribute("alt", re.compile("Un chat noir"))
        assert picture.get_attribute("src") != before
        expect(page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)
        browser.close()
