"""Several genotypes side by side: short trainings by one recipe, and what the members of a front are worth as files.

Each training that is done has a result.json, so an interrupted run continues with the next one. Two uses: finalists of
a search, of which the best becomes best.json, and --compare, a table of the found network and others.
"""

import copy
import hashlib
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from lib import UserError, checkpoint, config_io, naming
from lib.annotations import Annotations
from lib.config import Config
from lib.config_io import to_dict
from lib.detector import Detector, ElasticSSD, Supernet, recalibrate
from lib.elastic import to_device
from lib.export import export_graph, quantize, write
from lib.final_training import FinalTraining, evaluate, final_loader, some_images
from lib.genotype import Genotype
from lib.latency import ROUNDS, fused_detectors, time_detectors, visit_file
from lib.log import finite, progress, say
from lib.plain import check, read_json
from lib.runtime import device_name, seed_everything, time_interleaved
from lib.search import Search
from lib.training_run import read_previous

SIMILAR = 0.1  # random sub-networks have multiply-adds within this share of the found one's
TRIES = 4000
# Keys that no trial depends on, beside those that its folder and its data decide, and exceptions.
UNUSED = ("name", "data.", "supernet.", "search.", "search_space.schedule_cfg.", "final.cuda_graph", "final.genotypes")
UNUSED += ("final.supernet_state_dict", "final.save_", "final.max_steps")
DECIDING = ("search.objective", "search.bn_images", "search.batch_size")
ELSEWHERE = "remove it, or start elsewhere with --train-dir"
STARTS = {"inherited": "inherited, no training", "fine_tuned": "fine-tuned", "scratch": "from scratch"}


def shortened(config: Config, epochs: int | None, pictures: int) -> Config:
    """A recipe of `epochs` (None: a quarter of those that train on so many `pictures`), all counts in proportion.

    It evaluates after the last epoch only, since choosing the best of several would favour the noisier training.
    """
    config = copy.deepcopy(config_io.limited(config, "final", pictures)[0])
    final = config.final
    schedule = final.lr_schedule
    epochs = epochs or max(1, round(final.epochs / 4))
    ratio = epochs / final.epochs
    schedule.warmup_steps = round(schedule.warmup_steps * ratio)
    schedule.milestones = [max(1, round(epoch * ratio)) for epoch in schedule.milestones]
    if schedule.T_0 != "auto":
        schedule.T_0 = max(1, round(schedule.T_0 * ratio))
    final.epochs = final.eval_every = epochs
    final.save_every = 0
    return config


class Recipe(NamedTuple):
    """What all trials have in common; `config` holds the short recipe."""

    config: Config
    supernet: Supernet
    supernet_path: Path
    annotations: Annotations
    test: Annotations
    device: torch.device


# What is needed of a result.json.
class Scores(NamedTuple):
    AP: float
    AP50: float


def read_result(path: Path, starts: Sequence[str] = tuple(STARTS)) -> dict:
    """The content of a result.json with the scores of some starts."""
    columns = [("name", str), ("genotype", dict), ("flops", float), ("params", float)]
    content = read_json(path)
    check(content, NamedTuple("Result", [*columns, *((start, Scores) for start in starts)]), str(path))
    with naming(path):
        Genotype.from_dict(content["genotype"])
    return content


class Trials:
    """Train each of the named `networks` from each of `starts` by the recipe and evaluate it on the test set.

    `results` holds per network its name, genotype, cost, and per start the metrics. plan.json in `folder` says what is
    tried. Raises UserError if the folder holds trials by another plan; trials of further networks may join them.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, networks: Mapping[str, Genotype], starts: Sequence[str] = tuple(STARTS)
    ):
        self.recipe = recipe
        self.folder = folder
        self.networks = networks
        self.starts = starts
        self.results: list[dict] = []
        self.plan = {
            "contestants": {name: genotype.to_dict() for name, genotype in networks.items()},
            "supernet": checkpoint.sha256(recipe.supernet_path),
            "data": {"train": recipe.annotations.fingerprint(), "test": recipe.test.fingerprint()},
            "config": to_dict(recipe.config) | {"data": {}},  # a data folder may move: the fingerprints count
        }
        path = folder / "plan.json"
        if path.exists():
            known = check(read_json(path), dict, str(path))
            other = [key for key in ("supernet", "data") if known.get(key) != self.plan[key]]
            saved = config_io.from_dict(check(known.get("config"), dict, f"{path}: config"), f"{path}: config")
            changed = (key for key, *_ in config_io.differences(recipe.config, saved))
            other += [key for key in changed if key in DECIDING or not key.startswith(UNUSED)]
            if other:
                raise UserError(f"{folder}: holds trials with another {other[0]}; {ELSEWHERE}")
        for name, genotype in networks.items():
            result = self._result(name)
            if result.exists() and Genotype.from_dict(read_result(result, starts)["genotype"]) != genotype:
                raise UserError(f"{result}: is of another genotype than {name} is now; {ELSEWHERE}")
        checkpoint.write_text(path, json.dumps(self.plan, indent=1) + "\n")

    def _result(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_") / "result.json"

    def run(self) -> None:
        """Do what is missing; then `results` are complete. Raises Stopped after a signal."""
        self.results.clear()
        for number, (name, genotype) in enumerate(self.networks.items(), start=1):
            result = self._result(name)
            folder = result.parent
            if not result.exists():
                say(f"{name}, {number} of {len(self.networks)}")
                content = {"name": name, "genotype": genotype.to_dict()}
                content |= self.recipe.supernet.detector.cost(genotype)._asdict()
                for start in self.starts:
                    content[start] = self._try(start, genotype, folder / start)
                checkpoint.write_text(result, json.dumps(content, indent=1) + "\n")
                # best.pt stays for use; last.pt and last_good.pt are large and were only needed to resume
                for last in folder.glob("*/last*.pt"):
                    last.unlink()
            self.results.append(read_result(result, self.starts))

    def _try(self, start: str, genotype: Genotype, folder: Path) -> dict:
        """The metrics of one network from one start."""
        recipe = self.recipe
        network = recipe.supernet.detector
        if start == "inherited":
            model = to_device(network.extract(genotype), recipe.device)
            recalibrate(model, some_images(recipe.annotations, genotype.image_size, recipe.config), recipe.device)
            return finite(evaluate(model, recipe.test, recipe.config, recipe.device))
        seed_everything(recipe.config.seed)
        # Made for either start, so that all trainings begin with the same random state.
        untrained = ElasticSSD(recipe.config, len(recipe.annotations.classes))
        network = untrained if start == "scratch" else network
        loader = final_loader(recipe.annotations, genotype.image_size, recipe.config, recipe.device)
        training = FinalTraining(
            recipe.config,
            network,
            genotype,
            loader,
            recipe.test,
            folder=folder,
            device=recipe.device,
            inherits=start != "scratch",
            previous=read_previous(folder, recipe.config, "final"),
        )
        training.run()
        return training.best


def train_finalists(
    search: Search,
    supernet: Supernet,
    supernet_path: Path,
    annotations: Annotations,
    split: tuple[Sequence[int], Sequence[int]],
    device: torch.device,
    folder: Path,
    count: int,
) -> None:
    """Train the most promising candidates of a search briefly; the best of them then is `search.winner()`.

    They learn from the first part of the `split` and are judged by the second, which scored the candidates: the test
    set is for the detector that comes out.
    """
    chosen = [Genotype.from_dict(record["genotype"]) for record in search.promising(count)]
    genotypes = {f"{g.image_size}px_{hashlib.sha256(str(g).encode()).hexdigest()[:8]}": g for g in chosen}
    train, judge = (annotations.subset(rows) for rows in split)
    recipe = Recipe(shortened(search.config, None, len(train)), supernet, supernet_path, train, judge, device)
    Trials(recipe, folder, genotypes, ["fine_tuned"]).run()
    recall_finalists(search, folder)


def recall_finalists(search: Search, folder: Path) -> None:
    """Let a search know the finalists in `folder` that were trained from its supernet's weights."""
    plan = folder / "plan.json"
    if plan.is_file() and check(read_json(plan), dict, str(plan)).get("supernet") == search.identity.supernet_sha256:
        for path in folder.glob("*/result.json"):
            result = read_result(path, ["fine_tuned"])
            score = check(result["fine_tuned"].get(search.settings.objective), float, str(path))
            search.trained[Genotype.from_dict(result["genotype"])] = score


def measure_front(
    front: Sequence[Genotype], supernet: Supernet, config: Config, train: Annotations, judge: Annotations
) -> dict:
    """Costs, AP, milliseconds and size of each member of a front as a float and an int8 ONNX file: "rows", and "about".

    It is made as for a candidate's score: inherited weights, BatchNorm re-estimated on pictures of `train`. Each file,
    without NMS, is verified against the torch detector on `judge`; onnxruntime then runs all of them in turns.
    """
    table, visits = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for number, genotype in enumerate(progress(front, "members of the front")):
            images = list(some_images(train, genotype.image_size, config))
            model = supernet.detector.extract(genotype).eval()
            recalibrate(model, images, torch.device("cpu"))
            detector = Detector(model, config, genotype, judge.classes, judge.category_ids, supernet.epoch)
            graph = export_graph(detector, nms=False)
            files = [Path(folder) / f"{number}{suffix}.onnx" for suffix in ("", "_int8")]
            exact = write(graph, files[0], detector, judge)
            small = write(quantize(graph, images), files[1], detector, judge, exact["AP"])
            visits += [partial(visit_file, file, genotype.image_size) for file in files]
            cost = supernet.detector.cost(genotype)
            row = {"pixels": genotype.image_size, "M madds": cost.flops / 1e6, "M params": cost.params / 1e6}
            row |= {"AP torch": exact["AP_torch"], "AP float": exact["AP"], "AP int8": small["AP"]}
            table[str(genotype)] = row | {"MB float": exact["bytes"] / 1e6, "MB int8": small["bytes"] / 1e6}
        times = time_interleaved(visits, config.search.latency_threads, ROUNDS)
    for row, ms, ms_int8 in zip(table.values(), times[::2], times[1::2], strict=True):
        row |= {"ms float": ms, "ms int8": ms_int8}
    device, threads = device_name(torch.device("cpu")), config.search.latency_threads
    about = f"inherited weights; AP on {len(judge)} images of the search split; ms a picture before NMS, onnxruntime on"
    return {"about": f"{about} {device}, CPU threads: {threads}", "rows": table}


def contestants(
    supernet: Supernet, found: Genotype, pretrained: Genotype | None, count: int, seed: int
) -> dict[str, Genotype]:
    """The networks of --compare, the last `count` of them random ones of the found one's multiply-adds.

    No genotype appears twice; one in several roles has all their names. Raises UserError if `count` cannot be found.
    """
    space = supernet.space
    largest, smallest = space.largest(), space.smallest()
    names: dict[Genotype, str] = {}
    roles = {"found": found, "largest": largest, "smallest": smallest, "pretrained": pretrained}
    for role, genotype in roles.items():
        if genotype is not None:
            names[genotype] = f"{names[genotype]} and {role}" if genotype in names else role
    known = len(names)
    target = supernet.detector.cost(found).flops
    rng = random.Random(seed)
    for _ in range(TRIES):
        if len(names) == known + count:
            break
        genotype = space.sample_spread(rng)
        similar = abs(supernet.detector.cost(genotype).flops - target) <= SIMILAR * target
        if similar and genotype not in names:
            names[genotype] = f"random {len(names) - known + 1}"
    if (others := len(names) - known) < count:
        cost = f"within {SIMILAR:.0%} of the found one's multiply-adds"
        raise UserError(f"--compare-random {count}: only {others} other sub-networks are {cost}")
    return {name: genotype for genotype, name in names.items()}


def write_comparison(trials: Trials) -> str:
    """Time the networks of finished trials; write compare.json and compare.md; the table as text."""
    recipe = trials.recipe
    models = fused_detectors(recipe.supernet.detector, [*trials.networks.values()], recipe.config, recipe.device)
    *times, _nms = time_detectors(models, recipe.config, recipe.device)
    rows = [{**row, "latency_ms": ms} for row, ms in zip(trials.results, times, strict=True)]
    epochs, threads = recipe.config.final.epochs, recipe.config.search.latency_threads
    name = device_name(recipe.device)
    latency = {"device": str(recipe.device), "device_name": name, "threads": threads}
    content = {**trials.plan, "epochs": epochs, "commit": checkpoint.code_revision(), "latency": latency, "rows": rows}
    head = f"AP (AP50) on {len(recipe.test)} test images; latency on {name}, CPU threads: {threads}"
    table = f"{head}\n\n{as_markdown(rows, epochs)}"
    checkpoint.write_text(trials.folder / "compare.json", json.dumps(content, indent=1) + "\n")
    checkpoint.write_text(trials.folder / "compare.md", table)
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
    lines.append("")
    found = next(row for row in rows if "found" in row["name"].split(" and "))
    others = [row for row in rows if row["name"].startswith("random ")]
    for start, words in STARTS.items() if others else ():
        ap = found[start]["AP"]
        values = [row[start]["AP"] for row in others]
        mean = sum(values) / len(values)
        spread = f"{mean:.3f} on average ({min(values):.3f} to {max(values):.3f})"
        lines.append(f"- {words}: found {ap:.3f}, random {spread}: {ap - mean:+.3f}")
    return "\n".join(lines) + "\n"
