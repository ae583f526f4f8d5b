"""Workers of a cluster: as many as it has room for. Those of one machine are in the scripts' tests."""

from __future__ import annotations

import sys

import pytest

from lib.errors import UserError
from lib.ray_dispatcher import most_threads, pick_dispatcher, pick_ray_workers

MACHINES = [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}]


@pytest.mark.parametrize(
    ("cpus", "workers", "threads"),
    [([4], 1, 4), ([4], 2, 2), ([4], 3, 1), ([5, 1], 2, 2), ([4, 4, 4], 2, 4), ([3, 3], 4, 1), ([8, 4], 3, 4)],
)
def test_threads_are_what_machines_have_room_for(cpus, workers, threads):
    assert most_threads(cpus, workers) == threads
    assert sum(n // threads for n in cpus) >= workers > sum(n // (threads + 1) for n in cpus)


def test_a_cluster_gives_its_gpus_or_else_its_cpus(tiny_config):
    config = tiny_config(search__parallelism=0)
    assert pick_ray_workers(None, MACHINES, config) == (["cuda", "cuda"], None)
    assert pick_ray_workers(None, MACHINES[:1], config) == (["cpu"] * 4, 1)
    assert pick_ray_workers(None, MACHINES[:1], tiny_config(search__parallelism=2)) == (["cpu"] * 2, 2)
    assert pick_ray_workers("cpu,cpu,cpu", MACHINES, config) == (["cpu"] * 3, 4)
    assert pick_ray_workers("0, 1,cpu", MACHINES, config) == (["cuda", "cuda", "cpu"], 8)


@pytest.mark.parametrize(
    ("gpus", "words"), [("0,1,2", "3 GPU and 0 CPU workers: more than"), ("cpu,a", "'a' is neither")]
)
def test_what_a_cluster_cannot_give_is_named(tiny_config, gpus, words):
    with pytest.raises(UserError, match=words):
        pick_ray_workers(gpus, MACHINES, tiny_config())


def test_ray_that_is_not_installed_is_one_line(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^--dispatcher ray: the package is missing; pip install ray$"):
        pick_dispatcher("ray", None, None, tiny_config())
    with pytest.raises(UserError, match=r"^--ray-address auto: goes with --dispatcher ray$"):
        pick_dispatcher("local", "auto", None, tiny_config())
