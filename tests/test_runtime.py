"""Devices, workers, seeds, signals and exit statuses."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from dispatch_helpers import is_alive, start_a_child, wait_for
from tiny_runs import _SERVER

from lib import UserError
from lib.cli import CONFIGS
from lib.config_io import read_config
from lib.dispatcher import set_up
from lib.distributed import PeerLost
from lib.log import progress, say
from lib.runtime import (
    Stopped,
    StopRequest,
    pick_device,
    pick_workers,
    run,
    seed_everything,
)
from lib.scoring import scoring_worker


class Fork:
    """A forked child that runs `main`, with pipes from its stdout and stderr. Forking saves the imports."""

    def __init__(self, main: Callable[[], None]):
        (out, child_out), (err, child_err) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(child_out, 1)
            os.dup2(child_err, 2)
            os.closerange(3, 100)  # or the child would be a reader of its own pipes
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            code = 1
            try:
                main()
                code = 0
            except SystemExit as error:
                code = error.code
            finally:
                os._exit(code)
        os.close(child_out)
        os.close(child_err)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def forked(main: Callable[[], None]) -> Iterator[Fork]:
    process = Fork(main)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def gpus(monkeypatch):
    """A function that sets how many GPUs this machine has; its `current` lists what became the current one."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    have.current = []
    monkeypatch.setattr(torch.cuda, "set_device", have.current.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    return have


UNKNOWN = ["", "gpu", "mps", "meta", "cuda:x", "cuda:", "cuda:-1", "-1", "2", "cuda:2", "\u00b2", "0,,1", "0,gpu"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_device_names_those_that_are_there(gpus, tiny_config, name):
    for count, there in ((2, "cpu, cuda:0, cuda:1"), (0, "cpu")):
        gpus(count)
        for flag, pick in (("--device", pick_device), ("--gpus", lambda text: pick_workers(text, tiny_config()))):
            with pytest.raises(UserError, match=f"^{flag} {name}: '.*' is not among this machine's devices: {there}$"):
                pick(name)
    assert not gpus.current


def test_spellings_of_a_device(gpus, tiny_config):
    gpus(0)
    assert pick_device("auto") == torch.device("cpu")
    gpus(2)
    spellings = {"cpu": "cpu", "auto": "cuda:0", "cuda": "cuda:0", "0": "cuda:0", "1": "cuda:1", " cuda:1": "cuda:1"}
    for name, device in spellings.items():
        assert pick_device(name) == torch.device(device)
        if name != "auto":
            assert pick_workers(name, tiny_config())[0] == [device]
    for names in ("0,1", "cuda:0,cuda:1", "cuda, 1", "0,cuda:1"):
        assert pick_workers(names, tiny_config())[0] == ["cuda:0", "cuda:1"]
        with pytest.raises(UserError, match=f"--device {names}: expected one device; torchrun"):
            pick_device(names)


def test_the_device_becomes_the_current_one_and_no_other(gpus):
    gpus(2)
    pick_device("cpu")
    assert not gpus.current
    for name in ("1", "cuda:1"):
        pick_device(name)
    assert gpus.current == ["cuda:1"] * 2


def test_a_searchs_worker_is_on_its_own_device(gpus, monkeypatch):
    """Whatever starts it, a process or Ray: the device is the current one before anything is loaded."""
    gpus(2)
    monkeypatch.setattr("lib.scoring.load_supernet", lambda *_, **__: 1 / 0)
    function, message = set_up(scoring_worker, "cuda:1", ("last.pt", "hash", "images.pt", {}))
    assert function is None and b"ZeroDivisionError" in message and gpus.current == ["cuda:1"]


def test_workers_of_one_machine(gpus, tiny_config):
    def pick(gpus, **search):
        return pick_workers(gpus, tiny_config(**{f"search__{key}": value for key, value in search.items()}))

    gpus(0)
    assert pick("auto", parallelism=0) == (["cpu"] * 8, 1)
    assert pick("auto", parallelism=3) == pick("auto", parallelism=3, gpu_ids=[0, 1]) == (["cpu"] * 3, 4)
    assert pick("cpu,cpu", parallelism=9) == (["cpu"] * 2, 6)
    for count in (1, 2, 8):
        gpus(count)
        assert pick("auto", parallelism=0) == ([f"cuda:{i}" for i in range(count)], 12 // count)
    gpus(2)
    assert pick("auto", gpu_ids=[1, 5]) == (["cuda:1"], 12)
    assert pick("auto", gpu_ids=[7]) == (["cuda:0", "cuda:1"], 6)
    assert pick("auto", parallelism=3) == (["cuda:0", "cuda:1", "cuda:0"], 4)
    assert pick("auto", parallelism=2, gpu_ids=[1]) == (["cuda:1", "cuda:1"], 6)
    assert pick("0,0", parallelism=9) == (["cuda:0", "cuda:0"], 6)
    assert pick("1,cpu") == (["cuda:1", "cpu"], 6)
    assert pick(",".join(["0"] * 20)) == (["cuda:0"] * 20, 1)


def test_a_reference_configuration_has_a_worker_on_each_gpu(gpus):
    for path in CONFIGS.glob("*.yaml"):
        for count in (1, 8):
            gpus(count)
            devices, _ = pick_workers("auto", read_config(path, []))
            assert devices == [f"cuda:{i}" for i in range(count)], path


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_a_seed_fixes_every_generator(seed):
    draws = []
    for s in (seed, seed, seed + 1):
        seed_everything(s)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_the_first_signal_asks_and_the_handlers_come_back():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert {n: signal.getsignal(n) for n in before} == before


def work(leave: bool) -> None:
    """A loop of at most 30 s, which a signal ends if it is to `leave`."""
    with StopRequest() as stop:
        print("ready")
        for _ in range(3000):
            time.sleep(0.01)
            if stop.requested and leave:
                break
    print("saved")


def test_one_signal_lets_the_loop_save():
    with forked(lambda: work(leave=True)) as process:
        process.stdout.readline()
        process.signal(signal.SIGINT)
        assert process.wait() == 0
        assert process.stdout.read() == "saved\n" and "once more to stop at once" in process.stderr.read()


def test_the_second_signal_ends_it():
    with forked(lambda: work(leave=False)) as process:
        process.stdout.readline()
        process.signal(signal.SIGINT)
        assert process.stderr.readline() == "\n" and "Stopping" in process.stderr.readline()
        process.signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT and process.stdout.read() == ""


def test_a_batch_systems_second_sigterm_at_once_is_an_echo():
    def twice() -> None:
        with StopRequest():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        print("saved")

    with forked(twice) as process:
        assert process.wait() == 0 and process.stdout.read() == "saved\n"


def test_a_log_whose_reader_is_gone_does_not_keep_the_loop_from_saving(tmp_path):
    def main() -> None:
        with StopRequest() as stop:
            print("ready")
            for _ in progress(range(3000), "work"):
                say("a line")
                time.sleep(0.01)
                if stop.requested:
                    break
        (tmp_path / "saved").touch()

    with forked(lambda: run(main)) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        process.signal(signal.SIGINT)
        process.wait()
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("within", [True, False])
def test_a_lost_process_is_reported_whatever_the_launcher_sends_meanwhile(within, monkeypatch):
    """SIGTERM arrives between the error and its report, and again while the report is written."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    message = PeerLost.__str__
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(PeerLost, "__str__", lambda self: terminate() or message(self))
    monkeypatch.setattr("lib.distributed.first_to_report", lambda: True)

    def main() -> None:
        with contextlib.ExitStack() as stack:
            if within:
                stack.callback(terminate)
                stack.enter_context(StopRequest())
            raise PeerLost("gone")

    with forked(lambda: run(main)) as process:
        assert process.wait() == 1
        error = process.stderr.read()
    assert error.startswith("\nerror: gone") and error.count("\n") == 2


@pytest.mark.parametrize(
    ("error", "status", "message"), [(UserError("one line"), 2, "error: one line\n"), (KeyboardInterrupt(), 130, "")]
)
def test_a_script_ends_with_a_status_and_a_line(capsys, error, status, message):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_what_the_machine_refuses_is_one_line_that_names_the_file():
    with forked(lambda: run(lambda: Path("x" * 300).exists())) as process:
        assert process.wait() == 2
        assert re.fullmatch("error: x{300}: File name too long\n", process.stderr.read())


def test_what_a_terminal_cannot_show_is_escaped():
    def main() -> None:
        sys.stdout.reconfigure(encoding="ascii")  # as with PYTHONIOENCODING=ascii
        run(lambda: print("класс \udcff"))

    with forked(main) as process:
        assert process.wait() == 0
        assert process.stdout.read() == "\\u043a\\u043b\\u0430\\u0441\\u0441 \\udcff\n"


def test_closed_streams_and_a_full_disk_are_no_reason_to_stop():
    def main() -> None:
        sys.stdout = None  # as with >&-
        run(lambda: say("a line"))

    def full() -> None:
        sys.stdout = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
        run(lambda: say("a line"))

    for target, note in ((main, ""), (full, "note: what follows is not shown: No space left on device\n")):
        with forked(target) as process:
            assert process.wait() == 0 and process.stderr.read() == note


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_where_there_is_nothing_to_save_leaves_no_temporary_files(tmp_path, number):
    def work() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
            time.sleep(9)

    def script() -> None:
        signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP, and so would what it starts
        run(work)

    with forked(script) as process:
        assert process.wait() == 143 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (MemoryError(), "out of memory: a smaller batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "out of memory: a smaller batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."), "out of memory"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left"), "--shm-size=2g, or"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\n ...\nunable to mmap 9 bytes </torch_1>"
            ),
            "shm",
        ),
        (
            RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)"),
            "ulimit -n 65536, or",
        ),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "a loader process has ended, for want of mem",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line_with_the_remedy(capsys, error, remedy):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and remedy in printed and printed.count("\n") == 1


@pytest.fixture
def heard_hangup():
    """SIGHUP as in a terminal: tests that were started by nohup have it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_hangup")
def test_a_stop_has_the_status_of_its_signal(capsys):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGUSR1, 143)):

        def main(number=number) -> None:
            with StopRequest() as stop:
                os.kill(os.getpid(), number)
                assert stop.requested and stop.number == number
            raise Stopped("everything is saved", stop.number)

        with pytest.raises(SystemExit) as caught:
            run(main)
        assert caught.value.code == status
        assert capsys.readouterr().out == "stopped; everything is saved\n"


def test_a_batch_systems_warning_is_no_first_signal():
    """Slurm sends SIGUSR1 and later SIGTERM: that is not a second request, which would end the save."""

    def main() -> None:
        with StopRequest():
            for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        print("saved")

    with forked(main) as process:
        assert process.wait() == 0 and process.stdout.read() == "saved\n"


def test_under_nohup_a_closed_terminal_is_no_signal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_loader_process_ends_with_its_parent_however_it_was_started(tmp_path, method):
    path = tmp_path / "pid"
    parent = _SERVER.Process(target=start_a_child, args=(method, str(path)))
    parent.start()
    wait_for(lambda: path.exists() and path.read_text())
    parent.kill()
    parent.join()
    wait_for(lambda: not is_alive(int(path.read_text())), seconds=20)
