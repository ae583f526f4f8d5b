"""What the dispatchers promise, each with real workers that really die, hang, raise and are killed."""

from __future__ import annotations

import os
import signal
import time

import pytest
from dispatch_helpers import is_alive, pids_in, take, wait_for
from ray_cluster import cluster

from lib.dispatcher import ATTEMPTS, Dispatcher, TimeLimit, WorkerError
from lib.errors import UserError
from tests.dispatch_workers import setup, setup_dies, setup_raises, setup_user_error


@pytest.fixture(scope="module", params=["processes", "ray"])
def make(request):
    """The dispatcher's class."""
    if request.param == "processes":
        yield Dispatcher
    else:
        with cluster(cpus=12) as ray_dispatcher:
            yield ray_dispatcher.RayDispatcher


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


def test_large_payloads_and_results_do_not_block_each_other(shared):
    for i in range(4):
        shared.submit(("large", i), ("large", 3_000_000))
        shared.submit(("length", i), ("length", b"x" * 3_000_000))
    values = {r.job_id: r.value for r in take(shared, 8)}
    assert all(len(values["large", i]) == values["length", i] == 3_000_000 for i in range(4))


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
        for name in ("first", "second"):
            dispatcher.submit("running", ("wait", tmp_path / name))
            dispatcher.submit("queued", ("where", None))
            wait_for((tmp_path / f"{name}.runs").exists)
            os.kill(pid, signal.SIGKILL)
            (tmp_path / name).touch()
            results = {r.job_id: r for r in take(dispatcher, 2)}
            assert results["running"].error is None and results["queued"].value[2] != pid
            pid = results["queued"].value[2]
        os.kill(pid, signal.SIGKILL)  # while it has nothing to do
        dispatcher.submit("after", ("echo", 1))
        assert take(dispatcher, 1)[0].value == 1


def test_an_innocent_job_is_not_blamed_for_the_one_behind_it(make):
    with make(setup, (), ["cpu"], max_ahead=3) as dispatcher:
        dispatcher.submit("innocent", ("echo", 1))
        dispatcher.submit("poison", ("exit", 9))
        dispatcher.submit("bystander", ("echo", 2))
        results = {r.job_id: r for r in take(dispatcher, 3)}
        assert (results["innocent"].value, results["bystander"].value) == (1, 2)
        assert "the worker died (" in results["poison"].error and "(attempt 3 of 3)" in results["poison"].error


def test_a_job_that_always_kills_its_worker_is_given_up_and_hurts_no_other(make):
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("poison", ("exit", 9))
        for i in range(3):
            dispatcher.submit(i, ("echo", i))
        results = {r.job_id: r for r in take(dispatcher, 4)}
        assert "the worker died (" in results["poison"].error and "(attempt 3 of 3)" in results["poison"].error
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
    ("broken", "error", "message"),
    [
        (setup_raises, WorkerError, "(?s)worker cpu#0 could not be set up.*setup_raises.*no such device cpu"),
        (setup_user_error, UserError, "^last.pt: not a checkpoint"),
        (setup_dies, UserError, "worker cpu#0 died 3 times in a row before it was ready"),
    ],
)
def test_a_worker_that_cannot_be_set_up_is_a_clear_error(make, broken, error, message):
    with make(broken, (), ["cpu"]) as dispatcher:
        dispatcher.submit("a", ("echo", 1))
        with pytest.raises(error, match=message):
            take(dispatcher, 1)


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


def test_a_worker_that_the_system_kills_for_its_memory_is_replaced(make):
    """SIGKILL in the middle of a job is all that a process sees of the out-of-memory killer."""
    with make(setup, (), ["cpu"]) as dispatcher:
        dispatcher.submit("greedy", ("killed", None))
        dispatcher.submit("modest", ("echo", 1))
        results = {r.job_id: r for r in take(dispatcher, 2)}
        assert "the worker died (" in results["greedy"].error and "(attempt 3 of 3)" in results["greedy"].error
        assert results["modest"].value == 1


def test_a_hung_job_is_stopped_by_the_median_of_those_that_ended(make, tmp_path):
    limit = TimeLimit(factor=4, floor=1.0, least=4)
    with make(setup, (), ["cpu"]) as dispatcher:
        for i in range(4):
            dispatcher.submit(i, ("echo", i))
        for _ in take(dispatcher, 4):
            limit.add(0.3)  # as if it had taken so long
        dispatcher.time_limit = limit.seconds
        dispatcher.submit("hung", ("pid_then_sleep", str(tmp_path)))
        dispatcher.submit("next", ("echo", 1))
        results = {r.job_id: r for r in take(dispatcher, 2)}
        assert "no result within 1.2 s (attempt 3 of 3)" in results["hung"].error
        assert results["next"].value == 1 and len(pids_in(tmp_path)) <= ATTEMPTS
