"""The README's tree is true: it names every file of lib/, and each imports only files of lower floors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def floors() -> dict[str, int]:
    """The floor of each file of lib/, as the README draws it."""
    text = (ROOT / "README.md").read_text()
    found: dict[str, int] = {}
    floor = -1
    for line in text[text.index("lib/  ") : text.index("tests/  ")].splitlines()[1:]:
        number, name = re.fullmatch(r"  (?:floor (\d))?\s+(\w+)  .*", line).groups()
        floor = int(number) if number else floor
        found[name] = floor
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            names.add(node.module.removeprefix("lib."))
    return names


def test_every_file_is_in_the_tree() -> None:
    assert floors().keys() == {path.stem for path in (ROOT / "lib").glob("*.py")} - {"__init__"}


def test_files_import_only_from_below() -> None:
    floor = floors()
    upward = [
        f"{name} imports {other}"
        for name in floor
        for other in imported(ROOT / "lib" / f"{name}.py")
        if floor[other] >= floor[name]
    ]
    assert upward == []
