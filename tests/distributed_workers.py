"""What the processes of tests/test_distributed.py do, and what the test's own process does alone, to compare."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_runs import tiny_settings
from torch import nn

import supernet_train
from lib import config_io, distributed, final_training
from lib.annotations import Annotations
from lib.config import Config
from lib.datasets import load_annotations, split_indices, train_loader
from lib.detector import ElasticSSD
from lib.distributed import SyncBatchNorm, synchronise_norms
from lib.elastic import ElasticInvertedResidual
from lib.log import RunLog, read_log
from lib.losses import DetectionLoss
from lib.runtime import StopRequest, run
from lib.scoring import Scorer, prepare_scoring_data
from lib.shrinking import Panel, make_panel, sort_hidden_channels
from lib.training import Trainer

CPU = torch.device("cpu")
PROCESSES = 2
STEPS = 3
MULTIBOX = {"loss__type": "multibox"}
CASES = {  # what is trained: the script, whether BatchNorm is fixed, and changes of the configuration
    "supernet fixed": ("supernet", True, {}),
    "supernet synchronised": ("supernet", False, MULTIBOX),
    "supernet local": ("supernet", False, MULTIBOX | {"supernet__sync_batch_norm": False}),
    "final fixed": ("final", True, {"loss__type": "multibox"}),
    "final synchronised": ("final", False, {}),
}


class Job:
    """A function run by several processes as torchrun would run it, but forked: none has to import torch again.

    `work(rank)` has the processes' standard streams in files. `wait` gives the exit statuses.
    """

    def __init__(self, folder: Path, work: Callable[[int], None], size: int = PROCESSES):
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._streams = [Path(tempfile.mkstemp(dir=folder, suffix=suffix)[1]) for suffix in (".out", ".err")]
        fork = multiprocessing.get_context("fork")
        self._processes = [fork.Process(target=self._be, args=(folder, work, rank, size)) for rank in range(size)]
        for process in self._processes:
            process.start()

    def _be(self, folder: Path, work: Callable[[int], None], rank: int, size: int) -> None:
        for path, stream in zip(self._streams, (sys.__stdout__, sys.__stderr__), strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream.fileno())
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.chdir(folder)
        where = {"CUDA_VISIBLE_DEVICES": ""}
        if size > 1:
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port}
            where |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            where |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # the parent has the store
        os.environ.update({name: str(value) for name, value in where.items()})
        work(rank)
        sys.stdout.flush()

    def wait(self) -> list[int]:
        for process in self._processes:
            process.join(120)
            assert not process.is_alive()
        self.stdout, self.stderr = (path.read_text() for path in self._streams)
        return [process.exitcode for process in self._processes]


def run_script(folder: Path, script: str, *arguments: str, size: int = PROCESSES, interrupt: tuple = ()) -> Job:
    """A script in several processes, to its end. `interrupt` is (rank, signal): sent to itself within epoch 2."""

    def work(rank: int) -> None:
        update = Trainer.update

        def update_and_signal(trainer: Trainer, losses: object) -> object:
            found = update(trainer, losses)
            if (rank, trainer.epoch, trainer.batch) == (interrupt[0], 2, 3):
                os.kill(os.getpid(), interrupt[1])
            return found

        if interrupt:
            Trainer.update = update_and_signal
        run(lambda: importlib.import_module(script.removesuffix(".py")).main(list(arguments)))

    return Job(folder, work, size)


def be_one_of_several(rank: int, folder: Path) -> None:
    """Everything that needs several processes but no script; what each found goes to `folder`."""
    distributed.join(CPU)
    found = {"messages": messages(), "norms": norms(), "stops": stops(), "reports": distributed.first_to_report()}
    found["trained"] = {name: train(folder, name) for name in CASES}  # the first one draws the data
    found |= {"metrics": evaluate(folder), "panel": score_panel(folder, f"panel of {rank}")}
    torch.save(found, folder / f"{rank}.pt")
    lose_a_process(folder)


def settings(folder: Path, **changes: object) -> Config:
    both = {"batch_size": 8, "ema_decay": 0.9, "sync_batch_norm": True, "clip_grad_norm": 20.0}
    keys = {f"{stage}__{key}": value for stage in ("supernet", "final") for key, value in both.items()}
    keys |= {"supernet__samples": 3, "data__root": folder / "shapes", "data__workers": 0}
    return config_io.from_dict(tiny_settings(**keys | {"data__shapes_train": 24, "data__shapes_test": 7} | changes))


def load(c: Config, split: str) -> Annotations:
    return load_annotations(c.data, split)


def random_detector(c: Config) -> ElasticSSD:
    """With random statistics, as after a training."""
    torch.manual_seed(0)
    detector = ElasticSSD(c, num_classes=5)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return detector


def train(folder: Path, case: str) -> dict:
    """Some steps of a script's own."""
    stage, fixed, changes = CASES[case]
    c = settings(folder, **changes)
    annotations, detector = load(c, "train"), random_detector(c)
    model = detector if stage == "supernet" else detector.extract(detector.space.smallest())
    if not fixed:  # the last maps have a pixel an image: steps through their statistics magnify float32's rounding
        model.double()
    training = getattr(c, stage)
    loader = train_loader(annotations, range(len(annotations)), 64, training.batch_size, c, CPU)
    trainer = Trainer(model, training, CPU, loader.batch_sampler.batches_per_epoch)
    loss = DetectionLoss(c.loss)
    start = flat(model)
    model.train()
    if fixed:
        final_training.freeze_norms(model)
    losses = []
    for batch, _ in zip(loader, range(STEPS), strict=False):
        if stage == "supernet":
            genotypes = supernet_train.step_genotypes(detector.space, c.supernet, c.seed, trainer.step)
            items = supernet_train.supernet_losses(detector, loss, batch, genotypes, c.supernet.distill, 0.5)
        else:
            targets = loss.match(batch.boxes, batch.labels, model.priors)
            items = final_training.detection_losses(model, loss, batch, targets)
        losses += trainer.update(items)
    states = {"model": model.state_dict(), "ema": trainer.ema.state_dict()}
    return {**states, "losses": losses, "images": len(batch.images), "moved": (flat(model) - start).abs().max().item()}


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def evaluate(folder: Path) -> dict:
    """The metrics of a detector on seven pictures in batches of two."""
    c = settings(folder, final__batch_size=2)
    detector = random_detector(c)
    return final_training.evaluate(detector.extract(detector.space.largest()), load(c, "test"), c, CPU)


def score_panel(folder: Path, name: str) -> list[dict]:
    """What is logged about three sub-networks of a supernet whose BatchNorm is synchronised."""
    c = settings(folder, supernet__panel=1)
    annotations, detector = load(c, "train"), random_detector(c)
    synchronise_norms(detector)
    split = split_indices(annotations, c.data.data_portion, c.seed)
    log = RunLog(folder / name / "log.jsonl")
    scorer = Scorer(prepare_scoring_data(annotations, *split, c), c, CPU)
    panel = Panel(make_panel(detector.space, 1, c.seed), scorer, c)
    panel.score(detector, 1, log)
    return [record["networks"] for record in read_log(log.path)]


def messages() -> dict:
    """Each of the small exchanges."""
    rank = distributed.world().rank
    distributed.BUCKET = 50  # so that the gradients fill several
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 1), nn.Linear(2, 2)).to(memory_format=torch.channels_last)
    for number, parameter in enumerate(net.parameters()):
        parameter.data.fill_(rank + number)
        if number < 4:  # the last layer did not run
            numbers = torch.arange(1.0, parameter.numel() + 1).view_as(parameter)
            parameter.grad = torch.zeros_like(parameter).copy_(numbers * (1 + 2 * rank))
    distributed.average_gradients(net.parameters())
    distributed.copy_from_main(net)
    distributed.BUCKET = 2**23
    return {
        "gradients": [p.grad for p in net.parameters()],
        "copied": [p.detach().unique().tolist() for p in net.parameters()],
        "collected": distributed.collect([2 * item for item in distributed.deal("abcde")]),
        "dealt": distributed.deal("abcde"),
        "few": distributed.collect(distributed.deal(["alone"])),
        "told": distributed.from_main({"rank": rank}),
        "mean": distributed.mean_of({"a": 1.0 + rank, "b": 4.0 * rank}),
        "any": [distributed.any_of(flag) for flag in (False, rank == 1, True)],
        "normalizers": distributed.normalizer(torch.tensor([3 * rank, 0])).tolist(),
        "sorted": sort_channels(),
    }


def sort_channels() -> list[int]:
    """The order in which a block's channels are sorted. The last is the most important one to process 0, else 0."""
    block = ElasticInvertedResidual(8, 8, 1, expands=[2], kernels=[3], activation="relu")
    numbers = torch.arange(16)
    block.expand.weight.data.copy_(numbers.view(16, 1, 1, 1))
    block.project.weight.data.copy_((numbers if distributed.world().main else 16 - numbers).view(1, 16, 1, 1))
    assert sort_hidden_channels(nn.Sequential(block)) == 1
    return block.expand.weight[:, 0].flatten().tolist()


def share(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch."""
    return x.chunk(distributed.world().size)[distributed.world().rank]


def norms() -> dict:
    """A batch far from 0 through two synchronised layers; of the first, four of its six channels."""
    generator = torch.Generator().manual_seed(0)
    images, weight = (torch.randn(6, 4, 5, 5, generator=generator) * 3 + mean for mean in (50.0, 0.0))
    x = share(images).requires_grad_()
    net = nn.Sequential(nn.BatchNorm2d(6), nn.Sequential(nn.BatchNorm2d(4)))
    for number, parameter in enumerate(net.parameters()):
        parameter.data += 0.1 * torch.arange(len(parameter)) * (number + 1)
    synchronise_norms(net)
    first, second = net[0], net[1][0]
    y = second(first(x).relu())
    (y.square() * share(weight)).mean().backward()
    distributed.average_gradients(net.parameters())
    plain = copy.deepcopy(net)
    assert not any(isinstance(module, SyncBatchNorm) for module in plain.modules())
    local = plain[1](x.detach()).detach()
    return {"y": y.detach(), "x": x.grad, "net": net.state_dict(), "local": local} | {
        "gradients": [p.grad for p in net.parameters()]
    }


def stops() -> list[bool]:
    """One process has the signal, before the second of three steps."""
    seen = []
    with StopRequest() as stop:
        for step in range(3):
            if step == 1 and distributed.world().rank == 1:
                os.kill(os.getpid(), 15)
            seen.append(stop.requested)
            stop.agree()
            seen.append(stop.requested)
    return seen


def lose_a_process(folder: Path) -> None:
    """What the main process finds in a forward and in a backward pass once the other is gone."""
    x = torch.ones(2, requires_grad=True)
    y = distributed.stack(x).sum()
    distributed.any_of(False)
    if not distributed.world().main:
        os._exit(0)
    for name, call in {"backward": y.backward, "forward": lambda: distributed.any_of(False)}.items():
        try:
            call()
        except distributed.PeerLost as error:
            (folder / name).write_text(str(error))
