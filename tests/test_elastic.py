"""Elastic layers: a slice equals the plain layer cut from it; kernels, sorting, copies, wide filters' gradients."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v3_small
from torchvision.models._utils import _make_divisible
from torchvision.ops import SqueezeExcitation

from lib.elastic import (
    DepthwiseConv2d,
    ElasticBatchNorm,
    ElasticConv1x1,
    ElasticDepthwiseConv,
    ElasticInvertedResidual,
    ElasticSqueezeExcitation,
    Residual,
    copy_module,
    depthwise_conv,
    extract_segment,
    make_divisible,
    run_segment,
)
from lib.genotype import Block
from lib.shrinking import sort_hidden_channels

EXPANDS, KERNELS = (3, 4, 6), (3, 5, 7)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, matrices and statistics: nothing is an identity, a one or a zero by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return module


def make_block(in_channels=8, out_channels=8, stride=1, expands=EXPANDS, squeeze=True) -> ElasticInvertedResidual:
    block = ElasticInvertedResidual(in_channels, out_channels, stride, expands, KERNELS, "h_swish", squeeze)
    return randomise(block)


def inputs(channels: int, size: int = 7) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def no_elastic(module: nn.Module) -> bool:
    return not any(type(m).__name__.startswith("Elastic") for m in module.modules())


@settings(max_examples=50)
@given(st.floats(0, 2000), st.sampled_from([4, 8, 16]))
def test_make_divisible_equals_torchvisions(value, divisor):
    assert make_divisible(value, divisor) == _make_divisible(value, divisor)


@pytest.mark.parametrize(("c_in", "c_out"), list(itertools.product((3, 8), (5, 8, 16))))
def test_conv_extract(c_in, c_out):
    conv = ElasticConv1x1(8, 16, 1, bias=False)
    plain = conv.extract(c_in, c_out)
    x = inputs(c_in)
    assert type(plain) is nn.Conv2d
    assert plain.weight.shape == (c_out, c_in, 1, 1)
    assert torch.equal(plain(x), conv(x, c_out))


def test_extracted_weights_are_a_copy():
    conv = ElasticConv1x1(4, 4, 1, bias=False)
    before = conv.weight.detach().clone()
    nn.init.zeros_(conv.extract(4, 4).weight)
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize("channels", [1, 5, 16])
@pytest.mark.parametrize("training", [False, True])
def test_norm_extract(channels, training):
    norm = randomise(ElasticBatchNorm(16)).train(training)
    plain = norm.extract(channels).train(training)
    x = inputs(channels)
    assert isinstance(plain, nn.BatchNorm2d) and not isinstance(plain, ElasticBatchNorm)
    assert torch.allclose(plain(x), norm(x), atol=1e-6)
    assert torch.allclose(plain.running_mean, norm.running_mean[:channels])
    assert torch.allclose(plain.running_var, norm.running_var[:channels])


def test_norm_updates_only_its_slice():
    norm = randomise(ElasticBatchNorm(8)).train()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    norm(inputs(5)).sum().backward()
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(norm, name)[5:], before[name][5:])
        assert (getattr(norm, name)[:5] != before[name][:5]).all()
    assert (norm.bias.grad[:5] != 0).all()
    assert (norm.bias.grad[5:] == 0).all()


def test_evaluation_leaves_the_statistics_alone():
    norm = randomise(ElasticBatchNorm(8)).eval()
    before = norm.running_mean.clone()
    norm(inputs(5))
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "size"), list(itertools.product((3, 6), KERNELS)))
def test_depthwise_extract(channels, size, stride):
    conv = randomise(ElasticDepthwiseConv(6, KERNELS, stride))
    plain = conv.extract(channels, size)
    x = inputs(channels, 9)
    assert isinstance(plain, nn.Conv2d) and plain.groups == channels
    assert plain.kernel_size == (size, size)
    assert torch.equal(plain(x), conv(x, size))
    assert plain(x).shape[-1] == (9 + stride - 1) // stride


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_padding_equals_tensorflows_rule(side, kernel):
    """Output i begins at 2 i - floor(total / 2); at stride 1, and on odd sides, that is the centred padding."""
    conv = randomise(ElasticDepthwiseConv(2, KERNELS, 2, same_padding=True))
    x = torch.randn(1, 2, side, side)
    out = -(-side // 2)
    before = max((out - 1) * 2 + kernel - side, 0) // 2
    roomy = F.pad(x, (before, 8, before, 8))
    weight = conv.kernel(2, kernel)
    slow = torch.stack(
        [
            torch.stack(
                [
                    (roomy[0, :, 2 * i : 2 * i + kernel, 2 * j : 2 * j + kernel] * weight[:, 0]).sum((1, 2))
                    for j in range(out)
                ],
                -1,
            )
            for i in range(out)
        ],
        1,
    )
    torch.testing.assert_close(conv(x, kernel)[0], slow)
    torch.testing.assert_close(conv.extract(2, kernel)(x)[0], slow)
    centred = randomise(ElasticDepthwiseConv(2, KERNELS, 2))
    assert torch.allclose(conv(x, kernel), centred(x, kernel)) == (side == 9) and conv(x, kernel).shape[-1] == out


def slow_kernel(conv: ElasticDepthwiseConv, size: int) -> torch.Tensor:
    """7 to 5 to 3 with loops: w'[i] = sum_j matrix[i, j] * centre[j] over the flattened centre."""
    weight = conv.weight.detach()
    while weight.shape[-1] > size:
        smaller = weight.shape[-1] - 2
        matrix = dict(conv.named_parameters())[f"{smaller + 2}to{smaller}_matrix"].detach()
        result = torch.zeros(weight.shape[0], 1, smaller, smaller)
        for c, i, j in itertools.product(range(weight.shape[0]), range(smaller**2), range(smaller**2)):
            result[c, 0, i // smaller, i % smaller] += matrix[i, j] * weight[c, 0, 1 + j // smaller, 1 + j % smaller]
        weight = result
    return weight


@pytest.mark.parametrize("size", KERNELS)
def test_a_kernel_cut_out_under_autocast_keeps_its_precision(size):
    conv = randomise(ElasticDepthwiseConv(2, KERNELS, 1))
    with torch.autocast("cpu", torch.bfloat16):
        weight = conv.extract(2, size).weight
    assert torch.equal(weight, conv.kernel(2, size)) and weight.dtype == torch.float32


@pytest.mark.parametrize("size", KERNELS)
def test_kernel_transform_equals_a_slow_loop(size):
    conv = randomise(ElasticDepthwiseConv(2, KERNELS, 1))
    assert torch.allclose(conv.kernel(2, size), slow_kernel(conv, size), atol=1e-5)


def test_kernel_transforms_start_as_the_centre():
    conv = ElasticDepthwiseConv(2, KERNELS, 1)
    nn.init.normal_(conv.weight)
    for size, crop in ((7, 0), (5, 1), (3, 2)):
        assert torch.equal(conv.kernel(2, size), conv.weight[:, :, crop : 7 - crop, crop : 7 - crop])


def test_three_is_reached_through_five_and_both_matrices_learn():
    conv = randomise(ElasticDepthwiseConv(2, KERNELS, 1))
    conv(inputs(2), 3).square().sum().backward()
    matrices = {name: p.grad for name, p in conv.named_parameters() if name.endswith("matrix")}
    assert set(matrices) == {"7to5_matrix", "5to3_matrix"}
    assert matrices["5to3_matrix"].abs().min() > 0
    inner = torch.tensor([r * 5 + c for r in (1, 2, 3) for c in (1, 2, 3)])  # the 3x3 is cut from these rows' results
    outer = torch.tensor(sorted(set(range(25)) - set(inner.tolist())))
    assert matrices["7to5_matrix"][inner].abs().min() > 0
    assert (matrices["7to5_matrix"][outer] == 0).all()


def test_the_five_kernel_does_not_touch_the_smaller_matrix():
    conv = randomise(ElasticDepthwiseConv(2, KERNELS, 1))
    conv(inputs(2), 5).sum().backward()
    assert conv.get_parameter("5to3_matrix").grad is None
    assert conv.get_parameter("7to5_matrix").grad.abs().max() > 0


@pytest.mark.parametrize(("kernels", "names"), [((3,), set()), ((5,), set()), ((5, 3), {"5to3_matrix"})])
def test_matrices_exist_only_between_kernels_that_are_open(kernels, names):
    conv = ElasticDepthwiseConv(2, kernels, 1)
    assert {name for name, _ in conv.named_parameters()} == {"weight", *names}


@pytest.mark.parametrize("channels", [24, 32, 48])
def test_squeeze_excitation_narrows(channels):
    layer = randomise(ElasticSqueezeExcitation(48))
    plain = layer.extract(channels)
    x = inputs(channels)
    assert type(plain) is SqueezeExcitation
    assert plain.fc1.out_channels == _make_divisible(channels // 4, 8)
    assert (plain.fc1.in_channels, plain.fc2.out_channels) == (channels, channels)
    assert torch.allclose(plain(x), layer(x), atol=1e-6)
    assert not torch.allclose(layer(x), x)


@pytest.mark.parametrize(("out_channels", "stride", "squeeze"), [(8, 1, True), (16, 2, True), (16, 1, False)])
def test_block_extract_for_every_choice(out_channels, stride, squeeze):
    block = make_block(8, out_channels, stride, squeeze=squeeze).eval()
    x = inputs(8)
    outputs = []
    for choice in (Block(e, k) for e in EXPANDS for k in KERNELS):
        plain = block.extract(choice).eval()
        assert no_elastic(plain)
        assert isinstance(plain, Residual) == (stride == 1 and out_channels == 8)
        assert torch.allclose(plain(x), block(x, choice), atol=1e-5)
        outputs.append(block(x, choice))
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(outputs, 2))


def test_block_extract_in_training_mode():
    block = make_block().train()
    plain = block.extract(Block(4, 5)).train()
    assert torch.allclose(plain(inputs(8)), block(inputs(8), Block(4, 5)), atol=1e-5)


def test_a_block_of_expansion_one_has_no_expanding_convolution():
    block = randomise(ElasticInvertedResidual(12, 8, 1, (1,), (3,), "relu6"))
    assert block.expand is None
    assert block.hidden_channels(1) == 12  # the input's own channels, not rounded
    plain = block.eval().extract(Block(1, 3)).eval()
    assert torch.allclose(plain(inputs(12)), block(inputs(12), Block(1, 3)), atol=1e-6)


def test_segments_run_and_extract_alike():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    segment = [(stem, None), (make_block(), Block(4, 5)), (make_block(8, 16, 2), Block(3, 3))]
    for module, _ in segment:
        module.eval()
    plain = extract_segment(segment).eval()
    assert no_elastic(plain)
    assert torch.allclose(plain(inputs(3)), run_segment(segment, inputs(3)), atol=1e-5)
    nn.init.zeros_(plain[0][0].weight)
    assert stem[0].weight.abs().sum() > 0


class TwoBlocks(nn.Module):
    """Two elastic blocks and one without a hidden expansion, as a backbone has them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                ElasticInvertedResidual(8, 8, 1, (1,), (3,), "relu"),
                make_block(8, 8),
                make_block(8, 16, 2, squeeze=False),
            ]
        )

    def forward(self, x: torch.Tensor, expand: float = 6, kernel: int = 7) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, Block(expand, kernel) if block.expand is not None else Block(1, 3))
        return x


def two_blocks() -> TwoBlocks:
    return randomise(TwoBlocks(), seed=3)


def test_sorting_keeps_the_largest_networks_output_and_changes_a_narrow_ones():
    model = two_blocks().eval()
    wide, narrow = model(inputs(8)), model(inputs(8), 3)
    assert sort_hidden_channels(model) == 2
    assert torch.allclose(model(inputs(8)), wide, atol=1e-4)
    assert torch.allclose(model(inputs(8), kernel=3), two_blocks().eval()(inputs(8), kernel=3), atol=1e-4)
    assert not torch.allclose(model(inputs(8), 3), narrow, atol=1e-2)


def test_channels_are_ordered_by_the_l1_norm_of_the_projection():
    model = two_blocks()
    norms = [sum(abs(w) for w in model.blocks[1].project.weight[:, c].flatten().tolist()) for c in range(48)]
    order = sorted(range(48), key=lambda c: -norms[c])
    expected = {n: p.detach()[order].clone() for n, p in model.blocks[1].depthwise.named_parameters() if n == "weight"}
    sort_hidden_channels(model)
    assert torch.equal(model.blocks[1].depthwise.weight, expected["weight"])
    after = model.blocks[1].project.weight.detach().abs().sum((0, 2, 3))
    assert (after.diff() <= 1e-6).all()


def test_sorting_twice_is_sorting_once():
    model = two_blocks()
    sort_hidden_channels(model)
    once = copy.deepcopy(model.state_dict())
    sort_hidden_channels(model)
    assert all(torch.equal(once[name], tensor) for name, tensor in model.state_dict().items())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    target = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (model(inputs(8)) - target).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizers_state_follows_the_channels(kind):
    """Train, sort, train again: the same function as without the sorting."""
    outputs = {}
    for state_follows in (None, True, False):
        model = two_blocks()
        optimizer = OPTIMIZERS[kind](model.parameters())
        for seed in range(3):
            train(model, optimizer, seed)
        if state_follows is not None:
            sort_hidden_channels(model, optimizer if state_follows else None)
        train(model, optimizer, 3)
        outputs[state_follows] = model.eval()(inputs(8)).detach()
    assert torch.allclose(outputs[True], outputs[None], atol=1e-4)
    assert not torch.allclose(outputs[False], outputs[None], atol=1e-3)


def test_the_average_follows_the_models_order_not_its_own():
    model, average = two_blocks(), randomise(TwoBlocks(), seed=9)
    output = average.eval()(inputs(8))
    order, other = (
        net.blocks[1].project.weight.detach().abs().sum((0, 2, 3)).argsort(descending=True) for net in (model, average)
    )
    assert not torch.equal(order, other)
    expected = average.blocks[1].expand.weight.detach()[order].clone()
    sort_hidden_channels(model, average=average)
    assert torch.equal(average.blocks[1].expand.weight, expected)
    assert torch.allclose(average(inputs(8)), output, atol=1e-4)


def test_every_tensor_over_the_hidden_channels_is_permuted():
    """Whatever has the hidden size in its shape is listed in `hidden_axes`, so that nothing is left behind."""
    block = make_block(8, 16, 2)
    listed = {(id(getattr(module, name)), dim) for module, name, dim in block.hidden_axes()}
    hidden = block.hidden_channels(6)
    tensors = itertools.chain(block.parameters(), block.buffers())
    assert {(id(t), dim) for t in tensors for dim, n in enumerate(t.shape) if n == hidden} == listed


def test_random_choices_of_a_stack_equal_their_extracts():
    model, rng = two_blocks().eval(), random.Random(0)
    for _ in range(10):
        expand, kernel = rng.choice(EXPANDS), rng.choice(KERNELS)
        plain = nn.Sequential(
            *(b.extract(Block(expand, kernel) if b.expand is not None else Block(1, 3)) for b in model.blocks)
        )
        assert torch.allclose(plain.eval()(inputs(8)), model(inputs(8), expand, kernel), atol=1e-4)


def assembles_the_gradient(output: torch.Tensor) -> bool:
    """Whether a wide filter's gradient will be put together from narrow ones."""
    return "WideDepthwiseConv" in type(output.grad_fn).__name__


def gradients(function, x, weight, seed=1):
    x, weight = x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()
    output = function(x, weight)
    generator = torch.Generator().manual_seed(seed)
    output.backward(torch.randn(output.shape, generator=generator))
    return output.detach(), x.grad, weight.grad


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("height", "width"), [(9, 9), (10, 12), (4, 7), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 4, 5, 7, 9])
def test_depthwise_output_and_gradients_are_those_of_torch_in_float64(size, stride, height, width, memory_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, height, width, generator=generator).to(memory_format=memory_format)
    weight = torch.randn(6, 1, size, size, generator=generator)
    found = gradients(lambda x, w: depthwise_conv(x, w, stride, size // 2), x, weight)
    expected = gradients(
        lambda x, w: F.conv2d(x, w, stride=stride, padding=size // 2, groups=6), x.double(), weight.double()
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)


def test_a_wide_filter_without_padding():
    x, weight = torch.randn(2, 6, 11, 11), torch.randn(6, 1, 5, 5)
    found = gradients(lambda x, w: depthwise_conv(x, w, 2, 0), x, weight)
    expected = gradients(lambda x, w: F.conv2d(x, w, stride=2, groups=6), x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_wide_filters_that_are_trained_in_float32_go_their_own_way():
    x, wide, narrow = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 5, 5), torch.randn(4, 1, 3, 3)
    assert not assembles_the_gradient(depthwise_conv(x, narrow.requires_grad_(), 1, 1))
    assert not assembles_the_gradient(depthwise_conv(x.requires_grad_(), wide, 1, 2))
    assert not assembles_the_gradient(depthwise_conv(x.double(), wide.double().requires_grad_(), 1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv(x, wide.requires_grad_(), 1, 2).dtype == torch.bfloat16
    assert assembles_the_gradient(depthwise_conv(x, wide, 1, 2))


def test_a_depthwise_input_without_a_gradient():
    weight = torch.randn(4, 1, 5, 5, requires_grad=True)
    output = depthwise_conv(torch.randn(1, 4, 8, 8), weight, 1, 2)
    output.sum().backward()
    assert assembles_the_gradient(output) and weight.grad.shape == weight.shape


def test_the_depthwise_layer_is_a_convolution_with_another_gradient():
    layer = DepthwiseConv2d(6, 6, 5, 2, 2, groups=6, bias=False)
    plain = nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 9, 9)
    for each in (layer, copy.deepcopy(layer), plain):
        each(x).square().sum().backward()
    assert assembles_the_gradient(layer(x)) and torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_depthwise_bias_is_not_forgotten():
    layer = DepthwiseConv2d(6, 6, 5, 1, 2, groups=6)
    x = torch.randn(2, 6, 9, 9)
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))


@pytest.fixture(scope="module")
def network():
    network = mobilenet_v3_small(num_classes=5)
    network(torch.rand(2, 3, 64, 64))  # running statistics of its own
    network.features[0].requires_grad_(False)
    return network.eval()


def test_a_copy_is_what_deepcopy_gives(network):
    mine, theirs = copy_module(network), copy.deepcopy(network)
    assert repr(mine) == repr(theirs)
    assert [type(m) for m in mine.modules()] == [type(m) for m in theirs.modules()]
    assert vars(mine).keys() == vars(theirs).keys()
    weights, expected = mine.state_dict(), theirs.state_dict()
    assert list(weights) == list(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)
    for (name, a), (other, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (name, type(a), a.requires_grad, a.grad) == (other, nn.Parameter, b.requires_grad, None)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(mine(x), network(x))


def test_a_copy_shares_nothing_with_its_original(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    own = copy_module(network)
    with torch.no_grad():
        for tensor in own.state_dict().values():
            tensor.fill_(7)
    own.train().register_forward_hook(lambda *_: None)
    own.features[0].register_buffer("note", torch.ones(1), persistent=False)
    own.features[0][0].bias = nn.Parameter(torch.ones(16))
    del own.classifier[0]
    assert not network.training and not network._forward_hooks and network.features[0][0].bias is None
    assert len(network.classifier) == 4 and not network.features[0]._non_persistent_buffers_set
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_given_tensors_replace_those_of_the_copy():
    norm, scale = nn.BatchNorm2d(4), torch.arange(4.0)
    own = copy_module(norm, weight=scale, running_mean=-scale)
    assert own.weight.tolist() == [0, 1, 2, 3] and own.running_mean.tolist() == [0, -1, -2, -3]
    assert own.bias.tolist() == [0] * 4 and norm.weight.tolist() == [1] * 4
    scale.zero_()
    assert own.weight.tolist() == [0, 1, 2, 3] and isinstance(own.weight, nn.Parameter) and own.weight.requires_grad


def test_a_module_that_copies_itself_is_asked():
    class Stub(nn.Module):
        def __deepcopy__(self, memo):
            return nn.Identity()

    assert type(copy_module(nn.Sequential(Stub()))[0]) is nn.Identity
