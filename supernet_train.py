"""Stage 1: train one elastic SSD whose sub-networks share weights, opening kernels, widths and depths step by step.

    python supernet_train.py                                  # the built-in data set
    python supernet_train.py --cfg configs/bccd.yaml --data /path/to/bccd
    python supernet_train.py --cfg configs/voc_mbv3.yaml --dry-run
    python supernet_train.py --train-dir runs/bccd/supernet --resume    # go on after any interruption
    torchrun --nproc_per_node=4 supernet_train.py             # the same training on four GPUs

Writes last.pt (the supernet), split.json (which images train, which score candidates), log.jsonl and curves.png to
runs/NAME/supernet. The next command is async_search.py.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lib import UserError, checkpoint, cli, config_io, distributed, plan, shrinking
from lib.cli import remember, supernet_checkpoint
from lib.config import Config, DistillConfig, SupernetConfig
from lib.datasets import Batch, load_annotations, load_split, save_split, split_digest, split_indices, train_loader
from lib.detector import ElasticSSD, load_weights, training_file
from lib.elastic import to_device
from lib.genotype import Genotype, SearchSpace, read_genotype_file
from lib.log import duration, plot_training, say
from lib.losses import DetectionLoss, Targets
from lib.pretrained import as_table, load_pretrained
from lib.runtime import pick_device, run, seed_everything
from lib.scoring import Scorer, prepare_scoring_data
from lib.shrinking import Panel, boundaries, make_panel, space_at, value_at
from lib.training import Losses
from lib.training_run import Training, due_epochs, read_previous


def step_genotypes(space: SearchSpace, config: SupernetConfig, seed: int, step: int) -> list[Genotype]:
    """The sub-networks of one step, a function of (seed, step) alone, so that a resumed run draws the same.

    All of a step have the same image size, so that they share prior boxes and can teach one another; none is there
    twice, since its losses would only be averaged with themselves.
    """
    rng = random.Random(f"{seed}-{step}")
    size = rng.choice(space.image_size)
    sample = space.sample_spread if config.sampling == "spread" else space.sample
    drawn = [sample(rng) for _ in range(config.samples)]
    return list(dict.fromkeys(replace(genotype, image_size=size) for genotype in drawn))


def supernet_losses(
    detector: ElasticSSD,
    loss: DetectionLoss,
    batch: Batch,
    genotypes: Sequence[Genotype],
    distill: DistillConfig,
    weight: float,
    targets: Targets | None = None,
) -> Iterator[Losses]:
    """The losses of each sub-network in turn, averaged over them; the caller back-propagates one before the next runs.

    With a distillation `weight` the largest sub-network teaches the others. It is run for that only if it is not the
    first of `genotypes` already.
    """
    size = genotypes[0].image_size
    targets = targets or loss.match(batch.boxes, batch.labels, detector.priors(size))
    largest = replace(detector.space.largest(), image_size=size)
    teacher_logits = None
    for genotype in genotypes:
        taught = weight and genotype != largest
        if taught and teacher_logits is None:
            with torch.no_grad():
                teacher_logits, _ = detector(batch.images, largest)
        logits, offsets = detector(batch.images, genotype)
        losses = loss(logits, offsets, targets)
        if taught:
            losses["distill"] = weight * loss.distillation(logits, teacher_logits, targets, distill)
        elif weight:
            teacher_logits = logits.detach()
        yield {name: value / len(genotypes) for name, value in losses.items()}


class SupernetTraining(Training):
    """The epochs of stage 1: train sub-networks of what is open at the time, and follow the panel's scores.

    `split` is the `split_digest` of the pictures; `options` are those of `Training`.
    """

    stage = "supernet"

    def __init__(
        self, config: Config, detector: ElasticSSD, loader: DataLoader, panel: Panel, split: str, **options: Any
    ):
        self.panel = panel
        self.split = split
        schedule = config.search_space.schedule_cfg
        self.phases = boundaries(schedule, config.supernet.epochs)
        self.sort_epoch = shrinking.first_narrower_epoch(schedule) if config.supernet.sort_channels else None
        data = {"training": loader.dataset.annotations}
        to_device(detector, options["device"])
        super().__init__(config, detector, loader, data, phases=self.phases, **options)

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        trainer = self.trainer
        self.space = space_at(self.config, epoch)
        self.weight = value_at(self.settings.distill.weight, epoch)
        self.loader.batch_sampler.image_size = partial(self._image_size, trainer.step, trainer.batch)
        # Narrower blocks keep the first channels, which should be the most important ones. Sorting is done once: not
        # again when the epoch is resumed in its middle, nor before any training, when no channel is important yet.
        if epoch == self.sort_epoch and trainer.step and trainer.batch == 0:
            average = trainer.ema and trainer.ema.module
            blocks = shrinking.sort_hidden_channels(trainer.model, trainer.optimizer, average)
            say(f"epoch {epoch}: hidden channels of {blocks} blocks sorted by importance")

    def _image_size(self, step: int, first: int, batch: int) -> int:
        """The image size of a batch of this epoch, whose batch `first` begins the given step."""
        step += (batch - first) // self.settings.accumulate
        return self._genotypes(step)[0].image_size

    def _genotypes(self, step: int) -> list[Genotype]:
        return step_genotypes(self.space, self.settings, self.config.seed, step)

    def priors(self) -> Tensor:
        return self.trainer.model.priors(self._genotypes(self.trainer.step)[0].image_size)

    def losses(self, batch: Batch, targets: Targets) -> Iterator[Losses]:
        genotypes, distill = self._genotypes(self.trainer.step), self.settings.distill
        return supernet_losses(self.trainer.model, self.loss, batch, genotypes, distill, self.weight, targets)

    def state(self) -> dict:
        return {**super().state(), "split": self.split}

    def score(self, epoch: int) -> None:
        self.panel.score(self.trainer.averaged, epoch, self.log)
        plot_training(self.log.path, self.folder / "curves.png", self.config.search.objective, self.phases)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__, "start from the supernet of an earlier run (its folder)")
    parser.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard")
    parser.add_argument("--fit-priors", action="store_true", help="fit the prior boxes to the training data")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    distributed.join(device)
    run = cli.CommandLine(args, "supernet").resolve()
    folder, config = run.folder, run.config
    seed_everything(config.seed)
    annotations = load_annotations(config.data, "train")
    config, limit = config_io.limited(config, "supernet", round(config.data.data_portion[0] * len(annotations)))
    previous = read_previous(folder, config, "supernet") if args.resume else None
    split = folder / "split.json"
    if previous:
        train, search = load_split(split, annotations, previous.get("split", ""))
    else:
        train, search = split_indices(annotations, config.data.data_portion, config.seed)
    detector = ElasticSSD(config, len(annotations.classes))
    fit = args.fit_priors and not previous
    head, proposal = plan.propose_priors(annotations, detector, config, fit=fit, if_poor=args.dry_run)
    if fit:
        config.head = run.config.head = head
        seed_everything(config.seed)
        detector = ElasticSSD(config, len(annotations.classes))
    pretrained = start_from_pretrained(detector, config, annotations.classes, folder, previous is not None)
    size = max(config.search_space.image_size_choice)
    loader = train_loader(annotations, train, size, config.supernet.batch_size, config, device)
    splits = {"train": (annotations, train), "search": (annotations, search)}
    notes = []
    if args.dry_run:
        classes = list(annotations.classes)
        test = load_annotations(replace(config.data, classes=classes), "test")
        splits["test"] = (test, range(len(test)))
        notes = plan.check_pictures(splits, config.data)
    for line in (
        *run.describe(),
        *plan.describe_data(splits, detector.priors(size), config.loss.matched_threshold),
        *notes,
        *proposal,
        *plan.describe_space(detector, detector.space),
        *plan.describe_priors(detector, config),
        plan.describe_training("supernet", config.supernet, len(train), loader.batch_sampler.batches_per_epoch),
        *limit,
        *shrinking.describe_openings(config, config.supernet.epochs),
    ):
        print(line)
    with cli.claim(folder / "last.pt", args):
        if args.load:
            start_from_supernet(detector, supernet_checkpoint(args.load), annotations.classes, config)
        if args.dry_run:
            print_estimate(config, detector, loader, splits, device)
            return
        # The panel's scores need no intervals, so the images are not resampled.
        panel_config = replace(config, search=replace(config.search, resamples=0))
        scorer = Scorer(prepare_scoring_data(annotations, train, search, config), panel_config, device)
        panel = Panel(make_panel(detector.space, config.supernet.panel, config.seed, pretrained), scorer, config)
        options = {"folder": folder, "device": device, "previous": previous, "tensorboard": args.tensorboard}
        digest = split_digest(annotations, train, search)
        training = SupernetTraining(config, detector, loader, panel, digest, **options)
        # Only now, since a folder with another training has been refused and is to stay as it was.
        run.save_config()
        save_split(split, annotations, train, search)
        if pretrained:
            content = {**pretrained.to_dict(), "supernet": {"path": str(folder / "last.pt")}}
            content["config"] = config_io.to_dict(config)
            checkpoint.write_text(folder / "pretrained_genotype.json", json.dumps(content, indent=1) + "\n")
            print(f"wrote {folder / 'pretrained_genotype.json'}, the sub-network that holds the pretrained one")
        remember("supernet", folder)
        training.run()
        print(f"wrote {folder / 'last.pt'}, {folder / 'curves.png'}")
        print(f"next: {cli.command('async_search.py', load=folder)}")


def start_from_supernet(detector: ElasticSSD, path: Path, classes: Sequence[str], config: Config) -> None:
    """Load the weights of another supernet. Raises UserError unless it was trained on these classes, in this order."""
    payload = checkpoint.read(path)
    saved = training_file(payload, path)
    if saved.classes != list(classes):
        raise UserError(
            f"data.classes: expected {', '.join(saved.classes)}, in this order, as in {path}, found "
            f"{', '.join(classes)}; --set backbone.pretrained_path={path} starts from it with the classes of the same "
            "names"
        )
    load_weights(detector, payload, path)
    trained = config_io.from_dict(saved.config, str(path)).head
    for key in ("scales", "aspect_ratios", "squares"):
        before, now = getattr(trained, key), getattr(config.head, key)
        if before != now:
            print(f"note: head.{key} is {now}, the predictors of {path} were trained with {before}")


def print_estimate(
    config: Config, detector: ElasticSSD, loader: DataLoader, splits: dict[str, plan.Split], device: torch.device
) -> None:
    """How long this stage and the next will take on this device: some seconds of each kind of work, added up."""
    config, _ = config_io.limited(config, "final", len(splits["train"][1]))
    settings, seed = config.supernet, config.seed
    loss = DetectionLoss(config.loss, config.head.variances)
    starts = boundaries(config.search_space.schedule_cfg, settings.epochs)
    draws = itertools.count()

    def forward(epoch: int, batch: Batch) -> Iterator[Losses]:
        genotypes = step_genotypes(space_at(config, epoch), settings, seed, next(draws))
        weight = value_at(settings.distill.weight, epoch)
        return supernet_losses(detector, loss, batch, genotypes, settings.distill, weight)

    ends = itertools.pairwise([*starts, settings.epochs + 1])
    phases = [(end - first, partial(forward, first)) for first, end in ends]
    to_device(detector, device)
    training = plan.training_seconds(detector, settings, device, loader, phases)
    panel = make_panel(detector.space, settings.panel, seed)
    middling = detector.extract(detector.space.sample(random.Random(seed)))
    final = plan.final_seconds(middling, config, device, loader)
    (annotations, train), (_, search) = splits["train"], splits["search"]
    score = plan.scoring_seconds(detector, list(panel.values()), annotations, train, search, config, device)
    evaluations = config.search.num_epochs * config.search.steps
    panels = len(due_epochs(settings, starts)) * len(panel) * score
    for line in (
        f"estimated time on {device}:",
        f"  supernet: about {duration(training + panels)}, of which {duration(panels)} to score the panel",
        f"  search: about {duration(evaluations * score)} of one worker ({score:.2f} s a candidate)",
        f"  final: about {duration(final)} for a random sub-network, evaluations apart",
    ):
        print(line)


def start_from_pretrained(
    detector: ElasticSSD, config: Config, classes: Sequence[str], folder: Path, resumes: bool
) -> Genotype | None:
    """Put the configured pretrained network into `detector`; the sub-network that holds it. A resumed run has it."""
    if not config.backbone.pretrained_path:
        return None
    written = folder / "pretrained_genotype.json"
    if known := distributed.from_main(read_genotype_file(written) if resumes and distributed.world().main else None):
        return Genotype.from_dict(known)
    embedding = load_pretrained(detector, config, classes)
    print("\n".join(as_table(embedding.rows)))
    return embedding.genotype


if __name__ == "__main__":
    run(main)
