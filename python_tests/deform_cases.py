"""What the tests of deform_conv2d share: cases, their tensors, and an operator's result with all its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from harness import relative_error
from torch import Tensor

NAMES = ("input", "offset", "weight", "bias", "mask")
# Norm of the difference from the float64 reference, relative to it. For half precision: 3/4 of the distance between
# neighbouring numbers, room for rounding the samples once and the result once, not for sums in half precision.
BOUNDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 0.75 * 2.0**-10, torch.bfloat16: 0.75 * 2.0**-7}

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    image: tuple[int, int, int, int]  # N, Cin, H, W
    out_channels: int
    kernel: Pair
    stride: int | Pair = 1
    padding: int | Pair = 0
    dilation: int | Pair = 1
    groups: int = 1
    offset_groups: int = 1
    masked: bool = False
    biased: bool = True

    @property
    def options(self) -> dict[str, int | Pair]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def out_size(self) -> Pair:
        sides = zip(
            self.image[2:], self.kernel, pair(self.stride), pair(self.padding), pair(self.dilation), strict=True
        )
        height, width = (
            (side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for side, taps, stride, padding, dilation in sides
        )
        return height, width

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that the case has, and of its result under "output"."""
        (n, channels, _, _), size = self.image, self.out_size
        taps = self.offset_groups * self.kernel[0] * self.kernel[1]
        shapes: dict[str, tuple[int, ...]] = {
            "input": self.image,
            "offset": (n, 2 * taps, *size),
            "weight": (self.out_channels, channels // self.groups, *self.kernel),
            "output": (n, self.out_channels, *size),
        }
        if self.biased:
            shapes["bias"] = (self.out_channels,)
        if self.masked:
            shapes["mask"] = (n, taps, *size)
        return shapes


CASES = {
    "1x1": Case((1, 1, 5, 7), 1, (1, 1)),
    "3x3": Case((2, 3, 7, 9), 4, (3, 3), padding=1),
    "stride 2": Case((2, 4, 9, 6), 5, (3, 3), stride=2, padding=1, biased=False),
    "2x4": Case((1, 8, 8, 7), 3, (2, 4), padding=(1, 2), masked=True),
    "5x3": Case((1, 17, 9, 5), 6, (5, 3), stride=(2, 1), padding=(2, 0)),
    "dilated": Case((1, 32, 9, 9), 8, (3, 3), padding=(2, 3), dilation=(2, 3), biased=False),
    "groups": Case((2, 6, 6, 5), 4, (3, 3), padding=1, groups=2),
    "9x9": Case((1, 2, 10, 11), 2, (9, 9), padding=4),
    "5x5 in groups": Case((2, 6, 7, 9), 6, (5, 5), padding=2, groups=3, offset_groups=2, masked=True),
    "depthwise": Case((1, 8, 6, 7), 16, (3, 3), stride=(1, 2), padding=1, groups=8, masked=True),
    "offset groups": Case((2, 4, 5, 6), 3, (2, 2), offset_groups=2, masked=True),
    "4 offset groups": Case((1, 32, 6, 5), 7, (3, 3), padding=1, offset_groups=4, masked=True),
    "an offset per channel": Case((1, 3, 5, 5), 2, (3, 1), offset_groups=3, biased=False),
    "groups across offset groups": Case((2, 12, 5, 6), 6, (2, 3), padding=1, groups=3, offset_groups=2, masked=True),
    "64 channels": Case((1, 64, 5, 6), 9, (3, 3), padding=1),
    "160 channels": Case((1, 160, 4, 5), 8, (3, 3), padding=1, groups=2, offset_groups=2, masked=True),
    "520 channels": Case((1, 520, 3, 4), 36, (1, 2), groups=2, offset_groups=4, masked=True),
    "70 outputs": Case((1, 5, 6, 7), 70, (3, 3), padding=1),
    "33 images": Case((33, 2, 4, 3), 2, (3, 3), padding=1, masked=True),
    "one row": Case((2, 5, 1, 19), 4, (1, 3), padding=(0, 1)),
    "padding beyond reach": Case((1, 2, 3, 3), 2, (2, 2), padding=6),
}


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def off_integers(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """float64 in [low, high), at least 1/16 from integers and so on one side of them in every precision."""
    return torch.randint(low, high, shape) + torch.empty(shape, dtype=torch.float64).uniform_(0.0625, 0.9375)


def tensors(case: Case, device: torch.device, dtypes: torch.dtype | dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Random tensors of a case and a gradient of its result ("output"); offsets reach three pixels beyond borders."""
    made = {}
    for name, shape in case.shapes.items():
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]
        made[name] = (off_integers(shape, -3, 3) if name == "offset" else torch.randn(shape, dtype=torch.float64)).to(
            device, dtype
        )
    return made


def as_double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().contiguous() for name, tensor in given.items()}


def run(
    function: Callable[..., Tensor], options: dict[str, Any], given: dict[str, Tensor], wanted: Iterable[str] = NAMES
) -> dict[str, Tensor]:
    """The result under "output", and the gradients of the tensors wanted, as far as given. No tensor may change."""
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in given.items() if name in NAMES}
    sources = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    result = function(**leaves, **options)
    gradients = torch.autograd.grad(result, list(sources.values()), given["output"]) if sources else ()
    assert all(same(tensor, before[name]) for name, tensor in given.items())
    return {"output": result.detach(), **dict(zip(sources, gradients, strict=True))}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN for NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=0), b.nan_to_num(nan=0))


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Result and gradients within a relative error of `bound`."""
    assert got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in got}
    assert all(error <= bound for error in errors.values()), errors
