"""The live pages in Chromium: bytes, first paint, a forward pass, an answer to a moved control.

    python -m benchmarks.live_pages [--rounds N]

Prints medians over the rounds, each in a new page, and fails where a target is missed: 5 MB a page, a first paint
within a second, 32 tokens within 150 ms.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median

from playwright.sync_api import Browser, sync_playwright

from workshop.live import PAGES
from workshop.recording import find_chromium
from workshop.website import build_site

TOKENS = (32, 300)
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
FORWARD = """count => {
    const ids = Array.from({length: count}, (_, place) => (place * 37) % 1000)
    const start = performance.now()
    minimoe.finish(minimoe.forward(minimoe.balanced, ids))
    return performance.now() - start
}"""
MOVE = """async ([control, value]) => {
    const start = performance.now(), page = document.querySelector(".live")
    document.querySelector(control).value = value
    document.querySelector(control).dispatchEvent(new Event("input"))
    while (page.ariaBusy === "true") await new Promise(requestAnimationFrame)
    return performance.now() - start
}"""
CONTROLS = {"mixture": ("#k", "3"), "claim": ("#mix_vo", "0.5")}


def measure(browser: Browser, folder: Path, name: str) -> dict[str, float]:
    """Milliseconds of what happens in one new page."""
    page = browser.new_page()
    page.goto((folder / ("index.html" if name == "mixture" else f"{name}.html")).as_uri())
    page.wait_for_selector(".live[aria-busy=false]")
    found = {"first paint": page.evaluate(PAINT)}
    for count in TOKENS if name == "mixture" else ():
        found[f"forward pass, {count} tokens"] = page.evaluate(FORWARD, count)
    found[f"all drawn after {CONTROLS[name][0]} moved"] = page.evaluate(MOVE, list(CONTROLS[name]))
    page.close()
    return found


def main() -> None:
    """Build the site in a folder of its own, and measure both pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    missed = []
    print(f"load average {os.getloadavg()[0]:.1f}; medians of {rounds} pages")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        build_site(Path(folder))
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for name, scripts in PAGES.items():
            files = ("index.html" if name == "mixture" else f"{name}.html", "style.css", "live.css", *scripts)
            megabytes = sum((Path(folder) / file).stat().st_size for file in files) / 1e6
            runs = [measure(browser, Path(folder), name) for _ in range(rounds)]
            times = {what: median(run[what] for run in runs) for what in runs[0]}
            print(f"{name}: {megabytes:.2f} MB")
            print("".join(f"  {what:<36} {time:6.0f} ms\n" for what, time in times.items()))
            wanted = {"first paint": 1000, "forward pass, 32 tokens": 150}
            missed += [f"{name}: {what}" for what, most in wanted.items() if times.get(what, 0) > most]
            missed += [f"{name}: {megabytes:.2f} MB"] if megabytes > 5 else []
        browser.close()
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
