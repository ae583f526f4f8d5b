"""A week-long search in miniature: whatever dies, no evaluation is lost, counted twice or changed.

    python bench/week.py

20000 evaluations with made-up scores through the real search loop, ledger and worker processes. A worker is killed with
SIGKILL every 200 evaluations; the search itself is killed likewise three times, and started again. Then the same search
runs undisturbed. Both write their results as a search does: now and then, and at the end. Every evaluation must be in
the ledger once, and both searches must have the same front. The controller is random search, whose proposals depend on
the seed and their number alone; those of the others depend on the order of results, which no two runs of several
workers share. Exits with 1 if a promise is broken.
"""

# The workers import this file, so it imports nothing large; `simulate` runs in the searching process only.
import argparse
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.controllers import pareto_front
from lib.dispatcher import Dispatcher, Result

ROOT = Path(__file__).resolve().parent.parent
KILLS = "kills.txt"  # a line for each worker that was killed
STEPS = 100  # evaluations in an epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--kill-every", type=int, default=200, help="evaluations between two deaths (default: 200)")
    parser.add_argument("--parent-kills", type=int, default=3, help="deaths of the search (default: 3)")
    parser.add_argument("--folder", type=Path, help="a new folder for the ledgers (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("week.json"), help="JSON file to write (default: week.json)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = report(args.folder or Path(folder), args)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    once = found["evaluations"] == found["distinct"] == args.evaluations and not found["failed"]
    if not (once and found["front_is_equal"] and found["evaluations_are_equal"]):
        sys.exit("broken: an evaluation is missing, doubled, failed or another one, or the front differs")


def report(folder: Path, args: argparse.Namespace) -> dict:
    disturbed, undisturbed = folder / "disturbed", folder / "undisturbed"
    for place in (disturbed, undisturbed):
        place.mkdir(parents=True)
    start = time.monotonic()
    deaths = []
    for number in range(1, args.parent_kills + 1):
        search(disturbed, args, args.kill_every, args.evaluations * number // (args.parent_kills + 1))
        deaths.append(lines_of(disturbed / "evals.jsonl"))
    search(disturbed, args, args.kill_every)
    middle = time.monotonic()
    search(undisturbed, args, kill_every=0)
    end = time.monotonic()
    records, expected = read(disturbed), read(undisturbed)
    return {
        "evaluations": len(records),
        "distinct": len({record["key"] for record in records}),
        "failed": sum(record["status"] != "ok" for record in records),
        "workers_killed": lines_of(disturbed / KILLS),
        "searches_killed_at": deaths,
        "seconds": {"disturbed": middle - start, "undisturbed": end - middle},
        "front": len(front(expected)),
        "front_is_equal": front(records) == front(expected),
        "evaluations_are_equal": {r["key"] for r in records} == {r["key"] for r in expected},
    }


def search(folder: Path, args: argparse.Namespace, kill_every: int, last: int = 0) -> None:
    """Run a search to its end, or until it kills itself with its `last`-th evaluation in the ledger."""
    call = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bench.week import simulate; "
    # Not this file as the main module, which the workers would import a second time.
    call += f"simulate({str(folder)!r}, {args.evaluations}, {args.workers}, {kill_every}, {last})"
    with (folder / "printed.txt").open("a") as file:
        status = subprocess.run([sys.executable, "-c", call], stdout=file, stderr=file).returncode
    if status != (-signal.SIGKILL if last else 0):
        sys.exit(f"the search failed or was not killed; see {folder / 'printed.txt'}")


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]


def front(records: list[dict]) -> list[str]:
    """Genotypes and metrics of the front, each as text."""
    members = pareto_front(records, "AP", ["flops"])
    return sorted(json.dumps([m["genotype"], m["metrics"]], sort_keys=True) for m in members)


# The simulated search.


def scorer(device: str):
    """A worker that computes a number from the genotype for about a millisecond."""

    def score(job: dict) -> dict:
        genotype = job["genotype"]
        digest = repr(sorted(genotype.items())).encode()
        for _ in range(1000):
            digest = hashlib.sha256(digest).digest()
        value = int.from_bytes(digest[:6], "big") / 2**48
        blocks = [block for stage in genotype["backbone"]["stages"] for block in stage]
        flops = sum(block["expand"] * block["kernel"] for block in blocks)
        return {"metrics": {"AP": value, "flops": flops}, "images": 1}

    return score


class Saboteur(Dispatcher):
    """A dispatcher that kills the worker of every `every`-th result with SIGKILL, at its next job; 0 = never."""

    def __init__(self, workers: int, every: int, log: Path):
        self.every = every
        self.log = log
        self.seen = 0
        super().__init__(scorer, (), ["cpu"] * workers, threads_per_worker=1)

    def results(self, timeout: float | None = None) -> list[Result]:
        found = super().results(timeout)
        for result in found:
            self.seen += 1
            if self.every and self.seen % self.every == 0:
                self._workers[int(result.worker.rpartition("#")[2])].process.kill()
                with self.log.open("a") as file:
                    file.write(f"{result.worker}\n")
        return found


def simulate(folder: str, evaluations: int, workers: int, kill_every: int, last: int) -> None:
    """Run the search in `folder`, or resume it; with `last`, kill this process at so many evaluations in the ledger."""
    from async_search import search_loop
    from lib.config import Config, SearchConfig
    from lib.controllers import RandomSearch
    from lib.genotype import BlockChoices, SearchSpace, StageChoices
    from lib.latency import Coster
    from lib.ledger import Ledger
    from lib.log import Throttle
    from lib.report import write_results
    from lib.runtime import StopRequest
    from lib.search import Identity, Search

    class FatalLedger(Ledger):
        def append(self, record: dict) -> None:
            super().append(record)
            if next(count) == last:
                os.kill(os.getpid(), signal.SIGKILL)

    stage = StageChoices((1, 2, 3), BlockChoices((3, 4, 6), (3, 5, 7)))
    space = SearchSpace("mbv3_backbone", (64, 96), (stage,) * 4, (BlockChoices((0.5,), (3,)),))
    settings = SearchConfig(controller="random", num_epochs=-(-evaluations // STEPS), steps=STEPS)
    controller = RandomSearch(settings, space, 0, lambda genotype: True)
    identity = Identity(
        search="simulated", supernet=Path(), supernet_sha256="", budget={}, basis="simulated", basis_all="simulated"
    )
    path = Path(folder) / "evals.jsonl"
    count = itertools.count(lines_of(path) + 1)
    with FatalLedger(path) as ledger, StopRequest() as stop:
        search = Search(controller, ledger, Config(search=settings), Coster(None), identity, 1)
        search.total = evaluations
        search.replay()
        with Saboteur(workers, kill_every, Path(folder) / KILLS) as dispatcher:
            search_loop(search, dispatcher, stop, Throttle(lambda: write_results(search, path.parent)), 1)
    write_results(search, path.parent)


if __name__ == "__main__":
    main()
