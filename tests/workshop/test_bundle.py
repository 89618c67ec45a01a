"""Modules as one script: order, names, and what is refused."""

import re

import pytest

from workshop.bundle import bundle
from workshop.live import LIVE

pytestmark = pytest.mark.exact("computes nothing")


def modules(folder, **sources):
    for name, source in sources.items():
        (folder / f"{name}.js").write_text(source, encoding="utf-8")
    return folder / "entry.js"


def test_each_module_comes_once_and_before_those_that_need_it(tmp_path):
    entry = modules(
        tmp_path,
        entry='import { b } from "./b.js";\nimport { c } from "./c.js";\n\nb(c);\n',
        b='import { c } from "./c.js";\n\n// Says why.\nexport function b() {\n  return c;\n}\n',
        c="export const c = 1;\n",
    )
    script = bundle(entry)
    places = [script.index(part) for part in ("const c = 1", "// Says why.\nfunction b()", "b(c);")]
    assert places == sorted(places) and script.count("const c = 1") == 1
    assert "import" not in script and "export" not in script


def test_one_name_in_two_modules_and_unusual_imports_are_refused(tmp_path):
    b = "function twice() {}\nexport const b = 1;\n"
    with pytest.raises(ValueError, match=r"entry\.js declares twice, and so does b\.js"):
        bundle(modules(tmp_path, entry='import { b } from "./b.js";\nfunction twice() {}\n', b=b))
    with pytest.raises(ValueError, match=r"entry\.js: 'import b from"):
        bundle(modules(tmp_path, entry='import b from "./b.js";\n'))
    with pytest.raises(ValueError, match=r"entry\.js: 'export default"):
        bundle(modules(tmp_path, entry="export default 1;\n"))


def test_every_module_of_the_pages_is_used():
    scripts = "".join(bundle(LIVE / name) for name in ("explore.js", "claim.js"))
    assert [path.name for path in LIVE.glob("*.js") if f"// ---- {path.name}\n" not in scripts] == []


def test_what_a_module_imports_is_used_there_and_exported_elsewhere():
    for path in LIVE.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        for names, other in re.findall(r'^import \{ ([^}]+) \} from "\./([\w.]+)";', source, re.MULTILINE):
            exported = (LIVE / other).read_text(encoding="utf-8")
            for name in names.split(", "):
                assert re.search(rf"^export (async )?(const|function\*?|class) {name}\b", exported, re.MULTILINE), name
                assert len(re.findall(rf"\b{name}\b", source)) > 1, f"{path.name} imports {name} and does not use it"
