"""Short trainings of several genotypes by one recipe, in a folder of their own; and --compare, a table of them.

Each trial that is done has a result.json, so an interrupted run continues with the next one.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import checkpoint
from lib.annotations import Annotations
from lib.config import Config
from lib.config_io import to_dict
from lib.detector import ElasticSSD, Supernet, recalibrate
from lib.errors import UserError
from lib.final_training import FinalTraining, StartingNetwork, evaluate, final_loader, some_images
from lib.genotype import Genotype, SearchSpace
from lib.latency import ROUNDS, FusedDetectors, cpu_threads, time_detectors
from lib.log import finite, save_figure, say
from lib.runtime import device_name, seed_everything

SHORT = 4  # a short training has one in so many of the epochs of `final`
SIMILAR = 0.1  # random sub-networks have multiply-adds within this share of the found one's
TRIES = 2000
STARTS = {"inherited": "inherited, no training", "fine_tuned": "fine-tuned", "scratch": "from scratch"}


def shortened(config: Config, epochs: int | None) -> Config:
    """A recipe of `epochs` (None: a quarter of those of `final`), with every epoch and step count in proportion.

    It evaluates after the last epoch only, since choosing the best of several would favour the noisier training.
    """
    if epochs is not None and epochs < 1:
        raise UserError(f"--compare-epochs {epochs}: expected at least 1")
    config = copy.deepcopy(config)
    final = config.final
    schedule = final.lr_schedule
    epochs = epochs or max(1, round(final.epochs / SHORT))
    ratio = epochs / final.epochs
    schedule.warmup_steps = round(schedule.warmup_steps * ratio)
    schedule.milestones = [max(1, round(epoch * ratio)) for epoch in schedule.milestones]
    if schedule.T_0 != "auto":
        schedule.T_0 = max(1, round(schedule.T_0 * ratio))
    final.epochs = final.eval_every = epochs
    final.save_every = 0
    return config


@dataclass(frozen=True)
class Recipe:
    """What all trials have in common. `config` holds the short recipe, `starts` are some of STARTS."""

    config: Config
    supernet: Supernet
    supernet_path: Path
    annotations: Annotations
    test: Annotations
    device: torch.device
    starts: Sequence[str] = tuple(STARTS)


class Trials:
    """Train each of the named `networks` from each start of the recipe and evaluate it on the test set.

    plan.json in `folder` says what is tried. Raises UserError if the folder holds trials by another plan.
    """

    def __init__(self, recipe: Recipe, folder: Path, networks: Mapping[str, Genotype]):
        self.recipe = recipe
        self.folder = folder
        self.networks = networks
        plan = {
            "contestants": {name: genotype.to_dict() for name, genotype in networks.items()},
            "supernet": checkpoint.sha256(recipe.supernet_path),
            "data": {"train": recipe.annotations.fingerprint(), "test": recipe.test.fingerprint()},
            "config": to_dict(recipe.config) | {"data": {}},  # a data folder may move: the fingerprints count
        }
        self.plan = json.loads(json.dumps(plan))  # tuples become lists, as in the file
        path = folder / "plan.json"
        if path.exists():
            known = json.loads(path.read_text())
            for key, value in self.plan.items():
                if known.get(key) != value:
                    raise UserError(
                        f"{folder}: holds a comparison with another '{key}'; start this one elsewhere with --train-dir"
                    )
        checkpoint.write_text(path, json.dumps(self.plan, indent=1) + "\n")

    def run(self) -> bool:
        """Do what is missing; whether that ended before a signal to stop."""
        for number, (name, genotype) in enumerate(self.networks.items(), start=1):
            result = self._folder_of(name) / "result.json"
            if result.exists():
                continue
            say(f"{name}, {number} of {len(self.networks)}")
            metrics = {}
            for start in self.recipe.starts:
                found = self._try(start, genotype, self._folder_of(name) / start)
                if found is None:
                    return False
                metrics[start] = found
            cost = self.recipe.supernet.detector.cost(genotype)._asdict()
            content = {"name": name, "genotype": genotype.to_dict(), **cost, **metrics}
            checkpoint.write_text(result, json.dumps(content, indent=1) + "\n")
            # best.pt stays for use; last.pt is large and was only needed to resume
            for last in self._folder_of(name).glob("*/last.pt"):
                last.unlink()
        return True

    def results(self) -> list[dict]:
        """Per network its name, genotype, cost, and per start the metrics on the test set."""
        return [json.loads((self._folder_of(name) / "result.json").read_text()) for name in self.networks]

    def _folder_of(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")

    def _try(self, start: str, genotype: Genotype, folder: Path) -> dict | None:
        """The metrics of one network from one start; None after a signal to stop."""
        config = self.recipe.config
        device = self.recipe.device
        annotations = self.recipe.annotations
        supernet = self.recipe.supernet
        if start == "inherited":
            model = supernet.detector.extract(genotype).to(device, memory_format=torch.channels_last)
            recalibrate(model, some_images(annotations, genotype.image_size, config), device)
            return finite(evaluate(model, self.recipe.test, config, device))
        seed_everything(config.seed)
        # Made for either start, so that all trainings begin with the same random state.
        untrained = ElasticSSD(config, len(annotations.classes))
        origins = {
            "fine_tuned": StartingNetwork(supernet.detector, "supernet"),
            "scratch": StartingNetwork(untrained, "scratch"),
        }
        student = origins[start].student(genotype)
        loader = final_loader(annotations, genotype.image_size, config, device)
        training = FinalTraining(config, folder, student, loader, self.recipe.test, device, resume=True)
        return training.best if training.run() else None


def contestants(
    supernet: Supernet, found: Genotype, pretrained: Genotype | None, count: int, seed: int
) -> dict[str, Genotype]:
    """The networks of --compare: the found one, the pretrained one, the smallest, the largest, and `count` random ones
    of similar multiply-adds.

    No genotype appears twice; one in several roles has all their names. Raises UserError if `count` cannot be found.
    """
    space = supernet.space
    named = {"found": found, "largest": space.largest(), "smallest": space.smallest()}
    if pretrained is not None:
        named["pretrained"] = pretrained
    names: dict[Genotype, list[str]] = {}
    for name, genotype in named.items():
        names.setdefault(genotype, []).append(name)
    target = supernet.detector.cost(found).flops
    number = 0
    for genotype in _draws(space, random.Random(seed)):
        if number == count:
            break
        similar = abs(supernet.detector.cost(genotype).flops - target) <= SIMILAR * target
        if similar and genotype not in names:
            number += 1
            names[genotype] = [f"random {number}"]
    if number < count:
        raise UserError(
            f"--compare-random {count}: only {number} other sub-networks have multiply-adds within "
            f"{SIMILAR:.0%} of the found one's"
        )
    return {" and ".join(parts): genotype for genotype, parts in names.items()}


def _draws(space: SearchSpace, rng: random.Random) -> Iterator[Genotype]:
    """Uniform samples, then crossovers with an end of the space, near which uniform samples are rare."""
    ends = space.smallest(), space.largest()
    yield from (space.sample(rng) for _ in range(TRIES))
    yield from (space.crossover(space.sample(rng), ends[i % 2], rng) for i in range(TRIES))


def write_comparison(trials: Trials) -> str:
    """Time the networks of finished trials; write compare.json, compare.md and compare.png; the table as text."""
    recipe = trials.recipe
    threads = recipe.config.search.latency_threads
    detectors = FusedDetectors(recipe.supernet.detector, recipe.config, recipe.device)
    with cpu_threads(threads):
        fused = [detectors(genotype) for genotype in trials.networks.values()]
        times = time_detectors(fused, recipe.device, ROUNDS)
    rows = [{**row, "latency_ms": ms} for row, ms in zip(trials.results(), times, strict=True)]
    epochs = recipe.config.final.epochs
    name = device_name(recipe.device)
    content = {
        **trials.plan,
        "epochs": epochs,
        "commit": checkpoint.code_revision(),
        "latency": {"device": str(recipe.device), "device_name": name, "threads": threads},
        "rows": rows,
    }
    head = f"AP (AP50) on {len(recipe.test)} test images; latency on {name}, CPU threads: {threads}"
    table = f"{head}\n\n{as_markdown(rows, epochs)}"
    checkpoint.write_text(trials.folder / "compare.json", json.dumps(content, indent=1) + "\n")
    checkpoint.write_text(trials.folder / "compare.md", table)
    plot_comparison(rows, trials.folder / "compare.png")
    return table


def as_markdown(rows: Sequence[dict], epochs: int) -> str:
    """The table of compare.md, AP (AP50) on the test set, and what the search gave over chance."""
    heads = ["network", "M multiply-adds", "M parameters", "ms before NMS", STARTS["inherited"]]
    heads += [f"{STARTS[start]}, {epochs} epoch{'s' * (epochs > 1)}" for start in ("fine_tuned", "scratch")]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        costs = f"{row['flops'] / 1e6:.1f} | {row['params'] / 1e6:.3f} | {row['latency_ms']:.2f}"
        scores = " | ".join(f"{row[start]['AP']:.3f} ({row[start]['AP50']:.3f})" for start in STARTS)
        lines.append(f"| {row['name']} | {costs} | {scores} |")
    return "\n".join([*lines, "", *_gains(rows)]) + "\n"


def _gains(rows: Sequence[dict]) -> list[str]:
    """A line per start: the found network's AP less the mean of the random ones'. Empty without random ones."""
    found = next(row for row in rows if "found" in row["name"].split(" and "))
    others = [row for row in rows if row["name"].startswith("random ")]
    lines = []
    for start, words in STARTS.items() if others else ():
        ap = found[start]["AP"]
        values = [row[start]["AP"] for row in others]
        mean = sum(values) / len(values)
        lines.append(
            f"- {words}: found {ap:.3f}, random {mean:.3f} on average ({min(values):.3f} to "
            f"{max(values):.3f}): {ap - mean:+.3f}"
        )
    return lines


def plot_comparison(rows: Sequence[dict], picture: Path) -> None:
    """AP of each network against multiply-adds and against latency, with one marker per start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5))
    axes = figure.subplots(1, 2, sharey=True)
    costs = ("flops", "multiply-adds"), ("latency_ms", "measured latency before NMS [ms]")
    for axis, (cost, label) in zip(axes, costs, strict=True):
        for (start, words), marker in zip(STARTS.items(), "o^x", strict=True):
            axis.plot([r[cost] for r in rows], [r[start]["AP"] for r in rows], marker, label=words)
        for i, row in enumerate(sorted(rows, key=lambda row: row[cost])):
            top = row[cost], max(row[start]["AP"] for start in STARTS)
            above = 8 + 11 * (i % 3)  # staggered, because neighbours may cost nearly the same
            axis.annotate(row["name"], top, (0, above), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xlabel(label)
        axis.margins(0.12)
    axes[0].set_ylabel("AP on the test set")
    axes[0].legend(fontsize=8)
    save_figure(figure, picture)
