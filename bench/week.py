"""A week-long search in miniature: nothing is lost, counted twice or changed by any number of deaths.

    python bench/week.py --folder /tmp/week

20000 simulated evaluations through the real search loop, ledger and worker processes. A worker is killed with SIGKILL
every 200 evaluations; the script that searches is killed likewise three times, and started again. Then the same search
runs undisturbed. Every evaluation must be in the ledger once, and both searches must have the same front. The scores
are made up and the controller is random search (bench/simulated.py says why). Prints what was found, writes JSON, and
exits with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.simulated import KILLS
from lib.controllers import pareto_front

ROOT = Path(__file__).resolve().parent.parent

SEARCH = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench.simulated import simulate
from lib.ledger import Ledger
folder, last, *numbers = sys.argv[2:]
append = Ledger.append
def append_or_die(ledger, record):
    append(ledger, record)
    if len(ledger) == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
Ledger.append = append_or_die
simulate(Path(folder), *map(int, numbers))
"""  # not a file, which the workers would import, and torch with it


def search(folder: Path, args: argparse.Namespace, kill_every: int, last: int = 0) -> None:
    """A search to its end, or until it is killed as soon as it has `last` evaluations."""
    command = [sys.executable, "-c", SEARCH, ROOT, folder, last, args.evaluations, args.workers, kill_every]
    with (folder / "printed.txt").open("a") as file:
        status = subprocess.run(list(map(str, command)), stdout=file, stderr=file).returncode
    if status != (-signal.SIGKILL if last else 0):
        sys.exit(f"the search failed or was not killed; see {folder / 'printed.txt'}")


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def disturbed(folder: Path, args: argparse.Namespace) -> list[int]:
    """Search, and kill the search itself at even distances; how many evaluations it had each time."""
    deaths = []
    for number in range(1, args.parent_kills + 1):
        search(folder, args, args.kill_every, args.evaluations * number // (args.parent_kills + 1))
        deaths.append(lines_of(folder / "evals.jsonl"))
    search(folder, args, args.kill_every)
    return deaths


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]


def front(records: list[dict]) -> list:
    """Genotypes and metrics of the front, each as text."""
    members = pareto_front(records, "AP", ["flops"])
    return sorted(json.dumps([m["genotype"], m["metrics"]], sort_keys=True) for m in members)


def report(folder: Path, args: argparse.Namespace) -> dict:
    whole, broken = folder / "undisturbed", folder / "disturbed"
    for place in (whole, broken):
        place.mkdir(parents=True)
    begin = time.monotonic()
    deaths = disturbed(broken, args)
    middle = time.monotonic()
    search(whole, args, 0)
    end = time.monotonic()
    records, expected = read(broken), read(whole)
    return {
        "evaluations": len(records),
        "distinct": len({r["key"] for r in records}),
        "failed": sum(r["status"] != "ok" for r in records),
        "workers_killed": lines_of(broken / KILLS),
        "searches_killed_at": deaths,
        "seconds": {"disturbed": middle - begin, "undisturbed": end - middle},
        "front": len(front(expected)),
        "front_is_equal": front(records) == front(expected),
        "evaluations_are_equal": {r["key"] for r in records} == {r["key"] for r in expected},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--kill-every", type=int, default=200, help="evaluations between two deaths (default: 200)")
    parser.add_argument("--parent-kills", type=int, default=3, help="default: 3")
    parser.add_argument("--folder", type=Path, help="a new folder for the ledgers (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("week.json"), help="default: week.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = report(args.folder or Path(folder), args)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    once = found["evaluations"] == found["distinct"] == args.evaluations and not found["failed"]
    if not (once and found["front_is_equal"] and found["evaluations_are_equal"]):
        sys.exit("broken: an evaluation is missing, there twice, failed or another one, or the front differs")


if __name__ == "__main__":
    main()
