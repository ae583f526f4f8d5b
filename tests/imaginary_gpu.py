"""A GPU for a machine without one: tensors stay in CPU memory, and their storages carry the name of a device.

`install()` makes `torch.cuda` answer as if there were GPUs. From then on `Tensor.device`, `.to`, `.cpu` and the
factories work by the names, and an operator on tensors of two devices raises WrongDevice, as CUDA would refuse it.
`counts` says what the work so far would have asked of a real device: kernels, waits of the host and copies to the
device, each with the line of this project that asked. Nothing is said about time, and nothing about CUDA's numerics.
"""

from __future__ import annotations

import os
import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = f"{Path(__file__).parent.parent}{os.sep}"
CPU = "cpu"

# Operators that only describe memory: they launch no kernel.
VIEWS = {
    *("view", "_unsafe_view", "slice", "select", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze"),
    *("as_strided", "detach", "alias", "split", "split_with_sizes", "unbind", "_reshape_alias", "diagonal", "unfold"),
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "set_", "resize_"),
    *("_local_scalar_dense", "is_pinned", "view_as_real"),
}
# Operators whose result the host has to know before it can go on.
WAITS = {
    *("nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "unique_dim", "equal", "is_nonzero"),
    *("_local_scalar_dense", "nms", "repeat_interleave"),
}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}


class WrongDevice(RuntimeError):
    """An operator got tensors of different devices."""


@dataclass
class Counts:
    """Of everything since the last `clear`."""

    kernels: Counter = field(default_factory=Counter)  # by (operator, line)
    waits: Counter = field(default_factory=Counter)  # of the host for the device, by (reason, line)
    copies: Counter = field(default_factory=Counter)  # from the host to the device, by line
    # Of the copies, those that the host waits for: of memory that is not pinned, or without `non_blocking`.
    blocking: Counter = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()

    def totals(self) -> tuple[int, int, int]:
        return self.kernels.total(), self.waits.total(), self.copies.total()


counts = Counts()
_current = [0]  # the GPU that `cuda` alone names
_here = [CPU]  # where a factory without a device puts its tensor: the device of the call around it


def device_of(x: Tensor) -> str:
    return getattr(x.untyped_storage(), "imaginary_device", CPU)


def _place(x: Tensor, device: str) -> None:
    x.untyped_storage().imaginary_device = device


def _line() -> str:
    """The innermost line of this project outside of tests/."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(f"{ROOT}tests{os.sep}"):
            return f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _tensors(*trees: object) -> list[Tensor]:
    # torch's tree_leaves takes longer than all the rest of this file.
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found += () if tree.is_meta else (tree,)
        elif isinstance(tree, tuple | list):
            found += _tensors(*tree)
        elif isinstance(tree, dict):
            found += _tensors(*tree.values())
    return found


class _Device(TorchDispatchMode):
    """Sees every operator, those of the backward pass included."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        name = func.__name__.split(".")[0]
        device = self._device(name, args, tensors) if tensors else _here[-1]
        if device != CPU:
            self._count(name, args, device)
        result = func(*args, **kwargs)
        for x in _tensors(result):
            # A view, or a result in place, lies where its storage lies already.
            if not any(x.untyped_storage() is t.untyped_storage() for t in tensors):
                _place(x, device)
        return result

    def _device(self, name: str, args: tuple, tensors: list[Tensor]) -> str:
        """Where the operator runs."""
        if name in ("copy_", "_to_copy"):  # between devices: see _Names
            target, source = device_of(tensors[0]), device_of(tensors[-1])
            if target != source:
                _transfer(tensors[-1], target, non_blocking=False)
            return target
        if name in INDEXING:  # a GPU takes indices from the CPU, which are copied to it
            device = device_of(args[0])
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            if device != CPU:
                counts.copies[_line()] += sum(device_of(x) == CPU and x.ndim > 0 for x in indices)
            tensors = [args[0], *(args[2:3] if name not in ("index", "_unsafe_index") else ())]
        # Numbers of the CPU may meet tensors of any device.
        found = {device_of(x) for x in tensors if x.ndim > 0} or {device_of(x) for x in tensors}
        numbers = {device_of(x) for x in tensors if x.ndim == 0} - {CPU}
        if (len(found) > 1 and not name.startswith("_foreach")) or numbers - found:
            shapes = ", ".join(f"{tuple(x.shape)} on {device_of(x)}" for x in tensors)
            raise WrongDevice(f"{name}: {shapes} ({_line()})")
        return max(found)  # of a list, as in torch._foreach_add: cuda before cpu

    def _count(self, name: str, args: tuple, device: str) -> None:
        if name not in VIEWS:
            counts.kernels[name, _line()] += 1
        if name in WAITS or _lists_places(name, args):
            counts.waits[name, _line()] += 1


def _lists_places(name: str, args: tuple) -> bool:
    """Whether an operator makes a list of the places where a mask is true. Filling them with one number needs none."""
    by_mask = name in INDEXING and any(x.dtype == torch.bool for x in _tensors(args[1]))
    return by_mask and not (name.startswith("index_put") and args[2].numel() == 1)


def _transfer(x: Tensor, target: str, non_blocking: bool) -> None:
    if target == CPU:
        counts.waits["copy to the CPU", _line()] += 1
    elif device_of(x) == CPU:
        counts.copies[_line()] += 1
        if not (non_blocking and getattr(x.untyped_storage(), "pinned", False)):
            counts.blocking[_line()] += 1


def _pin(x: Tensor, device: object = None) -> Tensor:
    if device_of(x) != CPU:
        raise RuntimeError("only memory of the host can be pinned")
    pinned = x.detach()
    pinned.untyped_storage().pinned = True
    return pinned


def _named(device: object) -> str:
    """`cpu` or `cuda:N`; an index alone is a GPU's."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    index = _current[0] if device.index is None else device.index
    return CPU if device.type == "cpu" else f"cuda:{index}"


def _is_ours(device: object) -> bool:
    return device is not None and (isinstance(device, int) or torch.device(device).type in ("cpu", "cuda"))


class _Names(TorchFunctionMode):
    """Sees what Python code asks of torch: where tensors are, where they shall be, and the factories."""

    GETTERS = types.MappingProxyType(
        {
            torch.Tensor.device.__get__: torch.device,
            torch.Tensor.is_cuda.__get__: lambda name: name != CPU,
            torch.Tensor.is_cpu.__get__: lambda name: name == CPU,
        }
    )

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.__name__ in ("__get__", "__set__"):
            answer = None if args[0].is_meta else self.GETTERS.get(func)
            return answer(device_of(args[0])) if answer else func(*args, **kwargs)
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        if func is torch.Tensor.cpu:
            return _move(args[0], CPU)
        if func is torch.Tensor.cuda:
            return _move(args[0], _named("cuda"))
        if func is torch.Tensor.__deepcopy__ and not args[0].is_meta:
            with _disable_current_modes():  # torch copies the storage, and that without its name
                copied = func(*args, **kwargs)
            _place(copied, device_of(args[0]))
            return copied
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and device_of(args[0]) != CPU:
            raise TypeError("a tensor of a GPU cannot become a NumPy array: .cpu() first")
        if func is torch.Tensor.tolist and device_of(args[0]) != CPU:
            return _move(args[0], CPU).tolist()
        device = kwargs.get("device")
        if _is_ours(device):
            kwargs["device"] = CPU
            target = _named(device)
        else:
            target = max((device_of(x) for x in _tensors(args, kwargs)), default=_here[-1])
        _here.append(target)
        try:
            result = func(*args, **kwargs)
            if target != CPU and func in (torch.tensor, torch.Tensor.new_tensor):
                counts.copies[_line()] += 1
                counts.blocking[_line()] += 1
            if _is_ours(device):
                for x in _tensors(result):
                    _place(x, target)
            return result
        finally:
            _here.pop()

    def _to(self, args: tuple, kwargs: dict) -> Tensor:
        x, *others = args
        if others and isinstance(others[0], Tensor):  # x.to(other)
            return _move(x, device_of(others[0]), dtype=others[0].dtype)
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*others, **kwargs)
        if x.is_meta or (device is not None and device.type == "meta"):
            return torch.Tensor.to(x, *others, copy=copy, **kwargs)
        target = device_of(x) if device is None else _named(device)
        options = {"memory_format": memory_format, "non_blocking": non_blocking}
        return _move(x, target, dtype=dtype or x.dtype, copy=copy, **options)


def _move(
    x: Tensor, target: str, *, copy: bool = False, memory_format=None, dtype=None, non_blocking: bool = False
) -> Tensor:
    source = device_of(x)
    options = {} if memory_format is None else {"memory_format": memory_format}
    result = torch._C.TensorBase.to(x, dtype=dtype or x.dtype, copy=copy or source != target, **options)
    if source != target:
        _transfer(x, target, non_blocking)
        _place(result, target)
    return result


def install(gpus: int = 1) -> None:
    """For the rest of this process and of those that it forks."""
    properties = types.SimpleNamespace(name="Imaginary", total_memory=80 * 2**30, major=9, minor=0)
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: gpus,
        "current_device": lambda: _current[0],
        "set_device": lambda device: _current.__setitem__(0, int(_named(device).removeprefix("cuda:"))),
        "get_device_name": lambda device=None: "Imaginary",
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: counts.waits.update([("synchronize", _line())]),
        "empty_cache": lambda: None,
        "make_graphed_callables": _record,
        "_lazy_init": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state_all": lambda: [torch.get_rng_state()] * gpus,
        "set_rng_state_all": lambda states: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # What a DataLoader asks before it pins memory, also in a thread of its own, which has no modes.
    if hasattr(torch, "accelerator"):
        torch.accelerator.is_available = lambda: True
        torch.accelerator.current_accelerator = lambda check_available=False: None
        torch.accelerator.current_device_index = lambda: _current[0]
        torch.accelerator.set_device_index = lambda device: None
    torch.Tensor.pin_memory = _pin
    _autocast_on_the_cpu()
    _group_by_imaginary_device()
    for mode in (_Device(), _Names()):
        mode.__enter__()


def _record(module: torch.nn.Module, inputs: tuple) -> None:
    """Warms up, and refuses the cache of autocast, as torch does; then the module stays as it is."""
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise RuntimeError("make_graphed_callables does not support the autocast caching")
    for _ in range(3):
        module(*inputs)


def _autocast_on_the_cpu() -> None:
    real = torch.autocast.__init__

    def init(self, device_type, *args, **kwargs):
        real(self, device_type.replace("cuda", "cpu"), *args, **kwargs)

    torch.autocast.__init__ = init
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.is_autocast_enabled = lambda _device: enabled("cpu")
    torch.get_autocast_dtype = lambda _device: dtype("cpu")


def _group_by_imaginary_device() -> None:
    """The optimizers group parameters in C++, which does not see the names."""
    real = _foreach_utils._group_tensors_by_device_and_dtype

    def group(lists, with_indices=False):
        found = {}
        for (device, dtype), value in real(lists, with_indices).items():
            first = next((t for t in value[0][0] if t is not None), None)
            found[device if first is None else torch.device(device_of(first)), dtype] = value
        return found

    for module in list(sys.modules.values()):
        if getattr(module, "_group_tensors_by_device_and_dtype", None) is real:
            module._group_tensors_by_device_and_dtype = group
