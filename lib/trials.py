"""Does the search pay? Whom the found network is compared with, by which short recipe, and the result as a table.

The contestants of --compare: each trained by the short recipe from both starts, what is done never done again.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from lib import checkpoint
from lib.annotations import Annotations
from lib.checkpoint import code_revision
from lib.config import Config
from lib.config_io import to_dict
from lib.datasets import configured_train_loader
from lib.detector import ElasticSSD, Supernet, recalibrate
from lib.errors import UserError
from lib.final_training import Start, evaluate, find_teacher, make_training, some_images
from lib.genotype import Genotype, SearchSpace
from lib.latency import ROUNDS, FusedDetectors, cpu_threads, time_detectors
from lib.log import _save, finite, say
from lib.runtime import device_name, seed_everything


def plot_comparison(rows: Sequence[dict], starts: dict[str, str], picture: Path) -> None:
    """AP of each contestant of --compare against multiply-adds and latency, a marker for each of its starts."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), sharey=True)
    costs = ("flops", "multiply-adds"), ("latency_ms", "measured latency before NMS [ms]")
    for axis, (cost, label) in zip(axes, costs, strict=True):
        for (start, words), marker in zip(starts.items(), "o^x", strict=True):
            axis.plot([r[cost] for r in rows], [r[start]["AP"] for r in rows], marker, label=words)
        for i, row in enumerate(sorted(rows, key=lambda row: row[cost])):
            place = row[cost], max(row[start]["AP"] for start in starts)
            above = 8 + 11 * (i % 3)  # neighbours may cost nearly the same
            axis.annotate(row["name"], place, (0, above), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xlabel(label)
        axis.margins(0.12)
    axes[0].set_ylabel("AP on the test set")
    axes[0].legend(fontsize=8)
    _save(figure, picture)


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


class Contest:
    """A comparison in `folder`: plan.json says what is compared, and each contestant's folder has its result.json.

    `config` holds the short recipe. Raises UserError if the folder holds a comparison by another plan.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        supernet: Supernet,
        supernet_path: Path,
        contestants: Mapping[str, Genotype],
        annotations: Annotations,
        test: Annotations,
        device: torch.device,
    ):
        self.config, self.folder, self.contestants = config, folder, contestants
        self.supernet, self.annotations, self.test, self.device = supernet, annotations, test, device
        plan = {
            "contestants": {name: genotype.to_dict() for name, genotype in contestants.items()},
            "supernet": checkpoint.sha256(supernet_path),
            "data": {"train": annotations.fingerprint(), "test": test.fingerprint()},
            "config": to_dict(config) | {"data": {}},  # a folder may move: the fingerprints count
        }
        self.plan = json.loads(json.dumps(plan))
        if (folder / "plan.json").exists():
            refuse_other_plan(json.loads((folder / "plan.json").read_text()), self.plan, folder)
        checkpoint.write_text(folder / "plan.json", json.dumps(self.plan, indent=1) + "\n")

    def run(self) -> bool:
        """Have every contestant's result; whether it came to that before a signal to stop."""
        for number, (name, genotype) in enumerate(self.contestants.items(), start=1):
            result = self._own(name) / "result.json"
            if result.exists():
                continue
            say(f"{name}, {number} of {len(self.contestants)}")
            metrics = self._metrics(self._own(name), genotype)
            if metrics is None:
                return False
            cost = self.supernet.detector.cost(genotype)._asdict()
            content = {"name": name, "genotype": genotype.to_dict(), **cost, **metrics}
            checkpoint.write_text(result, json.dumps(content, indent=1) + "\n")
            for last in self._own(name).glob("*/last.pt"):
                last.unlink()  # best.pt stays, to be used; what a training resumes from is large
        return True

    def _own(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")

    def _metrics(self, folder: Path, genotype: Genotype) -> dict[str, dict] | None:
        """Metrics on the test set by start. None if it was told to stop."""
        inherited = Start(self.supernet.detector, True, self.supernet)
        model = inherited.network.extract(genotype).to(self.device, memory_format=torch.channels_last)
        recalibrate(model, some_images(self.annotations, genotype.image_size, self.config), self.device)
        metrics = {"inherited": finite(evaluate(model, self.test, self.config, self.device))}
        for name in ("fine_tuned", "scratch"):
            seed_everything(self.config.seed)
            network = ElasticSSD(self.config, len(self.annotations.classes))
            start = inherited if name == "fine_tuned" else Start(network, False, self.supernet)
            trained = self._train(folder / name, start, genotype)
            if trained is None:
                return None
            metrics[name] = trained
        return metrics

    def _train(self, folder: Path, start: Start, genotype: Genotype) -> dict | None:
        """The metrics after the last epoch of one training. None if it was told to stop."""
        everything, batch_size = range(len(self.annotations)), self.config.final.batch_size
        data = self.annotations, everything, genotype.image_size, batch_size
        loader = configured_train_loader(*data, self.config, self.device)
        teacher = find_teacher(start, self.config, genotype, self.annotations.classes)
        made_of = self.config, folder, start, genotype, teacher, loader, self.test, self.device
        training = make_training(*made_of, resume=True)
        return training.best if training.run() else None

    def write(self) -> str:
        """Time all contestants in turns, write compare.json, .md and .png; the table, with what it was measured on."""
        rows = [json.loads((self._own(name) / "result.json").read_text()) for name in self.contestants]
        threads = self.config.search.latency_threads
        detectors = FusedDetectors(self.supernet.detector, self.config, self.device)
        with cpu_threads(threads):
            times = time_detectors([detectors(g) for g in self.contestants.values()], self.device, ROUNDS)
        rows = [{**row, "latency_ms": ms} for row, ms in zip(rows, times, strict=True)]
        epochs, where = self.config.final.epochs, device_name(self.device)
        latency = {"device": str(self.device), "device_name": where, "threads": threads}
        content = {**self.plan, "epochs": epochs, "commit": code_revision(), "latency": latency, "rows": rows}
        said = f"AP (AP50) on {len(self.test)} test images; latency on {where}, CPU threads: {threads}"
        table = f"{said}\n\n{as_markdown(rows, epochs)}"
        checkpoint.write_text(self.folder / "compare.json", json.dumps(content, indent=1) + "\n")
        checkpoint.write_text(self.folder / "compare.md", table)
        plot_comparison(rows, STARTS, self.folder / "compare.png")
        return table
