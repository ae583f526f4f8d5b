"""The week-long search of bench/week.py, some seconds of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_runs import environment

BENCH = Path(__file__).parent.parent / "bench" / "week.py"


def test_no_death_loses_an_evaluation_or_changes_the_front(tmp_path):
    flags = ["--evaluations", "300", "--kill-every", "30", "--parent-kills", "2", "--folder", tmp_path / "ledgers"]
    command = [sys.executable, BENCH, *flags, "--out", tmp_path / "week.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "week.json").read_text())
    assert found["evaluations"] == found["distinct"] == 300 and found["failed"] == 0
    assert found["workers_killed"] >= 7 and found["searches_killed_at"] == [100, 200]
    assert found["front_is_equal"] and found["evaluations_are_equal"] and found["front"] > 1
