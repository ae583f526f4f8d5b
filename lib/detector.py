"""The detectors: ElasticSSD, all sub-networks in shared weights, and SSD, one of them as a plain module.

Then what is done with a detector: its BatchNorm is re-estimated and folded, its cost is counted, it detects objects,
and it is read back from a checkpoint (a supernet, a final detector).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_weights

from lib import UserError, checkpoint, config_io, naming
from lib.backbone import ElasticBackbone
from lib.config import Config
from lib.elastic import (
    ElasticDepthwiseConv,
    Segment,
    cast_weights,
    copy_module,
    extract_segment,
    make_divisible,
    run_segment,
)
from lib.genotype import Block, Genotype, SearchSpace
from lib.head import ElasticExtras, ElasticPredictor, Predictors
from lib.losses import focal_prior_bias
from lib.plain import Bounds, check, shown
from lib.postprocess import Detections, class_scores, postprocess
from lib.priors import decode, prior_boxes, priors_per_cell
from lib.shrinking import full_space, space_at

EXPORTED = (".onnx", ".xml", ".tflite")  # files of --export
MOST_WEIGHTS = 3e8
MOST_PRIORS = 400_000  # of an image


class Normalize(nn.Module):
    """Resize images (B, 3, H, W), uint8 or float in 0..255, to S x S, then (x - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_size: int) -> Tensor:
        x = images.to(self.mean.dtype)
        if x.shape[-2:] != (image_size, image_size):
            x = F.interpolate(x, (image_size, image_size), mode="bilinear", align_corners=False)
        x = (x - self.mean) / self.std
        # Not before the arithmetic, whose time channels_last would double at three channels.
        return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class SSD(nn.Module):
    """A plain detector of ordinary layers; `backbone` and `extras` hold one module per feature map."""

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
        """`forward` for images that have been resized and normalised, (B, 3, S, S)."""
        features = []
        for module in (*self.backbone, *self.extras):
            x = module(x)
            features.append(x)
        return self.predictors(features)


class ElasticSSD(nn.Module):
    """Every sub-network of a search space in shared weights. Stateless: the genotype is an argument.

    `space` is the largest space that the weights can serve; `forward` and `extract` take any genotype in it.
    """

    def __init__(self, config: Config, num_classes: int):
        super().__init__()
        self.space: SearchSpace = full_space(config)
        # Nothing is allocated yet for weights and prior boxes that nobody can train.
        with torch.device("meta"):
            _refuse_giant(config, self.space, _parts(config, self.space, num_classes))
        self.num_classes = num_classes
        head = config.head
        self.normalize = Normalize(config.backbone.pixel_mean, config.backbone.pixel_std)
        self.backbone, self.extras, self.predictors = _parts(config, self.space, num_classes)
        for size in self.space.image_size:
            priors = prior_boxes(self.feature_sizes(size), head.scales, head.aspect_ratios, head.clip, head.squares)
            self.register_buffer(f"priors_{size}", priors, persistent=False)  # (P, 4) cxcywh
        _initialise(self)
        # Otherwise the many background priors dominate the first losses.
        if config.loss.type == "focal":
            for net in self.predictors.classes:
                nn.init.constant_(net[-1].bias, focal_prior_bias())
        self._costs: dict[tuple, tuple[Cost, torch.Size]] = {}  # and output shape; by module, block and input shape

    def feature_sizes(self, image_size: int) -> list[tuple[int, int]]:
        """(height, width) of each feature map: a convolution of stride 2 with centred padding halves, rounding up."""
        last = self.backbone.feature_levels[-1]
        sizes = []
        side = image_size
        for level in range(1, last + len(self.space.head) + 1):
            side = (side + 1) // 2
            if level in self.backbone.feature_levels or level > last:
                sizes.append((side, side))
        return sizes

    def priors(self, image_size: int) -> Tensor:
        """Prior boxes of one image size, (P, 4) cxcywh."""
        return self.get_buffer(f"priors_{image_size}")

    def segments(self, genotype: Genotype) -> list[Segment]:
        """What `genotype` runs: one segment per feature map, each ending in that feature map."""
        return [*self.backbone.segments(genotype), *self.extras.segments(genotype)]

    def forward(self, images: Tensor, genotype: Genotype) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), 0..255, to logits (B, P, num_classes + 1) and offsets (B, P, 4) of one sub-network."""
        x = self.normalize(images, genotype.image_size)
        features = []
        with cast_weights(self):
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
            predictors=self.predictors.extract(self.backbone.channels(genotype)),
            priors=self.priors(genotype.image_size).clone(),
        ).train(self.training)

    def cost(self, genotype: Genotype) -> Cost:
        """Multiply-adds and parameters of the whole detector. Each block is counted once, then looked up."""
        costs = []
        shape = torch.Size([1, 3, genotype.image_size, genotype.image_size])
        predictors = zip(self.predictors.classes, self.predictors.boxes, strict=True)
        for segment, pair in zip(self.segments(genotype), predictors, strict=True):
            for module, block in segment:
                cost, shape = self._cost(module, block, shape)
                costs.append(cost)
            # Both predictors see the feature map with which the segment ends.
            for net in pair:
                costs.append(self._cost(net, shape[1] if isinstance(net, ElasticPredictor) else None, shape)[0])
        return Cost(flops=sum(cost.flops for cost in costs), params=sum(cost.params for cost in costs))

    def _cost(self, module: nn.Module, part: Block | int | None, shape: torch.Size) -> tuple[Cost, torch.Size]:
        key = (module, part, shape)
        if key not in self._costs:
            cost, output = module_cost(module if part is None else module.extract(part), shape)
            self._costs[key] = cost, output.shape
        return self._costs[key]


def _parts(config: Config, space: SearchSpace, num_classes: int) -> tuple[ElasticBackbone, ElasticExtras, Predictors]:
    head, backbone = config.head, ElasticBackbone(config.backbone, space.stages)
    extra_channels = [make_divisible(c * config.backbone.mult_ratio) for c in head.channels]
    extras = ElasticExtras(backbone.feature_channels[-1], extra_channels, space.head, head.extra_activation)
    channels = [*backbone.feature_channels, *extra_channels]
    kinds = ["elastic" if k in backbone.split_blocks else head.predictor for k in range(len(channels))]
    per_cell = priors_per_cell(head.aspect_ratios, head.squares)
    return backbone, extras, Predictors(channels, per_cell, num_classes, kinds)


def _refuse_giant(config: Config, space: SearchSpace, parts: Sequence[nn.Module]) -> None:
    """Raise UserError if the weights of these parts, or the prior boxes of an image, are too many."""
    weights = sum(parameter.numel() for part in parts for parameter in part.parameters())
    if weights > MOST_WEIGHTS:
        limit = f"at most {MOST_WEIGHTS:.0e} are supported"
        raise UserError(f"search_space: its largest sub-network has {weights:.1e} weights, {limit}")
    size = max(space.image_size)
    cells = (size / 2 ** config.backbone.feature_levels[0]) ** 2
    priors = cells * priors_per_cell(config.head.aspect_ratios, config.head.squares)[0]
    if priors > MOST_PRIORS:
        limit = f"at most {MOST_PRIORS:.0e} are supported"
        raise UserError(f"search_space.image_size_choice: {size} px gives {priors:.1e} prior boxes, {limit}")


def _initialise(model: ElasticSSD) -> None:
    """He initialisation; the predictors' last layers start near zero, so that the first logits are near their bias."""
    # Depthwise filters use the fan-in, k * k inputs. torch counts all channels in their fan-out, which would make the
    # weights hundreds of times too small.
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


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor], device: torch.device) -> None:
    """Reset the BatchNorm statistics and re-estimate them as the cumulative average over batches of images."""
    # torch's update_bn counts the batches on the device, and waits for it in each layer and batch.
    norms = {module: module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    training = model.training
    model.train()
    for number, batch in enumerate(images, start=1):
        for norm in norms:
            if number == 1:
                norm.reset_running_stats()
            norm.momentum = 1 / number
        model(batch.to(device, non_blocking=True))
    for norm, momentum in norms.items():
        norm.momentum = momentum
    model.train(training)


@torch.no_grad()
def fuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A copy of a plain `model` in evaluation mode, BatchNorm folded into the convolutions (Jacob et al., CVPR 2018).

    Every BatchNorm that follows a convolution in an `nn.Sequential` is removed; the outputs change by rounding only.
    `inplace` changes `model` itself: the copy takes a tenth of the time in which a candidate is scored.
    """
    model = (model if inplace else copy.deepcopy(model)).eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        layers = list(sequence._modules.items())  # named_children() leaves out a layer's second occurrence
        for (_, conv), (norm_name, norm) in itertools.pairwise(layers):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                delattr(sequence, norm_name)
    return model


class Cost(NamedTuple):
    """What a network costs."""

    flops: int  # multiply-adds for one image
    params: int  # learned numbers


def module_cost(module: nn.Module, input_shape: Sequence[int]) -> tuple[Cost, Tensor | tuple[Tensor, ...]]:
    """The cost of a plain module on one input of this shape, (1, ...), and its output on the meta device, without data.

    No arithmetic is done. Convolutions and linear layers count, as in the papers.
    """
    shadow = copy_module(module).to("meta").eval()
    flops = 0

    def count(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal flops
        flops += output.numel() * layer.weight[0].numel()  # each output is a sum over this many inputs

    for layer in shadow.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
        elif isinstance(layer, nn.BatchNorm2d | nn.ReLU | nn.ReLU6 | nn.Hardswish | nn.Hardsigmoid):
            # They change no shape, and three quarters of the time are theirs: on meta they are decomposed in Python.
            layer.forward = lambda x: x
    with torch.no_grad():
        output = shadow(torch.empty(input_shape, device="meta"))
    return Cost(flops, params=sum(p.numel() for p in module.parameters())), output


class ScoresAndBoxes(nn.Module):
    """A plain detector as it is deployed, up to non-maximum suppression: resize, network, scores, decoded boxes."""

    def __init__(self, model: SSD, config: Config):
        super().__init__()
        self.model = model
        self.loss_type = config.loss.type
        self.variances = config.head.variances

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), 0..255, to scores (B, P, num_classes) and boxes (B, P, 4), xyxy within [0, 1]."""
        return self.decode(*self.model(images))

    def decode(self, logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        boxes = decode(offsets, self.model.priors, self.variances).clamp(0, 1)
        return class_scores(logits, self.loss_type), boxes


@torch.inference_mode()
def detect(model: SSD, images: Iterable[Tensor], config: Config, device: torch.device) -> list[Detections]:
    """Detections of every image of the batches (B, 3, H, W), in order, on the CPU."""
    model.eval()
    found: list[Detections] = []
    for batch in images:
        logits, offsets = model(batch.to(device, non_blocking=True))
        found += postprocess(logits, offsets, model.priors, config.postprocess, config.loss.type, config.head.variances)
    return found


class TrainingFile(NamedTuple):
    """What last.pt of supernet_train.py and of final_train.py needs besides tensors; its types are checked."""

    config: dict
    classes: list[str]
    epoch: Annotated[int, Bounds(1)]
    batch: Annotated[int, Bounds(0)]
    step: Annotated[int, Bounds(0)]
    split: str  # a supernet's, see lib.datasets.split_digest; "" in a file of an earlier version


def training_file(payload: dict, path: Path) -> TrainingFile:
    """The checked content of last.pt. Raises UserError that names the file."""
    return check({"step": 0, "split": "", **payload}, TrainingFile, str(path))


class DetectorFile(NamedTuple):
    """What a checkpoint of final_train.py needs besides its weights; its types are checked."""

    config: dict
    genotype: dict
    classes: list[str]
    category_ids: list[int | None]  # None: the test set's file lacks the class
    epoch: Annotated[int, Bounds(0)]
    thresholds: list[Annotated[float, Bounds(0, 1)] | None]


class Supernet(NamedTuple):
    """A trained supernet of supernet_train.py."""

    detector: ElasticSSD
    config: Config
    classes: tuple[str, ...]
    epoch: int  # the last one that was trained
    space: SearchSpace  # the sub-networks that were open at that epoch
    split: str = ""  # of its pictures, see lib.datasets.split_digest; "": unknown


class Detector(NamedTuple):
    """A trained detector of final_train.py; `model` is in evaluation mode."""

    model: SSD
    config: Config
    genotype: Genotype
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    epoch: int
    thresholds: Sequence[float | None] = ()  # scores of the best F1 in the test set: over all, then of each class


def load_supernet(path: Path, mmap: bool = False) -> Supernet:
    """Load a checkpoint of supernet_train.py. With `mmap`, the processes of a machine share its memory."""
    payload = checkpoint.read(path, mmap)
    if "genotype" in payload or "config" not in payload:
        raise UserError(f"{path}: not a supernet's checkpoint; expected last.pt of supernet_train.py")
    found = training_file(payload, path)
    with naming(path):
        config = config_io.from_dict(found.config)
        detector = network(config, found.classes)
    load_weights(detector, payload, path)
    # At batch 0 of an epoch, nothing of that epoch has been trained yet.
    epoch = max(found.epoch - (found.batch == 0), 1)
    return Supernet(detector, config, tuple(found.classes), epoch, space_at(config, epoch), found.split)


def network(config: Config, classes: Sequence[str]) -> ElasticSSD:
    """The untrained network of a configuration and classes that were read from a file."""
    config_io.validate_structure(config)
    if not classes or len(set(classes)) < len(classes):
        raise UserError(f"classes: expected names without repeats, found {shown(classes)}")
    return ElasticSSD(config, len(classes))


def load_detector(path: Path) -> Detector:
    """Load best.pt or last.pt of final_train.py; of a run's folder, its best.pt."""
    path = path / "best.pt" if path.is_dir() else path
    if path.suffix in EXPORTED:
        raise UserError(f"{path}: an exported detector; expected the checkpoint that it comes from, best.pt")
    payload = checkpoint.read(path)
    if "genotype" not in payload:
        raise UserError(f"{path}: not a detector's checkpoint; expected best.pt of final_train.py")
    found = check({"thresholds": [], **payload}, DetectorFile, str(path))
    with naming(path):
        config = config_io.from_dict(found.config)
        genotype = Genotype.from_dict(found.genotype)
        model = network(config, found.classes).extract(genotype)
        check_ids(found.category_ids, found.classes)
    load_weights(model, payload, path)
    classes, category_ids = tuple(found.classes), tuple(found.category_ids)
    epoch = found.epoch - ("optimizer" in payload)  # last.pt holds the epoch that comes next
    return Detector(model.eval(), config, genotype, classes, category_ids, epoch, found.thresholds)


def check_ids(category_ids: Sequence[int | None], classes: Sequence[str]) -> None:
    """Raise UserError unless each class has a category id of its own, or none."""
    known = [number for number in category_ids if number is not None]
    if len(category_ids) != len(classes) or len(set(known)) < len(known):
        raise UserError(f"category_ids: expected {len(classes)} different ones, found {shown(list(category_ids))}")


def detector_checkpoint(path: Path) -> Path | None:
    """best.pt in the folder of a final training, or `path` itself if it is a detector's checkpoint; else None."""
    if path.is_dir():
        return path / "best.pt" if (path / "best.pt").is_file() else None
    return path if path.is_file() and "genotype" in checkpoint.read(path, mmap=True) else None


def load_weights(model: nn.Module, payload: dict, path: Path) -> None:
    """Load the weights of a checkpoint into `model`, or their moving average if the checkpoint has one."""
    weights = checkpoint.weights(payload, path)
    if key := checkpoint.not_finite(weights):
        raise UserError(f"{path}: {key} is not finite: its training diverged; name an earlier checkpoint")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # in one line
        raise UserError(f"{path}: does not fit the configured network: {reason[:300]}") from None
