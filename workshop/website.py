"""Makes the course as static pages: `make site`.

    python -m workshop.website            write the folder site/
    python -m workshop.website --serve    write it, and open it in a browser

A page for each notebook with its committed outputs, one for each of `DOCUMENTS`, an index, and exercises to download.
The index and claim.html are alive (live.py): models run in them. No page asks for anything but files beside it.
"""

from __future__ import annotations

import argparse
import html
import re
import webbrowser
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from string import Template
from urllib.parse import unquote

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from minimoe.atomic import write_atomically
from workshop.build import ROOT, read
from workshop.live import live_body, live_files, live_head

SITE = ROOT / "site"
DOCUMENTS = {"glossary.md": "Glossary"}  # the instructor guide holds the answers of the case
_PARTS = Path(__file__).with_name("pages")
_LINK = re.compile(r'<a\b[^>]*?\bhref="([^"]*)"[^>]*>(.*?)</a>', re.DOTALL)


def build_site(target: Path = SITE, root: Path = ROOT) -> None:
    """Write the course under `root`, its folders notebooks/ and docs/, as pages to the folder `target`.

    Raises:
        ValueError: a notebook was not executed, or a link leads nowhere; then nothing is written.
    """
    notebooks = {path: read(path) for path in sorted(root.glob("notebooks/*.ipynb"))}
    documents = {root / "docs" / name: title for name, title in DOCUMENTS.items() if (root / "docs" / name).exists()}
    exercises = sorted(root.glob("notebooks/exercises/*.ipynb"))
    addresses = {path: f"{path.stem}.html" for path in (*notebooks, *documents)}
    addresses |= {path: f"exercises/{path.name}" for path in exercises}

    titles = {path: html.escape(_title(notebook)) for path, notebook in notebooks.items()}
    neighbours = dict.fromkeys(notebooks, "")
    for before, after in pairwise(notebooks):
        neighbours[after] += f'<a rel="prev" href="{addresses[before]}">Previous: {titles[before]}</a>'
        neighbours[before] += f'<a rel="next" href="{addresses[after]}">Next: {titles[after]}</a>'

    files = {addresses[path]: path.read_bytes() for path in exercises}
    files["style.css"] = _style().encode()
    files |= live_files()
    index = _linked(to_html(_index(notebooks, documents)), root / "index", addresses)
    files["index.html"] = _page("minimoe", live_body("mixture") + index, head=live_head("mixture"))
    files["claim.html"] = _page("Explore a claim", live_body("claim"), head=live_head("claim"))
    for path, notebook in notebooks.items():
        body = _linked(_body(notebook, path.name), path, addresses)
        files[addresses[path]] = _page(titles[path], body, neighbours[path])
    for path, title in documents.items():
        body = _linked(to_html(path.read_text(encoding="utf-8"), _DocumentRenderer), path, addresses)
        files[addresses[path]] = _page(title, body)

    for name, data in files.items():
        write_atomically(target / name, data)


class _Renderer(IPythonRenderer):
    """Markdown as notebooks have it, with formulas in MathML, which browsers draw by themselves."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        return convert(body, xmlns="", display=display)

    def block_math(self, body: str) -> str:
        return self.inline_math(body, "block")


class _DocumentRenderer(_Renderer):
    """Documents are read on GitHub too, where anchors are in lower case and without punctuation."""

    def heading(self, text: str, level: int, **attrs: object) -> str:
        words = html.unescape(re.sub(r"<[^>]+>", "", text)).lower()
        anchor = re.sub(r"[^\w -]", "", words).replace(" ", "-")
        return f'<h{level} id="{anchor}">{text}</h{level}>\n'


def to_html(markdown: str, renderer: type[_Renderer] = _Renderer) -> str:
    """The HTML of a text in Markdown."""
    return MarkdownWithMath(renderer(escape=False)).render(markdown)


def _title(notebook: NotebookNode) -> str:
    return notebook.cells[0].source.partition("\n")[0].removeprefix("# ")


def _index(notebooks: dict[Path, NotebookNode], documents: dict[Path, str]) -> str:
    """Markdown: of each notebook its title, claim, minutes and exercises, as the notebook itself says them."""
    parts = [(_PARTS / "introduction.md").read_text(encoding="utf-8")]
    for path, notebook in notebooks.items():
        opening = notebook.cells[0].source
        claim = opening.split("\n\n")[1].strip("*")
        minutes = re.search(r"about (\d+ minutes?) to read", opening)[1]
        exercises = re.findall(r"(\[[^\]]+\]\()(exercises/[^)]+\))", "\n".join(cell.source for cell in notebook.cells))
        links = ", ".join(f"{text}notebooks/{name}" for text, name in exercises)
        parts.append(f"### {path.name[:2]} [{_title(notebook)}](notebooks/{path.name})")
        parts.append(f"{claim}\n\n{minutes} to read. To download, as an exercise: {links}")
    parts.append("## Beside the notebooks")
    parts += [f"- [{title}](docs/{path.name})" for path, title in documents.items()]
    return "\n\n".join(parts)


def _body(notebook: NotebookNode, name: str) -> str:
    """The cells as HTML, with a table of contents, and without the last one: every page has these links anyway."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.execution_count is None:
            raise ValueError(f"{name}: cell {cell.id} was not executed; `make notebooks` executes the notebooks")
    cells = [cell for cell in notebook.cells if not cell.source.startswith("**Previous:**")]
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", to_html)
    body, _ = exporter.from_notebook_node(NotebookNode(notebook, cells=cells))
    headings = re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', body)
    items = "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in headings)
    contents = f'<details class="contents"><summary>On this page</summary><ul>{items}</ul></details>'
    return body.replace("</h1>", f"</h1>{contents}", 1)


def _linked(body: str, source: Path, addresses: dict[Path, str]) -> str:
    """`body`, made from the file `source`, with links into the site. To what the site leaves out, there is no link."""

    def link(found: re.Match) -> str:
        href, text = html.unescape(found[1]), found[2]
        if re.match(r"[a-z]+:|#", href):
            return found[0]
        name, mark, anchor = href.partition("#")
        target = (source.parent / unquote(name)).resolve()
        if not target.exists():
            raise ValueError(f"{source.name} links to {href}, which does not exist")
        if target not in addresses:
            return text
        download = " download" if target.suffix == ".ipynb" and addresses[target].endswith(".ipynb") else ""
        return f'<a href="{html.escape(addresses[target] + mark + anchor)}"{download}>{text}</a>'

    return _LINK.sub(link, body)


def _page(title: str, body: str, neighbours: str = "", head: str = "") -> bytes:
    body = body.replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")
    page = Template((_PARTS / "page.html").read_text(encoding="utf-8"))
    return page.substitute(title=title, body=body, neighbours=neighbours, head=head).encode()


def _style() -> str:
    """The style sheet, with colours for code on light and on dark paper."""
    light, dark = (_code_style(name) for name in ("xcode", "lightbulb"))
    return (
        f"{(_PARTS / 'style.css').read_text(encoding='utf-8')}\n/* Code */\n"
        f"@media print, (prefers-color-scheme: light) {{\n{light}\n}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    )


def _code_style(name: str) -> str:
    """The rules of a Pygments style for tokens; those for line numbers are left out, as pages have none."""
    rules = HtmlFormatter(style=name).get_style_defs(".highlight").splitlines()
    return "\n".join(rule for rule in rules if rule.startswith(".highlight ."))


def serve(folder: Path) -> None:
    """Open the pages in a browser, from an address on this machine, until Ctrl-C."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"Served at {address} until Ctrl-C.", flush=True)
        webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SITE, help="folder for the pages")
    parser.add_argument("--serve", action="store_true", help="open them in a browser, until Ctrl-C")
    arguments = parser.parse_args()
    build_site(arguments.out)
    print(f"Written: {arguments.out / 'index.html'}")
    if arguments.serve:
        serve(arguments.out)


if __name__ == "__main__":
    main()
