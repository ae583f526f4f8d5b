"""Every bench can be started anywhere, and docs/ describes the benches and flags that are there."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("supernet_train.py", "async_search.py", "final_train.py")
BENCHES = sorted(path.name for path in (ROOT / "bench").glob("*.py") if path.name != "common.py")


def help_of(path, tmp_path, monkeypatch, capsys):
    """What --help prints, in a folder elsewhere; in this process, which has the large imports already."""
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_answers_help(name, tmp_path, monkeypatch, capsys):
    assert f"python bench/{name}" in help_of(f"bench/{name}", tmp_path, monkeypatch, capsys)


def test_the_figure_of_every_bench_is_in_docs():
    docs = "".join((ROOT / "docs" / name).read_text() for name in ("measured.md", "performance.md"))
    assert set(re.findall(r"python bench/(\w+\.py)", docs)) == set(BENCHES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_described(script, tmp_path, monkeypatch, capsys):
    shown = re.findall(r"^  (--[a-z0-9-]+)", help_of(script, tmp_path, monkeypatch, capsys), re.MULTILINE)
    text = (ROOT / "docs/flags.md").read_text()
    tables = text.split("## supernet_train.py")[0] + text.split(f"## {script}")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(--[a-z0-9-]+)", tables, re.MULTILINE)) == set(shown)


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md", "docs/performance.md", "docs/flags.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert link.startswith("http") or (path.parent / link).exists(), link
