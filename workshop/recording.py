"""The recording of the front page that the README begins with: docs/live.webp.

    python -m workshop.recording

drives the built page in Chromium, as a reader would, and keeps a picture after each step.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from minimoe.atomic import write_atomically
from workshop.build import ROOT
from workshop.website import build_site

TARGET = ROOT / "docs" / "live.webp"
WIDTH, HEIGHT = 1120, 760
BEGINNING, SENTENCE = "The ", "The cat sat by the river."
QUICK, SLOW, LONG = 110, 500, 1700  # milliseconds that a picture is shown
OVERVIEW, INSIDE, NEXT = "#explorer", ".inside", ".halves"  # what stands at the top of the picture


def steps(page: Page) -> Iterator[tuple[str, int]]:
    """What a reader does; after each step, what is looked at and for how long."""
    for end in range(len(BEGINNING), len(SENTENCE) + 1):
        page.fill("#text", SENTENCE[:end])
        yield OVERVIEW, QUICK
    yield OVERVIEW, LONG
    page.locator("#strips [aria-selected=true]").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
        yield OVERVIEW, SLOW
    yield INSIDE, LONG
    for expert in (0, 6):
        page.uncheck(f"#on-{expert}")
        yield NEXT, LONG
    page.fill("#k", "1")
    yield NEXT, LONG
    page.click("#reset")
    yield NEXT, SLOW
    for bias in ("0.1", "0.2", "0.3", "0.4"):
        page.fill("#bias-2", bias)
        yield OVERVIEW, SLOW
    yield OVERVIEW, LONG
    page.click("#reset")
    yield OVERVIEW, LONG


def record(browser: Browser, site: str) -> bytes:
    """An animated WebP of the front page of `site`, an address: a picture after each step."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
    page.goto(f"{site}/index.html")
    pictures, times = [], []
    for place, time in steps(page):
        page.wait_for_selector(".live[aria-busy=false]")
        page.evaluate("place => document.querySelector(place).scrollIntoView()", place)
        pictures.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        times.append(time)
    page.close()
    first, *others = pictures
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=others, duration=times, loop=0, quality=60, method=6)
    return data.getvalue()


def find_chromium() -> str:
    """The program. Raises FileNotFoundError where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if found is None:
        raise FileNotFoundError("found no chromium and no google-chrome, wanted a browser")
    return found


def main() -> None:
    """Build the site in a folder of its own, and record its front page."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        build_site(Path(folder))
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        recording = record(browser, Path(folder).as_uri())
        browser.close()
    write_atomically(TARGET, recording)
    print(f"Written: {TARGET}, {len(recording) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
