"""One search: it joins a controller and a ledger, and knows the front, its noise, and what random search would find.

`propose` gives a job, `learn` takes its result. Nothing here starts a process or writes a file but the ledger.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import checkpoint
from lib.budget import LIMIT_KEYS, Coster, counts_latency, limits_of
from lib.config import Config
from lib.controllers import Controller, RandomSearch, SpaceExhausted, best_record, pareto_front
from lib.dispatcher import Result
from lib.genotype import Genotype
from lib.ledger import Ledger, evaluation_basis, evaluation_key
from lib.log import say
from lib.scoring import SCORING_VERSION, Interval, interval, unpack

TAIL = 0.1  # on either side of the range of what random search would have found
Job = tuple[str, dict]  # the key of an evaluation, and what the scoring worker needs


@dataclass(frozen=True)
class Identity:
    """What tells a search, and its evaluations, from others in the same ledger."""

    search: str  # name of the search: its seed, controller, objective, costs, limits
    supernet: Path
    supernet_sha256: str
    budget: dict[str, float]  # the limits by their keys in the configuration
    basis: str  # all that a score depends on besides the genotype
    basis_all: str  # the same for a score on all images of the search split

    @classmethod
    def of(cls, supernet: Path, config: Config) -> Identity:
        settings = config.search
        latency = checkpoint.sha256(Path(settings.latency_table)) if counts_latency(settings) else "no latency"
        shared = (config.seed, settings.controller, settings.objective, settings.costs, limits_of(settings))
        keys = itertools.chain(*LIMIT_KEYS.values())
        hashes = checkpoint.sha256(supernet), checkpoint.sha256(supernet.parent / "split.json")
        scoring = {"version": SCORING_VERSION, "bn_images": settings.bn_images, "batch_size": settings.batch_size}
        return cls(
            search=f"{shared}-{latency}-{settings.resamples}",
            supernet=supernet,
            supernet_sha256=hashes[0],
            budget={key: getattr(settings, key) for key in keys if getattr(settings, key)},
            basis=evaluation_basis(*hashes, {**scoring, "images": settings.images}),
            basis_all=evaluation_basis(*hashes, {**scoring, "images": 0}),
        )


class Noise(NamedTuple):
    """How uncertain a score is on so few images."""

    interval: Interval  # of the score
    behind: Interval  # of the best score minus this one, on the same resamples
    tie: bool  # not clearly behind the best


class Search:
    """A search over `total` evaluations. Results already in the ledger are reused and never evaluated again.

    `told` are the records the search has learnt from, in order, each with the latency that `costs` predicts.
    `finalists` are the members of the front once they are scored on all images of the search split; the front and the
    best are then found among these.
    """

    def __init__(
        self, controller: Controller, ledger: Ledger, config: Config, costs: Coster, identity: Identity, epoch: int
    ):
        self.controller = controller
        self.ledger = ledger
        self.config = config
        self.costs = costs
        self.identity = identity
        self.first_epoch = epoch
        self.total = config.search.num_epochs * config.search.steps
        self.asked = 0
        self.told: list[dict] = []
        self.finalists: list[dict] = []
        self._running: dict[str, tuple[Genotype, str]] = {}  # by key: the genotype and its origin

    # What to evaluate next, and what is learnt from a result

    @property
    def epoch(self) -> int:
        return self.first_epoch + len(self.told) // self.config.search.steps

    def replay(self) -> None:
        """Tell the controller what an interrupted run of this very search had found."""
        # The proposals of random search depend on their number alone: it makes the same ones again, including those
        # whose evaluation was interrupted, and `propose` finds the others in the ledger.
        if isinstance(self.controller, RandomSearch):
            return
        for record in self.ledger.records(search=self.identity.search, basis=self.identity.basis):
            self.asked += 1
            self._tell(record, Genotype.from_dict(record["genotype"]))

    def propose(self) -> Job | None:
        """The next job; None once the search has asked for all it may. Learns known evaluations on the way."""
        while self.asked < self.total:
            try:
                genotype = self.controller.ask()
            except SpaceExhausted as end:
                say(f"search: {end}")
                self.total = self.asked
                return None
            self.asked += 1
            key = evaluation_key(genotype, self.identity.basis)
            known = self.ledger.lookup(key)
            if known is None:
                return self._job(key, genotype, self.controller.origin)
            self._tell(known, genotype)
        return None

    def learn(self, result: Result) -> None:
        """Record a result and tell the controller."""
        genotype, origin = self._running.pop(result.job_id)
        self._tell(self._record(result, genotype, origin, self.identity.basis), genotype)

    def missing_finalists(self) -> list[Job]:
        """Jobs that score the front on all images of the search split, if it was scored on a part of them.

        Results already in the ledger are reused; evaluations that failed are tried again.
        """
        if not self.config.search.images:
            return []
        jobs = []
        for member in self.front():
            genotype = Genotype.from_dict(member["genotype"])
            key = evaluation_key(genotype, self.identity.basis_all)
            known = self.ledger.lookup(key)
            if known is None or known["status"] == "failed":
                jobs.append(self._job(key, genotype, "front"))
            else:
                self._keep_finalist(known, genotype)
        return jobs

    def learn_finalist(self, result: Result) -> None:
        """Record a member of the front that was scored on all images."""
        genotype, origin = self._running.pop(result.job_id)
        self._keep_finalist(self._record(result, genotype, origin, self.identity.basis_all), genotype)

    def _job(self, key: str, genotype: Genotype, origin: str) -> Job:
        self._running[key] = genotype, origin
        return key, {"genotype": genotype.to_dict()}

    def _tell(self, record: dict, genotype: Genotype) -> None:
        if record["status"] == "ok":
            record = self._with_latency(record, genotype)
            self.controller.tell(genotype, record["metrics"])
        else:
            self.controller.tell_failure(genotype)
        self.told.append(record)

    def _keep_finalist(self, record: dict, genotype: Genotype) -> None:
        if record["status"] == "ok":
            self.finalists.append(self._with_latency(record, genotype))

    def _with_latency(self, record: dict, genotype: Genotype) -> dict:
        return {**record, "metrics": {**record["metrics"], **self.costs.latency(genotype)}}

    def _record(self, result: Result, genotype: Genotype, origin: str, basis: str) -> dict:
        outcome = {"metrics": {}, "error": result.error} if result.error else result.value
        record = {
            "key": result.job_id,
            "basis": basis,
            "search": self.identity.search,
            "origin": origin,
            "budget": self.identity.budget,
            "genotype": genotype.to_dict(),
            "status": "failed" if result.error else "ok",
            **outcome,
            "seconds": round(result.seconds, 3),
            "worker": result.worker,
            "epoch": self.epoch,
            "time": round(time.time(), 3),
        }
        self.ledger.append(record)
        return record

    # What has been found so far

    @property
    def scored(self) -> list[dict]:
        """The records of `told` that did not fail."""
        return [record for record in self.told if record["status"] == "ok"]

    def front(self) -> list[dict]:
        """The members of pareto.json, cheapest first."""
        settings = self.config.search
        return pareto_front(self.finalists or self.scored, settings.objective, settings.costs)

    def best(self) -> dict:
        settings = self.config.search
        return best_record(self.finalists or self.scored, settings.objective, settings.costs[0])

    def top(self, count: int) -> list[dict]:
        """The `count` best, best first, the cheaper first among equals."""
        objective, cost = self.config.search.objective, self.config.search.costs[0]
        return sorted(self.scored, key=lambda r: (-r["metrics"][objective], r["metrics"][cost]))[:count]

    def noise(self, record: dict) -> Noise | None:
        """None if the ledger lacks the scores on resamples of the images."""
        scores, best = self._on_resamples(record), self._on_resamples(self.best())
        if scores is None or best is None or scores.shape != best.shape:
            return None
        behind = interval(best - scores)
        return Noise(interval(scores), behind, tie=behind.low <= 0)

    def _on_resamples(self, record: dict) -> np.ndarray | None:
        if record.get("objective") != self.config.search.objective:
            return None
        return unpack(record["resampled"][str(record["images"])])

    def history(self) -> list[float]:
        """The best objective so far, after each evaluation that did not fail."""
        return list(itertools.accumulate((r["metrics"][self.config.search.objective] for r in self.scored), max))

    def random_evaluations(self) -> list[dict]:
        """Every random proposal in the ledger that this search could have made, whichever search made it."""
        found = self.ledger.records(
            origin="random", status="ok", budget=self.identity.budget, basis=self.identity.basis
        )
        return [r for r in found if r["metrics"][self.config.search.objective] is not None]

    def control(self) -> list[BestOf]:
        """What random search would have found with as many evaluations, as far as the ledger can tell."""
        scores = [r["metrics"][self.config.search.objective] for r in self.random_evaluations()]
        return best_of_random(scores, most=len(self.scored))


class BestOf(NamedTuple):
    """The best of `draws` random evaluations: its expected value, and the range that holds it 8 times in 10."""

    draws: int
    low: float
    mean: float
    high: float


def best_of_random(values: Sequence[float], most: int, points: int = 200) -> list[BestOf]:
    """The best of n of these m values, drawn without replacement, for n = 1 to m or `most` (at `points` n at most).

    Exact: of the C(m, n) equally likely draws, C(i, n) hold none but the i smallest values. Expected-best curves are
    how Dodge et al. (EMNLP 2019) compare searches of different length; theirs draw with replacement.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    m = len(ordered)
    last = min(m, most)
    if last == 0:
        return []
    ranks = np.arange(m, 1, -1)  # C(i - 1, n) / C(i, n) = (i - n) / i, from i = m down
    found = []
    for n in sorted({round(n) for n in np.linspace(1, last, min(last, points))}):
        cdf = np.ones(m)  # cdf[i - 1]: the best is among the i smallest
        cdf[:-1] = np.cumprod(np.maximum(ranks - n, 0) / ranks)[::-1]
        low, high = (ordered[np.searchsorted(cdf, share - 1e-9)] for share in (TAIL, 1 - TAIL))
        found.append(BestOf(n, float(low), float(np.diff(cdf, prepend=0.0) @ ordered), float(high)))
    return found
