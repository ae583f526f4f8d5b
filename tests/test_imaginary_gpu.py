"""What training and scoring would ask of a GPU: on the imaginary one, with nothing on the wrong device."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import imaginary_gpu
import pytest
import torch
import yaml
from tiny_runs import killed_at, read_lines, tiny_settings
from torch import nn

import async_search
import final_train
import supernet_train
from lib import checkpoint, config_io, dispatcher, final_training, latency, runtime
from lib.checkpoint import ROOT
from lib.config import LossConfig, TrainConfig
from lib.datasets import Batch, load_annotations
from lib.detector import ElasticSSD, load_detector
from lib.elastic import to_device
from lib.final_training import detection_losses
from lib.losses import DetectionLoss
from lib.scoring import Scorer, scoring_worker
from lib.training import Trainer, build_optimizer
from lib.training_run import Training

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
copies_tensors = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
    reason="torch 2.4 crashes where a tensor is deep-copied under a dispatch mode, which the imaginary GPU is",
)


def on_imaginary_gpu(work: Callable[[], object], gpus: int = 1) -> object:
    """The result of `work` in a process of its own, where the GPUs stay."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def be() -> None:
        torch.set_num_threads(1)
        imaginary_gpu.install(gpus)
        try:
            theirs.send(work())
        except BaseException as error:
            theirs.send(repr(error))
            raise

    process = context.Process(target=be)
    process.start()
    theirs.close()
    assert ours.poll(300), "no answer"
    result = ours.recv()
    process.join()
    assert process.exitcode == 0, result
    return result


def reference(size: int = 96) -> tuple[config_io.Config, ElasticSSD, Batch]:
    """The reference MobileNetV3 space with 20 classes, and four pictures with three objects each.

    The pictures are small: how many operators there are does not depend on their size.
    """
    config = config_io.read_config(
        ROOT / "configs" / "voc_mbv3.yaml", ["data.num_classes=20", f"search_space.image_size_choice=[{size}]"]
    )
    torch.manual_seed(0)
    detector = ElasticSSD(config, 20)
    corner = 0.5 * torch.rand(4, 3, 2)
    boxes = torch.cat([corner, corner + 0.05 + 0.4 * torch.rand(4, 3, 2)], -1)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    return config, detector, Batch(images, boxes, torch.randint(1, 21, (4, 3)), torch.arange(4))


def count_steps() -> dict[tuple[str, str], tuple[int, int, int]]:
    """Kernels, waits and copies of matching, forward and backward pass and the optimizer's step."""
    config, detector, batch = reference()
    rng = random.Random(0)
    drawn = sorted((detector.space.sample(rng) for _ in range(101)), key=lambda g: detector.cost(g).flops)
    genotype = drawn[50]
    to_device(detector, GPU).train()
    batch = batch.to(GPU)
    plain = detector.extract(genotype)
    networks = {"supernet": (detector, (batch.images, genotype)), "plain": (plain, (batch.images,))}
    loss = DetectionLoss(config.loss, config.head.variances)
    found = {}
    for name, (model, inputs) in networks.items():
        optimizer = build_optimizer(model, config.supernet)
        optimizer.zero_grad(set_to_none=True)
        # Momentum exists from the second step on.
        for dtype in (torch.float32, torch.float32, *[torch.bfloat16] * (name == "supernet")):
            imaginary_gpu.counts.clear()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                logits, offsets = model(*inputs)
                targets = loss.match(batch.boxes, batch.labels, detector.priors(96))
                losses = loss(logits, offsets, targets)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found[name, str(dtype)] = imaginary_gpu.counts.totals()
    return found


def test_a_step_never_makes_the_host_wait_and_launches_few_operators():
    """The supernet's step had 1,007 operators and 8 waits in float32, and 1,285 operators in bfloat16."""
    most = {"supernet": {"torch.float32": 765, "torch.bfloat16": 900}, "plain": {"torch.float32": 740}}
    found = on_imaginary_gpu(count_steps)
    assert all((waits, copies) == (0, 0) for _, waits, copies in found.values()), found
    for name, limits in most.items():
        assert all(found[name, dtype][0] <= limit for dtype, limit in limits.items()), found


@copies_tensors
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_waits_when_it_reads_the_losses_of_ten_batches(precision):
    """Moving average, clipped gradients and accumulation included."""

    def work() -> tuple:
        config = TrainConfig(precision=precision, accumulate=2, ema_decay=0.9, clip_grad_norm=1.0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
        trainer = Trainer(model, config, GPU, batches_per_epoch=40)
        images = torch.rand(4, 3, 8, 8, device=GPU)
        found = []
        for _ in range(20):
            imaginary_gpu.counts.clear()
            losses = ({name: model(images).square().mean()} for name in ("cls", "loc"))
            found.append((len(trainer.update(losses)), *imaginary_gpu.counts.totals()[1:]))
        return found

    assert on_imaginary_gpu(work) == 2 * [*[(0, 0, 0)] * 9, (10, 1, 0)]


def count_scoring(nms_threshold: float) -> tuple[int, int]:
    """Waits and copies of scoring the smallest sub-network on four pictures in batches of two."""
    config, detector, batch = reference()
    images = {96: batch.images}
    objects = [{"boxes": 96 * b, "labels": n, "ignore": n < 0} for b, n in zip(batch.boxes, batch.labels, strict=True)]
    classes = [f"class {i + 1}" for i in range(20)]
    data = {"bn_images": images, "images": images, "truth": objects, "sizes": [[96, 96]] * 4, "classes": classes}
    config.search.batch_size = 2
    config.postprocess.nms_threshold = nms_threshold
    scorer = Scorer(data, config, GPU)
    detector.to(GPU)
    imaginary_gpu.counts.clear()
    scorer(detector, detector.space.smallest())
    return imaginary_gpu.counts.totals()[1:]


def test_scoring_waits_once_a_batch_and_copies_pictures_only():
    """And once a candidate, whether its statistics are finite. There were 27 waits for each picture."""
    assert on_imaginary_gpu(lambda: count_scoring(nms_threshold=0.45)) == (2 + 1, 2 + 2)
    # Few boxes survive, so further candidates are tried: for that, everything is copied once.
    waits, _ = on_imaginary_gpu(lambda: count_scoring(nms_threshold=0.01))
    assert waits == 4 * 2 + 1


@pytest.mark.parametrize("kind", ["focal", "multibox"])
def test_losses_and_gradients_on_the_gpu_are_those_on_the_cpu(kind):
    """There, priors are masked where the CPU picks them, and proposals have a fixed number of rounds."""

    def both() -> list[float]:
        config, detector, batch = reference()
        batch.labels[1, 1:] = 0  # padding
        batch.labels[2] = 0  # no object at all
        batch.boxes[3, 1] = batch.boxes[3, 0]  # two objects want the same priors
        results = []
        for device in (CPU, GPU):
            loss = DetectionLoss(replace(LossConfig(), type=kind))
            torch.manual_seed(1)
            priors = detector.priors(96)
            logits = torch.randn(4, len(priors), 21).to(device).requires_grad_()
            teacher = torch.randn(4, len(priors), 21).to(device)
            offsets = torch.randn(4, len(priors), 4).to(device).requires_grad_()
            moved = batch.to(device)
            targets = loss.match(moved.boxes, moved.labels, priors.to(device))
            losses = loss(logits, offsets, targets)
            losses["distill"] = loss.distillation(logits, teacher, targets, config.supernet.distill)
            sum(losses.values()).backward()
            results.append([*losses.values(), logits.grad, offsets.grad, targets.prior_labels])
        return [float((a.cpu() - b.cpu()).abs().max() / b.cpu().abs().max()) for a, b in zip(*results, strict=True)]

    assert max(on_imaginary_gpu(both)) < 1e-5


def test_an_operator_on_two_devices_is_refused_and_waits_are_seen():
    def work() -> tuple:
        a, b = torch.ones(3, device="cuda:0"), torch.ones(3)
        with pytest.raises(imaginary_gpu.WrongDevice):
            a + b
        with pytest.raises(TypeError, match="NumPy"):
            a.numpy()
        imaginary_gpu.counts.clear()
        assert a.is_cuda and not b.is_cuda and (a * 2).device == GPU and b.to(a).device == GPU
        (a + b.cuda()).sum().item()
        a.nonzero()
        return imaginary_gpu.counts.totals()

    assert on_imaginary_gpu(work) == (4, 2, 2)  # mul, add, sum, nonzero; item and nonzero; b twice


def test_a_final_step_trains_there():
    def work() -> bool:
        config, detector, batch = reference()
        model = detector.extract(detector.space.smallest()).to(GPU).train()
        loss, batch = DetectionLoss(config.loss, config.head.variances), batch.to(GPU)
        targets = loss.match(batch.boxes, batch.labels, model.priors)
        (losses,) = detection_losses(model, loss, batch, targets)
        sum(losses.values()).backward()
        return all(p.grad.device == GPU for p in model.parameters())

    assert on_imaginary_gpu(work)


@contextlib.contextmanager
def each_call(owner: object, name: str, report: Callable[..., None]) -> Iterator[None]:
    """Meanwhile `report(counts, *arguments)` gets what each call of a method or function asked of the GPUs."""
    real = getattr(owner, name)

    def counted(*arguments: object) -> object:
        imaginary_gpu.counts.clear()
        result = real(*arguments)
        report(imaginary_gpu.counts, *arguments)
        return result

    with mock.patch.object(owner, name, counted):
        yield


def watched_worker(*setup: object) -> Callable[[dict], dict]:
    """A search's worker, whose results say where it computes, and how often the host waited there."""
    score = scoring_worker(*setup)

    def watched(job: dict) -> dict:
        imaginary_gpu.counts.clear()
        result = score(job)
        _, waits, _ = imaginary_gpu.counts.totals()
        result["metrics"] |= {"gpu": torch.cuda.current_device(), "waits": waits}
        return result

    return watched


def run_the_scripts(folder: Path) -> dict[str, list]:
    """The three stages in `folder`, both trainings ended and resumed; what their epochs asked of the GPU."""
    os.chdir(folder)
    found: dict[str, list] = {"supernet": [], "final": [], "save": []}

    def epoch(counts: imaginary_gpu.Counts, training: Training, *_: object) -> None:
        _, waits, copies = counts.totals()
        found[training.stage].append((training.trainer.step, waits, copies, counts.blocking.total()))

    def save(counts: imaginary_gpu.Counts, training: Training) -> None:
        found["save"].append(counts.totals()[1])

    with contextlib.ExitStack() as meanwhile:
        for owner, name, stand_in in (
            (dispatcher, "CONTEXT", multiprocessing.get_context("fork")),  # so that the GPUs are there
            (async_search, "scoring_worker", watched_worker),
            (latency, "ROUNDS", 1),
            (runtime, "REPETITIONS", 1),
            (supernet_train, "plot_training", lambda *_: None),
            (final_training, "plot_training", lambda *_: None),
        ):
            meanwhile.enter_context(mock.patch.object(owner, name, stand_in))
        meanwhile.enter_context(each_call(Training, "_train_epoch", epoch))
        meanwhile.enter_context(each_call(Training, "save", save))
        supernet = ["--cfg", "tiny.yaml", "--device", "cuda:1"]
        with killed_at(1, (checkpoint, "save")):
            supernet_train.main(supernet)
        supernet_train.main([*supernet, "--resume"])
        async_search.main(["--gpus", "0,1"])
        with killed_at(1, (checkpoint, "save")):
            final_train.main([])
        final_train.main(["--resume"])
    return found


@copies_tensors
def test_the_three_scripts_run_there(tmp_path):
    """Half precision, moving averages, distillation, --resume and two workers; every operator checks its devices."""
    settings = tiny_settings(
        data__root="shapes",
        data__shapes_train=10,
        data__shapes_test=4,
        data__workers=0,
        search_space__num_cell_groups=[1, 1, 1, 1, 2, 1],
        supernet__precision="fp16",
        supernet__ema_decay=0.9,
        search__num_epochs=2,
        search__steps=2,
        final__ema_decay=0.9,
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    found = on_imaginary_gpu(lambda: run_the_scripts(tmp_path), gpus=2)
    # Steps so far, waits, copies (five a batch), copies that the host waits for. In fp16 it reads at each step the loss
    # and whether a gradient overflowed.
    assert found["supernet"] == [(2, 4, 10, 0), (4, 4, 10, 0)]
    assert found["final"] == [(2, 0, 10, 0), (4, 0, 10, 0)]
    # Losses; whether the weights are finite; the scaler's state.
    assert max(found["save"]) <= 4
    records = read_lines(tmp_path / "runs/tiny/search/evals.jsonl")
    places = {(record["metrics"]["gpu"], record["metrics"]["waits"]) for record in records}
    assert len(records) == 4 and places == {(0, 2), (1, 2)}
    final = tmp_path / "runs/tiny/final"
    metrics = json.loads((final / "metrics.json").read_text())
    assert metrics["latency"]["device"] == "cuda:0"
    # The CPU finds what the GPU found.
    detector = load_detector(final / "best.pt")
    data = replace(detector.config.data, root=str(tmp_path / "shapes"), classes=list(detector.classes))
    expected = final_training.evaluate(detector.model, load_annotations(data, "test"), detector.config, CPU)
    assert all(metrics[name] == pytest.approx(expected[name], abs=1e-6) for name in ("AP", "AP50", "mAP"))
