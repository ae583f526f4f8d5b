"""Elastic backbones: strides, tables, and torchvision's own networks with the same weights as oracle."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig

from lib import UserError
from lib.backbone import TABLES, ElasticBackbone
from lib.config import BackboneConfig, Config
from lib.elastic import ElasticDepthwiseConv, ElasticInvertedResidual, extract_segment, run_segment
from lib.genotype import Block, BlockChoices, Genotype, SearchSpace, StageChoices
from lib.shrinking import full_space

MBV2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)


def feature_maps(backbone: ElasticBackbone, x: torch.Tensor, genotype: Genotype) -> list[torch.Tensor]:
    maps = []
    for segment in backbone.segments(genotype):
        x = run_segment(segment, x)
        maps.append(x)
    return maps


def small_config(**backbone) -> Config:
    config = Config(backbone=BackboneConfig(mult_ratio=0.25, **backbone))
    config.search_space.num_cell_groups = [1, 2, 2, 2, 2, 2]
    config.search_space.schedule_cfg.depth_choice.value = [[2], [2], [2, 1]]
    if config.backbone.backbone_type == "mbv2_backbone":
        config.search_space.num_cell_groups.append(1)
        config.search_space.expansions.append(6)
    return config


def make_backbone(config: Config) -> tuple[ElasticBackbone, SearchSpace]:
    torch.manual_seed(0)
    space = full_space(config)
    backbone = ElasticBackbone(config.backbone, space.stages)
    for module in backbone.modules():
        if isinstance(module, ElasticDepthwiseConv):
            nn.init.kaiming_normal_(module.weight)
    return backbone, space


def randomise_norms(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Layer by layer, in the order in which both list them."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, ElasticDepthwiseConv)
    pairs = zip(*([m for m in net.modules() if isinstance(m, kinds)] for net in (source, target)), strict=True)
    with torch.no_grad():
        for theirs, ours in pairs:
            tensors = dict([*ours.named_parameters(recurse=False), *ours.named_buffers(recurse=False)])
            for name, tensor in tensors.items():
                tensor.copy_(getattr(theirs, name))


def test_mobilenet_v2_equals_torchvisions():
    torch.manual_seed(0)
    oracle = mobilenet_v2().features[:18]  # without the last 1x1 convolution
    randomise_norms(oracle)
    stages = [StageChoices((d,), BlockChoices((1 if i == 0 else 6,), (3,))) for i, d in enumerate(MBV2_DEPTHS)]
    ours = ElasticBackbone(BackboneConfig(backbone_type="mbv2_backbone"), stages)
    copy_weights(oracle, ours)
    genotype = SearchSpace("mbv2_backbone", (96,), tuple(stages), ()).largest()
    x = torch.randn(2, 3, 96, 96)
    expected = {}
    with torch.no_grad():
        ours.eval(), oracle.eval()
        stride_16, stride_32 = feature_maps(ours, x, genotype)
        y = x
        for i, layer in enumerate(oracle):
            expected[i] = y = layer(y)
    assert stride_16.shape == (2, 96, 6, 6)
    assert stride_32.shape == (2, 320, 3, 3)
    assert torch.allclose(stride_16, expected[13], atol=1e-4)
    assert torch.allclose(stride_32, expected[17], atol=1e-4)
    assert expected[13].abs().max() > 0.1


@pytest.mark.parametrize("use_se", [False, True])
@pytest.mark.parametrize(("activation", "name"), [("HS", "h_swish"), ("RE", "relu")])
@pytest.mark.parametrize(("out_channels", "stride", "kernel"), [(16, 1, 5), (24, 2, 3)])
def test_mobilenet_v3_block_equals_torchvisions(use_se, activation, name, out_channels, stride, kernel):
    torch.manual_seed(0)
    settings = InvertedResidualConfig(16, kernel, 96, out_channels, use_se, activation, stride, 1, 1.0)
    oracle = InvertedResidual(settings, nn.BatchNorm2d)
    randomise_norms(oracle)
    ours = ElasticInvertedResidual(16, out_channels, stride, (6,), (kernel,), name, use_se)
    copy_weights(oracle, ours)
    x = torch.randn(2, 16, 9, 9)
    expected = oracle.eval()(x)
    assert torch.allclose(ours.eval()(x, Block(6, kernel)), expected, atol=1e-5)
    assert torch.allclose(ours.extract(Block(6, kernel)).eval()(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "levels", "channels"),
    [
        ("mbv3_backbone", [4, 5], [112, 960]),
        ("mbv3_backbone", [2, 3, 4, 5], [24, 40, 112, 960]),
        ("mbv3_backbone", [5], [960]),
        ("mbv2_backbone", [4, 5], [96, 320]),
        ("mbv2_backbone", [3, 4, 5], [32, 96, 320]),
    ],
)
def test_channels_of_the_feature_maps(kind, levels, channels):
    config = small_config(backbone_type=kind, feature_levels=levels)
    config.backbone.mult_ratio = 1.0
    backbone, _ = make_backbone(config)
    assert backbone.feature_channels == channels


@pytest.mark.parametrize("kind", ["mbv3_backbone", "mbv2_backbone"])
@pytest.mark.parametrize("size", [64, 75])
def test_feature_maps_have_their_levels_stride(kind, size):
    backbone, space = make_backbone(small_config(backbone_type=kind, feature_levels=[2, 3, 4, 5]))
    rng = random.Random(0)
    for genotype in (space.smallest(), space.largest(), space.sample(rng)):
        features = feature_maps(backbone, torch.randn(2, 3, size, size), genotype)
        sides = [-(-size // 2**level) for level in (2, 3, 4, 5)]
        assert [tuple(f.shape) for f in features] == [
            (2, c, s, s) for c, s in zip(backbone.feature_channels, sides, strict=True)
        ]


@pytest.mark.parametrize("kind", ["mbv3_backbone", "mbv2_backbone"])
def test_every_sub_network_equals_its_extract(kind):
    backbone, space = make_backbone(small_config(backbone_type=kind))
    randomise_norms(backbone.eval())
    rng, x = random.Random(0), torch.randn(2, 3, 64, 64)
    for genotype in (space.smallest(), space.largest(), *(space.sample(rng) for _ in range(3))):
        y = x
        for segment, expected in zip(backbone.segments(genotype), feature_maps(backbone, x, genotype), strict=True):
            y = extract_segment(segment).eval()(y)
            assert torch.allclose(y, expected, atol=1e-5)


def test_a_shallow_stage_runs_its_first_blocks():
    backbone, space = make_backbone(small_config())
    used = [m for segment in backbone.segments(space.smallest()) for m, _ in segment]
    assert used == [backbone.stem, *(stage[0] for stage in backbone.stages), backbone.last_conv]


def test_the_tables_of_the_papers():
    v2, v3 = TABLES["mbv2_backbone"], TABLES["mbv3_backbone"]
    assert list(v2.strides) == [1, 2, 2, 2, 1, 2, 1]
    assert list(v2.layer_channels) == [32, 16, 24, 32, 64, 96, 160, 320, 1280]
    assert not any(v2.squeeze_excitation)
    assert not v2.last_conv
    assert list(v3.strides) == [1, 2, 2, 2, 1, 2]
    assert list(v3.layer_channels) == [16, 16, 24, 40, 80, 112, 160, 960, 1280]
    assert [i + 1 for i, se in enumerate(v3.squeeze_excitation) if se] == [3, 5, 6]
    assert list(v3.activations) == ["relu"] * 3 + ["h_swish"] * 3
    assert v3.last_conv


def test_the_blocks_are_built_from_the_table():
    backbone, _ = make_backbone(small_config())
    for i, stage in enumerate(backbone.stages):
        for block in stage:
            assert (block.squeeze_excitation is not None) == (i in (2, 4, 5))
            assert type(block.activation) is (nn.ReLU if i < 3 else nn.Hardswish)
    assert isinstance(backbone.stem[2], nn.Hardswish)
    assert backbone.stem[0].stride == (2, 2)
    assert isinstance(backbone.last_conv[2], nn.Hardswish)


def test_mult_ratio_scales_and_rounds_the_channels():
    config = small_config()
    config.backbone.mult_ratio = 0.5
    backbone, _ = make_backbone(config)
    assert [stage[0].out_channels for stage in backbone.stages] == [8, 16, 24, 40, 56, 80]
    assert backbone.feature_channels == [56, 480]


def test_own_strides_and_channels_replace_the_table():
    config = small_config(
        strides=[1, 2, 2, 1, 1, 2], layer_channels=[8, 8, 16, 16, 24, 24, 32, 64], feature_levels=[3, 4]
    )
    config.backbone.mult_ratio = 1.0
    backbone, space = make_backbone(config)
    features = feature_maps(backbone, torch.randn(1, 3, 64, 64), space.largest())
    assert [tuple(f.shape[1:]) for f in features] == [(24, 8, 8), (64, 4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": [1, 2, 2]}, "backbone.strides: expected 6 values, one per stage, found 3"),
        ({"layer_channels": [16, 16, 24]}, "backbone.layer_channels: expected at least 8 values, found 3"),
        ({"feature_levels": [5, 4]}, "backbone.feature_levels: expected ascending levels"),
        ({"feature_levels": [4, 4, 5]}, "backbone.feature_levels: expected ascending levels"),
        ({"feature_levels": [4, 6]}, "backbone.feature_levels: .* out of 1, 2, 3, 4, 5"),
        ({"feature_levels": [3, 4]}, "backbone.feature_levels: .* ending with 5, found"),
        ({"feature_levels": []}, "backbone.feature_levels: .* found \\[\\]"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message) as caught:
        make_backbone(small_config(**options))
    assert "\n" not in str(caught.value)


def test_a_wrong_number_of_stages_is_named():
    config = Config(backbone=BackboneConfig(backbone_type="mbv2_backbone"))
    with pytest.raises(UserError, match=r"search_space\.num_cell_groups: expected 7 values, one per stage, found 6"):
        make_backbone(config)
