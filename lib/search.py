"""A search between its controller and its ledger: what to evaluate next, and what is learnt from a result.

One search as it stands, for those who write about it: its front, its best, its noise, beside random search.
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
from lib.budget import Coster, counts_latency, limits_of
from lib.config import Config, SearchConfig
from lib.controllers import Controller, RandomSearch, SpaceExhausted, best_record, pareto_front
from lib.dispatcher import Result
from lib.genotype import Genotype, SearchSpace
from lib.ledger import Ledger, evaluation_basis, evaluation_key
from lib.log import say
from lib.scoring import SCORING_VERSION, Interval, interval, unpack


def identify(supernet: Path, config: Config) -> dict:
    """What tells this search, and what its evaluations rest on, from others in the same ledger."""
    settings = config.search
    shared = (config.seed, settings.controller, settings.objective, settings.costs, limits_of(settings))
    measured = checkpoint.sha256(Path(settings.latency_table)) if counts_latency(settings) else "no latency"
    racing = settings.resamples if settings.racing else 0
    limits = {name: value for name, value in vars(settings).items() if name[:4] in ("min_", "max_") and value}
    hashes = checkpoint.sha256(supernet), checkpoint.sha256(supernet.parent / "split.json")
    scored_by = {"version": SCORING_VERSION, "bn_images": settings.bn_images, "batch_size": settings.batch_size}
    return {
        "search": f"{shared}-{measured}-{racing}",
        "supernet_sha256": hashes[0],
        "budget": limits,
        "basis": evaluation_basis(*hashes, {**scored_by, "images": settings.images}),
        "basis_all": evaluation_basis(*hashes, {**scored_by, "images": 0}),
    }


class Search:
    """One search: the ask, submit, tell loop over a ledger.

    What the ledger already holds is told at once and never evaluated again. Its records are told with the latency that
    `costs` predicts.
    """

    def __init__(
        self, controller: Controller, ledger: Ledger, config: Config, costs: Coster, identity: dict, first_epoch: int
    ):
        self.controller, self.ledger, self.config, self.costs = controller, ledger, config, costs
        self.identity, self.first_epoch = identity, first_epoch
        self.total = config.search.num_epochs * config.search.steps
        self.asked = 0
        self.told: list[dict] = []  # the records this search has learnt from
        self.running: dict[str, tuple[Genotype, str]] = {}  # and its origin
        self.finalists: list[dict] = []  # the front, scored anew on all images
        self._resampled: dict[Genotype, dict] = {}  # scores of full evaluations on resamples, which racing compares

    @property
    def epoch(self) -> int:
        return self.first_epoch + len(self.told) // self.config.search.steps

    def replay(self) -> None:
        """Tell the controller what an interrupted run of this very search had found.

        Not random search, whose proposals depend on their number alone: it makes the same ones again, what was lost
        in flight among them, and `propose` finds the others in the ledger.
        """
        if isinstance(self.controller, RandomSearch):
            return
        for record in self.ledger.records(search=self.identity["search"], basis=self.identity["basis"]):
            self.asked += 1
            self._tell(record, Genotype.from_dict(record["genotype"]))

    def _tell(self, record: dict, genotype: Genotype) -> None:
        if record["status"] != "failed":
            record = {**record, "metrics": {**record["metrics"], **self.costs.latency(genotype)}}
        if record["status"] == "ok":
            self.controller.tell(genotype, record["metrics"])
            if record.get("objective") == self.config.search.objective:
                self._resampled[genotype] = record["resampled"]
        else:
            self.controller.tell_failure(genotype)
        self.told.append(record)

    def propose(self) -> tuple[str, dict] | None:
        """The next job; None where the search has asked for all it may. Known evaluations are told on the way."""
        while self.asked < self.total:
            try:
                genotype = self.controller.ask()
            except SpaceExhausted as end:
                say(f"search: {end}")
                self.total = self.asked
                return None
            self.asked += 1
            key = evaluation_key(genotype, self.identity["basis"])
            known = self.ledger.lookup(key)
            if known is None or (known["status"] == "stopped" and known["search"] != self.identity["search"]):
                origin = self.controller.origin
                self.running[key] = genotype, origin
                return key, {"genotype": genotype.to_dict(), "rivals": self._rivals(genotype, origin)}
            self._tell(known, genotype)
        return None

    def _rivals(self, genotype: Genotype, origin: str) -> list[dict]:
        """The resampled scores of whom `genotype` must not clearly lose to; given ones are scored in any case."""
        if not self.config.search.racing or origin == "given":
            return []
        rivals = self.controller.rivals(self.costs(genotype))
        known = [self._resampled[rival] for rival in rivals if rival in self._resampled]
        return known if len(known) == len(rivals) else []

    def learn(self, result: Result) -> None:
        """Record a result and tell the controller."""
        genotype, origin = self.running.pop(result.job_id)
        self._tell(self._record(result, genotype, origin, self.identity["basis"]), genotype)

    def _record(self, result: Result, genotype: Genotype, origin: str, basis: str) -> dict:
        value = {"metrics": {}} if result.error else dict(result.value)
        record = {
            "key": result.job_id,
            "basis": basis,
            "search": self.identity["search"],
            "origin": origin,
            "budget": self.identity["budget"],
            "genotype": genotype.to_dict(),
            "status": "failed" if result.error else "stopped" if value.pop("lost") else "ok",
            **value,
            "seconds": round(result.seconds, 3),
            "worker": result.worker,
            "epoch": self.epoch,
            "time": round(time.time(), 3),
            **({"error": result.error} if result.error else {}),
        }
        self.ledger.append(record)
        return record

    def succeeded(self) -> list[dict]:
        return [record for record in self.told if record["status"] == "ok"]

    def random_evaluations(self) -> list[dict]:
        """Every random proposal in the ledger that this search could have made, whichever search made it."""
        return self.ledger.records(origin="random", budget=self.identity["budget"], basis=self.identity["basis"])

    def missing_finalists(self, run: SearchRun) -> list[tuple[str, dict]]:
        """Jobs that score the front's members on all images of the search split, where a part of them was used.

        What the ledger holds of these is taken from there.
        """
        if not self.config.search.images:
            return []
        jobs = []
        for member in run.front():
            genotype = Genotype.from_dict(member["genotype"])
            key = evaluation_key(genotype, self.identity["basis_all"])
            known = self.ledger.lookup(key)
            if known is None or known["status"] == "failed":  # which a resumed search tries again
                self.running[key] = genotype, "front"
                jobs.append((key, {"genotype": member["genotype"], "rivals": []}))
            else:
                self._keep_finalist(known, genotype)
        return jobs

    def learn_finalist(self, result: Result) -> None:
        genotype, origin = self.running.pop(result.job_id)
        self._keep_finalist(self._record(result, genotype, origin, self.identity["basis_all"]), genotype)

    def _keep_finalist(self, record: dict, genotype: Genotype) -> None:
        if record["status"] == "ok":
            self.finalists.append({**record, "metrics": {**record["metrics"], **self.costs.latency(genotype)}})

    def as_run(self, folder: Path, supernet: Path) -> SearchRun:
        """The search as it stands, for those who write about it."""
        return SearchRun(
            name=self.config.name,
            search=self.identity["search"],
            supernet=supernet,
            folder=folder,
            settings=self.config.search,
            space=self.controller.space,
            total=self.total,
            told=self.told,
            random=self.random_evaluations(),
            finalists=self.finalists,
        )


class Noise(NamedTuple):
    """What the score of one sub-network is worth on so few images."""

    interval: Interval  # of its score
    behind: Interval  # of the best one's score less its own, on the same resamples
    tie: bool  # not clearly behind the best


@dataclass(frozen=True)
class SearchRun:
    """Annotations of the ledger, in the order they came.

    `told`: all that the search has learnt from, of `total` in the end. `random`: every evaluation of a uniform random
    proposal on this supernet, split, settings and budget, whichever search made it. `search`: the name that the
    records of this search have in the ledger. `folder` is where pareto.json is. `finalists`: members of the front once
    they have been scored anew on all images of the search split; the front and the best are then found among these.
    """

    name: str
    search: str
    supernet: Path
    folder: Path
    settings: SearchConfig
    space: SearchSpace
    total: int
    told: Sequence[dict]
    random: Sequence[dict]
    finalists: Sequence[dict] = ()

    @property
    def scored(self) -> list[dict]:
        """Those scored on all images."""
        return [record for record in self.told if record["status"] == "ok"]

    @property
    def compared(self) -> list[dict]:
        """Those scored, and those that racing stopped."""
        return [record for record in self.told if record["status"] != "failed"]

    @property
    def own(self) -> list[dict]:
        """What this search paid for itself; the rest it found in the ledger."""
        return [record for record in self.told if record["search"] == self.search]

    def front(self) -> list[dict]:
        """The members of pareto.json, in its order."""
        return pareto_front(self.finalists or self.scored, self.settings.objective, self.settings.costs)

    def best(self) -> dict:
        return best_record(self.finalists or self.scored, self.settings.objective, self.settings.costs[0])

    def top(self, count: int) -> list[dict]:
        """The `count` best, best first, the cheaper first among equals."""
        objective, cost = self.settings.objective, self.settings.costs[0]
        ordered = sorted(self.scored, key=lambda r: (-r["metrics"][objective], r["metrics"][cost]))
        return ordered[:count]

    def noise(self, record: dict) -> Noise | None:
        """None where the ledger lacks the scores on resamples of the images."""
        own, best = (_on_resamples(r, self.settings.objective) for r in (record, self.best()))
        if own is None or best is None or own.shape != best.shape:
            return None
        behind = interval(best - own)
        return Noise(interval(own), behind, behind.low <= 0)

    def history(self) -> list[float]:
        """The best objective so far, after each evaluation that did not fail; one stopped early is no new best."""
        found = [r["metrics"][self.settings.objective] for r in self.scored]
        scores = iter(found)
        return best_so_far([next(scores) if r["status"] == "ok" else min(found) for r in self.compared])

    def control(self) -> list[BestOf]:
        """What random search would have found with as many evaluations, as far as the ledger can tell."""
        objective = self.settings.objective
        found = [r["metrics"][objective] for r in self.random if r["status"] != "failed"]
        found = [score for score in found if score is not None]
        return best_of_random(found, most=len(self.compared)) if found and self.compared else []


def _on_resamples(record: dict, objective: str) -> np.ndarray | None:
    if record.get("objective") != objective:
        return None
    return unpack(record["resampled"][str(record["images"])])


TAIL = 0.1  # on either side of the range of what random search would have found


class BestOf(NamedTuple):
    """The best of `draws` random evaluations: its expected value, and the range that holds it 8 times in 10."""

    draws: int
    low: float
    mean: float
    high: float


def best_so_far(values: Sequence[float]) -> list[float]:
    """The largest of the first 1, 2, 3, ... values."""
    return list(itertools.accumulate(values, max))


def best_of_random(values: Sequence[float], most: int, points: int = 200) -> list[BestOf]:
    """The best of n of these m values, drawn without replacement, for n = 1 to m or `most` (at `points` n at most).

    Exact: of the C(m, n) equally likely draws, C(i, n) hold none but the i smallest values. Expected-best curves are
    how Dodge et al. (EMNLP 2019) compare searches of different length; theirs draw with replacement.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    m = len(ordered)
    ranks = np.arange(m, 1, -1)  # C(i - 1, n) / C(i, n) = (i - n) / i, from i = m down
    found = []
    last = min(m, most)
    for n in sorted({round(n) for n in np.linspace(1, last, min(last, points))}):
        cdf = np.ones(m)  # cdf[i - 1]: the best is among the i smallest
        cdf[:-1] = np.cumprod(np.maximum(ranks - n, 0) / ranks)[::-1]
        low, high = (ordered[np.searchsorted(cdf, share - 1e-9)] for share in (TAIL, 1 - TAIL))
        found.append(BestOf(n, float(low), float(np.diff(cdf, prepend=0.0) @ ordered), float(high)))
    return found
