"""The contestants of --compare: each trained by the short recipe from both starts, what is done never done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from lib import checkpoint
from lib.compare import STARTS, as_markdown, refuse_other_plan
from lib.config import Config, to_dict
from lib.datasets import configured_train_loader
from lib.detector import ElasticSSD
from lib.engine import recalibrate
from lib.final_training import evaluate, some_images
from lib.genotype import Genotype
from lib.models import Supernet
from lib.records import Records
from lib.report import plot_comparison
from lib.revision import code_revision
from lib.runlog import finite, say
from lib.runtime import device_name, seed_everything
from lib.start import Start, find_teacher, make_training
from lib.timing import ROUNDS, FusedDetectors, cpu_threads, time_detectors


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
        records: Records,
        test: Records,
        device: torch.device,
    ):
        self.config, self.folder, self.contestants = config, folder, contestants
        self.supernet, self.records, self.test, self.device = supernet, records, test, device
        plan = {
            "contestants": {name: genotype.to_dict() for name, genotype in contestants.items()},
            "supernet": checkpoint.sha256(supernet_path),
            "data": {"train": records.fingerprint(), "test": test.fingerprint()},
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
        recalibrate(model, some_images(self.records, genotype.image_size, self.config), self.device)
        metrics = {"inherited": finite(evaluate(model, self.test, self.config, self.device))}
        for name in ("fine_tuned", "scratch"):
            seed_everything(self.config.seed)
            network = ElasticSSD(self.config, len(self.records.classes))
            start = inherited if name == "fine_tuned" else Start(network, False, self.supernet)
            trained = self._train(folder / name, start, genotype)
            if trained is None:
                return None
            metrics[name] = trained
        return metrics

    def _train(self, folder: Path, start: Start, genotype: Genotype) -> dict | None:
        """The metrics after the last epoch of one training. None if it was told to stop."""
        everything, batch_size = range(len(self.records)), self.config.final.batch_size
        data = self.records, everything, genotype.image_size, batch_size
        loader = configured_train_loader(*data, self.config, self.device)
        teacher = find_teacher(start, self.config, genotype, self.records.classes)
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
