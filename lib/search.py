"""One search: it joins a controller and a ledger, and knows the front, its noise, and what random search would find.

`propose` gives a job, `learn` takes its result. Nothing here starts a process or writes a file but the ledger.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import UserError, checkpoint
from lib.annotations import Annotations
from lib.config import Config
from lib.controllers import LIMIT_KEYS, Controller, RandomSearch, SpaceExhausted, limits_of, pareto_front
from lib.dispatcher import Result
from lib.genotype import Genotype
from lib.latency import Coster
from lib.ledger import Ledger, checked, evaluation_basis, evaluation_key
from lib.log import say
from lib.plain import check, read_json
from lib.scoring import interval, rests_on, unpack

TAIL = 0.1  # on either side of the range of what random search would have found
COSTS = {  # how a cost is shown: its name, what it is divided by, its unit
    "flops": ("multiply-adds", 1e6, "M"),
    "params": ("parameters", 1e6, "M"),
    "latency_ms": ("latency", 1.0, "ms"),
}
FRONT_TABLE = "front-table/1"
Job = tuple[str, dict]  # the key of an evaluation, and what the scoring worker needs


def cost_text(metrics: Mapping[str, float], cost: str) -> str:
    """A cost with its unit and name, as in `312.4 M multiply-adds`."""
    name, scale, unit = COSTS[cost]
    return f"{metrics[cost] / scale:.4g} {unit} {name}"


@dataclass(frozen=True)
class Identity:
    """What tells a search, and its evaluations, from others in the same ledger."""

    search: str  # name of the search: its seed, controller, objective, costs, limits
    supernet: Path
    supernet_sha256: str
    budget: dict[str, float]  # the limits by their keys in the configuration
    basis: str  # all that a score depends on besides the genotype
    basis_all: str  # the same for a score on all images of the search split
    parts: dict[str, str] = field(default_factory=dict)  # of the basis, shortened: a message says what has changed
    latency_table: str = ""  # SHA-256 of the one by which limits of latency were kept

    @classmethod
    def of(
        cls, supernet: Path, config: Config, annotations: Annotations, train: Sequence[int], search: Sequence[int]
    ) -> Identity:
        settings = config.search
        limits = limits_of(settings)
        counts_latency = "latency_ms" in (*settings.costs, *limits)
        latency = checkpoint.sha256(Path(settings.latency_table)) if counts_latency else "no latency"
        shared = (config.seed, settings.controller, settings.objective, settings.costs, limits)
        by_key = {key: getattr(settings, key) for keys in LIMIT_KEYS.values() for key in keys}
        weights = checkpoint.sha256(supernet)
        on_all = replace(config, search=replace(settings, images=0))
        parts = rests_on(weights, annotations, train, search, config)
        return cls(
            search=f"{shared}-{latency}-{settings.resamples}",
            supernet=supernet,
            supernet_sha256=weights,
            budget={key: limit for key, limit in by_key.items() if limit},
            basis=evaluation_basis(parts),
            basis_all=evaluation_basis(rests_on(weights, annotations, train, search, on_all)),
            parts={name: digest[:12] for name, digest in parts.items()},
            latency_table=latency if "latency_ms" in limits else "",
        )


class Noise(NamedTuple):
    """How uncertain a score is on so few images; each interval is its low and its high end."""

    interval: tuple[float, float]  # of the score
    behind: tuple[float, float]  # of the best score minus this one, on the same resamples
    tie: bool  # not clearly behind the best


class Search:
    """A search over `total` evaluations. Results already in the ledger are reused and never evaluated again.

    `told` are the records the search has learnt from, in order, each with the latency that `costs` predicts; `scored`
    are those that did not fail; `rescored` are the members of the front once they are scored on all images of the
    search split, among which the front and the best are then found.
    """

    def __init__(
        self, controller: Controller, ledger: Ledger, config: Config, costs: Coster, identity: Identity, epoch: int
    ):
        self.controller = controller
        self.ledger = ledger
        self.config = config
        self.settings = config.search
        self.costs = costs
        self.identity = identity
        self.first_epoch = epoch
        self.total = self.settings.num_epochs * self.settings.steps
        self.asked = 0
        self.told: list[dict] = []
        self.scored: list[dict] = []
        self.rescored: list[dict] = []
        self.trained: dict[Genotype, float] = {}  # the objective of finalists after a short training
        self._running: dict[str, dict] = {}  # by key: what the record will hold of the proposal

    @property
    def epoch(self) -> int:
        return self.first_epoch + len(self.told) // self.settings.steps

    def replay(self) -> None:
        """Tell the controller what an interrupted run of this very search had found."""
        # The proposals of random search depend on their number alone: it makes the same ones again, including those
        # whose evaluation was interrupted, and `propose` finds the others in the ledger.
        if not isinstance(self.controller, RandomSearch):
            for record in self.ledger.records(search=self.identity.search, basis=self.identity.basis):
                self.asked += 1
                self._tell(record)

    def propose(self) -> Job | None:
        """The next job; None once the search has asked for all it may. Learns known evaluations on the way."""
        while self.asked < self.total:
            try:
                genotype = self.controller.ask()
            except SpaceExhausted as end:
                say(f"search: {end}")
                self.total = self.asked
                break
            self.asked += 1
            key = evaluation_key(genotype, self.identity.basis)
            known = self.ledger.lookup(key)
            if known is None:
                return self._job(key, genotype, self.controller.origin, self.identity.basis)
            self._tell(known)
        return None

    def rescoring_jobs(self) -> list[Job]:
        """Jobs that score the front on all images of the search split, if it was scored on a part of them.

        Results already in the ledger are reused; evaluations that failed are tried again.
        """
        jobs = []
        for member in self.front() if self.settings.images else ():
            genotype = Genotype.from_dict(member["genotype"])
            key = evaluation_key(genotype, self.identity.basis_all)
            known = self.ledger.lookup(key)
            if known is None or known["status"] == "failed" or self._missing(known):
                jobs.append(self._job(key, genotype, "front", self.identity.basis_all))
            else:
                self.rescored.append(self._with_latency(known))
        return jobs

    def describe_unused(self) -> str:
        """Why evaluations in the ledger are of no use to this search, in one line; "" if all are of use."""
        basis = self.identity.basis
        unused = [r for r in self.ledger.records() if r.get("basis") != basis and r.get("origin") != "front"]
        if not unused:
            return ""
        before = unused[-1].get("rests_on", {})
        changed = [name for name, digest in self.identity.parts.items() if before.get(name) != digest]
        why = f"since then there are other {', '.join(changed)}" if before else "an earlier version made them"
        return f"{self.ledger.path}: {len(unused)} evaluations cannot be compared with those of this search: {why}"

    def _job(self, key: str, genotype: Genotype, origin: str, basis: str) -> Job:
        job = {"genotype": genotype.to_dict()}
        proposal = {"key": key, "basis": basis, "search": self.identity.search, "origin": origin}
        if basis == self.identity.basis:
            proposal["rests_on"] = self.identity.parts
        self._running[key] = {**proposal, "budget": self.identity.budget, **job}
        return key, job

    def learn(self, result: Result) -> None:
        """Record the result of a job; the controller is told, unless it scores the front again.

        A result that cannot be believed (an objective that is NaN, an AP of 7) is recorded as a failure.
        """
        record = self._running.pop(result.job_id)
        record |= {"seconds": round(result.seconds, 3), "worker": result.worker, "epoch": self.epoch}
        record |= {"time": round(time.time(), 3), "status": "ok", "metrics": {}}
        try:
            # A worker's result is believed no more than a line of a stranger's ledger.
            scored = record if result.error else checked(record | result.value)
            error = result.error or self._missing(scored)
        except (ValueError, UserError) as fault:
            error = f"the result cannot be believed: {fault}"
        record = record | {"status": "failed", "error": error} if error else scored
        # On disk first: a crash from here on loses nothing.
        self.ledger.append(record)
        if record["origin"] != "front":
            self._tell(record)
        elif not error:
            self.rescored.append(self._with_latency(record))

    def _missing(self, record: dict) -> str:
        """The objective or a cost that a record of status "ok" lacks, as a sentence; "" if it has all."""
        names = (self.settings.objective, *(cost for cost in self.settings.costs if cost != "latency_ms"))
        return next((f"{name} is not a number" for name in names if record["metrics"].get(name) is None), "")

    def _tell(self, record: dict) -> None:
        genotype = Genotype.from_dict(record["genotype"])
        if record["status"] == "ok" and not self._missing(record):
            record = self._with_latency(record)
            self.controller.tell(genotype, record["metrics"])
            self.scored.append(record)
        else:
            self.controller.tell(genotype, None)
        self.told.append(record)

    def _with_latency(self, record: dict) -> dict:
        latency = self.costs.latency(Genotype.from_dict(record["genotype"]))
        return {**record, "metrics": record["metrics"] | latency}

    def front(self) -> list[dict]:
        """The members of pareto.json, cheapest first."""
        return pareto_front(self.rescored or self.scored, self.settings.objective, self.settings.costs)

    def _rank(self, record: dict) -> tuple[float, float]:
        """Records are best first in this order: highest objective, the cheapest among equals."""
        return -record["metrics"][self.settings.objective], record["metrics"][self.settings.costs[0]]

    def best(self) -> dict:
        return min(self.rescored or self.scored, key=self._rank)

    def promising(self, count: int) -> list[dict]:
        """The records that a short training may choose among: the best of each image size, then the second of each.

        Inherited weights order networks of one image size better than the sizes among each other.
        """
        taken: Counter[int] = Counter()
        places = []
        for rank, record in enumerate(sorted(self.scored, key=self._rank)):
            size = record["genotype"]["image_size"]
            places.append((taken[size], rank, record))
            taken[size] += 1
        return [record for *_, record in sorted(places, key=lambda place: place[:2])[:count]]

    def winner(self) -> dict:
        """What best.json is: the finalist that a short training made the best, else the best with inherited weights."""
        return max(self.finalists(), key=self.trained_score, default=self.best())

    def trained_score(self, record: dict) -> float | None:
        """The objective of a finalist after its short training; None of any other record."""
        return self.trained.get(Genotype.from_dict(record["genotype"]))

    def finalists(self) -> list[dict]:
        """The trained ones, best first with inherited weights; scored on all images where the front was.

        None, if they were trained for another objective or before this search went on: its best is not among them then.
        """
        if not self.trained or not self.scored:
            return []
        first = min(self.scored, key=self._rank)  # `promising` begins with it
        records = (*self.scored, *self.rescored) if self.trained_score(first) is not None else ()
        last = {Genotype.from_dict(record["genotype"]): record for record in records}
        return sorted((last[genotype] for genotype in self.trained if genotype in last), key=self._rank)

    def describe_finalists(self) -> list[str]:
        """A line for each: what it costs, its score with inherited weights and after its short training."""
        objective = self.settings.objective
        winner, finalists = self.winner(), self.finalists()
        lines = []
        if self.trained and not finalists:
            return ["the trainings in finalists/ are of an earlier search: --finalists K trains those of this one"]
        for record in finalists:
            costs = f"{record['genotype']['image_size']} px, {cost_text(record['metrics'], self.settings.costs[0])}"
            scores = f"{record['metrics'][objective]:.4f} inherited, {self.trained_score(record):.4f} after"
            chosen = ", best.json" if record is winner else ""
            lines.append(f"finalist, {costs}: {objective} {scores} a short training{chosen}")
        return lines

    def top(self, count: int) -> list[dict]:
        """The `count` best, best first."""
        return sorted(self.scored, key=self._rank)[:count]

    def noise(self, record: dict) -> Noise | None:
        """None if the ledger lacks the scores on resamples of the images."""
        pair = (record, self.best())
        # Records of another search may be about another objective, and those of resamples = 0 have none.
        if any(each.get("objective") != self.settings.objective for each in pair):
            return None
        try:
            scores, best = (unpack(each["resampled"][str(each["images"])]) for each in pair)
        except (KeyError, TypeError, ValueError):  # a ledger may come from elsewhere
            return None
        if scores.shape != best.shape or not scores.size:
            return None
        behind = interval(best - scores)
        return Noise(interval(scores), behind, tie=behind[0] <= 0)

    def history(self) -> list[float]:
        """The best objective so far, after each evaluation that did not fail."""
        return list(itertools.accumulate((r["metrics"][self.settings.objective] for r in self.scored), max))

    def random_evaluations(self) -> list[dict]:
        """Every random proposal in the ledger that this search could have made, whichever search made it."""
        same = {"budget": self.identity.budget, "basis": self.identity.basis}
        found = self.ledger.records(origin="random", status="ok", **same)
        # A limit of milliseconds is another one by another table, whose hash is part of a search's name.
        return [r for r in found if self.identity.latency_table in r["search"] and not self._missing(r)]

    def control(self) -> list[BestOf]:
        """What random search would have found with as many evaluations, as far as the ledger can tell."""
        scores = [r["metrics"][self.settings.objective] for r in self.random_evaluations()]
        return best_of_random(scores, most=len(self.scored))


class _FrontTable(NamedTuple):
    supernet: str
    about: str
    rows: dict[str, dict[str, float]]


def front_table(folder: Path, front: Sequence[Genotype], supernet_sha256: str) -> str:
    """What --front-table measured of the members of this supernet's front, as text."""
    path = folder / "front_table.json"
    try:
        content = check(read_json(path, FRONT_TABLE), _FrontTable, str(path)) if path.is_file() else None
    except UserError as error:  # no reason to end a search
        return str(error)
    if content is None or content.supernet != supernet_sha256:
        return "none: see --front-table"
    rows = {k: content.rows[str(genotype)] for k, genotype in enumerate(front) if str(genotype) in content.rows}
    heads = ("index", *next(iter(rows.values()), ()))
    lines = ["".join(f"{value:>9.4g}" for value in (k, *row.values())) for k, row in rows.items()]
    return "\n".join([content.about, "".join(f"{head:>9}" for head in heads), *lines])


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
    m = len(values)
    last = min(m, most)
    ordered = np.sort(np.asarray(values, dtype=float))
    ranks = np.arange(m, 1, -1)  # C(i - 1, n) / C(i, n) = (i - n) / i, from i = m down
    found = []
    for n in sorted({round(n) for n in np.linspace(1, last, min(last, points))}):
        cdf = np.ones(m)  # cdf[i - 1]: the best is among the i smallest
        cdf[:-1] = np.cumprod(np.maximum(ranks - n, 0) / ranks)[::-1]
        low, high = (ordered[np.searchsorted(cdf, share - 1e-9)] for share in (TAIL, 1 - TAIL))
        found.append(BestOf(n, float(low), float(np.diff(cdf, prepend=0.0) @ ordered), float(high)))
    return found
