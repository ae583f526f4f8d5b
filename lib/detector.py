"""What a network costs: multiply-adds and parameters, counted without running it on data.

BatchNorm folded into the convolution before it: what a deployed detector computes, with fewer operations.

ElasticSSD: backbone, extra blocks, predictors, priors of every sub-network; `extract` gives one as a plain SSD.

Trained networks read back from their checkpoints: a supernet, a final detector, a teacher.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_weights
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from lib import checkpoint, config_io
from lib.backbone import ElasticBackbone
from lib.config import Config, DistillConfig
from lib.elastic import ElasticDepthwiseConv, Segment, copy_module, extract_segment, run_segment
from lib.errors import UserError
from lib.genotype import Block, Genotype, SearchSpace
from lib.head import ElasticExtras, Predictors, extra_channels
from lib.losses import focal_prior_bias
from lib.postprocess import Detections, class_scores, postprocess
from lib.priors import decode, prior_boxes, priors_per_cell
from lib.shrinking import full_space, space_at


class Cost(NamedTuple):
    """`flops` are multiply-adds for one image, `params` are learned numbers."""

    flops: int
    params: int

    def plus(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.params + other.params)


ModuleCost = tuple[Cost, list[tuple[int, ...]]]  # and the shapes of the outputs


def module_cost(module: nn.Module, *input_shapes: Sequence[int]) -> ModuleCost:
    """The cost of a plain module on inputs of these shapes, and the shapes of its outputs.

    Runs on torch's meta device, so no arithmetic is done. Convolutions and matrix products count, as in the papers.
    """
    shadow = copy.deepcopy(module).to("meta").eval()
    inputs = [torch.empty(shape, device="meta") for shape in input_shapes]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = shadow(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    params = sum(p.numel() for p in module.parameters())
    return Cost(counter.get_total_flops() // 2, params), [tuple(o.shape) for o in outputs]


def fuse(model: nn.Module) -> nn.Module:
    """A copy of a plain `model` in evaluation mode with the same outputs, but for rounding (Jacob et al., CVPR 2018).

    Every BatchNorm that follows a convolution in an `nn.Sequential` is folded into it and gone.
    """
    return fuse_(copy.deepcopy(model))


@torch.no_grad()
def fuse_(model: nn.Module) -> nn.Module:
    """`fuse` in place: without the copy, which takes a tenth of the time that a candidate's score does."""
    model.eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        layers = list(sequence._modules.items())  # named_children() leaves out a layer's second occurrence
        for (_, conv), (norm_name, norm) in itertools.pairwise(layers):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                delattr(sequence, norm_name)
    return model


class Normalize(nn.Module):
    """Pictures, uint8 or float in 0..255, (B, 3, H, W), to (x - mean) / std at S x S."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_size: int) -> Tensor:
        x = images.to(self.mean.dtype)
        if x.shape[-2:] != (image_size, image_size):
            x = F.interpolate(x, (image_size, image_size), mode="bilinear", align_corners=False)
        # With three channels, channels_last before would take twice as long.
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class SSD(nn.Module):
    """One plain detector without a trace of elasticity; `backbone` and `extras` are one module per feature map."""

    def __init__(
        self,
        image_size: int,
        normalize: Normalize,
        backbone: Sequence[nn.Module],
        extras: Sequence[nn.Module],
        predictors: Predictors,
        priors: Tensor,
    ):
        super().__init__()
        self.image_size = image_size
        self.normalize = normalize
        self.backbone = nn.ModuleList(backbone)
        self.extras = nn.ModuleList(extras)
        self.predictors = predictors
        self.register_buffer("priors", priors, persistent=False)  # (P, 4) cxcywh

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), 0..255, to logits (B, P, num_classes + 1) and offsets (B, P, 4)."""
        return self.predict(self.normalize(images, self.image_size))

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` of what has been resized and normalised, (B, 3, S, S)."""
        features = []
        for module in (*self.backbone, *self.extras):
            x = module(x)
            features.append(x)
        return self.predictors(features)


class ScoresAndBoxes(nn.Module):
    """A plain detector as it is deployed, up to non-maximum suppression: resize, network, scores, decoded boxes."""

    def __init__(self, model: SSD, config: Config):
        super().__init__()
        self.model = model
        self.loss_type, self.variances = config.loss.type, config.head.variances

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), 0..255, to scores (B, P, num_classes) and boxes (B, P, 4), xyxy within [0, 1]."""
        return self.decode(*self.model(images))

    def decode(self, logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        boxes = decode(offsets, self.model.priors, self.variances).clamp(0, 1)
        return class_scores(logits, self.loss_type), boxes


class ElasticSSD(nn.Module):
    """Every sub-network of a search space in shared weights. Stateless: the genotype is an argument.

    `space` is the largest space the weights can serve; `forward` and `extract` take any genotype in it.
    """

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        self.space: SearchSpace = full_space(config)
        self.num_classes = num_classes
        head, mult_ratio = config.head, config.backbone.mult_ratio
        self.normalize = Normalize(config.backbone.pixel_mean, config.backbone.pixel_std)
        self.backbone = ElasticBackbone(config.backbone, self.space.stages)
        extras = extra_channels(head.channels, mult_ratio)
        self.extras = ElasticExtras(self.backbone.feature_channels[-1], extras, self.space.head)
        channels = [*self.backbone.feature_channels, *extras]
        self.predictors = Predictors(channels, priors_per_cell(head.aspect_ratios), num_classes, head.predictor)
        for size in self.space.image_size:
            priors = prior_boxes(self.feature_sizes(size), head.scales, head.aspect_ratios, head.clip)
            self.register_buffer(f"priors_{size}", priors, persistent=False)  # (P, 4) cxcywh
        _initialise(self)
        if config.loss.type == "focal":
            self.predictors.set_class_bias(focal_prior_bias())
        self._costs: dict[tuple, ModuleCost] = {}

    def feature_sizes(self, image_size: int) -> list[tuple[int, int]]:
        """Side of each feature map: a convolution of stride 2 with centred padding halves, rounding up."""
        sizes, side = [], image_size
        for level in range(1, self.backbone.feature_levels[-1] + len(self.space.head) + 1):
            side = (side + 1) // 2
            if level in self.backbone.feature_levels or level > self.backbone.feature_levels[-1]:
                sizes.append((side, side))
        return sizes

    def priors(self, image_size: int) -> Tensor:
        """Prior boxes of one image size, (P, 4) cxcywh."""
        return self.get_buffer(f"priors_{image_size}")

    def segments(self, genotype: Genotype) -> list[Segment]:
        return [*self.backbone.segments(genotype), *self.extras.segments(genotype)]

    def forward(self, images: Tensor, genotype: Genotype) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), 0..255, to logits (B, P, num_classes + 1) and offsets (B, P, 4) of one sub-network."""
        x = self.normalize(images, genotype.image_size)
        features = []
        for segment in self.segments(genotype):
            x = run_segment(segment, x)
            features.append(x)
        return self.predictors(features)

    def extract(self, genotype: Genotype) -> SSD:
        """The sub-network as a plain module of its own, in the same mode: `extract(g)(x)` equals `self(x, g)`."""
        self.space.check(genotype)
        return SSD(
            image_size=genotype.image_size,
            normalize=copy_module(self.normalize),
            backbone=[extract_segment(s) for s in self.backbone.segments(genotype)],
            extras=[extract_segment(s) for s in self.extras.segments(genotype)],
            predictors=copy_module(self.predictors),
            priors=self.priors(genotype.image_size).clone(),
        ).train(self.training)

    def cost(self, genotype: Genotype) -> Cost:
        """Multiply-adds and parameters of the whole detector. Each block is counted once, then looked up."""
        total, shape, features = Cost(0, 0), (1, 3, genotype.image_size, genotype.image_size), []
        for segment in self.segments(genotype):
            for module, block in segment:
                cost, (shape,) = self._cost((module, block), [shape], lambda m=module, b=block: _plain(m, b))
                total = total.plus(cost)
            features.append(shape)
        cost, _ = self._cost(self.predictors, features, lambda: _FeatureList(self.predictors))
        return total.plus(cost)

    def _cost(self, what: object, shapes: list[tuple[int, ...]], make: Callable[[], nn.Module]) -> ModuleCost:
        key = (what, *shapes)
        if key not in self._costs:
            self._costs[key] = module_cost(make(), *shapes)
        return self._costs[key]


def _plain(module: nn.Module, block: Block | None) -> nn.Module:
    return module if block is None else module.extract(block)


class _FeatureList(nn.Module):
    """Predictors that take their feature maps one by one, as `module_cost` passes inputs."""

    def __init__(self, predictors: Predictors):
        super().__init__()
        self.predictors = predictors

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictors(features)


def _initialise(model: ElasticSSD) -> None:
    """He initialisation; the predictors' last layers start near zero, so that the first losses are near their priors'.

    A depthwise filter sees k * k inputs: its fan-in. Its fan-out as torch counts it has all channels in it, and would
    make it hundreds of times too small.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            mode = "fan_out" if module.groups == 1 else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ElasticDepthwiseConv):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
    for net in (*model.predictors.classes, *model.predictors.boxes):
        nn.init.normal_(net[-1].weight, std=0.01)


class Supernet(NamedTuple):
    """`space` holds the sub-networks that were open at `epoch`, the last one that was trained."""

    detector: ElasticSSD
    config: Config
    classes: tuple[str, ...]
    epoch: int
    space: SearchSpace


class Detector(NamedTuple):
    """A detector of final_train.py, ready to use: `model` is in evaluation mode."""

    model: SSD
    config: Config
    genotype: Genotype
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    epoch: int


def load_supernet(path: Path, mmap: bool = False) -> Supernet:
    """Read a checkpoint of supernet_train.py. `mmap` lets the processes of a machine share its memory."""
    payload = checkpoint.read(path, mmap)
    if "genotype" in payload or "config" not in payload:
        raise UserError(f"{path}: not a supernet's checkpoint; expected last.pt of supernet_train.py")
    settings = config_io.from_dict(payload["config"], str(path))
    detector = ElasticSSD(settings, len(payload["classes"]))
    load_weights(detector, payload, path)
    epoch = max(payload["epoch"] - (payload["batch"] == 0), 1)
    return Supernet(detector, settings, tuple(payload["classes"]), epoch, space_at(settings, epoch))


def load_detector(path: Path) -> Detector:
    """Read best.pt (or last.pt) of final_train.py; of a run's folder, its best.pt."""
    path = path / "best.pt" if path.is_dir() else path
    if path.suffix == ".onnx":
        raise UserError(f"{path}: an exported detector; expected the checkpoint that it comes from, best.pt")
    payload = checkpoint.read(path)
    if "genotype" not in payload:
        raise UserError(f"{path}: not a detector's checkpoint; expected best.pt of final_train.py")
    settings = config_io.from_dict(payload["config"], str(path))
    genotype = Genotype.from_dict(payload["genotype"])
    classes = tuple(payload["classes"])
    model = ElasticSSD(settings, len(classes)).extract(genotype)
    load_weights(model, payload, path)
    return Detector(model.eval(), settings, genotype, classes, tuple(payload["category_ids"]), payload["epoch"])


def detector_checkpoint(where: Path) -> Path | None:
    """best.pt in the folder of a final training, or `where` itself if it is a detector's checkpoint; else None."""
    if where.is_dir():
        return where / "best.pt" if (where / "best.pt").is_file() else None
    return where if where.is_file() and "genotype" in checkpoint.read(where, mmap=True) else None


def load_teacher(distill: DistillConfig, key: str, classes: Sequence[str], priors: Mapping[int, Tensor]) -> SSD | None:
    """The detector that `distill.teacher` names, frozen. None if it names none, or never gives it a weight.

    `key` is that setting's name; `priors` (P, 4), by image size, are those of the networks that it would teach. It may
    have another image size, if that gives the same ones. Raises UserError unless these and the classes are equal.
    """
    if not distill.teacher or not distill.active():
        return None
    teacher = load_detector(Path(distill.teacher))
    if teacher.classes != tuple(classes):
        known = ", ".join(teacher.classes)
        raise UserError(f"{key}: {distill.teacher} knows {known}, not {', '.join(classes)}")
    for size, expected in priors.items():
        if not torch.equal(teacher.model.priors, expected):
            raise UserError(f"{key}: {distill.teacher} has other prior boxes than what it would teach at {size} px")
    return teacher.model.requires_grad_(False)


def load_weights(model: nn.Module, payload: dict, path: Path) -> None:
    """The weights of a checkpoint, its moving average where there is one, into `model`."""
    try:
        model.load_state_dict(checkpoint.weights(payload))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: does not fit the configured network: {reason[:300]}") from None


def recalibrate(model: nn.Module, images: Iterable[Tensor], device: torch.device) -> None:
    """Reset the BatchNorm statistics and re-estimate them as the cumulative average over batches of images."""
    update_bn(images, model, device)


@torch.inference_mode()
def detect(model: SSD, images: Iterable[Tensor], config: Config, device: torch.device) -> list[Detections]:
    """Detections of every image of the batches (B, 3, H, W), in order, on the CPU."""
    model.eval()
    found: list[Detections] = []
    for batch in images:
        logits, offsets = model(batch.to(device, non_blocking=True))
        options = config.postprocess, config.loss.type, config.head.variances
        found += (Detections(*(t.cpu() for t in d)) for d in postprocess(logits, offsets, model.priors, *options))
    return found
