"""What the tests of prototype_cam share: cases, their tensors, and a result with the gradients of the features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import LAYOUTS, relative_error
from torch import Tensor

from wsss_ops import reference

# Norm of the difference from the float64 reference, relative to it: 3/4 of the distance between neighbouring numbers
# for half precision, in which resized levels are kept too.
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 0.75 * 2**-10, torch.bfloat16: 0.75 * 2**-7}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    levels: tuple[tuple[int, int, int], ...]  # D, h, w
    classes: int
    cam_size: tuple[int, int]
    images: int = 2
    single: bool = True  # a tensor, not a list of one
    size: tuple[int, int] | None = None
    valid: bool = False
    tagged: float = 0.5
    detach_prototypes: bool = False


SIZES = {
    "one pixel": Case(((3, 1, 1),), 2, (1, 1)),
    "one channel": Case(((1, 4, 5),), 3, (4, 5)),
    "one class": Case(((5, 3, 4),), 1, (3, 4)),
    "odd": Case(((33, 9, 7),), 5, (9, 7), valid=True),
    "9 classes": Case(((6, 7, 9),), 9, (7, 9), tagged=1.0),
    "81 classes": Case(((20, 12, 11),), 81, (12, 11), images=3, tagged=0.9),
    "many channels": Case(((1100, 3, 4),), 4, (3, 4), images=1),
    "many pixels": Case(((7, 33, 40),), 21, (33, 40), images=1, valid=True),
    "no seeds": Case(((6, 4, 5),), 3, (4, 5), tagged=0.0),
    "seeds up": Case(((9, 8, 12),), 4, (3, 5), size=(8, 12), valid=True),
    "seeds down": Case(((9, 4, 3),), 4, (9, 7), size=(4, 3)),
    "features up": Case(((9, 4, 3),), 4, (9, 7)),
    "features down": Case(((9, 11, 8),), 4, (5, 8), size=(3, 4)),
    "one level": Case(((11, 6, 5),), 4, (6, 5), single=False),
    "levels": Case(((5, 16, 12), (17, 8, 6), (18, 3, 5), (2, 1, 1)), 5, (8, 6), single=False, valid=True),
    "levels to a size": Case(((5, 3, 4), (40, 6, 9)), 5, (12, 9), single=False, size=(6, 7)),
}
# A case for each of the ways through the kernels.
WAYS = {
    "one tensor": Case(((33, 9, 7),), 5, (9, 7), valid=True),
    "many classes": Case(((12, 9, 10),), 30, (9, 10), tagged=1.0),
    "detached": Case(((20, 6, 7),), 4, (6, 7), detach_prototypes=True),
    "levels": Case(((9, 12, 10), (14, 6, 5), (7, 2, 3)), 4, (6, 5), single=False),
    "whole loads": Case(((168, 8, 24),), 6, (8, 24), tagged=0.7),
    "many classes, whole loads": Case(((40, 16, 16),), 12, (16, 16), tagged=1.0),
    "levels, whole loads": Case(
        ((16, 16, 32), (40, 32, 64), (24, 8, 16), (16, 4, 8), (8, 8, 24)), 4, (8, 16), single=False
    ),
}


def tensors(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float32, layout: str = "nchw"
) -> dict[str, Any]:
    """Arguments of prototype_cam."""
    n = case.images
    levels = []
    for d, height, width in case.levels:
        level = torch.randn(n, d, height, width, dtype=torch.float64) + 0.3
        levels.append(LAYOUTS[layout](level.to(dtype).to(device)))
    tags = torch.rand(n, case.classes) < case.tagged
    cam = torch.randn(n, case.classes, *case.cam_size).relu() * tags[:, :, None, None]
    valid = torch.rand(n, *case.cam_size) < 0.8 if case.valid else None
    return {
        "features": levels[0] if case.single else levels,
        "cam": cam.to(device),
        "tags": tags.to(device),
        "valid": None if valid is None else valid.to(device),
        "size": case.size,
        "detach_prototypes": case.detach_prototypes,
    }


def levels_of(given: dict[str, Any]) -> list[Tensor]:
    features = given["features"]
    return [features] if isinstance(features, Tensor) else list(features)


def run(function: Callable[..., Tensor], given: dict[str, Any], gradient: Tensor | None = None) -> list[Tensor]:
    """The result and the gradient of each level, by default of the result's sum. No tensor may change."""
    levels = [level.detach().requires_grad_() for level in levels_of(given)]
    fixed = [*levels, *(value for value in given.values() if isinstance(value, Tensor))]
    before = [tensor.detach().clone() for tensor in fixed]
    single = isinstance(given["features"], Tensor)
    result = function(**{**given, "features": levels[0] if single else levels})
    gradients = torch.autograd.grad(result, levels, torch.ones_like(result) if gradient is None else gradient)
    for tensor, value in zip(fixed, before, strict=True):
        assert torch.equal(tensor.detach().nan_to_num(), value.nan_to_num())
    return [result.detach(), *gradients]


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    levels = [level.detach().double().contiguous() for level in levels_of(given)]
    return {**given, "features": levels[0] if isinstance(given["features"], Tensor) else levels}


def assert_matches(function: Callable[..., Tensor], given: dict[str, Any]) -> None:
    """The function on what is given against the float64 reference, with a random gradient of the result."""
    levels = levels_of(given)
    dtype = levels[0].dtype
    twin = as_double(given)
    expected = reference.prototype_cam(**twin)
    gradient = torch.randn(expected.shape, dtype=torch.float64, device=expected.device).to(dtype)
    if dtype.itemsize == 2:  # where rounding the resized levels could change a cosine's sign, nothing is asked
        gradient = torch.where(expected > 0.02, gradient, 0)
    wanted = run(reference.prototype_cam, twin, gradient.double())
    got = run(function, given, gradient)
    assert [tensor.dtype for tensor in got] == [dtype] * len(got)
    assert torch.equal(got[0] == 0, wanted[0].to(dtype) == 0) or dtype.itemsize == 2
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in wanted]
    assert relative_error(got[0], wanted[0]) <= BOUNDS[dtype]
    # Of all levels at once: one of few pixels or channels can have a gradient that is nothing but rounding.
    gradient, expected = (torch.cat([level.flatten() for level in tensors[1:]]) for tensors in (got, wanted))
    if float(expected.norm()) < 1e-6:
        assert float(gradient.double().norm()) < 50 * BOUNDS[dtype]
    else:
        assert relative_error(gradient, expected) <= BOUNDS[dtype]
