"""One search as it stands, for those who write about it: its front, its best, its noise, beside random search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.bootstrap import Interval, interval, unpack
from lib.config import SearchConfig
from lib.genotype import SearchSpace
from lib.pareto import best_record, pareto_front
from lib.search_stats import BestOf, best_of_random, best_so_far


class Noise(NamedTuple):
    """What the score of one sub-network is worth on so few images."""

    interval: Interval  # of its score
    behind: Interval  # of the best one's score less its own, on the same resamples
    tie: bool  # not clearly behind the best


@dataclass(frozen=True)
class SearchRun:
    """Records of the ledger, in the order they came.

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
