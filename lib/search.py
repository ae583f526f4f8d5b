"""A search between its controller and its ledger: what to evaluate next, and what is learnt from a result."""

from __future__ import annotations

import time
from pathlib import Path

from lib import checkpoint
from lib.budget import counts_latency, limits_of
from lib.config import Config
from lib.evolution import Controller, RandomSearch, SpaceExhausted
from lib.genotype import Genotype
from lib.latency import Coster
from lib.ledger import Ledger, evaluation_basis, evaluation_key
from lib.pool import Result
from lib.runlog import say
from lib.scoring import SCORING_VERSION
from lib.search_run import SearchRun


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
