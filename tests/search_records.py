"""Made-up records of a search, for the tests of what is written about it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lib.config import Config, SearchConfig
from lib.controllers import make_controller
from lib.genotype import BlockChoices, Genotype, SearchSpace, StageChoices, all_blocks
from lib.scoring import pack
from lib.search import Identity, Search

STAGE = StageChoices((1, 2, 3), BlockChoices((3, 4, 6), (3, 5, 7)))
SPACE = SearchSpace("mbv3_backbone", (64, 96), (STAGE,) * 4, (BlockChoices((0.5,), (3,)),))


def everything_fits(genotype) -> bool:
    return True


def every_genotype(space: SearchSpace) -> Iterator[Genotype]:
    """All `space.size()` genotypes of the space."""
    stages = []
    for choices in space.stages:
        blocks = all_blocks(choices.block)
        stages.append([stage for depth in choices.depth for stage in itertools.product(blocks, repeat=depth)])
    heads = map(all_blocks, space.head)
    parts = space.image_size, itertools.product(*stages), itertools.product(*heads)
    for image_size, chosen, head in itertools.product(*parts):
        yield Genotype(image_size, space.backbone_type, chosen, head)


def make_identity(**fields) -> Identity:
    defaults = {"search": "this", "supernet": Path("runs/a/supernet/last.pt"), "supernet_sha256": "abc"}
    return Identity(**{**defaults, "budget": {}, "basis": "b", "basis_all": "all", **fields})


def make_records(count: int, controller: str = "evo", search: str = "this", failed=lambda i: False, seed: int = 0):
    """Records of a search whose AP grows with cost, with some noise."""
    rng = random.Random(seed)
    asked = make_controller(SearchConfig(controller=controller, population_size=20), SPACE, seed, everything_fits)
    records = []
    for i in range(count):
        genotype = asked.ask()
        flops = 1e6 * sum(b.expand * b.kernel for stage in genotype.stages for b in stage)
        ap = 0.3 + flops / 1e9 + rng.gauss(0, 0.02)
        metrics = {"AP": ap, "AP50": 0.6, "mAP": None, "flops": flops, "params": 7e6}
        record = {"key": f"{search}-{i}", "search": search, "origin": asked.origin, "genotype": genotype.to_dict()}
        record |= {"status": "ok", "metrics": metrics, "seconds": 2.0, "worker": f"cpu#{i % 2}", "time": 1e9 + i}
        if failed(i):
            record |= {"status": "failed", "metrics": {}, "error": "Traceback\nRuntimeError: <out of memory> & more"}
            asked.tell(genotype, None)
        else:
            asked.tell(genotype, metrics)
        records.append(record)
    return records


def with_resamples(records: list[dict]) -> list[dict]:
    """The same, each with its AP on 200 resamples of 40 images."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.02, 200)
    for record in records:
        scores = np.clip(record["metrics"]["AP"] + common + rng.normal(0, 0.005, 200), 0, 1)
        record |= {"images": 40, "objective": "AP", "resampled": {"40": pack(scores)}}
    return records


def make_search(told: list[dict], others: list[dict] = (), total: int = 100, budget: dict = {}, **settings) -> Search:  # noqa: B006
    """A search that has learnt from `told`, in whose ledger there are `others` too."""

    def records(origin: str, status: str, **_) -> list[dict]:
        return [r for r in (*told, *others) if r.get("origin") == origin and r["status"] == status]

    config = Config(name="a <b>", search=SearchConfig(**settings))
    controller = make_controller(config.search, SPACE, 0, everything_fits)
    search = Search(controller, SimpleNamespace(records=records), config, None, make_identity(budget=budget), 1)
    for record in told:
        search.told.append(record)
    search.scored = [record for record in told if record["status"] == "ok"]
    search.total = total
    return search
