"""Elastic layers: each runs any slice of itself, and cuts that slice out as a plain torch.nn layer.

A layer takes the number of input channels from its input, and the rest of the slice (output channels, kernel) as an
argument, so no module stores an "active" sub-network. `layer.extract(slice)` is an ordinary module with a copy of the
slice's weights, such that `layer.extract(slice)(x)` equals `layer(x, slice)`.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torchvision.ops import SqueezeExcitation

from lib.genotype import Block


class ReLU6(nn.ReLU6):
    """ReLU6, in place unless autograd records: it would copy the input first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x, inplace=not torch.is_grad_enabled())


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer without the count of batches, which costs an operator and which nothing here reads."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


def to_device(module: nn.Module, device: torch.device, trains_in_half: bool = False) -> nn.Module:
    """Move `module`; in channels_last where that is faster: on a CPU, and for one network in half precision.

    For a supernet's many shapes, cuDNN would compile depthwise kernels of that order for seconds at nearly every step.
    """
    channels_last = device.type == "cpu" or trains_in_half
    return module.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


ACTIVATIONS = {"relu": functools.partial(nn.ReLU, inplace=True), "relu6": ReLU6, "h_swish": nn.Hardswish}
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")  # one number per channel each


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `value`, at least `divisor` and at least 90% of `value` (MobileNetV2)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad (B, C, H, W) as TensorFlow's SAME does: of an odd amount, the larger half is at the bottom and the right."""
    sides = []
    for length in (x.shape[3], x.shape[2]):
        amount = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        sides += [amount // 2, amount - amount // 2]
    return F.pad(x, sides)


class SamePadConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]))


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with one square filter per channel, through `depthwise_conv`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:  # BatchNorm has been folded in, so there is nothing to train
            return super().forward(x)
        return depthwise_conv(x, self.weight, self.stride[0], self.padding[0])


class SamePadDepthwiseConv2d(SamePadConv2d, DepthwiseConv2d):
    """Depthwise convolution with TensorFlow's SAME padding."""


_halves: dict[nn.Parameter, Tensor] = {}  # the cast weights of the supernet that is running under autocast


@contextlib.contextmanager
def cast_weights(module: nn.Module) -> Iterator[None]:
    """Under autocast, cast the weights of all elastic layers in one go; autocast casts each slice, and its gradient."""
    kinds = ElasticConv1x1, ElasticDepthwiseConv
    device = next(module.parameters()).device.type
    try:
        if torch.is_autocast_enabled(device):
            parameters = [p for layer in module.modules() if isinstance(layer, kinds) for p in layer.parameters()]
            _halves.update({p: torch.empty_like(p, dtype=torch.get_autocast_dtype(device)) for p in parameters})
            with torch.no_grad():
                torch._foreach_copy_(list(_halves.values()), parameters)
        yield
    finally:
        _halves.clear()


# For a sliced parameter, autograd's backward pass allocates zeros of the parameter's size, once for each sliced
# dimension: a fifth of the operators of a training step. Here the gradients of all slices are kept until the end of the
# backward pass, and then added to the parameters' gradients in one go.


def first_channels(*slices: tuple[nn.Parameter, tuple[int, ...]]) -> tuple[Tensor, ...]:
    """The leading slice of each parameter, with the given sizes of its first dimensions; cast within `cast_weights`.

    A backward pass adds to the parameters' `grad` as usual. `torch.autograd.grad` does not see these parameters.
    """
    parameters = [parameter for parameter, _ in slices]
    indices = [tuple(map(slice, sizes)) for _, sizes in slices]
    learns = torch.is_grad_enabled() and parameters[0].requires_grad
    if learns and (parameters[0] in _halves or any(sizes != tuple(p.shape[: len(sizes)]) for p, sizes in slices)):
        return _Slices.apply(indices, *parameters)
    return tuple(_halves.get(p, p)[index] for p, index in zip(parameters, indices, strict=True))


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Sequence[tuple[slice, ...]], *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.indices = indices
        ctx.parameters = parameters
        return tuple(_halves.get(p, p).detach()[index] for p, index in zip(parameters, indices, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        task = torch._C._current_graph_task_id()
        if task not in _waiting:
            _waiting.clear()  # of a backward pass that failed
            _waiting[task] = []
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _add_gradients(_waiting.pop(task)))
        _waiting[task] += zip(ctx.parameters, ctx.indices, gradients, strict=True)
        return None, *[None] * len(gradients)


_waiting: dict[int, list[tuple[nn.Parameter, tuple[slice, ...], Tensor]]] = {}  # slices' gradients by backward pass


@torch.no_grad()
def _add_gradients(gradients: list[tuple[nn.Parameter, tuple[slice, ...], Tensor]]) -> None:
    """Add the gradients of slices to those of their parameters."""
    fresh = list(dict.fromkeys(parameter for parameter, *_ in gradients if parameter.grad is None))
    if fresh:
        # One tensor of zeros for all, in the layout that the optimizer wants.
        zeros = fresh[0].new_zeros(sum(parameter.numel() for parameter in fresh))
        for parameter, part in zip(fresh, zeros.split([parameter.numel() for parameter in fresh]), strict=True):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
    while gradients:
        # A parameter that was used twice has two turns.
        turn = {parameter: (parameter.grad[index], gradient) for parameter, index, gradient in reversed(gradients)}
        torch._foreach_add_(*map(list, zip(*turn.values(), strict=True)))
        taken = {id(gradient) for _, gradient in turn.values()}
        gradients = [entry for entry in gradients if id(entry[2]) not in taken]


class ElasticConv1x1(nn.Conv2d):
    """1x1 convolution from the first input channels to the first `out_channels` output channels."""

    def forward(self, x: Tensor, out_channels: int) -> Tensor:
        slices = [(self.weight, (out_channels, x.shape[1]))]
        if self.bias is not None:
            slices.append((self.bias, (out_channels,)))
        return F.conv2d(x, *first_channels(*slices))

    def extract(self, in_channels: int, out_channels: int) -> nn.Conv2d:
        conv = _blank(nn.Conv2d, in_channels, out_channels, 1, bias=self.bias is not None)
        bias = self.bias[:out_channels] if self.bias is not None else None
        return copy_module(conv, weight=self.weight[:out_channels, :in_channels], bias=bias)


class ElasticBatchNorm(nn.BatchNorm2d):
    """Batch normalisation of the first channels. Shared running statistics fit no sub-network: re-estimate them."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        weight, bias = first_channels((self.weight, (c,)), (self.bias, (c,)))
        mean, var = self.running_mean[:c], self.running_var[:c]
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def extract(self, channels: int) -> nn.BatchNorm2d:
        norm = _blank(BatchNorm2d, channels, self.eps, self.momentum)
        tensors = {name: getattr(self, name)[:channels] for name in NORM_TENSORS}
        return copy_module(norm, num_batches_tracked=self.num_batches_tracked, **tensors)


class ElasticDepthwiseConv(nn.Module):
    """Depthwise convolution with an elastic kernel (Once-for-All, section 3.3).

    The largest kernel is stored. A smaller one is the centre of the next larger one, flattened, times a learned matrix
    that starts as the identity: 3x3 is cut from the transformed 5x5, so every matrix on the way learns.
    """

    def __init__(self, channels: int, kernels: Sequence[int], stride: int, same_padding: bool = False):
        super().__init__()
        self.stride = stride
        self.same_padding = same_padding and stride > 1  # at stride 1 both paddings are the same
        self.weight = nn.Parameter(torch.empty(channels, 1, max(kernels), max(kernels)))
        for size in range(max(kernels) - 2, min(kernels) - 1, -2):
            self.register_parameter(f"{size + 2}to{size}_matrix", nn.Parameter(torch.eye(size * size)))

    def kernel(self, channels: int, size: int) -> Tensor:
        """The weights of the first `channels` channels at kernel `size`, (channels, 1, size, size)."""
        smaller_sizes = range(self.weight.shape[-1] - 2, size - 1, -2)
        matrices = [(self.get_parameter(f"{smaller + 2}to{smaller}_matrix"), ()) for smaller in smaller_sizes]
        weight, *matrices = first_channels((self.weight, (channels,)), *matrices)
        for smaller, matrix in zip(smaller_sizes, matrices, strict=True):
            centre = F.pad(weight, (-1, -1, -1, -1)).flatten(1)  # (channels, smaller**2)
            weight = F.linear(centre, matrix).view(channels, 1, smaller, smaller)
        return weight

    def forward(self, x: Tensor, size: int) -> Tensor:
        """(B, C, H, W) to (B, C, H / stride, W / stride), rounded up."""
        weight = self.kernel(x.shape[1], size)
        if self.same_padding:
            return depthwise_conv(pad_same(x, size, self.stride), weight, self.stride, padding=0)
        return depthwise_conv(x, weight, self.stride, padding=size // 2)

    def extract(self, channels: int, size: int) -> nn.Conv2d:
        kind = SamePadDepthwiseConv2d if self.same_padding else DepthwiseConv2d
        padding = 0 if self.same_padding else size // 2
        conv = _blank(kind, channels, channels, size, self.stride, padding, groups=channels, bias=False)
        # Autocast would round the transformed weights to half precision for good.
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            return copy_module(conv, weight=self.kernel(channels, size))


class ElasticSqueezeExcitation(nn.Module):
    """Squeeze-and-excitation with a hard sigmoid (MobileNetV3, section 5.3) that narrows with its block."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = ElasticConv1x1(channels, self.squeeze_channels(channels), 1)
        self.fc2 = ElasticConv1x1(self.squeeze_channels(channels), channels, 1)

    @staticmethod
    def squeeze_channels(channels: int) -> int:
        return make_divisible(channels // 4)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        scale = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        scale = F.relu(self.fc1(scale, self.squeeze_channels(channels)))
        return x * F.hardsigmoid(self.fc2(scale, channels))

    def extract(self, channels: int) -> SqueezeExcitation:
        squeezed = self.squeeze_channels(channels)
        plain = copy_module(_blank(SqueezeExcitation, 1, 1, scale_activation=nn.Hardsigmoid))
        plain.fc1 = self.fc1.extract(channels, squeezed)
        plain.fc2 = self.fc2.extract(squeezed, channels)
        return plain


class Residual(nn.Sequential):
    """Layers whose output is added to their input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ElasticInvertedResidual(nn.Module):
    """Inverted residual block (MobileNetV2, section 3.3) of any expand ratio and kernel it was built for.

    Hidden channels are the first `make_divisible(in_channels * expand)`; if 1 is the only ratio, nothing is expanded.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expands: Sequence[float],
        kernels: Sequence[int],
        activation: str,
        squeeze_excitation: bool = False,
        same_padding: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.residual = stride == 1 and in_channels == out_channels
        hidden = self.hidden_channels(max(expands))
        self.expand = self.expand_norm = None
        if max(expands) != 1:
            self.expand = ElasticConv1x1(in_channels, hidden, 1, bias=False)
            self.expand_norm = ElasticBatchNorm(hidden)
        self.depthwise = ElasticDepthwiseConv(hidden, kernels, stride, same_padding)
        self.depthwise_norm = ElasticBatchNorm(hidden)
        self.squeeze_excitation = ElasticSqueezeExcitation(hidden) if squeeze_excitation else None
        self.project = ElasticConv1x1(hidden, out_channels, 1, bias=False)
        self.project_norm = ElasticBatchNorm(out_channels)
        self.activation = ACTIVATIONS[activation]()
        self.is_tapped = False  # whether a feature map ends in the expansion, whose channels then keep their order

    def hidden_channels(self, expand: float) -> int:
        return make_divisible(self.in_channels * expand) if expand != 1 else self.in_channels

    def expansion(self, x: Tensor, block: Block) -> Tensor:
        """(B, in_channels, H, W) to the hidden channels, (B, hidden_channels(block.expand), H, W)."""
        return self.activation(self.expand_norm(self.expand(x, self.hidden_channels(block.expand))))

    def forward(self, x: Tensor, block: Block, expanded: bool = False) -> Tensor:
        """(B, in_channels, H, W), or its expansion, to (B, out_channels, H / stride, W / stride), rounded up."""
        h = x if self.expand is None or expanded else self.expansion(x, block)
        h = self.activation(self.depthwise_norm(self.depthwise(h, block.kernel)))
        if self.squeeze_excitation is not None:
            h = self.squeeze_excitation(h)
        h = self.project_norm(self.project(h, self.out_channels))
        return x + h if self.residual else h

    def extract(self, block: Block) -> nn.Sequential:
        hidden = self.hidden_channels(block.expand)
        plain = Residual() if self.residual else nn.Sequential()
        # The layers run in the order in which they are assigned.
        if self.expand is not None:
            plain.expand = self.expand.extract(self.in_channels, hidden)
            plain.expand_norm = self.expand_norm.extract(hidden)
            plain.expand_activation = self.activation
        plain.depthwise = self.depthwise.extract(hidden, block.kernel)
        plain.depthwise_norm = self.depthwise_norm.extract(hidden)
        plain.activation = self.activation
        if self.squeeze_excitation is not None:
            plain.squeeze_excitation = self.squeeze_excitation.extract(hidden)
        plain.project = self.project.extract(hidden, self.out_channels)
        plain.project_norm = self.project_norm.extract(self.out_channels)
        return plain

    def hidden_axes(self) -> Iterator[tuple[nn.Module, str, int]]:
        """Every (module, tensor name, dimension) that runs over the hidden channels of a block that expands."""
        yield from ((self.expand, "weight", 0), (self.depthwise, "weight", 0), (self.project, "weight", 1))
        yield from ((norm, name, 0) for norm in (self.expand_norm, self.depthwise_norm) for name in NORM_TENSORS)
        if squeeze := self.squeeze_excitation:
            yield from ((squeeze.fc1, "weight", 1), (squeeze.fc2, "weight", 0), (squeeze.fc2, "bias", 0))


# Modules that run one after the other, each with the block that it runs; None: the module is not elastic.
Segment = list[tuple[nn.Module, Block | None]]


def run_segment(segment: Segment, x: Tensor) -> Tensor:
    for module, block in segment:
        x = module(x) if block is None else module(x, block)
    return x


def extract_segment(segment: Segment) -> nn.Sequential:
    return nn.Sequential(*(copy_module(m) if block is None else m.extract(block) for m, block in segment))


@torch.no_grad()
def copy_module(module: nn.Module, **tensors: Tensor) -> nn.Module:
    """A deep copy of `module`, in a fraction of copy.deepcopy's time: a search cuts out every candidate as one.

    Copies of `tensors` replace its own parameters and buffers of those names. Parameters, buffers, submodules, dicts
    and sets are copied, other attributes are shared.
    """
    if hasattr(module, "__deepcopy__"):
        return copy.deepcopy(module)
    own = module.__new__(type(module))
    own.__dict__ = {n: value.copy() if isinstance(value, dict | set) else value for n, value in vars(module).items()}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            own._parameters[name] = nn.Parameter(tensors.get(name, parameter).clone(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            own._buffers[name] = tensors.get(name, buffer).clone()
    for name, child in module._modules.items():
        own._modules[name] = copy_module(child) if child is not None else None
    return own


@functools.cache
def _blank(make: Callable[..., nn.Module], *args: object, **options: object) -> nn.Module:
    """A layer to pass to `copy_module`, which is faster than making a new one and draws no random numbers."""
    with torch.device("meta"):
        return make(*args, **options)


# oneDNN has a depthwise kernel for the gradient of filters up to 3 columns wide. For wider ones it takes the kernel for
# groups of 16 channels, which does 16 times the work: a fifth of a whole training step. Below, the gradient of a wide
# filter is assembled from those of filters that are 3 columns wide.
NARROW = 3


def depthwise_conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """F.conv2d of (B, C, H, W) with one filter per channel, (C, 1, K, K): the same values and gradients."""
    wide = weight.shape[-1] > NARROW and weight.requires_grad and torch.is_grad_enabled()
    float_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if wide and float_on_cpu and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling():
        return _WideDepthwiseConv.apply(x, weight, stride, padding)
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=weight.shape[0])


class _WideDepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        ctx.padding = padding
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        # Not torch.nn.grad.conv2d_input, which does not know that x is in channels_last order.
        stride, padding, wanted = [ctx.stride] * 2, [ctx.padding] * 2, [ctx.needs_input_grad[0], False, False]
        x_gradient, _, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, stride, padding, [1, 1], False, [0, 0], len(weight), wanted
        )
        weight_gradient = _weight_gradient(gradient, x, weight.shape[-1], ctx.stride, ctx.padding)
        return x_gradient, weight_gradient, None, None


def _weight_gradient(gradient: Tensor, x: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """The gradient (C, 1, K, K) of weights from that of the output, (B, C, H', W'), and the input (B, C, H, W)."""
    batch, channels = x.shape[:2]
    height = x.shape[2] + 2 * padding
    width = x.shape[3] + 2 * padding
    row = channels * width
    # The input is padded once, in channels_last order. A filter's columns from `first` on see it shifted by `first`
    # pixels: the same memory, read from there on. One row more is allocated for the last image's shift.
    memory = x.new_empty(batch * height * row + row)
    memory[-row:].zero_()
    shape = (batch, channels, height, width)
    strides = (height * row, 1, row, channels)
    _copy_into(memory.as_strided(shape, strides), x, padding)
    # A shifted row ends with pixels of the next row. They meet output columns that do not exist: zeros.
    wider = (*gradient.shape[:3], (width - NARROW) // stride + 1)
    padded = torch.empty(wider, dtype=x.dtype, memory_format=torch.channels_last)
    _copy_into(padded, gradient, 0)
    result = x.new_empty(channels, 1, size, size)
    for first in (*range(0, size - NARROW, NARROW), size - NARROW):
        shifted = memory.as_strided(shape, strides, first * channels)
        columns = conv2d_weight(shifted, (channels, 1, size, NARROW), padded, stride, groups=channels)
        result[..., first : first + NARROW] = columns
    return result


def _copy_into(out: Tensor, x: Tensor, first: int) -> None:
    """Copy x (B, C, H, W) into a tensor of at least its size, from row and column `first` on, with zeros around it."""
    # F.pad would first fill all of it with zeros, in the time of the copy.
    bottom, right = first + x.shape[2], first + x.shape[3]
    out[:, :, first:bottom, first:right].copy_(x)
    for border in (out[:, :, :first], out[:, :, bottom:], out[:, :, :, :first], out[:, :, :, right:]):
        border.zero_()
