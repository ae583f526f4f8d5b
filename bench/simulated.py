"""A search whose evaluations are made up, in no more than a millisecond each; all else is the real thing.

The controller is random search: its proposals depend on the seed and their number alone. What the other controllers
propose depends on the order in which results arrive, which no two runs of several workers share.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lib.dispatcher import Dispatcher, Result

KILLS = "kills.txt"  # a line for each worker that was killed
STEPS = 100  # evaluations of an epoch


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
        return {"metrics": {"AP": value, "flops": flops}, "images": 1, "lost": False}

    return score


class Saboteur(Dispatcher):
    """A dispatcher that kills the worker of every `every`-th result with SIGKILL, at its next job."""

    def __init__(self, *args, every: int, log: Path, **options):
        self.every, self.log, self.seen = every, log, 0
        super().__init__(*args, **options)

    def results(self, timeout: float | None = None) -> list[Result]:
        found = super().results(timeout)
        for result in found:
            self.seen += 1
            if self.every and self.seen % self.every == 0:
                self._workers[int(result.worker.rpartition("#")[2])].process.kill()
                with self.log.open("a") as file:
                    file.write(f"{result.worker}\n")
        return found


def simulate(folder: Path, evaluations: int, workers: int, kill_every: int) -> None:
    """Run the search in `folder` to its end, or go on with one that was interrupted there."""
    from async_search import search_loop
    from lib.budget import Coster
    from lib.config import Config, SearchConfig
    from lib.controllers import RandomSearch
    from lib.dispatcher import TimeLimit
    from lib.genotype import BlockChoices, SearchSpace, StageChoices
    from lib.ledger import Ledger
    from lib.runtime import StopRequest
    from lib.search import Search

    stage = StageChoices((1, 2, 3), BlockChoices((3, 4, 6), (3, 5, 7)))
    space = SearchSpace("mbv3_backbone", (64, 96), (stage,) * 4, (BlockChoices((0.5,), (3,)),))
    settings = SearchConfig(controller="random", racing=False, num_epochs=-(-evaluations // STEPS), steps=STEPS)
    identity = {**dict.fromkeys(("search", "basis", "basis_all"), "simulated"), "budget": {}}
    controller = RandomSearch(space, 0, lambda genotype: True)

    with Ledger(folder / "evals.jsonl") as ledger, StopRequest() as stop:
        search = Search(controller, ledger, Config(search=settings), Coster(None), identity, 1)
        search.total = evaluations
        search.replay()
        options = {"threads_per_worker": 1, "every": kill_every, "log": folder / KILLS}
        with Saboteur(scorer, (), ["cpu"] * workers, **options) as dispatcher:
            search_loop(search, dispatcher, stop, lambda: None, 1, TimeLimit())
