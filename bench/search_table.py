"""Score every sub-network of a small space with inherited weights: the table that bench/search_quality.py searches.

    python bench/search_table.py --supernet runs/bccd/supernet --gpus cpu,cpu --out runs/bccd/table.jsonl

The small space is what the supernet opened, cut down from the input on until `--most` sub-networks are left: kernels at
their largest, expand ratios at both ends, two depths. Run again after an interruption, it goes on. Each line holds the
metrics, and the scores on resamples of the images by which racing decides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import checkpoint
from lib.config import to_dict
from lib.datasets import load_records, load_split
from lib.dispatcher import Dispatcher
from lib.evolution import every_genotype
from lib.genotype import BlockChoices, SearchSpace, StageChoices
from lib.ledger import Ledger
from lib.models import load_supernet
from lib.runlog import progress
from lib.runtime import run
from lib.scoring import prepare_scoring_data, save_scoring_data, scoring_worker
from lib.workers import pick_workers


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
    records = load_records(config.data, "train", config.seed)
    train, search = load_split(args.supernet / "split.json", records)
    genotypes = list(every_genotype(small_space(supernet.space, args.most)))
    images = args.out.with_suffix(".images.pt")
    save_scoring_data(prepare_scoring_data(records, train, search, config), images)
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
