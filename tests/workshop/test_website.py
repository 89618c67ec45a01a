"""The static pages: links, alt texts, and no request to anyone."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workshop.build import NOTEBOOKS, write
from workshop.live import live_files
from workshop.website import build_site

pytestmark = pytest.mark.exact("computes nothing")

ALIVE = {"index": ("mixture.js", "explore.js"), "claim": ("relatives.js", "claim.js")}
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="
OPENING = """# {title}

**It has a claim & a `word`.**

**Time:** about 5 minutes to read, 2 seconds to run."""
TEXT = """## A part: what's this?

### A formula, $p_i$

$$\\sum_i p_i$$

| a | table |
|---|---|
| of | words |

See [the other]({other}#A-part:-what's-this?), [the files](../README.md), [elsewhere](https://example.org).

## Exercise

[To do](exercises/00_first.ipynb)"""


class Page(HTMLParser):
    """What a page holds: `ids`, `links` (href of a), `images`, `loads` (what it makes a browser fetch), `text`."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.images, self.loads, self.tags, self.text = set(), [], [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a":
            self.links.append(given["href"])
        if tag == "img":
            self.images.append(given)
        self.loads += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]
        if tag == "link":
            self.loads.append(given["href"])
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style", ""))

    def handle_data(self, data):
        self.text += data


def broken_links(folder: Path) -> list[str]:
    pages = {path.name: Page(path) for path in folder.glob("*.html")}
    broken = []
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"https?:", link):
                continue
            target, _, anchor = link.partition("#")
            target = target or name
            # A browser looks for an anchor as it is written, then for what its %22 and the like stand for.
            if not (folder / target).is_file() or (anchor and not {anchor, unquote(anchor)} & pages[target].ids):
                broken.append(f"{name}: {link}")
    return broken


def notebook(title: str, other: str):
    return new_notebook(
        cells=[
            new_markdown_cell(OPENING.format(title=title)),
            new_markdown_cell(TEXT.format(other=other)),
            new_code_cell(
                "show(figure)  # a < b",
                execution_count=1,
                outputs=[new_output("display_data", {"text/html": f'<img alt="One grey pixel" src="{PIXEL}">'})],
            ),
            new_code_cell("print(1)", execution_count=2, outputs=[new_output("stream", name="stdout", text="1 < 2\n")]),
            new_markdown_cell("<details><summary><b>What happened</b></summary>\n\nIt *printed*.\n\n</details>"),
            new_markdown_cell("**Previous:** none · **Next:** none"),
        ]
    )


@pytest.fixture
def root(tmp_path) -> Path:
    """A course of two notebooks, with a document and an exercise."""
    write(notebook("First & last", "01_b.ipynb"), tmp_path / "notebooks" / "00_a.ipynb")
    write(notebook("Second", "00_a.ipynb"), tmp_path / "notebooks" / "01_b.ipynb")
    write(new_notebook(), tmp_path / "notebooks" / "exercises" / "00_first.ipynb")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "glossary.md").write_text(
        "# Words\n\n## What's `this`?\n\n[Here](#whats-this), and [there](../notebooks/00_a.ipynb#Exercise).\n",
        encoding="utf-8",
    )
    (tmp_path / "README.md").touch()
    return tmp_path


@pytest.fixture
def small(root) -> Path:
    build_site(root / "site", root)
    return root / "site"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    return folder


def test_the_small_site_has_its_pages_and_no_broken_link(small):
    assert {str(path.relative_to(small)) for path in small.rglob("*") if path.is_file()} == {
        *("00_a.html", "01_b.html", "glossary.html", "index.html", "style.css", "exercises/00_first.ipynb"),
        *("claim.html", *live_files()),
    }
    assert broken_links(small) == []


def test_the_index_says_what_the_notebooks_say(small):
    index = Page(small / "index.html")
    for words in ("First & last", "It has a claim & a word.", "5 minutes to read", "To do", "Glossary"):
        assert words in index.text
    assert {"00_a.html", "01_b.html", "glossary.html", "exercises/00_first.ipynb"} <= set(index.links)


def test_links_lead_to_pages_downloads_and_elsewhere(small):
    page = Page(small / "00_a.html")
    assert "01_b.html#A-part:-what%27s-this?" in page.links and "https://example.org" in page.links
    assert not any("README" in link for link in page.links) and "the files" in page.text
    assert ("a", {"href": "exercises/00_first.ipynb", "download": None}) in page.tags
    assert ("a", {"rel": "next", "href": "01_b.html"}) in page.tags
    assert ("a", {"rel": "prev", "href": "00_a.html"}) in Page(small / "01_b.html").tags
    assert not any(given.get("rel") == "prev" for _, given in page.tags)
    assert "Previous: none" not in page.text


def test_a_page_keeps_outputs_alt_texts_folds_and_formulas(small):
    page = Page(small / "00_a.html")
    assert [image["alt"] for image in page.images] == ["One grey pixel"]
    assert "1 < 2" in page.text and "show(figure)" in page.text and "$" not in page.text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("math") == 2 and {"details", "summary"} < set(tags)


def test_what_is_not_whole_is_refused_and_nothing_written(root):
    whole, unexecuted = notebook("Second", "00_a.ipynb"), notebook("Second", "00_a.ipynb")
    unexecuted.cells[2].execution_count = None
    for broken in (unexecuted, notebook("Second", "02_c.ipynb")):
        write(broken, root / "notebooks" / "01_b.ipynb")
        with pytest.raises(ValueError, match=r"was not executed|links to 02_c\.ipynb"):
            build_site(root / "site", root)
    write(whole, root / "notebooks" / "01_b.ipynb")
    (root / "docs" / "glossary.md").write_text("[gone](../notebooks/02_c.ipynb)", encoding="utf-8")
    with pytest.raises(ValueError, match=r"links to \.\./notebooks/02_c\.ipynb, which does not exist"):
        build_site(root / "site", root)
    assert not (root / "site").exists()


def test_the_checker_sees_a_broken_link(small):
    (small / "01_b.html").write_text(
        '<a href="gone.html"></a><a href="00_a.html#gone"></a><a href="#gone"></a>', encoding="utf-8"
    )
    (small / "exercises" / "00_first.ipynb").unlink()
    assert {fault.split(": ")[1] for fault in broken_links(small)} > {"gone.html", "00_a.html#gone", "#gone"}


def test_the_course_has_no_broken_link(whole):
    assert len(list(whole.glob("[01]*.html"))) == len(list(NOTEBOOKS.glob("*.ipynb")))
    assert broken_links(whole) == []


def test_pages_ask_nobody_for_anything_and_two_of_them_are_alive(whole):
    for path in whole.glob("*.html"):
        page = Page(path)
        wanted = {"style.css"}
        if path.stem in ALIVE:
            wanted |= {"live.css", *ALIVE[path.stem]}
        others = [address for address in page.loads if address not in wanted and not address.startswith("data:")]
        assert not others, f"{path.name} loads {others}"
        assert [given for tag, given in page.tags if tag == "script"] == [
            {"defer": None, "src": name} for name in ALIVE.get(path.stem, ())
        ]
    for style in ("style.css", "live.css"):
        assert not re.search(r"url\(|@import", (whole / style).read_text(encoding="utf-8"))
    for script in ("explore.js", "claim.js"):
        text = (whole / script).read_text(encoding="utf-8")
        assert not re.search(
            r"\bfetch\(|XMLHttpRequest|WebSocket|https?://(?!www\.w3\.org/2000/svg)|\bimport\b\(", text
        )


def test_pages_are_in_english_with_one_title_and_alt_texts(whole):
    for path in whole.glob("*.html"):
        page = Page(path)
        assert ("html", {"lang": "en"}) in page.tags
        assert sum(tag == "h1" for tag, _ in page.tags) == 1, path.name
        assert all(len(image["alt"].split()) >= 5 for image in page.images), path.name
        assert page.links[0] == "#main", "the first link skips the navigation"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_code_stand_out_on_light_and_on_dark_paper(whole):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    css = (whole / "style.css").read_text(encoding="utf-8")
    for root_rule, code in zip(
        re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2], css.split("/* Code */")[1].split("@media")[1:], strict=True
    ):
        named = dict(re.findall(r"--(\w+): (#\w{6});", root_rule))
        pairs = [(named[name], named["paper"]) for name in ("ink", "quiet", "link")]
        pairs += [(colour, named["box"]) for colour in re.findall(r"(?<![-\w])color: (#\w{6})", code)]
        assert len(pairs) > 20
        for text, paper in pairs:
            dark, light = sorted(map(luminance, (text, paper)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {paper}"
