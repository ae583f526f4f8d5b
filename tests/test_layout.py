"""The house stays one that can be seen at a glance: no import circle, few files, and a README that names them all."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "lib").glob("*.py"))


def imported(path: Path) -> set[str]:
    """The files of lib/ that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            names.add(node.module.removeprefix("lib."))
    return names


def test_no_two_files_import_each_other_directly_or_through_others():
    graph = {path.stem: imported(path) for path in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_house_stays_small():
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES}
    # Ratchets: lower them when something goes. The aim is 10,800 lines.
    assert len(FILES) <= 46 and sum(lengths.values()) <= 12_842
    assert max(lengths.values()) <= 450, max(lengths, key=lengths.get)


def test_the_readme_names_every_file():
    text = (ROOT / "README.md").read_text()
    families = text[text.index("lib/           flat") : text.index("tests/         one file")]
    named = set(re.findall(r"\w+", families))
    assert {path.stem for path in FILES} - {"__init__"} <= named
