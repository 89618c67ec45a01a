"""The live pages: the modules in pages/live/ as classic scripts, and beside them the models they run.

python -m workshop.live mixture    print a page with all that it needs in one file, as notebooks show it
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM
from workshop.bundle import bundle
from workshop.claims import claim_data
from workshop.packing import pack, pack_tokenizer

LIVE = Path(__file__).with_name("pages") / "live"
BALANCED, UNBALANCED = "moe-real", "moe-real-unbalanced"  # mixtures trained with a balance loss, and without
PAGES = {
    "mixture": ("mixture.js", "explore.js"),
    "claim": ("relatives.js", "claim.js"),
}  # the scripts of each: its models, then what runs and shows them


def live_body(page: str) -> str:
    """The part of a page that its scripts fill."""
    return (LIVE / f"{page}.html").read_text(encoding="utf-8")


def live_head(page: str) -> str:
    """What its head loads, after the text has been drawn."""
    scripts = "".join(f'<script defer src="{name}"></script>\n' for name in PAGES[page])
    return f'<link rel="stylesheet" href="live.css">\n{scripts}'


@cache
def live_scripts(page: str) -> dict[str, str]:
    """The scripts of a page by name, in the order in which they run."""
    data, program = PAGES[page]
    packed = _constant("MIXTURE", _mixtures()) if page == "mixture" else _constant("RELATIVES", claim_data())
    return {data: packed, program: bundle(LIVE / program)}


def live_files() -> dict[str, bytes]:
    """What lies beside the pages, by name: scripts, their style, and the modules that the pages show as they are."""
    files = {name: text for page in PAGES for name, text in live_scripts(page).items()}
    files["live.css"] = (LIVE / "live.css").read_text(encoding="utf-8")
    files |= {f"source/{path.name}": path.read_text(encoding="utf-8") for path in sorted(LIVE.glob("*.js"))}
    return {name: text.encode() for name, text in files.items()}


def standalone(page: str) -> str:
    """A page in one file; what it links to is not there, so that links are plain words."""
    style = "".join(path.read_text(encoding="utf-8") for path in (LIVE.parent / "style.css", LIVE / "live.css"))
    body = re.sub(r"<a\b[^>]*>(.*?)</a>", r"\1", live_body(page), flags=re.DOTALL)
    scripts = "".join(f"<script>\n{text}</script>\n" for text in live_scripts(page).values())
    head = f'<meta charset="utf-8">\n<title>minimoe</title>\n<style>\n{style}</style>'
    document = f"<head>\n{head}\n</head>\n<body>\n<main>\n{body}</main>\n{scripts}</body>"
    return f'<!DOCTYPE html>\n<html lang="en">\n{document}\n</html>\n'


def open_shipped(name: str) -> MoEForCausalLM:
    """A model of data/zoo in float32."""
    return MoEForCausalLM.from_pretrained(data_path(f"zoo/{name}"), dtype=torch.float32)


def _mixtures() -> dict[str, Any]:
    balanced, unbalanced = open_shipped(BALANCED), open_shipped(UNBALANCED)
    return {
        "balanced": pack(balanced),
        "unbalanced": pack(unbalanced, bits=8),
        "tokenizer": pack_tokenizer(balanced.tokenizer_json),
    }


def _constant(name: str, data: dict[str, Any]) -> str:
    """As a script; in HTML, `</` could end it, and `<!--` begin a comment."""
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--")
    return f"const {name} = {text};\n"


if __name__ == "__main__":
    sys.stdout.write(standalone(sys.argv[1]))
