"""The real corpus: what is taken out of installed packages is what it says it is."""

import ast
import doctest
import inspect
import json
import random
import shutil
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.training import real
from minimoe.training.corpus import Corpus
from minimoe.training.documents import digest

pytestmark = pytest.mark.exact("computes nothing")
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
packs = pytest.mark.skipif(
    any(real.installed_version(package) is None for package in real.LANGUAGE_PACKS),
    reason="needs the text extra",
)


@pytest.fixture(scope="module")
def assembled():
    return real.assemble(real.available_domains())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))


def syntax_without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
    return ast.dump(tree)


# --- code and prose ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_code_is_the_module_less_its_docstrings():
    modules = list(real._modules())
    for name, source in random.Random(0).sample(modules, 60):
        code, _ = real.code_and_prose(source)
        assert ast.dump(ast.parse(code)) == syntax_without_docstrings(source), name


CUT = (  # source, code
    ('"""Doc."""\nx = 1\n', "x = 1\n"),
    ('"""Only."""\n', ""),
    ('def f():\n    """Doc."""\n', "def f():\n    pass\n"),
    ('def f(): "doc"\n', "def f(): pass\n"),
    ('def f():\n    """é 中文."""; return 1\n', "def f():\n    return 1\n"),
    ('def f(): "é"; return "中"\n', 'def f(): return "中"\n'),
    ("def f():\n    ('a '\n     'b')\n    return 1\n", "def f():\n    return 1\n"),
    ('def f():\n    """Doc."""  # why\n    return 1\n', "def f():\n      # why\n    return 1\n"),
    (
        'class A:\n    """A.\n\n    More."""\n\n    def g(self):\n        "G"\n',
        "class A:\n\n    def g(self):\n        pass\n",
    ),
    ('x = "no docstring"\n"nor this"\n', 'x = "no docstring"\n"nor this"\n'),
    ('def f():\n    b"no docstring"\n', 'def f():\n    b"no docstring"\n'),
    ('def f():\n    f"no docstring {1}"\n', 'def f():\n    f"no docstring {1}"\n'),
    (
        'async def f():\n    """Doc."""\n    def g():\n        """Doc."""\n',
        "async def f():\n    def g():\n        pass\n",
    ),
)


def test_docstrings_are_cut_to_the_character():
    for source, code in CUT:
        assert real.code_and_prose(source)[0] == code
        assert ast.dump(ast.parse(code)) == syntax_without_docstrings(source)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=1, max_size=3))
def test_any_docstring_can_be_cut(texts):
    source = "".join(f"def f{index}():\n    {text!r}\n    return {index}\n" for index, text in enumerate(texts))
    code, prose = real.code_and_prose(source)
    assert code == "".join(f"def f{index}():\n    return {index}\n" for index in range(len(texts)))
    if not any(">>>" in text or "\n" in text for text in texts):
        assert prose == "\n\n".join(inspect.cleandoc(text) for text in texts)


def test_prose_keeps_sentences_and_drops_doctests():
    source = (
        '"""One.\n\n>>> 1 + 1\n2\n\nTwo.\n"""\n'
        'class A:\n    """Three.\n\n    Four\n      indented."""\n    def f(self):\n        """Five."""\n'
    )
    assert real.code_and_prose(source)[1] == "One.\n\nTwo.\n\nThree.\n\nFour\n  indented.\n\nFive."


def test_assembled_prose_holds_no_doctest_and_code_no_docstring_of_a_module(assembled):
    parser = doctest.DocTestParser()
    assert all(not parser.get_examples(document.text) for document in assembled["prose"])
    assert all(len(document.text) > 0 for document in assembled["code"])


def test_sources_are_read_not_imported():
    script = (
        "import sys\nfrom minimoe.training import real\n"
        "real.sources_sha256(['code']); next(real._modules())\n"
        "assert not {'sympy', 'networkx'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_tests_benchmarks_and_generated_parsers_are_left_out():
    names = [name for package in real.LIBRARIES for name in real.source_files(package)]
    assert len(names) > 1000 and names.count("core/expr.py") == 1
    assert not [name for name in names if {"tests", "benchmarks", "_antlr"} & set(name.split("/"))]


# --- messages ---------------------------------------------------------------------------------------------


@packs
def test_messages_are_parallel(assembled):
    french, chinese, english = (assembled[domain] for domain in ("french", "chinese", "english"))
    assert len(french) == len(chinese) == len(english) > 2000
    assert [d.split for d in french] == [d.split for d in chinese] == [d.split for d in english]
    # independent reader: gettext, on the compiled catalogues that lie beside the JSON
    gettext = pytest.importorskip("gettext")
    for package, documents in zip(real.LANGUAGE_PACKS, (french, chinese), strict=True):
        folder = next(iter(real.source_files(package).values())).parent
        with open(folder / "notebook.mo", "rb") as file:
            catalogue = gettext.GNUTranslations(file)
        said = {e.text: d.text for e, d in zip(english, documents, strict=True)}
        both = [text for text in said if catalogue.gettext(text) != text]
        assert len(both) > 5
        agreeing = [text for text in both if catalogue.gettext(text).strip() == said[text]]
        assert len(agreeing) >= 0.9 * len(both)  # another catalogue may translate the same message otherwise


@packs
def test_languages_are_what_they_are_called(assembled):
    def share(domain, low, high):
        hits = sum(any(low <= char <= high for char in document.text) for document in assembled[domain])
        return hits / len(assembled[domain])

    assert share("chinese", "\u4e00", "\u9fff") > 0.95
    assert share("french", "à", "ü") > 0.3
    assert share("english", "à", "ü") < 0.01 and share("english", "\u4e00", "\u9fff") == 0


# --- splits, sizes, manifest ------------------------------------------------------------------------------


def test_no_text_is_in_both_splits(assembled):
    for domain, documents in assembled.items():
        texts = [document.text for document in documents]
        assert len(set(texts)) == len(texts), domain
        held_out = sum(document.split == "held_out" for document in documents)
        assert 0.07 < held_out / len(documents) < 0.13, domain


def test_the_manifest_describes_what_is_assembled(assembled):
    manifest = real.read_manifest()
    assert list(manifest) == list(real.DOMAINS)
    compared = 0
    for domain, documents in assembled.items():
        entry = manifest[domain]
        tested = {package["name"]: package["version"] for package in entry["packages"]}
        if tested == {package: real.installed_version(package) for package in real.PACKAGES[domain]}:
            assert (len(documents), digest(documents)) == (entry["documents"], entry["sha256"]), domain
            compared += 1
    assert compared >= 1  # arithmetic needs no package


def test_the_manifest_names_what_its_numbers_rest_on():
    for domain, entry in real.read_manifest().items():
        assert entry["bytes"] > 50_000 and entry["documents"] > 500 and len(entry["sha256"]) == 64
        for package in entry["packages"]:
            assert set(package) == {"name", "version", "licence", "files"} and all(package.values())
        assert bool(entry["packages"]) == (domain != "arithmetic")


def test_other_text_warns_and_names_the_version(monkeypatch, assembled):
    digests = {domain: digest(documents) for domain, documents in assembled.items()}
    digests["code"] = "0" * 64
    monkeypatch.setattr(real, "installed_version", lambda package: "0.9" if package == "sympy" else "3.6.1")
    with pytest.warns(UserWarning, match=r"code: other text.*sympy 0\.9 \(tested: 1\.14\.0\).*[Ll]osses.*hash"):
        real.check_against_manifest(digests)


@packs
def test_a_changed_package_warns_and_goes_on(monkeypatch, tmp_path):
    package, package_root, version = real.LANGUAGE_PACKS[0], real._root, real.installed_version
    root = tmp_path / "pack"
    shutil.copytree(package_root(package), root)
    monkeypatch.setattr(real, "_root", lambda asked: root if asked == package else package_root(asked))
    before = Corpus.real(domains=["french"])
    path = root / "locale/fr_FR/LC_MESSAGES/jupyterlab.json"
    messages = json.loads(path.read_text(encoding="utf-8"))
    messages["Auto Closing Brackets"] = ["Tout à fait autre chose"]
    path.write_text(json.dumps(messages), encoding="utf-8")
    monkeypatch.setattr(real, "installed_version", lambda asked: "9.9" if asked == package else version(asked))
    with pytest.warns(UserWarning, match=r"french: .*fr-FR 9\.9 \(tested: "):
        after = Corpus.real(domains=["french"])
    assert after.sha256 != before.sha256  # the cache is keyed by the files' bytes
    assert "Tout à fait autre chose" in after.documents("french") + after.documents("french", "train")


@packs
def test_the_tested_versions_do_not_warn():
    if real.installed_version(real.LANGUAGE_PACKS[0]) != real.read_manifest()["french"]["packages"][0]["version"]:
        pytest.skip("another version is installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = Corpus.real(domains=["french", "chinese"])
    assert corpus.domains == ("french", "chinese")


# --- missing packages -------------------------------------------------------------------------------------


def without_packs(package):
    return None if package in real.LANGUAGE_PACKS else "1.0"


def test_without_language_packs_the_others_remain(monkeypatch):
    monkeypatch.setattr(real, "installed_version", without_packs)
    with pytest.warns(UserWarning, match=r"french, chinese, english.*language-pack-fr-FR.*'minimoe\[text\]'"):
        assert real.available_domains() == ("code", "prose", "arithmetic")


def test_a_domain_asked_for_by_name_must_be_there(monkeypatch):
    monkeypatch.setattr(real, "installed_version", without_packs)
    with pytest.raises(ModuleNotFoundError, match=r"french: not installed.*pip install 'minimoe\[text\]'"):
        Corpus.real(domains=["arithmetic", "french"])


def test_unknown_domains_are_refused():
    for domains in (["klingon"], []):
        with pytest.raises(ValueError, match=r"wanted some of .*'code'"):
            Corpus.real(domains=domains)
