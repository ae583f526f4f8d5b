"""ElasticSSD: backbone, extra blocks, predictors, priors of every sub-network; `extract` gives one as a plain SSD."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.backbone import ElasticBackbone
from lib.boxes import decode
from lib.config import Config
from lib.cost import Cost, ModuleCost, module_cost
from lib.elastic import ElasticDepthwiseConv, Segment, extract_segment, run_segment
from lib.genotype import Block, Genotype, SearchSpace
from lib.head import ElasticExtras, Predictors, extra_channels
from lib.losses import focal_prior_bias
from lib.postprocess import class_scores
from lib.priors import prior_boxes, priors_per_cell
from lib.schedule import full_space
from lib.twin import twin


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
            normalize=twin(self.normalize),
            backbone=[extract_segment(s) for s in self.backbone.segments(genotype)],
            extras=[extract_segment(s) for s in self.extras.segments(genotype)],
            predictors=twin(self.predictors),
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
