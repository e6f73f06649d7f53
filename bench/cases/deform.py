"""deform_conv2d against its matrix products, its reference and torchvision's operator.

D1 is ESOL's sampler on a ResNet-50 at crop 512, D2 a smaller layer, also with offset groups and a mask; D3 is for
CPUs. `forward` is one product, `offsets` forward and backward where only the offset learns (two products), `all`
forward and backward with every gradient (three).
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

import wsss_ops
from wsss_ops import reference

from ..measure import Function
from .case import Case, Precision, arithmetic

# Which of (input, offset, weight, bias, mask) learn.
LEARNING = {
    "forward": (False,) * 5,
    "offsets": (False, True, False, False, False),
    "all": (True,) * 5,
}


@dataclass(frozen=True)
class Layer:
    name: str
    device: str
    images: int
    channels: int  # in and out
    size: int
    offset_groups: int = 1
    masked: bool = False
    precision: Precision = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def pixels(self) -> int:
        return self.images * self.size**2

    def tensors(self, device: torch.device, layout: torch.memory_format) -> list[Tensor | None]:
        """input, offset, weight, bias and mask."""
        n, c, size = self.images, self.channels, self.size
        numbers = functools.partial(torch.randn, device=device)
        mask = torch.rand(n, 9 * self.offset_groups, size, size, device=device) if self.masked else None
        return [
            numbers(n, c, size, size).to(self.dtype, memory_format=layout),
            numbers(n, 18 * self.offset_groups, size, size).to(self.dtype),
            (numbers(c, c, 3, 3) / (3 * c**0.5)).to(self.dtype),
            numbers(c).to(self.dtype),
            None if mask is None else mask.to(self.dtype),
        ]


def deform_case(layer: Layer, learns: str, layout: torch.memory_format) -> Case:
    products = {"forward": 1, "offsets": 2, "all": 3}[learns]

    def build(device: torch.device, compiled: bool) -> Mapping[str, Function]:
        given = [
            None if tensor is None else tensor.requires_grad_(wanted)
            for tensor, wanted in zip(layer.tensors(device, layout), LEARNING[learns], strict=True)
        ]
        gradient = torch.randn(layer.images, layer.channels, layer.size, layer.size, device=device)
        gradient = gradient.to(layer.dtype, memory_format=layout)
        leaves = [tensor for tensor in given if tensor is not None and tensor.requires_grad]

        def step(operator: Callable[..., Tensor]) -> Function:
            input, offset, weight, bias, mask = given

            def run() -> object:
                output = operator(input, offset, weight, bias, padding=1, mask=mask)
                return torch.autograd.grad(output, leaves, gradient.to(output.dtype)) if leaves else output

            return arithmetic(layer.precision, run)

        name, floor = bare_products(layer, device, products)
        functions: dict[str, Function] = {
            f"floor: {name}": floor,
            "wsss_ops": step(wsss_ops.deform_conv2d),
            "reference": step(reference.deform_conv2d),
        }
        if importlib.util.find_spec("torchvision") is not None:
            import torchvision

            functions["torchvision"] = step(torchvision.ops.deform_conv2d)
        if compiled:
            functions["reference compiled"] = step(torch.compile(reference.deform_conv2d))
        return functions

    groups = f", {layer.offset_groups} offset groups, mask" if layer.masked else ""
    return Case(
        name=f"{layer.name} {learns} {'channels_last' if layout == torch.channels_last else 'NCHW'}",
        op="deform",
        work=f"N{layer.images} C{layer.channels} {layer.size}x{layer.size} 3x3, {layer.channels} outputs, "
        f"{layer.precision}{groups}",
        device=layer.device,
        flops=products * 2 * layer.pixels * 9 * layer.channels**2,
        build=build,
    )


def bare_products(layer: Layer, device: torch.device, count: int) -> tuple[str, Function]:
    """The convolution's first `count` products alone, over columns that are there, by the faster of two means."""
    rows, width, outputs = layer.pixels, 9 * layer.channels, layer.channels
    precision: Precision = "bf16" if layer.precision == "autocast" else layer.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    columns, weight, gradient = (
        torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (outputs, width), (rows, outputs))
    )
    maps = [x.view(layer.images, layer.size, layer.size, -1).permute(0, 3, 1, 2) for x in (columns, gradient)]
    kernel = weight.view(outputs, width, 1, 1)

    def by_backward(wanted: list[bool]) -> Any:
        settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(maps[1], maps[0], kernel, None, *settings, wanted)

    means: dict[str, list[Function]] = {
        "mm": [lambda: columns @ weight.t(), lambda: gradient @ weight, lambda: gradient.t() @ columns],
        "conv2d 1x1": [
            lambda: F.conv2d(maps[0], kernel),
            lambda: by_backward([True, False, False]),
            lambda: by_backward([False, True, False]),
        ],
    }
    name = fastest(device, layer, {name: arithmetic(precision, each[0]) for name, each in means.items()})
    return name, arithmetic(precision, lambda: [product() for product in means[name][:count]])


_fastest: dict[Layer, str] = {}


def fastest(device: torch.device, layer: Layer, means: Mapping[str, Function]) -> str:
    """Decided once per layer, so that all data sets of its cases have the same floor."""
    if layer not in _fastest:
        seconds = {name: min(_seconds(function, device) for _ in range(5)) for name, function in means.items()}
        _fastest[layer] = min(seconds, key=seconds.__getitem__)
    return _fastest[layer]


def _seconds(function: Function, device: torch.device) -> float:
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def overhead(device: torch.device) -> dict[str, Function]:
    input, offset, weight = (torch.randn(shape, device=device) for shape in ((1, 4, 4, 4), (1, 18, 4, 4), (4, 4, 3, 3)))
    input = input.contiguous(memory_format=torch.channels_last)
    return {
        name: functools.partial(function, input, offset, weight, padding=1)
        for name, function in {"wsss_ops": wsss_ops.deform_conv2d, "reference": reference.deform_conv2d}.items()
    }


D3 = Layer("D3", "cpu", 2, 256, 32)
GPU_LAYERS = [
    Layer(f"{name} {precision}", "cuda", 16, channels, size, offset_groups, masked, precision)
    for precision in get_args(Precision)
    for name, channels, size, offset_groups, masked in (
        ("D1", 2048, 32, 1, False),
        ("D2", 256, 64, 1, False),
        ("D2 G4", 256, 64, 4, True),
    )
]
CASES = [
    *(
        deform_case(D3, learns, layout)
        for learns in LEARNING
        for layout in (torch.contiguous_format, torch.channels_last)
    ),
    *(deform_case(layer, learns, torch.channels_last) for layer in GPU_LAYERS for learns in LEARNING),
]
