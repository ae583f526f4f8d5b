"""What guidance is worth: evaluations that each controller needs, on a table of real evaluations.

    python bench/search_quality.py --table runs/bccd/table.jsonl --out search_quality.json

The table (bench/search_table.py) holds every sub-network of a small space, so a search costs nothing and can be
repeated. A controller is asked and told one at a time, with seeds 0, 1, 2, ...; counted are the evaluations until the
best one found has 99% of the table's best objective, until it is among the three best of the table, and until the front
covers 99% of the hypervolume of the table's front (objective against multiply-adds, both over the table's worst).
Prints medians with 95% bootstrap intervals over the seeds, and ratios to random search, and writes JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.search_table import Table, hypervolume, read_table, table_parser
from lib.controllers import SpaceExhausted, make_controller, pareto_front
from lib.log import progress

CONTROLLERS = ("random", "evo", "pareto-evo")


def evaluations_needed(table: Table, name: str, seed: int, options: dict) -> dict[str, int]:
    """Evaluations until each goal is met; a search ends at the latest when it has seen the whole table."""
    best = table.best(table.records)
    scores = sorted((r["metrics"][table.objective] for r in table.records), reverse=True)
    goals = {"99% of the best": 0.99 * best, "one of the three best": scores[2]}
    whole = hypervolume(pareto_front(table.records, table.objective, ["flops"]), table)
    controller = make_controller(name, table.space, seed, table.holds, objective=table.objective, **options)
    found: dict[str, int] = {}
    front: list[dict] = []
    top = 0.0
    for count in range(1, len(table.records) + 1):
        try:
            genotype = controller.ask()
        except SpaceExhausted:
            break
        record = table[genotype]
        controller.tell(genotype, record["metrics"])
        top = max(top, record["metrics"][table.objective])
        front = pareto_front([*front, record], table.objective, ["flops"])
        for goal, value in goals.items():
            if top >= value:
                found.setdefault(goal, count)
        if "99% of the hypervolume" not in found and hypervolume(front, table) >= 0.99 * whole:
            found["99% of the hypervolume"] = count
        if len(found) == 3:
            break
    return found


def median_interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Median, and its 95% bootstrap interval."""
    values = np.asarray(values, float)
    medians = np.median(np.random.default_rng(0).choice(values, (draws, len(values))), axis=1)
    return float(np.median(values)), *(float(q) for q in np.quantile(medians, [0.025, 0.975]))


def ratio_interval(values: Sequence[float], others: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Ratio of the medians, and its 95% bootstrap interval, seeds drawn for both on their own."""
    rng = np.random.default_rng(0)
    a, b = (np.median(rng.choice(np.asarray(v, float), (draws, len(v))), axis=1) for v in (values, others))
    return float(np.median(values) / np.median(others)), *(float(q) for q in np.quantile(a / b, [0.025, 0.975]))


def main() -> None:
    parser = table_parser(__doc__, seeds=40, out="search_quality.json")
    args = parser.parse_args()
    table, options = read_table(args)
    needed = {name: [] for name in CONTROLLERS}
    for seed in progress(range(args.seeds), "seeds"):
        for name in CONTROLLERS:
            needed[name].append(evaluations_needed(table, name, seed, options))
    goals = list(needed["random"][0])
    rows = {}
    print(f"\n| evaluations until, median of {args.seeds} seeds (95%) | {' | '.join(CONTROLLERS)} |")
    print("|---" * (len(CONTROLLERS) + 1) + "|")
    for goal in goals:
        by_name = {name: [run[goal] for run in needed[name]] for name in CONTROLLERS}
        rows[goal] = {
            name: {
                "evaluations": values,
                "median": median_interval(values),
                "of_random": ratio_interval(values, by_name["random"]),
            }
            for name, values in by_name.items()
        }
        cells = []
        for name in CONTROLLERS:
            median, low, high = rows[goal][name]["median"]
            ratio, least, most = rows[goal][name]["of_random"]
            of_random = "" if name == "random" else f"; {ratio:.2f} ({least:.2f} to {most:.2f}) of random"
            cells.append(f"{median:.0f} ({low:.0f} to {high:.0f}){of_random}")
        print(f"| {goal} | {' | '.join(cells)} |")
    args.out.write_text(json.dumps({"table": table.describe(), "options": options, "goals": rows}, indent=1) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
