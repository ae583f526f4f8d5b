"""Checkpoints: always whole, data only, random states restored, one line for an unreadable file; locks; revisions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import UserError, checkpoint
from lib.checkpoint import code_revision, lock, lock_folder, remove_leftovers


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(tmp_path, mmap):
    path = tmp_path / "new" / "folder" / "last.pt"
    payload = {"epoch": 3, "lr": 0.1, "ema": None, "names": ["a", "b"], "model": {"w": torch.arange(6).view(2, 3)}}
    checkpoint.save(path, payload)
    loaded = checkpoint.read(path, mmap)
    assert torch.equal(loaded["model"].pop("w"), payload["model"].pop("w"))
    assert loaded == {"format": "checkpoint/1", **payload}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("odd")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def failing(_payload, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
        checkpoint.save(path, {"epoch": 2})
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    monkeypatch.undo()
    assert checkpoint.read(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_has_its_name_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    seen, save = [], torch.save

    def watching(payload, file):
        save(payload, file)
        seen.append(checkpoint.read(path)["epoch"])

    monkeypatch.setattr(torch, "save", watching)
    checkpoint.save(path, {"epoch": 2})
    assert seen == [1]
    assert checkpoint.read(path)["epoch"] == 2


def test_a_process_that_has_the_old_file_mapped_keeps_it(tmp_path):
    """The new one is another file that takes the name; written over, the old bytes would change under their readers."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"w": torch.zeros(1000)})
    mapped = checkpoint.read(path, mmap=True)["w"]
    checkpoint.save(path, {"w": torch.ones(1000)})
    assert not mapped.any()
    assert checkpoint.read(path)["w"].all()


@pytest.fixture
def small_disk():
    """A limit on the file size stands in for a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_is_one_line(tmp_path, small_disk):
    """torch hides the reason behind a RuntimeError of its own."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises(UserError) as caught:
        checkpoint.save(path, {"w": torch.zeros(10**6)})
    assert str(caught.value) == f"{path}: cannot be written (File too large)"
    assert checkpoint.read(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [lambda p: checkpoint.save(p, {}), lambda p: checkpoint.write_text(p, "x")])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, write):
    (tmp_path / "file").write_text("here")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "last.pt")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "deeper" / "last.pt")


def test_write_text_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "best.json"
    for text in ("one\n", "zwölf\n"):
        checkpoint.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


class Trap:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trap-was-sprung"),)


def test_objects_are_refused_and_their_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    torch.save({"format": checkpoint.FORMAT, "x": Trap()}, path)
    text = refusal(path)
    assert "objects other than tensors and plain data" in text
    assert "weights_only" not in text  # torch's own message advises to switch the safety off
    assert not Path("trap-was-sprung").exists()


def test_a_missing_file_and_a_folder(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "none.pt")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_cut_and_damaged_files(tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    checkpoint.save(good, {"w": torch.zeros(50)})
    whole, rng = good.read_bytes(), random.Random(0)
    contents = [b"", b"hello there", b"{}", *(whole[: rng.randrange(len(whole))] for _ in range(20))]
    contents += [rng.randbytes(rng.randrange(1, 60)) for _ in range(200)]
    for content in contents:
        bad.write_bytes(content)
        assert "not a readable checkpoint" in refusal(bad)


@pytest.mark.parametrize(
    ("payload", "found"),
    [({"model": {}}, "found None"), ([1], "found 'list'"), ({"format": "checkpoint/9"}, "found 'checkpoint/9'")],
)
def test_another_format_is_named(tmp_path, payload, found):
    torch.save(payload, tmp_path / "other.pt")
    text = refusal(tmp_path / "other.pt")
    assert "expected a checkpoint of format 'checkpoint/1'" in text
    assert found in text


def draws() -> list:
    """From every generator; an odd number of Gaussians, whose second half Python and NumPy keep for later."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.sample(range(100), 5),
        np.random.rand(3).tolist(),
        float(np.random.standard_normal()),
        torch.rand(3).tolist(),
        torch.randperm(7).tolist(),
    ]


def test_random_states_round_trip_through_a_file(tmp_path):
    draws()
    checkpoint.save(tmp_path / "last.pt", {"random": checkpoint.random_states()})
    expected = [draws(), draws()]
    assert expected[0] != expected[1]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    checkpoint.restore_random_states(checkpoint.read(tmp_path / "last.pt")["random"])
    assert [draws(), draws()] == expected


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 7])
def test_sha256(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert checkpoint.sha256(tmp_path / "file") == expected


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on elsewhere", file=file, end="", flush=True)
print("ready", flush=True)
input()
"""


@contextlib.contextmanager
def other_process_locks(path: Path) -> Iterator[None]:
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdin.close()


def test_one_has_the_lock_until_it_ends(tmp_path):
    path = tmp_path / "file"
    with path.open("w") as file:
        with other_process_locks(path), pytest.raises(BlockingIOError):
            lock(file, wait=False)
        lock(file, wait=True)


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


def test_a_copy_stays_when_its_original_is_replaced(tmp_path):
    last, good = tmp_path / "last.pt", tmp_path / "last_good.pt"
    for epoch in (1, 2):
        checkpoint.save(last, {"epoch": epoch})
        checkpoint.copy(last, good)
    checkpoint.save(last, {"epoch": 3})
    assert [checkpoint.read(path)["epoch"] for path in (last, good)] == [3, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last_good.pt"}


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    """The others are told which one; afterwards nothing is left of the lock, nor of a folder that stayed empty."""
    folder = tmp_path / "runs" / "new"
    with lock_folder(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not folder.exists()
    folder.mkdir()
    with (
        other_process_locks(folder / ".lock"),
        pytest.raises(UserError, match="new: in use by process 7 on elsewhere; wait for it to end"),
        lock_folder(folder),
    ):
        pass
    assert (folder / ".lock").exists()
    with lock_folder(folder):
        (folder / "last.pt").write_text("")
    assert [path.name for path in folder.iterdir()] == ["last.pt"]
    (folder / ".lock").write_text("process 1 on a machine that was switched off")
    with lock_folder(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_that_its_last_holder_removes_meanwhile_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "lock", lambda file, wait: Path(file.name).unlink())
    with pytest.raises(UserError, match="in use by another process"), lock_folder(tmp_path / "new"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", refuse)
    with lock_folder(tmp_path):
        assert "this file system has no locks; start no second process" in capsys.readouterr().out


def test_an_empty_folder_of_the_user_stays_and_a_new_one_goes(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "new"):
        with lock_folder(folder):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_killed_processes_left_over_goes_and_nothing_else(tmp_path):
    others = (".part", ".hidden.part", "notes.part", "last.pt")
    for name in (f".last.pt.{os.getpid()}.part", f".x.{10**30}.part", *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others}
