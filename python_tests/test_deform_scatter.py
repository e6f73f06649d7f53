"""The input's gradient in any order, which a CUDA block sums up for a tile of 8x8 output pixels and nine taps: wherever
the offsets lead, and wherever images, chunks, rows and channels end."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from deform_cases import BOUNDS, Case, as_double, assert_near, off_integers, run, tensors
from harness import workspace
from torch import Tensor

from wsss_ops import deform_conv2d, reference

CASE = Case((2, 4, 37, 41), 3, (3, 3), padding=1, masked=True)


@pytest.fixture(autouse=True)
def in_any_order(poisoned_memory: None) -> None:
    torch.use_deterministic_algorithms(False)


def check(case: Case, given: dict[str, Tensor], bound: float = BOUNDS[torch.float32]) -> None:
    got = run(deform_conv2d, case.options, given, ["input"])
    assert_near(got, run(reference.deform_conv2d, case.options, as_double(given), ["input"]), bound)


def broken(shape: tuple[int, ...]) -> Tensor:
    kinds = torch.tensor([0.25, -20.5, 30.75, nan, inf, -inf, 1e9, -1e30])
    return kinds[torch.randint(0, len(kinds), shape)]


# A block's table has 32x32 slots for the pixels of an image, which pixels 32 apart share.
OFFSETS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "zero": torch.zeros,
    "on pixels": lambda shape: torch.randint(-2, 3, shape),
    "anywhere": lambda shape: off_integers(shape, -40, 40),
    "far but alike": lambda shape: off_integers(shape, 19, 22),
    "32 apart": lambda shape: 32 * torch.randint(-1, 2, shape) + 0.25,
    "broken": broken,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OFFSETS)
def test_wherever_offsets_lead(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    dtypes = dict.fromkeys(CASE.shapes, dtype)
    if dtype == torch.bfloat16:
        dtypes["offset"] = torch.float32
    given = tensors(CASE, device, dtypes)
    given["offset"] = OFFSETS[kind](CASE.shapes["offset"]).to(device, dtypes["offset"])
    check(CASE, given, BOUNDS[dtype])


@pytest.mark.parametrize("nbytes", [2_000, 8_000, 96 * 2**20])
@pytest.mark.parametrize("width", [1, 2, 3, 6, 8, 19])
def test_ends_of_images_rows_and_chunks(device: torch.device, width: int, nbytes: int) -> None:
    """Chunks of 13, 55 and all pixels, in tiles that cross the ends of images of five rows."""
    case = Case((7, 4, 5, width), 4, (3, 3), padding=1, groups=2, offset_groups=2)
    with workspace(nbytes):
        check(case, tensors(case, device, torch.float32))


@pytest.mark.parametrize("stride", [2, 3])
def test_strides(device: torch.device, stride: int) -> None:
    case = Case((1, 4, 50, 33), 2, (3, 3), stride=stride, padding=6, dilation=6)
    check(case, tensors(case, device, torch.float32))


def test_several_slices_of_channels_a_block(device: torch.device) -> None:
    """16 tiles of 66 slices, of 8 channels each: more than blocks are started for."""
    case = Case((1, 521, 64, 9), 1, (1, 1))
    check(case, tensors(case, device, torch.float32))
