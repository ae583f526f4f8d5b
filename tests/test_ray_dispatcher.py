"""What only a cluster has: machines that go, a driver that goes, addresses. The rest is in test_pool.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dispatch_helpers import is_alive, pids_in, take, wait_for
from search_runs import search
from tiny_runs import finish, read_lines

pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")

from ray.cluster_utils import Cluster

from lib.errors import UserError
from lib.ray_dispatcher import RayDispatcher, connect, machines
from tests.dispatch_workers import setup, setup_user_error

ROOT = Path(__file__).parents[1]
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token is left in the home folder


def test_a_machine_that_is_lost_costs_nothing(tmp_path):
    """Two machines, one worker on each. One goes with the job it runs; then a third comes and takes its place."""
    import ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    connect(cluster.address)
    try:
        assert [machine["CPU"] for machine in machines()] == [1, 1]
        with RayDispatcher(setup, (), ["cpu", "cpu"]) as dispatcher:
            seen = set()
            while len(seen) < 2:
                for i in range(2):
                    dispatcher.submit(i, ("sleep", 0.1))
                seen |= {result.worker for result in take(dispatcher, 2)}
            for i in range(4):
                dispatcher.submit(i, ("sleep", 1.0))
            cluster.remove_node(lost, allow_graceful=False)
            results = take(dispatcher, 4)
            assert sorted(r.job_id for r in results) == list(range(4)) and {r.error for r in results} == {None}
            cluster.add_node(num_cpus=1)
            count = 0
            while len({r.worker for r in results[-2:]}) < 2:  # as long as one worker does all the work
                for _ in range(2):
                    dispatcher.submit(count := count + 1, ("sleep", 0.2))
                results += take(dispatcher, 2)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_mistake_that_a_worker_finds_tells_what_machines_must_share():
    connect(None, cpus=1)
    import ray

    try:
        with RayDispatcher(setup_user_error, (), ["cpu"]) as dispatcher:
            dispatcher.submit("a", ("echo", 1))
            with pytest.raises(UserError, match=r"^last.pt: not a checkpoint .*every machine needs"):
                take(dispatcher, 1)
    finally:
        ray.shutdown()


def test_a_cluster_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"^--ray-address auto: no Ray cluster answers .*: ray start --head$"):
        connect("auto")


DRIVER = """
import sys
from lib.ray_dispatcher import RayDispatcher, connect
from tests.dispatch_workers import setup

connect(None, cpus=2)
dispatcher = RayDispatcher(setup, (), ["cpu", "cpu"])
dispatcher.submit("hung", ("pid_then_sleep", sys.argv[1]))
dispatcher.submit("busy", ("pid_then_compute", sys.argv[1]))
dispatcher.results()
"""


def test_actors_of_a_killed_driver_end_by_themselves(tmp_path):
    (tmp_path / "pids").mkdir()
    (tmp_path / "driver.py").write_text(DRIVER)
    words = [sys.executable, tmp_path / "driver.py", tmp_path / "pids"]
    driver = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        pids = wait_for(lambda: len(pids_in(tmp_path / "pids")) == 2 and pids_in(tmp_path / "pids"))
        driver.kill()
        driver.wait()
        wait_for(lambda: not any(map(is_alive, pids)), seconds=15)
    finally:
        driver.kill()


def test_a_search_runs_on_ray_and_stops_at_ctrl_c(flow, tmp_path):
    """Ctrl-C reaches the whole group, as in a terminal, Ray's processes included."""
    options = ["--load", flow[0] / "runs/tiny/supernet", "--gpus", "cpu,cpu", "--train-dir", "search"]
    options += ["--dispatcher", "ray", "--set", "search.num_epochs=3", "--set", "search.steps=4"]
    evaluations = tmp_path / "search" / "evals.jsonl"

    process = search(tmp_path, options, "slow")
    try:
        wait_for(lambda: evaluations.exists() and evaluations.read_bytes().count(b"\n") >= 2)
        os.killpg(process.pid, signal.SIGINT)
        done = finish(process)
    finally:
        process.kill()
    assert done.returncode == 0 and "with --resume goes on" in done.stdout, done.stderr
    assert 2 <= len(read_lines(evaluations)) < 12
    done = finish(search(tmp_path, [*options, "--resume"], "slow"))
    assert done.returncode == 0, done.stderr
    records = read_lines(evaluations)
    assert len(records) == len({r["key"] for r in records}) == 12 and {r["status"] for r in records} == {"ok"}
    assert {r["worker"] for r in records} == {"cpu#0", "cpu#1"}
