"""Results name the commit that made them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lib.checkpoint import code_revision


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_commit_and_whether_it_is_all(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "v1")  # a tag is not what is asked for
    assert code_revision(checkout) == commit and len(commit) == 40
    (checkout / "run.log").write_text("untracked files are no change")
    assert code_revision(checkout) == commit
    (checkout / "code.py").write_text("2")
    assert code_revision(checkout) == f"{commit}-dirty"


def test_a_copy_within_another_checkout_has_none(checkout, monkeypatch):
    (checkout / "copy").mkdir()
    assert code_revision(checkout / "copy") is None
    monkeypatch.setenv("PATH", "")
    assert code_revision(checkout) is None  # no git here
