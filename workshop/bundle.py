"""JavaScript modules as one classic script, which a browser also runs from a file.

    bundle(Path("explore.js"))    the module with all that it imports, each once, dependencies first

The modules share one scope in the end: a name that two of them use is refused, and so is what `bundle` does not know.
"""

from __future__ import annotations

import re
from pathlib import Path

_IMPORT = re.compile(r'^import \{[^}]+\} from "\./([\w.]+)";\n', re.MULTILINE)
_DECLARED = re.compile(r"^(?:export )?(?:async )?(?:const|let|function\*?|class) (\w+)", re.MULTILINE)
_LEFT_OVER = re.compile(r"^(?:import|export)\b.*$", re.MULTILINE)


def bundle(entry: Path) -> str:
    """The script of `entry`, readable and with its comments.

    Raises ValueError: two modules declare one name, or a line imports or exports in another way than the usual one.
    """
    parts, owners = [], {}
    for path in _in_order(entry, []):
        source = path.read_text(encoding="utf-8")
        for name in _DECLARED.findall(source):
            if owners.setdefault(name, path.name) != path.name:
                raise ValueError(f"{path.name} declares {name}, and so does {owners[name]}: wanted one name once")
        body = re.sub(r"^export (?=async|const|let|function|class)", "", _IMPORT.sub("", source), flags=re.MULTILINE)
        if left := _LEFT_OVER.search(body):
            raise ValueError(f'{path.name}: {left[0]!r}, wanted import {{ ... }} from "./file.js" or export function')
        parts.append(f"// ---- {path.name}\n\n{body.strip()}\n")
    return "(() => {\n" + "\n".join(parts) + "})();\n"


def _in_order(path: Path, found: list[Path]) -> list[Path]:
    """`found`, with the modules that `path` needs and then itself added to it."""
    for name in _IMPORT.findall(path.read_text(encoding="utf-8")):
        if path.with_name(name) not in found:
            _in_order(path.with_name(name), found)
    found.append(path)
    return found
