"""What the dispatchers promise, with real workers that die, hang, raise and are killed; and the time limit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dispatch_helpers import is_alive, pids_in, take, wait_for

from lib import UserError
from lib.dispatcher import ATTEMPTS, Dispatcher, TimeLimit
from tests.dispatch_workers import (
    setup,
    setup_dies,
    setup_hangs,
    setup_in_the_end,
    setup_raises,
    setup_user_error,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["processes", "ray"])
def make(request):
    """The dispatcher's class."""
    if request.param == "processes":
        yield Dispatcher
        return
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    from lib import ray_dispatcher

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token is left in the home folder
    ray_dispatcher.connect(None, cpus=12)
    yield ray_dispatcher.RayDispatcher
    ray.shutdown()


@pytest.fixture(scope="module")
def shared(make):
    """Two workers for the tests that leave them healthy; both are ready."""
    with make(setup, ("x", 1), ["cpu", "cpu"], threads_per_worker=3) as dispatcher:
        seen = set()
        while len(seen) < 2:
            dispatcher.submit(0, ("sleep", 0.05))
            dispatcher.submit(1, ("sleep", 0.05))
            seen |= {result.worker for result in take(dispatcher, 2)}
        yield dispatcher
        assert dispatcher.pending == 0


def test_every_job_has_one_result_and_workers_share_them(shared):
    for i in range(40):
        shared.submit(i, ("echo", i * i))
    assert shared.pending == 40
    results = take(shared, 40)
    assert {r.job_id: r.value for r in results} == {i: i * i for i in range(40)}
    assert {r.error for r in results} == {None}
    assert {r.worker for r in results} == {"cpu#0", "cpu#1"}
    assert shared.pending == 0
    assert shared.results() == []


def test_setup_gets_device_and_arguments_once_per_worker(shared):
    for i in range(8):
        shared.submit(i, ("where", None))
    values = [r.value for r in take(shared, 8)]
    assert {value[:2] for value in values} == {("cpu", ("x", 1))}
    pids = {value[2] for value in values}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_there_is_no_barrier(shared, tmp_path):
    start = time.monotonic()
    shared.submit("slow", ("wait", tmp_path / "go"))
    for i in range(4):
        shared.submit(i, ("sleep", 0.02))
    results = take(shared, 3)  # at most one job waits behind the slow one
    assert "slow" not in {r.job_id for r in results}
    assert all(0.02 <= r.seconds <= time.monotonic() - start for r in results)
    (tmp_path / "go").touch()
    assert "slow" in {r.job_id for r in take(shared, 2)}


def test_free_slots_are_two_a_worker(shared):
    assert shared.free_slots() == 4
    for i in range(3):
        shared.submit(i, ("sleep", 0.05))
    assert shared.free_slots() == 1
    for i in range(3, 6):
        shared.submit(i, ("sleep", 0.05))
    assert shared.free_slots() == 0
    take(shared, 6)
    assert shared.free_slots() == 4


def test_a_job_cannot_be_pending_twice(shared):
    shared.submit("a", ("echo", 1))
    with pytest.raises(ValueError, match="pending already"):
        shared.submit("a", ("echo", 2))
    assert [r.value for r in take(shared, 1)] == [1]
    shared.submit("a", ("echo", 3))
    assert [r.value for r in take(shared, 1)] == [3]


def test_results_returns_empty_at_its_timeout(shared, tmp_path):
    shared.submit("slow", ("wait", tmp_path / "go"))
    start = time.monotonic()
    assert shared.results(timeout=0.1) == []
    assert time.monotonic() - start >= 0.1
    (tmp_path / "go").touch()
    take(shared, 1)


def test_a_job_that_raises_is_an_error_with_its_traceback(shared):
    shared.submit("bad", ("raise", "boom"))
    shared.submit("exits", ("sys_exit", 3))
    shared.submit("lambda", ("unpicklable", None))
    shared.submit("good", ("echo", 1))
    results = {r.job_id: r for r in take(shared, 4)}
    assert "ValueError: boom" in results["bad"].error
    assert "do_raise" in results["bad"].error
    assert "attempt 3 of 3" in results["bad"].error
    assert "SystemExit: 3" in results["exits"].error
    assert "pickle" in results["lambda"].error
    assert (results["good"].value, results["good"].error) == (1, None)


def test_jobs_and_large_results_do_not_block_each_other(shared):
    for i in range(4):
        shared.submit(("large", i), ("large", 3_000_000))
        shared.submit(("length", i), ("length", b"x" * 32_000))
    values = {r.job_id: r.value for r in take(shared, 8)}
    assert all(len(values["large", i]) == 3_000_000 and values["length", i] == 32_000 for i in range(4))


def test_workers_get_their_threads_and_the_parent_keeps_its_own(shared):
    shared.submit("threads", ("environment", "OMP_NUM_THREADS"))
    assert take(shared, 1)[0].value == "3"
    assert os.environ.get("OMP_NUM_THREADS") != "3"


def test_a_payload_that_cannot_be_sent_is_refused_at_once(shared):
    with pytest.raises(Exception, match="pickle"):
        shared.submit("lambda", ("echo", lambda: None))
    assert shared.pending == 0


def test_a_worker_killed_in_the_middle_loses_nothing_and_counts_nothing_twice(make, tmp_path):
    with make(setup, (), ["cpu", "cpu"]) as dispatcher:
        dispatcher.submit("victim", ("count_then_die_once", str(tmp_path / "died")))
        for i in range(30):
            dispatcher.submit(i, ("sleep", 0.005))
        results = take(dispatcher, 31)
        assert sorted(map(str, (r.job_id for r in results))) == sorted(["victim", *map(str, range(30))])
        assert {r.error for r in results} == {None}
        assert dispatcher.results(timeout=0.2) == []


def test_a_worker_killed_from_outside_is_replaced(make, tmp_path):
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("before", ("where", None))
        pid = take(dispatcher, 1)[0].value[2]
        dispatcher.submit("running", ("wait", tmp_path / "go"))
        dispatcher.submit("queued", ("where", None))
        wait_for((tmp_path / "go.runs").exists)
        os.kill(pid, signal.SIGKILL)
        (tmp_path / "go").touch()
        results = {r.job_id: r for r in take(dispatcher, 2)}
        assert results["running"].error is None and results["queued"].value[2] != pid
        os.kill(results["queued"].value[2], signal.SIGKILL)  # while it has nothing to do
        dispatcher.submit("after", ("echo", 1))
        assert take(dispatcher, 1)[0].value == 1


def test_a_job_that_ends_when_its_time_is_up_has_its_result_and_no_other_is_blamed(make, tmp_path):
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("first", ("echo", 0))
        take(dispatcher, 1)  # the worker is ready
        dispatcher.submit("late", ("echo", 1))
        dispatcher.submit("next", ("wait", tmp_path / "go"))
        wait_for((tmp_path / "go.runs").exists)
        dispatcher._replace(dispatcher._workers[0], "no result within 1 s")
        assert not dispatcher._failures
        (tmp_path / "go").touch()
        assert {r.job_id: r.error for r in take(dispatcher, 2)} == {"late": None, "next": None}


def test_an_innocent_job_is_not_blamed_for_the_one_behind_it(make, monkeypatch):
    monkeypatch.setattr(make, "MAX_AHEAD", 3)
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("innocent", ("echo", 1))
        dispatcher.submit("poison", ("exit", 9))
        dispatcher.submit("bystander", ("echo", 2))
        results = {r.job_id: r for r in take(dispatcher, 3)}
        assert (results["innocent"].value, results["bystander"].value) == (1, 2)
        assert "the worker died (" in results["poison"].error and "(attempt 3 of 3)" in results["poison"].error


def test_a_job_that_always_kills_its_worker_is_given_up_and_hurts_no_other(make):
    """One exits, one is killed, which is all that a process sees of the kernel's out-of-memory killer."""
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("exits", ("exit", 9))
        dispatcher.submit("killed", ("killed", None))
        for i in range(3):
            dispatcher.submit(i, ("echo", i))
        results = {r.job_id: r for r in take(dispatcher, 5)}
        for name, how in (
            ("exits", "exit code 9"),
            ("killed", "killed by SIGKILL, probably for want of memory: try"),
        ):
            assert "the worker died (" in results[name].error and "(attempt 3 of 3)" in results[name].error
            assert how in results[name].error or make is not Dispatcher
        assert [results[i].value for i in range(3)] == [0, 1, 2]


def test_deaths_and_exceptions_count_together(make, tmp_path):
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("flaky", ("fail_until", str(tmp_path / "count")))
        result = take(dispatcher, 1)[0]
        assert (result.value, result.error) == (ATTEMPTS, None)


def test_a_job_over_its_time_limit_is_given_up_and_the_others_go_on(make, tmp_path):
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("warm", ("echo", 0))
        take(dispatcher, 1)  # the limit counts from a ready worker on, but keep the test's own clock simple
        dispatcher.time_limit = 0.3
        dispatcher.submit("hung", ("pid_then_sleep", str(tmp_path)))
        dispatcher.submit("next", ("echo", 1))
        results = {r.job_id: r for r in take(dispatcher, 2)}
        assert "no result within 0.3 s (attempt 3 of 3)" in results["hung"].error
        assert results["next"].value == 1
        assert len(pids_in(tmp_path)) <= ATTEMPTS  # one that was slow to begin left none
        wait_for(lambda: not any(map(is_alive, pids_in(tmp_path))), seconds=5)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (setup_raises, r"RuntimeError: no such device cpu \(.*dispatch_workers.py, line \d+\)$"),
        (setup_user_error, "^last.pt: not a checkpoint"),
        (setup_dies, "worker cpu#0 failed 3 times in a row before it was ready: "),
        (setup_hangs, "worker cpu#0 failed 3 times in a row before it was ready: not ready within 0.5 s"),
    ],
)
def test_workers_that_cannot_be_set_up_are_a_clear_error(make, broken, message):
    limit = 0.5 if broken is setup_hangs else None
    with make(broken, (), ["cpu"], setup_limit=limit) as dispatcher:
        dispatcher.submit("a", ("echo", 1))
        with pytest.raises(UserError, match=message) as caught:
            take(dispatcher, 1)
        assert "\n" not in str(caught.value)


def test_a_worker_that_hangs_or_fails_in_its_setup_is_replaced(make, tmp_path):
    """The first one hangs, the second one raises; meanwhile the other worker goes on."""
    with make(setup_in_the_end, (str(tmp_path),), ["cpu"], setup_limit=3) as dispatcher:
        dispatcher.submit("a", ("echo", 1))
        assert take(dispatcher, 1)[0].value == 1
        assert len(pids_in(tmp_path)) == 3
        wait_for(lambda: sum(map(is_alive, pids_in(tmp_path))) == 1, seconds=5)


def test_no_worker_is_left_where_not_all_can_be_started(monkeypatch):
    """They ignore the SIGTERM that ends children at an interpreter's exit, which then would wait for ever."""
    start = Dispatcher._start

    def start_one(self, slot):
        if slot == 1:
            raise OSError("Too many open files")
        return start(self, slot)

    monkeypatch.setattr(Dispatcher, "_start", start_one)
    before = set(multiprocessing.active_children())
    with pytest.raises(OSError, match="Too many open files"):
        Dispatcher(setup, (), ["cpu", "cpu"])
    assert set(multiprocessing.active_children()) == before


def test_close_ends_hung_and_busy_workers_in_seconds(make, tmp_path):
    dispatcher = make(setup, (), ["cpu", "cpu"])
    dispatcher.submit("hung", ("pid_then_sleep", str(tmp_path)))
    dispatcher.submit("busy", ("pid_then_compute", str(tmp_path)))
    pids = wait_for(lambda: not dispatcher.results(timeout=0.02) and len(pids_in(tmp_path)) == 2 and pids_in(tmp_path))
    start = time.monotonic()
    dispatcher.close()
    wait_for(lambda: not any(map(is_alive, pids)), seconds=5)
    assert time.monotonic() - start < 8
    dispatcher.close()
    assert dispatcher.results() == []


def test_memory_that_cannot_be_had_fails_the_job_and_not_the_worker(make):
    """A limit on the worker's address space, so that an allocation really fails."""
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("greedy", ("allocate", 1 << 30))
        dispatcher.submit("modest", ("allocate", 1 << 10))
        results = {r.job_id: r for r in take(dispatcher, 2)}
        assert "MemoryError" in results["greedy"].error and "(attempt 3 of 3)" in results["greedy"].error
        assert results["modest"].value == 1 << 10


def test_ctrl_c_and_sigterm_are_left_to_the_parent():
    """While the worker starts, and while it runs a job."""
    before = set(multiprocessing.active_children())
    with Dispatcher(setup, (), ["cpu"]) as dispatcher:
        (process,) = set(multiprocessing.active_children()) - before
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
        dispatcher.submit("where", ("where", None))
        assert take(dispatcher, 1)[0].value[2] == process.pid
        dispatcher.submit("interrupt", ("interrupt", None))
        assert take(dispatcher, 1)[0].value == "alive"


def test_results_sent_before_death_are_taken_from_the_pipe(monkeypatch):
    """The parent does not look until the worker, which finished one job, is dead: that job is not run again."""
    monkeypatch.setattr(Dispatcher, "MAX_AHEAD", 3)
    with Dispatcher(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("pid", ("where", None))
        pid = take(dispatcher, 1)[0].value[2]
        dispatcher.submit("first", ("where", None))
        dispatcher.submit("second", ("exit", 1))
        wait_for(lambda: not is_alive(pid))
        results = take(dispatcher, 2)
        assert [r.job_id for r in results] == ["first", "second"]
        assert results[0].value[2] == pid


PARENT = """
import multiprocessing
import sys
from lib import dispatcher
from lib.dispatcher import Dispatcher
from tests.dispatch_workers import setup

if __name__ == "__main__":
    dispatcher.CONTEXT = multiprocessing.get_context(sys.argv[2])
    dispatcher = Dispatcher(setup, (), ["cpu"] * 3)
    dispatcher.submit("hung", ("pid_then_sleep", sys.argv[1]))
    dispatcher.submit("busy", ("pid_then_compute", sys.argv[1]))
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    dispatcher.results()
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_workers_of_a_killed_parent_end_by_themselves(tmp_path, method):
    """One hangs, one computes, one is idle."""
    (tmp_path / "pids").mkdir()
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "parent.py", tmp_path / "pids", method]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(pids_in(tmp_path / "pids")) == 2)
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 3
        assert all(map(is_alive, children))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not any(map(is_alive, children)), seconds=5)
    finally:
        parent.kill()
        parent.communicate()


def test_the_limit_follows_the_running_median():
    limit, rng, seen = TimeLimit(factor=10, floor=0, least=3), random.Random(0), []
    for i in range(200):
        seen.append(rng.expovariate(1))
        limit.add(seen[-1])
        assert limit.seconds is None if i < 2 else limit.seconds == 10 * statistics.median_high(seen)


def test_there_is_a_floor_and_another_limit_before_some_jobs_ended():
    limit = TimeLimit(factor=10, floor=60, least=4, first=600)
    for _ in range(3):
        limit.add(1.0)
    assert limit.seconds == 600 and TimeLimit(first=0).seconds is TimeLimit().seconds is None
    limit.add(1.0)
    assert limit.seconds == 60
    for _ in range(6):
        limit.add(20.0)
    assert limit.seconds == 200


def test_a_few_slow_jobs_do_not_move_it():
    limit = TimeLimit(floor=1.0)
    for seconds in [*[1.0] * 20, *[1000.0] * 9]:
        limit.add(seconds)
    assert limit.seconds == pytest.approx(10)


def test_a_factor_of_0_is_no_limit():
    limit = TimeLimit(factor=0, first=600)
    assert limit.seconds is None
    for _ in range(20):
        limit.add(1.0)
    assert limit.seconds is None
