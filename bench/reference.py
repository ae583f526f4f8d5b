"""What the benches of training and scoring share: the reference space, random pictures with objects, training steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lib import config_io
from lib.config import Config, TrainConfig
from lib.datasets import Batch
from lib.detector import SSD, ElasticSSD
from lib.final_training import detection_losses
from lib.genotype import Genotype
from lib.training import Trainer, detection_loss
from supernet_train import supernet_losses

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "voc_mbv3.yaml"
CPU = torch.device("cpu")


def reference(num_classes: int = 3) -> tuple[Config, ElasticSSD]:
    """The reference MobileNetV3 space, at 300 px, with random weights."""
    settings = config_io.read_config(CONFIG, [f"data.num_classes={num_classes}"])
    torch.manual_seed(0)
    return settings, ElasticSSD(settings, num_classes)


def random_genotypes(detector: ElasticSSD, count: int) -> list[Genotype]:
    rng = random.Random(0)
    return [detector.space.sample(rng) for _ in range(count)]


def middling(detector: ElasticSSD, count: int = 101) -> Genotype:
    """The median of that many random genotypes by their multiply-adds."""
    return sorted(random_genotypes(detector, count), key=lambda g: detector.cost(g).flops)[count // 2]


def random_batch(images: int, size: int, objects: int, num_classes: int) -> Batch:
    """Noise with random boxes: sides from a twentieth to four fifths of the picture."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    sides = 0.05 * 16 ** torch.rand(images, objects, 2, generator=generator)
    corner = torch.rand(images, objects, 2, generator=generator) * (1 - sides)
    labels = torch.randint(1, num_classes + 1, (images, objects), generator=generator)
    return Batch(pixels, torch.cat([corner, corner + sides], -1), labels, torch.arange(images))


Step = Callable[[Batch], dict[str, float]]  # one training step, with the optimizer's; the losses before it


class SupernetSteps:
    """`steps(batch, genotype)` is a step of supernet_train.py: matching, network, losses, gradients, optimizer.

    `distill` is the weight of distillation from the largest sub-network.
    """

    def __init__(self, detector: ElasticSSD, settings: Config, distill: float = 0.0):
        self.detector, self.settings, self.distill = detector.train(), settings.supernet, distill
        self.loss = detection_loss(settings)
        self.trainer = Trainer(detector, settings.supernet, CPU, batches_per_epoch=2**31)

    def __call__(self, batch: Batch, genotype: Genotype) -> dict[str, float]:
        losses = supernet_losses(self.detector, self.loss, batch, [genotype], self.settings.distill, self.distill)
        return self.trainer.update(losses)


def plain_step(model: SSD, settings: Config, training: TrainConfig) -> Step:
    """A step of final_train.py on a plain detector, with the optimizer of `training`."""
    trainer = Trainer(model.train(), training, CPU, batches_per_epoch=2**31)
    loss = detection_loss(settings)
    return lambda batch: trainer.update(detection_losses(trainer.model, loss, batch))


def outputs(result: tuple[Tensor, Tensor]) -> Tensor:
    """A detector's logits and offsets as one tensor, to compare."""
    return torch.cat([part.flatten(1) for part in result], 1)
