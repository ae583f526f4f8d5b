"""What guidance is worth: the evaluations that each controller needs, on a table of all sub-networks of a small space.

    python bench/search_quality.py --supernet runs/bccd/supernet --gpus cpu,cpu

The table holds every sub-network of a small space, scored with inherited weights: once, a second call reuses it. The
space is what the supernet opened, cut down from the input on until `--most` sub-networks are left:
kernels at their largest, expand ratios at both ends, two depths.

A search of the table costs nothing, so it is repeated with seeds 0, 1, 2, ... and told one result at a time. Counted
are the evaluations until the best AP found is 99% of the table's best, until one of the table's three best is found,
and until the front covers 99% of the hypervolume of the table's front (AP against multiply-adds, relative to the
table's worst). Prints medians with 95% bootstrap intervals over the seeds.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import common
import numpy as np

from lib.checkpoint import sha256
from lib.config import SearchConfig
from lib.config_io import to_dict
from lib.controllers import SpaceExhausted, make_controller, pareto_front
from lib.detector import load_supernet
from lib.dispatcher import Dispatcher
from lib.genotype import BlockChoices, Genotype, SearchSpace, StageChoices, all_blocks
from lib.ledger import Ledger
from lib.log import progress
from lib.runtime import pick_workers, run
from lib.scoring import save_scoring_data, scoring_worker

CONTROLLERS = ("random", "evo", "pareto-evo", "surrogate")
COSTS = ["flops"]
DRAWS = 10_000  # of the bootstrap


def main() -> None:
    parser = common.bench_parser(__doc__, "search_quality.json")
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a supernet run")
    parser.add_argument("--table", type=Path, help="JSON lines to write or reuse (default: SUPERNET/table.jsonl)")
    parser.add_argument("--most", type=int, default=1600, help="sub-networks in the table (default: 1600)")
    parser.add_argument("--gpus", default="cpu", help="workers that score, as in async_search.py")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--population-size", type=int, default=32)
    parser.add_argument("--tournament-size", type=int, default=8)
    args = parser.parse_args()
    args.table = args.table or args.supernet / "table.jsonl"
    table = Table(args.table, complete_table(args))
    print(f"{len(table.records)} sub-networks, AP {table.scores[0]:.4f} to {table.scores[-1]:.4f}")
    settings = SearchConfig(population_size=args.population_size, tournament_size=args.tournament_size, costs=COSTS)

    needed: dict[str, list[dict[str, int]]] = {name: [] for name in CONTROLLERS}
    for seed in progress(range(args.seeds), "seeds"):
        for name in CONTROLLERS:
            needed[name].append(evaluations_needed(table, replace(settings, controller=name), seed))
    rows = []
    for goal in needed["random"][0]:
        medians = {name: median_interval([run[goal] for run in needed[name]]) for name in CONTROLLERS}
        rows.append({"evaluations until": goal, **medians})
    common.report(args, rows, scores=table.scores, needed=needed)


def complete_table(args: argparse.Namespace) -> SearchSpace:
    """Score the sub-networks of the small space that the table lacks; return that space."""
    supernet = load_supernet(args.supernet / "last.pt")
    space = small_space(supernet.space, args.most)
    genotypes = {str(genotype): genotype for genotype in every_genotype(space)}
    images = args.table.with_suffix(".images.pt")
    save_scoring_data(common.search_split_data(supernet, args.supernet), images)
    path = args.supernet / "last.pt"
    setup = (str(path), sha256(path), str(images), to_dict(supernet.config))
    devices, threads = pick_workers(args.gpus, supernet.config)
    with Ledger(args.table) as ledger, Dispatcher(scoring_worker, setup, devices, threads_per_worker=threads) as pool:
        missing = [key for key in genotypes if ledger.lookup(key) is None]
        for key in missing:
            pool.submit(key, {"genotype": genotypes[key].to_dict()})
        with progress(None, "table", total=len(genotypes), initial=len(genotypes) - len(missing)) as bar:
            while pool.pending:
                for result in pool.results():
                    if result.error:
                        sys.exit(result.error)
                    genotype = genotypes[result.job_id].to_dict()
                    ledger.append({"key": result.job_id, "status": "ok", "genotype": genotype, **result.value})
                    bar.update()
    images.unlink()
    return space


def small_space(space: SearchSpace, most: int) -> SearchSpace:
    """A part of `space` of at most `most` genotypes, if fixing choices reaches that."""
    stages = []
    for stage in space.stages:
        ends = tuple(sorted({stage.block.expand[0], stage.block.expand[-1]}))
        stages.append(StageChoices(stage.depth[:2], BlockChoices(ends, stage.block.kernel[-1:])))
    heads = tuple(BlockChoices(block.expand[-1:], block.kernel[-1:]) for block in space.head)
    small = replace(space, image_size=space.image_size[-1:], stages=tuple(stages), head=heads)
    for fixed in fixed_from_the_input(small.stages):
        if small.size() <= most:
            break
        small = replace(small, stages=fixed)
    return small


def fixed_from_the_input(stages: tuple[StageChoices, ...]) -> Iterator[tuple[StageChoices, ...]]:
    """Stages with ever more choices fixed at their largest: widths of the first half, all depths, the other widths."""
    half = len(stages) // 2
    widths = [(i, "expand") for i in range(len(stages))]
    depths = [(i, "depth") for i in range(len(stages))]
    for i, what in [*widths[:half], *depths, *widths[half:]]:
        stage = stages[i]
        if what == "depth":
            stage = replace(stage, depth=stage.depth[-1:])
        else:
            stage = replace(stage, block=stage.block._replace(expand=stage.block.expand[-1:]))
        stages = (*stages[:i], stage, *stages[i + 1 :])
        yield stages


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


class Table:
    """The records of a table of `space` by genotype, as a search looks them up."""

    def __init__(self, path: Path, space: SearchSpace):
        self.space = space
        self.records = [json.loads(line) for line in path.read_text().splitlines()]
        self._by_genotype = {Genotype.from_dict(record["genotype"]): record for record in self.records}
        self.scores = sorted(record["metrics"]["AP"] for record in self.records)
        self.flops = sorted(record["metrics"]["flops"] for record in self.records)

    def __getitem__(self, genotype: Genotype) -> dict:
        return self._by_genotype[genotype]

    def hypervolume(self, front: Sequence[dict]) -> float:
        """Area between a front, cheapest first, and the table's worst: AP against multiply-adds, both from 0 to 1."""
        low, high = self.scores[0], self.flops[-1]
        volume, reached = 0.0, low
        for metrics in (record["metrics"] for record in front):
            volume += max(metrics["AP"] - reached, 0) * (high - metrics["flops"])
            reached = max(reached, metrics["AP"])
        return volume / ((self.scores[-1] - low) * (high - self.flops[0]))


def evaluations_needed(table: Table, settings: SearchConfig, seed: int) -> dict[str, int]:
    """Evaluations until each goal is met; at the latest when the search has seen the whole table."""
    third, _, best = table.scores[-3:]
    all_covered = table.hypervolume(pareto_front(table.records, "AP", COSTS))
    controller = make_controller(settings, table.space, seed, lambda _: True, costs=lambda g: table[g]["metrics"])
    found: dict[str, int] = {}
    front: list[dict] = []
    for count in range(1, len(table.records) + 1):
        try:
            genotype = controller.ask()
        except SpaceExhausted:
            break
        record = table[genotype]
        controller.tell(genotype, record["metrics"])
        front = pareto_front([*front, record], "AP", COSTS)
        top = max(member["metrics"]["AP"] for member in front)
        met = {
            "AP is 99% of the best": top >= 0.99 * best,
            "one of the three best is found": top >= third,
            "the front covers 99% of the hypervolume": table.hypervolume(front) >= 0.99 * all_covered,
        }
        for goal in met:
            if met[goal]:
                found.setdefault(goal, count)
        if len(found) == len(met):
            break
    return found


def median_interval(values: Sequence[int]) -> str:
    """Median (its 95% bootstrap interval)."""
    medians = np.median(np.random.default_rng(0).choice(values, (DRAWS, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return f"{np.median(values):.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    run(main)
