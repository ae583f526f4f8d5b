"""Stage 1: train one elastic SSD whose sub-networks share weights, opening kernels, widths and depths step by step.

    python supernet_train.py                                  # the built-in data set
    python supernet_train.py --cfg configs/bccd.yaml --data /path/to/bccd
    python supernet_train.py --cfg configs/voc_mbv3.yaml --dry-run
    python supernet_train.py --cfg configs/bccd.yaml --resume # go on after any interruption
    torchrun --nproc_per_node=4 supernet_train.py             # the same training on four GPUs

Writes last.pt (the supernet), split.json (which images train, which score candidates), log.jsonl and curves.png to
runs/NAME/supernet. The next command is async_search.py.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lib import checkpoint, cli, distributed, plan
from lib.config import Config, DistillConfig, SupernetConfig, to_dict
from lib.datasets import Batch, configured_train_loader, load_records, save_split, split_indices
from lib.detector import ElasticSSD
from lib.elastic import sort_hidden_channels
from lib.engine import Losses, Trainer, train_epoch
from lib.genotype import Genotype, SearchSpace
from lib.losses import DetectionLoss, adaptive_distillation
from lib.models import load_backbone, load_weights
from lib.preflight import preflight
from lib.report import plot_training
from lib.runlog import RunLog, read_log, say
from lib.runs import remember, supernet_checkpoint
from lib.runtime import StopRequest, pick_device, run, seed_everything
from lib.schedule import boundaries, describe_openings, first_narrower_epoch, space_at, value_at
from lib.scoring import Scorer, prepare_scoring_data


def step_genotypes(space: SearchSpace, config: SupernetConfig, seed: int, step: int) -> list[Genotype]:
    """The sub-networks of one step, a function of (seed, step) alone, so that a resumed run draws the same.

    Under the sandwich rule (Yu and Huang, ICCV 2019) the largest comes first, then the smallest, then random ones.
    All of a step have the same image size, so that they share prior boxes and can teach one another.
    """
    rng = random.Random(f"{seed}-{step}")
    size = rng.choice(space.image_size)
    ends = [space.largest(), space.smallest()] if config.sampling == "sandwich" else []
    drawn = [*ends, *(space.sample(rng) for _ in range(config.samples))]
    return [_at_size(genotype, size) for genotype in drawn]


def _at_size(genotype: Genotype, image_size: int) -> Genotype:
    return Genotype(image_size, genotype.backbone_type, genotype.stages, genotype.head)


def supernet_losses(
    detector: ElasticSSD,
    loss: DetectionLoss,
    batch: Batch,
    genotypes: Sequence[Genotype],
    distill: DistillConfig,
    weight: float,
) -> Iterator[Losses]:
    """The losses of each sub-network in turn, averaged over them; the caller back-propagates one before the next runs.

    With a distillation `weight`, the largest sub-network teaches the others. It is run for that only if it is not
    among `genotypes` already.
    """
    priors = detector.priors(genotypes[0].image_size)
    targets = loss.match(batch.boxes, batch.labels, priors)
    largest = _at_size(detector.space.largest(), genotypes[0].image_size)
    teacher_logits = None
    for genotype in genotypes:
        if weight and teacher_logits is None and genotype != largest:
            with torch.no_grad():
                teacher_logits, _ = detector(batch.images, largest)
        logits, offsets = detector(batch.images, genotype)
        losses = loss(logits, offsets, targets)
        if genotype == largest:
            teacher_logits = logits.detach()
        elif weight:
            mask, normalizer = targets.positive, targets.positive_normalizer
            if distill.priors == "all":
                mask, normalizer = targets.prior_labels >= 0, targets.counted_normalizer
            options = distill.beta, distill.gamma, distill.temperature, normalizer
            losses["distill"] = weight * adaptive_distillation(logits, teacher_logits, mask, loss.type, *options)
        yield {name: value / len(genotypes) for name, value in losses.items()}


def panel(space: SearchSpace, size: int, seed: int) -> dict[str, Genotype]:
    """The sub-networks whose AP is followed: always the same ones, whether open yet or not."""
    rng = random.Random(seed)
    middle = {f"random {i + 1}": space.sample(rng) for i in range(size)}
    return {"smallest": space.smallest(), **middle, "largest": space.largest()}


def score_panel(detector: ElasticSSD, scorer: Scorer, config: Config, epoch: int, log: RunLog) -> None:
    """Score the panel on the search split, dealt out to the processes, log it and print one line."""
    followed = panel(detector.space, config.supernet.panel, config.seed)
    scored = distributed.collect([scorer(detector, g) for g in distributed.deal(list(followed.values()))])
    networks = dict(zip(followed, scored, strict=False))  # only the main process has the scores
    log.write("eval", epoch, networks=networks)
    metric = config.search.objective
    scores = ", ".join(f"{name} {m[metric]:.3f}" for name, m in networks.items())
    say(f"epoch {epoch}: {metric} on the search split: {scores}")


def scored_epochs(log: Path) -> set[int]:
    return {record["step"] for record in read_log(log) if record["kind"] == "eval"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__, "start from the supernet of an earlier run (its folder)")
    cli.add_tensorboard(parser)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    distributed.join(device)
    config = cli.read_config(args, "supernet")
    folder = cli.run_folder(args, config, "supernet")
    seed_everything(config.seed)
    records = load_records(config.data, "train", config.seed)
    train, search = split_indices(records, config.data.data_portion, config.seed)
    detector = ElasticSSD(config, len(records.classes))
    size = max(config.search_space.image_size_choice)
    loader = configured_train_loader(records, train, size, config.supernet.batch_size, config, device)
    for line in (
        *preflight(records, range(len(records)), detector.priors(size), config.loss.matched_threshold),
        plan.describe_split(len(records), train, search),
        *plan.describe_space(detector, detector.space),
        *plan.describe_priors(detector, config),
        plan.describe_training("supernet", config.supernet, len(train), loader.batch_sampler.batches_per_epoch),
        *describe_openings(config, config.supernet.epochs),
    ):
        print(line)
    if args.dry_run:
        return
    cli.refuse_to_overwrite(folder / "last.pt", args.resume)
    if config.backbone.pretrained_path:
        count = load_backbone(detector, Path(config.backbone.pretrained_path))
        print(f"backbone: {count} tensors from {config.backbone.pretrained_path}")
    if args.load:
        path = supernet_checkpoint(args.load)
        load_weights(detector, checkpoint.load(path), path)
    cli.save_config(config, folder)
    save_split(folder / "split.json", records, train, search)
    scorer = Scorer(prepare_scoring_data(records, train, search, config), config, device)
    finished = train_supernet(args, config, folder, detector, loader, scorer, records.classes, device)
    if finished:
        print(f"wrote {folder / 'last.pt'}, {folder / 'curves.png'}\nnext: python async_search.py --load {folder}")
    else:
        print(f"stopped; everything is in {folder / 'last.pt'}, the same command with --resume goes on")


def train_supernet(
    args: argparse.Namespace,
    config: Config,
    folder: Path,
    detector: ElasticSSD,
    loader: DataLoader,
    scorer: Scorer,
    classes: Sequence[str],
    device: torch.device,
) -> bool:
    """Epochs from where the run stands to the last one, a checkpoint after each; whether the last one was reached."""
    settings, sampler = config.supernet, loader.batch_sampler
    phases = boundaries(config.search_space.schedule_cfg, settings.epochs)
    sort_epoch = first_narrower_epoch(config.search_space.schedule_cfg) if settings.sort_channels else None
    trainer = Trainer(detector, settings, device, sampler.batches_per_epoch, phases)
    last = folder / "last.pt"
    if args.resume and (payload := checkpoint.load_if_any(last)):
        trainer.load_state_dict(payload)
        print(f"resumed {last} at epoch {trainer.epoch}, step {trainer.step}")
    variances = tuple(config.head.variances)
    loss = DetectionLoss(**vars(config.loss), variances=variances, normalizers=distributed.normalizers)
    log = RunLog(folder / "log.jsonl", args.tensorboard)
    remember("supernet", folder)

    def save(path: Path) -> None:
        checkpoint.save(path, {**trainer.state_dict(), "config": to_dict(config), "classes": list(classes)})

    def score_if_due(epoch: int) -> None:
        if epoch and (epoch % settings.eval_every == 0 or epoch == settings.epochs):
            score_panel(trainer.averaged, scorer, config, epoch, log)
            if distributed.world().main:
                plot_training(log.path, folder / "curves.png", config.search.objective, phases)

    with StopRequest() as stop:
        if trainer.batch == 0 and trainer.epoch - 1 not in distributed.from_main(scored_epochs(log.path)):
            score_if_due(trainer.epoch - 1)  # a run that was killed while it scored
        while trainer.epoch <= settings.epochs and not stop.requested:
            epoch = trainer.epoch
            space = space_at(config, epoch)
            weight = value_at(settings.distill.weight, epoch)
            if epoch == sort_epoch and trainer.step and trainer.batch == 0:
                blocks = sort_hidden_channels(detector, trainer.optimizer, trainer.ema and trainer.ema.module)
                say(f"epoch {epoch}: hidden channels of {blocks} blocks sorted by importance")

            def forward(batch: Batch, space=space, weight=weight) -> Iterator[Losses]:
                genotypes = step_genotypes(space, settings, config.seed, trainer.step)
                return supernet_losses(detector, loss, batch, genotypes, settings.distill, weight)

            sampler.set_epoch(epoch, trainer.batch)
            detector.train()
            losses = train_epoch(trainer, loader, forward, stop)
            save(last)
            if trainer.batch:  # stopped within an epoch
                break
            log.write("train", epoch, losses=losses, lr=trainer.scheduler.get_last_lr()[0])
            if settings.save_every and epoch % settings.save_every == 0:
                save(folder / f"epoch_{epoch:04d}.pt")
            score_if_due(epoch)
    log.close()
    return trainer.epoch > settings.epochs


if __name__ == "__main__":
    run(main)
