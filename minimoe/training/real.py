"""The real corpus: text assembled on the reader's machine from installed packages, so that none of it is shipped.

| domain                   | from                                                                            |
|--------------------------|---------------------------------------------------------------------------------|
| code                     | the sources of sympy and networkx without docstrings; a document is a module    |
| prose                    | those docstrings without their doctests; a document is a module's docstrings    |
| french, chinese, english | JupyterLab's language packs; a document is a message, said and split alike in   |
|                          | all three                                                                       |
| arithmetic               | that of the planted corpus, and more of it                                      |

The sources are read, never imported. Tests, benchmarks and generated parsers are left out. `data/corpora/manifest.json`
records what the tested versions give; `python -m workshop.rebuild` writes it again.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimoe.data_files import data_path
from minimoe.progress import progress_bar
from minimoe.training.documents import Document, distinct, split_of
from minimoe.training.planted import planted_documents

LIBRARIES = ("sympy", "networkx")
LANGUAGE_PACKS = ("jupyterlab-language-pack-fr-FR", "jupyterlab-language-pack-zh-CN")
PACKAGES: dict[str, tuple[str, ...]] = dict.fromkeys(("code", "prose"), LIBRARIES)  # names on PyPI
PACKAGES |= dict.fromkeys(("french", "chinese", "english"), LANGUAGE_PACKS) | {"arithmetic": ()}
DOMAINS = tuple(PACKAGES)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LEFT_OUT = {"tests", "benchmarks", "_antlr"}  # folders of the libraries
ARITHMETIC_DOCUMENTS = 10_000


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_domains(domains: Sequence[str] | None = None) -> tuple[str, ...]:
    """The domains to assemble: the ones named, or else all whose packages are installed, with a warning about the rest.

    Raises ValueError for an unknown domain, and ModuleNotFoundError when a named domain's package is not installed.
    """
    wanted = DOMAINS if domains is None else tuple(dict.fromkeys(domains))
    if not wanted or not set(wanted) <= set(DOMAINS):
        raise ValueError(f"domains={list(wanted)}: wanted some of {list(DOMAINS)}")
    missing = {package for domain in wanted for package in PACKAGES[domain] if installed_version(package) is None}
    lacking = [domain for domain in wanted if missing & set(PACKAGES[domain])]
    if lacking:
        needed = "'minimoe[text]'" if missing & set(LANGUAGE_PACKS) else " ".join(sorted(missing))
        remedy = f"get it with: pip install {needed}"
        message = f"{', '.join(lacking)}: not installed: {', '.join(sorted(missing))}; {remedy}"
        if domains is not None:
            raise ModuleNotFoundError(message)
        warnings.warn(f"going on without {message}", stacklevel=3)
    return tuple(domain for domain in wanted if domain not in lacking)


def _root(package: str) -> Path:
    """The package's folder, found without importing it."""
    return Path(importlib.util.find_spec(package.replace("-", "_")).submodule_search_locations[0])


def source_files(package: str) -> dict[str, Path]:
    """The files that text is read from, by their path inside the package, in an order that no machine changes."""
    root = _root(package)
    pattern = "*.py" if package in LIBRARIES else "locale/*/LC_MESSAGES/*.json"
    names = {path.relative_to(root).as_posix(): path for path in root.rglob(pattern)}
    return {name: names[name] for name in sorted(names) if not LEFT_OUT & set(name.split("/"))}


def sources_sha256(domains: Sequence[str]) -> str:
    """sha256 of every file that the domains are assembled from, names included."""
    state = hashlib.sha256()
    for package in dict.fromkeys(package for domain in domains for package in PACKAGES[domain]):
        for name, path in source_files(package).items():
            data = path.read_bytes()
            state.update(f"{package}/{name} {len(data)}\n".encode())
            state.update(data)
    return state.hexdigest()


def assemble(domains: Sequence[str]) -> dict[str, list[Document]]:
    """The documents of each domain, in a fixed order. A module's code and prose are in the same split, as are the
    versions of a message."""
    found = {domain: [] for domain in DOMAINS}
    if {"code", "prose"} & set(domains):
        for name, source in _modules():
            code, prose = code_and_prose(source)
            found["code"].append(Document(code, split_of(name)))
            found["prose"].append(Document(prose, split_of(name)))
    if {"french", "chinese", "english"} & set(domains):
        for message in _messages():
            split = split_of(message["english"])
            for language, text in message.items():
                found[language].append(Document(text, split))
    if "arithmetic" in domains:
        found["arithmetic"] = planted_documents("arithmetic", ARITHMETIC_DOCUMENTS)
    return {domain: distinct(found[domain]) for domain in domains}


def _modules() -> Iterator[tuple[str, str]]:
    """Name and source of every module of the libraries, newlines as `\\n`."""
    paths = {f"{package}/{name}": path for package in LIBRARIES for name, path in source_files(package).items()}
    for name, path in progress_bar(paths.items(), desc="reading modules", unit="file", leave=False):
        yield name, path.read_text(encoding="utf-8")


def code_and_prose(source: str) -> tuple[str, str]:
    """A module without its docstrings, and the docstrings without their doctests.

    The code parses to the module's syntax tree less the docstrings, `pass` where nothing else was in a body; every
    other character stays. A doctest is a paragraph with a `>>>` in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes such as "\d" are the libraries' concern
        tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, WITH_DOCSTRING)]
    documented = [node for node in nodes if ast.get_docstring(node) is not None]
    documented.sort(key=lambda node: node.body[0].lineno)
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    for node in reversed(documented):  # from the end, so that earlier positions stay true
        _cut_docstring(lines, node)
    paragraphs = (text for node in documented for text in re.split(r"\n\s*\n", ast.get_docstring(node)))
    return b"".join(lines).decode(), "\n\n".join(text for text in paragraphs if ">>>" not in text)


def _cut_docstring(lines: list[bytes], node: ast.AST) -> None:
    """Take the docstring of `node` out of `lines`, in place."""
    docstring = node.body[0]
    first, last = docstring.lineno - 1, docstring.end_lineno - 1
    before = lines[first][: docstring.col_offset]
    after = lines[last][docstring.end_col_offset :]
    if len(node.body) == 1 and not isinstance(node, ast.Module):
        before += b"pass"
    else:
        after = re.sub(rb"^[ \t]*;[ \t]*", b"", after)
    rest = before + after
    lines[first : last + 1] = [rest] if rest.strip() else []


def _messages() -> list[dict[str, str]]:
    """The interface messages that the language packs say in English, French and Chinese.

    Left out: a message that a pack leaves in English (names, mostly), and one whose text another has in any language.
    The order is that of a hash, since neighbours in the alphabet resemble each other.
    """
    french, chinese = (_translations(package) for package in LANGUAGE_PACKS)
    messages, seen = [], set()
    for english in sorted(french.keys() & chinese.keys(), key=lambda text: hashlib.sha256(text.encode()).digest()):
        texts = {"french": french[english], "chinese": chinese[english], "english": english}
        if len(set(texts.values())) == 3 and all(texts.values()) and seen.isdisjoint(texts.values()):
            seen.update(texts.values())
            messages.append(texts)
    return messages


def _translations(package: str) -> dict[str, str]:
    """English message -> translation. A pack's catalogues say `{"context\\x04message": [singular, plural]}`."""
    translations = {}
    for path in source_files(package).values():
        for message, forms in json.loads(path.read_text(encoding="utf-8")).items():
            if message:  # the empty one is the catalogue's header
                translations.setdefault(message.split("\x04")[-1].strip(), forms[0].strip())
    return translations


def read_manifest() -> dict:
    """Domain -> packages, documents, bytes and sha256, as the tested versions gave them."""
    return json.loads(data_path("corpora/manifest.json").read_text(encoding="utf-8"))["domains"]


def check_against_manifest(digests: dict[str, str]) -> None:
    """Warn if text assembled here (domain -> sha256) is not the text that the project's numbers come from."""
    manifest = read_manifest()
    changed = [domain for domain, found in digests.items() if found != manifest[domain]["sha256"]]
    if not changed:
        return
    tested = {package["name"]: package["version"] for domain in changed for package in manifest[domain]["packages"]}
    installed = {package: installed_version(package) for domain in changed for package in PACKAGES[domain]}
    others = [f"{name} {found} (tested: {tested[name]})" for name, found in installed.items() if found != tested[name]]
    warnings.warn(
        f"{', '.join(changed)}: other text than the tested one, because of "
        f"{', '.join(others) or 'files that differ from those of the tested versions'}. Losses, samples and routing "
        "statistics of models trained on it may move, and so does the corpus hash that checkpoints record.",
        stacklevel=3,
    )
