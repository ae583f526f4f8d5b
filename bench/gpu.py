"""What only a GPU can show, in 8 minutes: that it computes what the CPU computes, that it repeats, how fast it is.

    python bench/gpu.py                        # cuda:0
    python bench/gpu.py --data /path/to/voc    # also pictures a second of the training loader on your own data
    python bench/gpu.py --device cpu --quick   # the same script without a GPU, a small network

Prints PASS, FAIL and INFO lines and writes gpu.json. The exit status is 1 if something failed. A section that raises an
error fails; the others go on.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor

from lib import checkpoint
from lib.config_io import read_config
from lib.datasets import Batch, load_annotations, train_loader
from lib.detector import ElasticSSD, detect, fuse
from lib.elastic import to_device
from lib.latency import fused_detectors, time_detectors
from lib.losses import DetectionLoss
from lib.runtime import pick_device, prepare_process, seed_everything
from lib.scoring import Scorer

CLASSES, OBJECTS = 20, 3
SECTIONS = "parity repeats precisions waits stages steps score loader latency recorded".split()  # noqa: SIM905
PRECISIONS = ("fp32", "bf16", "fp16")


class Report:
    """Lines as they come, and all of them in the JSON file at the end."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.lines: list[dict] = []

    def line(self, status: str, name: str, text: str) -> None:
        print(f"{status} {time.monotonic() - self.start:4.0f} s  {name}: {text}", flush=True)
        self.lines.append({"status": status, "name": name, "text": text})

    def info(self, name: str, text: str) -> None:
        self.line("INFO", name, text)

    def check(self, name: str, good: bool, text: str) -> None:
        self.line("PASS" if good else "FAIL", name, text)


class Bench:
    """The sections; each method is one, run in their order."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.report = args, folder, Report()
        self.device = pick_device(args.device)
        self.clock = common.clock_of(self.device)
        self.gpu = self.device.type == "cuda"
        self.config, self.detector = self.small() if args.quick else common.reference(CLASSES)
        self.size = self.detector.space.largest().image_size
        self.middle = common.median_genotype(self.detector)
        self.rounds = 3 if args.quick else 10

    def small(self) -> tuple:
        config = read_config(common.ROOT / "configs" / "shapes.yaml", [f"data.num_classes={CLASSES}"])
        torch.manual_seed(0)
        return config, ElasticSSD(config, CLASSES)

    def batch(self, images: int, size: int | None = None) -> Batch:
        return common.random_batch(images, size or self.size, OBJECTS, CLASSES).to(self.device)

    def milliseconds(self, work: Callable[[], object], rounds: int | None = None) -> float:
        """The median over the rounds, after three calls to warm up."""
        for _ in range(3):
            work()
        timed = common.timed(work, self.clock)
        return 1e3 * float(np.median([timed() for _ in range(rounds or self.rounds)]))

    def parity(self) -> None:
        """A supernet step in float32 on the device and on the CPU: outputs, losses, gradients, weights."""
        config, detector = self.small()
        genotype, found = common.median_genotype(detector), {}
        allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        for device in (common.CPU, self.device):
            model = copy.deepcopy(detector).to(device).train()
            batch = common.random_batch(8, genotype.image_size, OBJECTS, CLASSES).to(device)
            logits, offsets = model(batch.images, genotype)
            loss = DetectionLoss(config.loss, config.head.variances)
            losses = loss(logits, offsets, loss.match(batch.boxes, batch.labels, model.priors(genotype.image_size)))
            sum(losses.values()).backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found[device.type] = logits, offsets, torch.stack(list(losses.values())), torch.cat(gradients)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
        names = "logits", "offsets", "losses", "gradients"
        for name, value, expected in zip(names, found[self.device.type], found["cpu"], strict=True):
            gap = relative(value, expected)
            self.report.check(f"{name} as on the CPU", gap < 1e-3, f"relative difference {gap:.1e}")

    def repeats(self) -> None:
        """The same seed twice."""

        def weights() -> Tensor:
            config, detector = self.small()
            seed_everything(3)
            steps = common.SupernetSteps(detector, config, self.device)
            for genotype in common.random_genotypes(detector, 8):
                steps(self.batch(8, genotype.image_size), genotype)
            return torch.cat([p.detach().flatten() for p in detector.parameters()]).cpu()

        first, second = weights(), weights()
        equal = torch.equal(first, second)
        text = "bit by bit" if equal else f"relative difference {relative(first, second):.1e}"
        self.report.check("the same seed twice", equal or (self.gpu and relative(first, second) < 1e-2), text)

    def precisions(self) -> None:
        """Each precision learns one batch by heart."""
        for precision in PRECISIONS if self.gpu else PRECISIONS[:1]:
            config, detector = self.small()
            config.supernet.precision = precision
            steps = common.SupernetSteps(detector, config, self.device)
            genotype = detector.space.largest()
            batch = self.batch(8, genotype.image_size)
            losses = [sum(steps(batch, genotype).values()) for _ in range(10 if self.args.quick else 60)]
            good = losses[-1] < 0.9 * losses[0]  # False for a NaN too
            self.report.check(f"{precision} trains", good, f"loss {losses[0]:.2f} to {losses[-1]:.2f}")

    def waits(self) -> None:
        """The host waits for nothing within a step of a GPU: a wait raises an error here."""
        if not self.gpu:
            return
        config, detector = self.small()
        steps = common.SupernetSteps(detector, config, self.device)
        genotype = common.median_genotype(detector)
        batch = self.batch(8, genotype.image_size)
        steps(batch, genotype)
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.trainer.update(steps.losses(batch, genotype))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self.report.check("a supernet step does not wait", True, "torch.cuda.set_sync_debug_mode saw nothing")

    def stages(self) -> None:
        """The three scripts as a user runs them, the search with two workers on the device."""
        keys = "supernet.epochs=3 supernet.eval_every=3 final.epochs=2 final.eval_every=2 search.steps=4"
        keys += (
            " search.num_epochs=1 search.population_size=4 search.bn_images=32 data.shapes_train=96 data.shapes_test=16"
        )
        sets = [part for key in [*keys.split(), f"data.root={self.folder / 'shapes'}"] for part in ("--set", key)]
        device, workers = ["--device", self.args.device], "0,0" if self.gpu else "cpu,cpu"
        half = ["--set", "supernet.precision=bf16", "--set", "supernet.ema_decay=0.9"]
        precise = ["--set", f"final.precision={'fp16' if self.gpu else 'fp32'}"]
        commands = {
            "supernet_train.py": ["--cfg", common.ROOT / "configs" / "shapes.yaml", *sets, *half, *device],
            "async_search.py": ["--gpus", workers],
            "final_train.py": ["--genotype", "best.json", *precise, *device],
        }
        for script, flags in commands.items():
            command = [sys.executable, common.ROOT / script, *flags]
            start = time.monotonic()
            done = subprocess.run(list(map(str, command)), cwd=self.folder, capture_output=True, text=True)
            last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
            self.report.check(script, done.returncode == 0, f"{time.monotonic() - start:.0f} s; {' '.join(last)[:200]}")

    def steps(self) -> None:
        """Training steps beside torchvision's ssdlite320."""
        for images in (4,) if self.args.quick else (16, 32, 64):
            for precision in PRECISIONS[:2] if self.gpu else PRECISIONS[:1]:
                config = copy.deepcopy(self.config)
                config.supernet.precision = config.final.precision = precision
                batch, genotypes = self.batch(images), common.random_genotypes(self.detector, 8)
                supernet = common.SupernetSteps(copy.deepcopy(self.detector), config, self.device)
                plain = self.detector.extract(self.middle)
                final = partial(common.plain_step(plain, config, config.final, self.device), batch)
                took = {"final": self.milliseconds(final), "supernet": 0.0}
                for genotype in genotypes:
                    took["supernet"] += self.milliseconds(partial(supernet, batch, genotype)) / len(genotypes)
                peer = common.PeerProcess(CLASSES, self.device)
                peer.load(common.random_batch(images, common.PEER_SIZE, OBJECTS, CLASSES))
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                with torch.autocast(self.device.type, dtype, enabled=precision == "bf16"):
                    theirs = self.milliseconds(peer.train)
                text = ", ".join(f"{name} {ms:.1f} ms ({ms / theirs:.2f})" for name, ms in took.items())
                self.report.info(f"step, batch {images}, {precision}", f"{text}, ssdlite320 {theirs:.1f} ms")

    def score(self) -> None:
        """A candidate's score in its parts."""
        images, calibration = (16, 8) if self.args.quick else (500, 256)
        data = common.scoring_data(images, calibration, OBJECTS, CLASSES, self.size)
        detector = self.detector.to(self.device)
        whole = self.milliseconds(lambda: Scorer(data, self.config, self.device)(detector, self.middle), 3)
        model = to_device(fuse(detector.extract(self.middle)), self.device)
        batches = data["images"][self.size].split(self.config.search.batch_size)
        detection = self.milliseconds(lambda: detect(model, batches, self.config, self.device), 3)
        with torch.inference_mode():
            network = self.milliseconds(lambda: [model(batch.to(self.device)) for batch in batches], 3)
        text = f"{whole:.0f} ms, of it detection {detection:.0f} ms, of that the network {network:.0f} ms"
        self.report.info(f"score on {images} pictures, BatchNorm on {calibration}", text)

    def loader(self) -> None:
        """Pictures a second that reach the device."""
        if self.args.data is None:
            return
        self.config.data.root, self.config.data.dataset_type = str(self.args.data), "auto"
        self.config.data.num_classes = 0
        annotations = load_annotations(self.config.data, "train")
        for workers in (0, 1) if self.args.quick else (4, 8, 16):
            self.config.data.workers = workers
            loader = train_loader(annotations, range(len(annotations)), self.size, 32, self.config, self.device)
            for epoch in (1, 2):  # the first one starts the workers
                loader.batch_sampler.set_epoch(epoch)
                start = self.clock()
                seen = sum(len(batch.to(self.device)) for batch in loader)
                rate = seen / (self.clock() - start)
            self.report.info(f"loader, {workers} workers", f"{rate:.0f} pictures a second")

    def latency(self) -> None:
        """Plain calls, whether they repeat to 3%, and the same work without its launches, as a CUDA graph."""
        space = self.detector.space
        genotypes = [space.smallest(), self.middle, space.largest()]
        models = fused_detectors(self.detector, genotypes, self.config, self.device)
        runs = np.array([time_detectors(models, self.config, self.device) for _ in range(2 if self.args.quick else 4)])
        runs = runs[:, : len(models)]  # the last one is NMS
        worst = float((np.ptp(runs, axis=0) / np.median(runs, axis=0)).max())
        times = ", ".join(f"{ms:.3f}" for ms in np.median(runs, axis=0))
        self.report.line("PASS" if worst < 0.03 else "FAIL" if self.gpu else "INFO", "latency repeats", f"{worst:.1%}")
        graphs = ""
        if self.gpu:
            sizes = [genotype.image_size for genotype in genotypes]
            images = [torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.device) for size in sizes]
            times_of_graphs = [self.milliseconds(graph_of(m, x)) for m, x in zip(models, images, strict=True)]
            graphs = "; without resizing, as a CUDA graph " + ", ".join(f"{ms:.3f}" for ms in times_of_graphs)
        self.report.info("latency of smallest, median, largest", f"{times} ms{graphs}")

    def recorded(self) -> None:
        """A final step with its passes launched kernel by kernel and in one go: the same weights, in less time."""
        batch = self.batch(4 if self.args.quick else 32)
        for precision in PRECISIONS if self.gpu else PRECISIONS[:1]:
            texts, weights = [], []
            for record in (False, True):
                config = copy.deepcopy(self.config)
                config.final.precision, config.final.cuda_graph = precision, record
                model = self.detector.extract(self.middle)
                step = partial(common.plain_step(model, config, config.final, self.device), batch)
                for _ in range(5):
                    step()
                weights.append(torch.cat([value.flatten() for value in model.parameters()]))
                texts.append(f"{self.milliseconds(step):.1f} ms")
                texts[-1] += f" (kernels {kernel_milliseconds(step):.1f} ms)" if self.gpu else ""
            gap = relative(*weights)
            text = f"{', recorded '.join(texts)}, weights differ by {gap:.1e}"
            self.report.check(f"final step, {precision}", gap < 1e-3, text)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def kernel_milliseconds(work: Callable[[], object], calls: int = 3) -> float:
    """For how long kernels run in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
    kernels = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(e.time_range.elapsed_us() for e in kernels) / 1e3 / calls


@torch.inference_mode()
def graph_of(model: torch.nn.Module, picture: Tensor) -> Callable[[], None]:
    """Replays a call of `model` without launching its kernels one by one."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            model(picture)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(picture)
    return graph.replay


def main() -> None:
    parser = common.bench_parser(__doc__, "gpu.json")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--data", type=Path, help="a data set, for the loader's rate")
    parser.add_argument("--quick", action="store_true", help="a small network and few rounds, for a CPU")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="of the sections, these")
    args = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        report = bench.report
        name = torch.cuda.get_device_name(bench.device) if bench.gpu else common.device_name(common.CPU)
        report.info("machine", f"{name}, torch {torch.__version__}, commit {checkpoint.code_revision()}")
        for section in (getattr(bench, name) for name in args.only or SECTIONS):
            try:
                section()
            except Exception as error:
                traceback.print_exc()
                report.check(section.__name__, False, repr(error)[:300])
            args.out.write_text(json.dumps(report.lines, indent=1) + "\n")
    failed = [line["name"] for line in report.lines if line["status"] == "FAIL"]
    print(f"{len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}; wrote {args.out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
