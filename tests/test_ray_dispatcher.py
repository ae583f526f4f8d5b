"""What only a cluster has: room for workers, machines that are lost, a driver that is lost, addresses.

What all dispatchers promise is in test_dispatcher.py.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dispatch_helpers import is_alive, pids_in, take, wait_for
from search_runs import search
from tiny_runs import finish, read_lines

from lib import UserError
from lib.ray_dispatcher import RayDispatcher, connect, pick_dispatcher, pick_ray_workers
from tests.dispatch_workers import setup, setup_user_error

ROOT = Path(__file__).parents[1]
MACHINES = [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install ray)")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token is left in the home folder


@pytest.mark.parametrize(
    ("cpus", "workers", "threads"),
    [([4], 1, 4), ([4], 2, 2), ([4], 3, 1), ([5, 1], 2, 2), ([4, 4, 4], 2, 4), ([3, 3], 4, 1), ([8, 4], 3, 4)],
)
def test_threads_are_what_machines_have_room_for(tiny_config, cpus, workers, threads):
    devices, found = pick_ray_workers(",".join(["cpu"] * workers), [{"CPU": n} for n in cpus], tiny_config())
    assert (len(devices), found) == (workers, threads)
    assert sum(n // threads for n in cpus) >= workers > sum(n // (threads + 1) for n in cpus)


def test_a_cluster_gives_its_gpus_or_else_its_cpus(tiny_config):
    config = tiny_config(search__parallelism=0)
    assert pick_ray_workers("auto", MACHINES, config) == (["cuda:0", "cuda:1"], 4)
    assert pick_ray_workers("auto", MACHINES[:1], config) == (["cpu"] * 4, 1)
    assert pick_ray_workers("auto", MACHINES[:1], tiny_config(search__parallelism=2)) == (["cpu"] * 2, 2)
    assert pick_ray_workers("auto", MACHINES, tiny_config(search__parallelism=3)) == (["cuda:0", "cuda:1", "cuda:0"], 2)
    assert pick_ray_workers("cuda:1, 1", MACHINES, config) == (["cuda:1", "cuda:1"], 2)
    assert pick_ray_workers("cpu,cpu,cpu", MACHINES, config) == (["cpu"] * 3, 4)
    assert pick_ray_workers("0, cuda:1,cpu", MACHINES, config) == (["cuda:0", "cuda:1", "cpu"], 8)


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("0,1,2", r"^--gpus 0,1,2: '2' is not among the Ray cluster's devices: cpu, cuda:0, cuda:1$"),
        ("cpu,a", "'a' is not among the Ray"),
        (",".join(["cpu"] * 13), "13 CPU workers: more than the Ray cluster's 12 CPUs"),
    ],
)
def test_what_a_cluster_cannot_give_is_named(tiny_config, gpus, words):
    with pytest.raises(UserError, match=words):
        pick_ray_workers(gpus, MACHINES, tiny_config())


def test_a_missing_ray_is_one_line(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^--dispatcher ray: the package is missing; pip install ray$"):
        pick_dispatcher("ray", None, "auto", tiny_config())
    with pytest.raises(UserError, match=r"^--ray-address auto: goes with --dispatcher ray$"):
        pick_dispatcher("local", "auto", "auto", tiny_config())


@needs_ray
def test_a_machine_that_is_lost_costs_nothing(tmp_path):
    """Two machines, one worker on each. One goes with the job it runs; then a third comes and takes its place."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=1)
    connect(cluster.address)
    try:
        assert [node["Resources"]["CPU"] for node in ray.nodes()] == [1, 1]
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


@needs_ray
def test_workers_share_a_gpu():
    """Six of one GPU, whose rounded parts must not come to more than the whole, and one of another."""
    import ray

    ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        devices = ["cuda:0"] * 6 + ["cuda:1"]
        with RayDispatcher(setup, (), devices, threads_per_worker=3) as dispatcher:
            seen = set()
            while len(seen) < 7:  # until the test's time is up, if one of them finds no room
                for number in range(7):
                    dispatcher.submit(number, ("sleep", 0.1))
                seen |= {result.worker for result in take(dispatcher, 7)}
            dispatcher.submit("threads", ("environment", "OMP_NUM_THREADS"))
            assert take(dispatcher, 1)[0].value == "3"
    finally:
        ray.shutdown()


@needs_ray
def test_a_mistake_that_a_worker_finds_names_what_machines_must_share():
    connect(None, cpus=1)
    import ray

    try:
        with RayDispatcher(setup_user_error, (), ["cpu"]) as dispatcher:
            dispatcher.submit("a", ("echo", 1))
            with pytest.raises(UserError, match=r"^last.pt: not a checkpoint .*every machine needs"):
                take(dispatcher, 1)
    finally:
        ray.shutdown()


@needs_ray
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


@needs_ray
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


@needs_ray
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
    assert done.returncode == 130 and "with --resume goes on" in done.stdout, done.stderr
    assert 2 <= len(read_lines(evaluations)) < 12
    done = finish(search(tmp_path, [*options, "--resume"], "slow"))
    assert done.returncode == 0, done.stderr
    records = read_lines(evaluations)
    assert len(records) == len({r["key"] for r in records}) == 12 and {r["status"] for r in records} == {"ok"}
    assert {r["worker"] for r in records} == {"cpu#0", "cpu#1"}
