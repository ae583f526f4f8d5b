"""Score every sub-network of a small space with inherited weights: the table that searches are measured on.

    python bench/search_table.py --supernet runs/bccd/supernet --gpus cpu,cpu --out runs/bccd/table.jsonl

The small space is what the supernet opened, cut down from the input on until `--most` sub-networks are left: kernels at
their largest, expand ratios at both ends, two depths. Run again after an interruption, it goes on. Each line holds the
metrics, and the scores on resamples of the images by which racing decides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import checkpoint
from lib.config_io import to_dict
from lib.controllers import every_genotype
from lib.datasets import load_annotations, load_split
from lib.detector import load_supernet
from lib.dispatcher import Dispatcher
from lib.genotype import Block, BlockChoices, Genotype, SearchSpace, StageChoices
from lib.ledger import Ledger
from lib.log import progress
from lib.runtime import pick_workers, run
from lib.scoring import prepare_scoring_data, save_scoring_data, scoring_worker


def small_space(space: SearchSpace, most: int) -> SearchSpace:
    """A part of `space` of at most `most` genotypes."""
    ends = [StageChoices(s.depth[:2], BlockChoices(_ends(s.block.expand), s.block.kernel[-1:])) for s in space.stages]
    heads = tuple(BlockChoices(b.expand[-1:], b.kernel[-1:]) for b in space.head)
    small = replace(space, image_size=space.image_size[-1:], stages=tuple(ends), head=heads)
    for stages in _fixed_from_the_input(small.stages):
        if small.size() <= most:
            break
        small = replace(small, stages=stages)
    return small


def _ends(options: tuple) -> tuple:
    return tuple(sorted({options[0], options[-1]}))


def _fixed_from_the_input(stages: tuple[StageChoices, ...]) -> Iterator[tuple[StageChoices, ...]]:
    """Stages with ever more choices fixed at their largest: widths of the first half, all depths, the other widths."""
    half = len(stages) // 2
    order = [(i, "expand") for i in range(half)] + [(i, "depth") for i in range(len(stages))]
    for i, what in [*order, *((i, "expand") for i in range(half, len(stages)))]:
        stage = stages[i]
        if what == "depth":
            stage = replace(stage, depth=stage.depth[-1:])
        else:
            stage = replace(stage, block=stage.block._replace(expand=stage.block.expand[-1:]))
        stages = (*stages[:i], stage, *stages[i + 1 :])
        yield stages


class Table:
    """The annotations of a table by genotype, as a search looks them up."""

    def __init__(self, annotations: list[dict], objective: str):
        self.annotations, self.objective = annotations, objective
        self._by_genotype = {Genotype.from_dict(r["genotype"]): r for r in annotations}
        self.space = spanned_space(list(self._by_genotype))

    @classmethod
    def read(cls, path: Path, objective: str) -> Table:
        return cls([json.loads(line) for line in path.read_text().splitlines()], objective)

    def __getitem__(self, genotype: Genotype) -> dict:
        return self._by_genotype[genotype]

    def holds(self, genotype: Genotype) -> bool:
        return genotype in self._by_genotype

    def best(self, annotations: list[dict]) -> float:
        return max(r["metrics"][self.objective] for r in annotations)

    def describe(self) -> str:
        scores = [r["metrics"][self.objective] for r in self.annotations]
        flops = [r["metrics"]["flops"] / 1e6 for r in self.annotations]
        return (
            f"{self.objective} {min(scores):.4f} to {max(scores):.4f} on {self.annotations[0]['images']} images, "
            f"{min(flops):.0f} to {max(flops):.0f} M multiply-adds"
        )


def table_parser(doc: str, seeds: int, out: str) -> argparse.ArgumentParser:
    """The flags of a bench that searches a table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--objective", default="AP")
    parser.add_argument("--population-size", type=int, default=32)
    parser.add_argument("--tournament-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def read_table(args: argparse.Namespace) -> tuple[Table, dict]:
    """The table of `--table`, and the options of the controllers that search it."""
    table = Table.read(args.table, args.objective)
    print(f"{args.table}: {len(table.annotations)} sub-networks, {table.describe()}")
    return table, {"population_size": args.population_size, "tournament_size": args.tournament_size}


def spanned_space(genotypes: Sequence[Genotype]) -> SearchSpace:
    """The smallest space with these choices in each stage."""

    def choices(blocks: Iterable[Block]) -> BlockChoices:
        expand, kernel = zip(*blocks, strict=True)
        return BlockChoices(tuple(sorted(set(expand))), tuple(sorted(set(kernel))))

    stages = []
    for i in range(len(genotypes[0].stages)):
        depths = tuple(sorted({len(g.stages[i]) for g in genotypes}))
        stages.append(StageChoices(depths, choices(block for g in genotypes for block in g.stages[i])))
    heads = tuple(choices(g.head[i] for g in genotypes) for i in range(len(genotypes[0].head)))
    sizes = tuple(sorted({g.image_size for g in genotypes}))
    return SearchSpace(genotypes[0].backbone_type, sizes, tuple(stages), heads)


def hypervolume(front: Sequence[dict], table: Table) -> float:
    """Area between a front, cheapest first, and the table's worst: objective against multiply-adds, each 0 to 1."""
    scores, flops = ([r["metrics"][name] for r in table.annotations] for name in (table.objective, "flops"))
    low, dear = min(scores), max(flops)
    volume, reached = 0.0, low
    for metrics in (r["metrics"] for r in front):
        volume += max(metrics[table.objective] - reached, 0) * (dear - metrics["flops"])
        reached = max(reached, metrics[table.objective])
    return volume / ((max(scores) - low) * (dear - min(flops)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", type=Path, required=True, help="folder of a supernet run")
    parser.add_argument("--most", type=int, default=1600, help="sub-networks to score (default: %(default)s)")
    parser.add_argument("--gpus", default="cpu", help="workers, as in async_search.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    supernet = load_supernet(args.supernet / "last.pt")
    config = supernet.config
    config.data.classes = list(supernet.classes)
    annotations = load_annotations(config.data, "train")
    train, search = load_split(args.supernet / "split.json", annotations)
    genotypes = list(every_genotype(small_space(supernet.space, args.most)))
    images = args.out.with_suffix(".images.pt")
    save_scoring_data(prepare_scoring_data(annotations, train, search, config), images)
    setup = (str(args.supernet / "last.pt"), str(images), to_dict(config))
    devices, threads = pick_workers(args.gpus, config)
    with Ledger(args.out) as ledger, Dispatcher(scoring_worker, setup, devices, threads_per_worker=threads) as pool:
        missing = {str(genotype): genotype for genotype in genotypes if ledger.lookup(str(genotype)) is None}
        for key, genotype in missing.items():
            pool.submit(key, {"genotype": genotype.to_dict(), "rivals": []})
        bar = progress(None, "table", total=len(genotypes), initial=len(genotypes) - len(missing))
        while pool.pending:
            for result in pool.results():
                if result.error:
                    sys.exit(result.error)
                genotype = missing[result.job_id].to_dict()
                ledger.append({"key": result.job_id, "genotype": genotype, "seconds": result.seconds, **result.value})
                bar.update()
        bar.close()
    images.unlink()
    print(
        f"wrote {args.out}: {len(genotypes)} sub-networks; supernet {checkpoint.sha256(args.supernet / 'last.pt')[:12]}"
    )


if __name__ == "__main__":
    run(main)
