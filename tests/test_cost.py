"""Multiply-adds and parameters: against torchvision's published numbers and a slow count per convolution."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torchvision.models import (
    MobileNet_V2_Weights,
    MobileNet_V3_Large_Weights,
    mobilenet_v2,
    mobilenet_v3_large,
)

from lib.config import Config
from lib.detector import Cost, ElasticSSD, module_cost


def slow_cost(model: nn.Module, x: torch.Tensor) -> Cost:
    """Output elements times inputs per output, layer by layer, by running the model on data."""
    total = 0

    def count(layer: nn.Module, _inputs, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            per_output = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        else:
            per_output = layer.in_features
        total += output[0].numel() * per_output

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return Cost(total, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (mobilenet_v2, MobileNet_V2_Weights.IMAGENET1K_V1),
        (mobilenet_v3_large, MobileNet_V3_Large_Weights.IMAGENET1K_V1),
    ],
    ids=["mobilenet_v2", "mobilenet_v3_large"],
)
def test_published_numbers(make, weights):
    model = make()
    cost, output = module_cost(model, (1, 3, 224, 224))
    assert cost.params == weights.meta["num_params"]
    assert cost.flops / 1e9 == pytest.approx(weights.meta["_ops"], abs=6e-4)  # given in three digits
    assert output.shape == (1, 1000)
    assert cost == slow_cost(model, torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("groups", [1, 4])
def test_one_convolution_by_hand(groups):
    cost, output = module_cost(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups), (1, 8, 9, 9))
    assert output.shape == (1, 12, 5, 5)
    assert cost == Cost(12 * 5 * 5 * 9 * 8 // groups, 12 * 9 * 8 // groups + 12)


def test_counting_leaves_the_module_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module_cost(model, (1, 3, 4, 4))
    assert model.training
    assert model[0].weight.device.type == "cpu"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def small_detector(kind: str, predictor: str) -> ElasticSSD:
    config = Config()
    space = config.search_space
    space.num_cell_groups, space.image_size_choice = [1, 2, 2, 2, 2, 2], [64, 96]
    space.schedule_cfg.depth_choice.value = [[2], [2], [2, 1]]
    space.head_width_choice = [0.25, 0.5]
    if kind == "mbv2_backbone":
        space.num_cell_groups, space.expansions = [*space.num_cell_groups, 1], [*space.expansions, 6]
    config.backbone.backbone_type, config.backbone.mult_ratio = kind, 0.25
    config.head.predictor = predictor
    return ElasticSSD(config, 3)


@pytest.mark.parametrize(("kind", "predictor"), [("mbv3_backbone", "ssdlite"), ("mbv2_backbone", "plain")])
def test_a_sub_networks_cost_is_that_of_the_network_cut_out(kind, predictor):
    detector, rng = small_detector(kind, predictor), random.Random(0)
    space = detector.space
    costs = []
    for genotype in (space.smallest(), space.largest(), space.sample(rng), space.sample(rng)):
        plain = detector.extract(genotype)
        costs.append(detector.cost(genotype))
        assert costs[-1] == slow_cost(plain, torch.zeros(1, 3, genotype.image_size, genotype.image_size))
        assert detector.cost(genotype) == costs[-1]  # looked up, not added up
    smallest, largest, *others = costs
    for other in others:
        assert smallest.flops < other.flops < largest.flops
        assert smallest.params < other.params < largest.params
