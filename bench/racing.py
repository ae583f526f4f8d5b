"""What racing saves and what it costs, on a table of real evaluations with their scores on every rung.

    python bench/racing.py --table runs/bccd/table.jsonl --out racing.json

Searches with and without racing from the same seeds, on the table of bench/search_table.py. Saved: images that need not
be scored (BatchNorm is re-estimated for every candidate all the same). Cost: whether a stopped candidate belonged to
the front of all that the search proposed, whether it can be told from that front at all, and what the search ends with.
Prints a table and writes JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.search_table import Table, hypervolume, read_table, table_parser
from lib.controllers import SpaceExhausted, make_controller, pareto_front
from lib.log import progress
from lib.scoring import has_lost, interval, rungs, unpack


def search(table: Table, name: str, seed: int, evaluations: int, racing: bool, options: dict) -> dict:
    """One search; the records proposed, those stopped, and the images scored."""
    controller = make_controller(name, table.space, seed, table.holds, objective=table.objective, **options)
    asked, stopped, images = [], [], 0
    for _ in range(evaluations):
        try:
            genotype = controller.ask()
        except SpaceExhausted:
            break
        record = table[genotype]
        asked.append(record)
        rivals = [table[g]["resampled"] for g in controller.rivals(record["metrics"])] if racing else []
        seen = scored_images(record, rivals)
        images += seen
        if seen < record["images"]:
            stopped.append(record)
            controller.tell_failure(genotype)
        else:
            controller.tell(genotype, record["metrics"])
    return {"asked": asked, "stopped": stopped, "images": images}


def scored_images(record: dict, rivals: list[dict]) -> int:
    """How many of the images are scored before the candidate has lost, or all of them."""
    for n in rungs(record["images"])[:-1]:
        if has_lost(unpack(record["resampled"][str(n)]), n, rivals):
            return n
    return record["images"]


def compare(table: Table, name: str, seed: int, evaluations: int, options: dict) -> dict:
    full, raced = (search(table, name, seed, evaluations, racing, options) for racing in (False, True))
    stopped = {r["key"] for r in raced["stopped"]}
    scored = [r for r in raced["asked"] if r["key"] not in stopped]
    would_be = pareto_front(raced["asked"], table.objective, ["flops"])
    lost = [r for r in would_be if r["key"] in stopped]
    fronts = [pareto_front(records, table.objective, ["flops"]) for records in (full["asked"], scored)]
    return {
        "stopped": len(stopped) / len(raced["asked"]),
        "images_saved": 1 - raced["images"] / sum(r["images"] for r in raced["asked"]),
        "front": len(would_be),
        "lost_from_front": len(lost),
        "lost_clearly": sum(clearly_better(r, scored) for r in lost),
        "best_less_full": table.best(scored) - table.best(full["asked"]),
        "hypervolume_of_full": hypervolume(fronts[1], table) / hypervolume(fronts[0], table),
    }


def clearly_better(record: dict, scored: list[dict]) -> bool:
    """Whether a lost member of the front is beyond the noise better than all of the scored that cost no more."""
    own = unpack(record["resampled"][str(record["images"])])
    rivals = [r for r in scored if r["metrics"]["flops"] <= record["metrics"]["flops"]]
    return all(interval(own - unpack(r["resampled"][str(r["images"])])).low > 0 for r in rivals)


def main() -> None:
    parser = table_parser(__doc__, seeds=20, out="racing.json")
    parser.add_argument("--evaluations", type=int, default=200)
    args = parser.parse_args()
    table, options = read_table(args)
    options["costs"] = ["flops"]
    print(f"\n| {args.evaluations} evaluations, mean of {args.seeds} seeds | stopped | images saved ", end="")
    print("| lost from the front | of them beyond noise | best AP less full search's (95%) ", end="")
    print("| hypervolume, of full search's (95%) |")
    print("|---" * 7 + "|")
    results = {}
    for name in ("random", "evo", "pareto-evo"):
        seeds = progress(range(args.seeds), name)
        runs = [compare(table, name, seed, args.evaluations, options) for seed in seeds]
        mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        total = {key: sum(run[key] for run in runs) for key in ("front", "lost_from_front", "lost_clearly")}
        draws = np.random.default_rng(0).integers(0, len(runs), (10_000, len(runs)))
        ends = {
            key: np.quantile(np.array([run[key] for run in runs])[draws].mean(1), [0.025, 0.975]).tolist()
            for key in ("best_less_full", "hypervolume_of_full")
        }
        results[name] = {"mean": mean, "total": total, "intervals": ends, "runs": runs}
        best, volume = ends["best_less_full"], ends["hypervolume_of_full"]
        print(f"| {name} | {mean['stopped']:.1%} | {mean['images_saved']:.1%} ", end="")
        print(f"| {total['lost_from_front']} of {total['front']} | {total['lost_clearly']} ", end="")
        print(f"| {mean['best_less_full']:+.4f} ({best[0]:+.4f} to {best[1]:+.4f}) ", end="")
        print(f"| {mean['hypervolume_of_full']:.3f} ({volume[0]:.3f} to {volume[1]:.3f}) |")
    args.out.write_text(
        json.dumps({"table": table.describe(), "options": options, "searches": results}, indent=1) + "\n"
    )
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
