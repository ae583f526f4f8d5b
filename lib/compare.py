"""Does the search pay? Whom the found network is compared with, by which short recipe, and the result as a table."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence

from lib.config import Config
from lib.errors import UserError
from lib.genotype import Genotype, SearchSpace

SIMILAR = 0.1  # random contestants' multiply-adds differ from the found one's by at most this share of them
TRIES = 2000
SHORT = 4  # of `final.epochs`, one in so many
STARTS = {"inherited": "inherited, no training", "fine_tuned": "fine-tuned", "scratch": "from scratch"}


def contestants(
    space: SearchSpace,
    flops: Callable[[Genotype], float],
    found: Genotype,
    pretrained: Genotype | None,
    count: int,
    seed: int,
) -> dict[str, Genotype]:
    """The found one, the pretrained one, the ends of the space, and `count` random ones of similar multiply-adds.

    No genotype is there twice: one that plays two parts has both names. Raises UserError if `count` cannot be found.
    """
    named = {"found": found, "largest": space.largest(), "smallest": space.smallest()}
    if pretrained is not None:
        named["pretrained"] = pretrained
    names: dict[Genotype, list[str]] = {}
    for name, genotype in named.items():
        names.setdefault(genotype, []).append(name)
    limits = (1 - SIMILAR) * flops(found), (1 + SIMILAR) * flops(found)
    drawn = (g for g in _draws(space, random.Random(seed)) if limits[0] <= flops(g) <= limits[1])
    number = 0
    while number < count:
        genotype = next(drawn, None)
        if genotype is None:
            raise UserError(
                f"--compare-random {count}: only {number} other sub-networks have multiply-adds within "
                f"{SIMILAR:.0%} of the found one's"
            )
        if genotype not in names:
            number += 1
            names[genotype] = [f"random {number}"]
    return {" and ".join(parts): genotype for genotype, parts in names.items()}


def _draws(space: SearchSpace, rng: random.Random) -> Iterator[Genotype]:
    """Uniform ones first; near an end of the space, which these seldom reach, it takes crossovers with the end."""
    ends = space.smallest(), space.largest()
    yield from (space.sample(rng) for _ in range(TRIES))
    yield from (space.crossover(space.sample(rng), ends[i % 2], rng) for i in range(TRIES))


def shortened(config: Config, epochs: int | None) -> Config:
    """The recipe of stage 3 in `epochs` (None: a quarter of its own), all that it times by epoch or step in proportion.

    It is evaluated after the last epoch only, so that no choice on the test set flatters the noisier of two trainings.
    """
    if epochs is not None and epochs < 1:
        raise UserError(f"--compare-epochs {epochs}: expected at least 1")
    config = copy.deepcopy(config)
    final, schedule = config.final, config.final.lr_schedule
    epochs = epochs or max(1, round(final.epochs / SHORT))
    ratio = epochs / final.epochs
    schedule.warmup_steps = round(schedule.warmup_steps * ratio)
    schedule.milestones = [max(1, round(epoch * ratio)) for epoch in schedule.milestones]
    if schedule.T_0 != "auto":
        schedule.T_0 = max(1, round(schedule.T_0 * ratio))
    weight = final.distill.weight
    weight.boundary = [max(round(1 + (b - 1) * ratio), i + 1) for i, b in enumerate(weight.boundary)]
    final.epochs = final.eval_every = epochs
    final.save_every = 0
    return config


def refuse_other_plan(known: dict, plan: dict, where: object) -> None:
    """Raise UserError, naming the first difference, if a comparison that is to go on was begun by another plan."""
    for key in plan:
        if known.get(key) != plan[key]:
            raise UserError(f"{where}: that comparison has another '{key}'; start this one elsewhere with --train-dir")


def as_markdown(rows: Sequence[dict], epochs: int) -> str:
    """The table of compare.md, AP (AP50) on the test set, and what the search gave over chance."""
    heads = ["network", "M multiply-adds", "M parameters", "ms before NMS", STARTS["inherited"]]
    heads += [f"{STARTS[start]}, {epochs} epoch{'s' * (epochs > 1)}" for start in ("fine_tuned", "scratch")]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        costs = f"{row['flops'] / 1e6:.1f} | {row['params'] / 1e6:.3f} | {row['latency_ms']:.2f}"
        scores = " | ".join(f"{row[start]['AP']:.3f} ({row[start]['AP50']:.3f})" for start in STARTS)
        lines.append(f"| {row['name']} | {costs} | {scores} |")
    return "\n".join([*lines, "", *gains(rows)]) + "\n"


def gains(rows: Sequence[dict]) -> list[str]:
    """The found network's AP less the mean of the random ones', a line for each start; none without random ones."""
    found = next(row for row in rows if "found" in row["name"].split(" and "))
    others = [row for row in rows if row["name"].startswith("random ")]
    if not others:
        return []
    lines = []
    for start, words in STARTS.items():
        values = [row[start]["AP"] for row in others]
        mean = sum(values) / len(values)
        lines.append(
            f"- {words}: found {found[start]['AP']:.3f}, random {mean:.3f} on average ({min(values):.3f} to "
            f"{max(values):.3f}): {found[start]['AP'] - mean:+.3f}"
        )
    return lines
