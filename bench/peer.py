"""torchvision's ssdlite320_mobilenet_v3_large as it comes, in a process of its own, to be timed beside this project.

Of its own, since how the C allocator is set (lib/runtime.py) holds for a whole process, and the peer is timed without.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from bench.turns import Clock, TimedRun
from lib.datasets import Batch
from lib.detector import Cost

SIZE = 320
BACKGROUND = 9.0  # logit that makes every prior box sure of the background, so that nothing enters NMS


class Peer:
    """`peer.run(name, *arguments)` has one of `PeerProcess`'s methods timed; a context manager."""

    def __init__(self, num_classes: int, threads: int, clock: Clock):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, num_classes, threads, clock), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def call(self, name: str, *arguments: object) -> object:
        self._pipe.send((name, arguments))
        result = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def timed(self, name: str, *arguments: object) -> TimedRun:
        return lambda: self.call(name, *arguments)


def _serve(pipe: Connection, num_classes: int, threads: int, clock: Clock) -> None:
    torch.set_num_threads(threads)
    process = PeerProcess(num_classes, clock)
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            pipe.send(getattr(process, name)(*arguments))
        except Exception as error:
            pipe.send(error)


class PeerProcess:
    """What runs on the other side: each method does one thing and gives the seconds that it took."""

    def __init__(self, num_classes: int, clock: Clock):
        torch.manual_seed(0)
        self.model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes + 1)
        self.num_classes, self.clock = num_classes, clock
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)

    def load(self, batch: Batch) -> None:
        """Pictures and objects of the steps that follow, in the form in which torchvision wants them."""
        self.images = list(batch.images.float() / 255)
        self.targets = [
            {"boxes": boxes * SIZE, "labels": labels} for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]

    def train(self) -> float:
        """One training step, optimizer included."""
        self.model.train()
        start = self.clock()
        self.optimizer.zero_grad()
        loss = sum(self.model(self.images, self.targets).values())
        loss.backward()
        self.optimizer.step()
        seconds = self.clock() - start
        if not loss.isfinite():
            raise FloatingPointError(f"the peer's loss is {loss.item()}")
        return seconds

    @torch.inference_mode()
    def silence(self) -> None:
        """Every prior box becomes sure of the background: nothing enters NMS."""
        for predictor in self.model.head.classification_head.module_list:
            predictor[-1].bias.view(-1, self.num_classes + 1)[:, 0] = BACKGROUND
        found = sum(len(detections["boxes"]) for detections in self.model.eval()(self.images))
        if found:
            raise ValueError(f"the peer still finds {found} boxes")

    @torch.inference_mode()
    def detect(self, images: int) -> float:
        """From pictures to detections."""
        self.model.eval()
        start = self.clock()
        self.model(self.images[:images])
        return self.clock() - start

    @torch.inference_mode()
    def network(self, images: int) -> float:
        """Normalised pictures to logits and offsets, nothing else."""
        self.model.eval()
        batch, _ = self.model.transform(self.images[:images])
        start = self.clock()
        self.model.head(list(self.model.backbone(batch.tensors).values()))
        return self.clock() - start

    @torch.inference_mode()
    def cost(self) -> Cost:
        """Multiply-adds for one image, and parameters."""
        with FlopCounterMode(display=False) as counter:
            self.model.eval()(self.images[:1])
        return Cost(counter.get_total_flops() // 2, sum(p.numel() for p in self.model.parameters()))
