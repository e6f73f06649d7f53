"""deform_conv2d at values that break arithmetic, at many samples of one pixel, and the same from run to run."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from deform_cases import BOUNDS, Case, as_double, assert_near, off_integers, run, tensors
from harness import in_threads, instruction_set, threads, workspace
from torch import Tensor

from wsss_ops import _backend, deform_conv2d, reference

CASE = Case((2, 8, 7, 6), 4, (3, 3), padding=1, groups=2, offset_groups=2, masked=True)
FUNCTIONS = {"operator": deform_conv2d, "reference": reference.deform_conv2d}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("value", [nan, inf, -inf, 1e9, -1e9, 1e30, -1e30])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_offsets_out_of_this_world(
    device: torch.device, function: Callable[..., Tensor], dtype: torch.dtype, value: float
) -> None:
    """Such a sample, its own gradients and its part in all others are exactly 0: as if masked out by 0."""
    given = tensors(CASE, device, dtype)
    pairs = given["offset"].unflatten(1, (-1, 2))
    which = torch.randint(0, 5, pairs[:, :, 0].shape, device=device)  # 0: y, 1: x, 2: both, 3 and 4: a sound sample
    gone = which < 3
    masked = {**given, "mask": given["mask"].masked_fill(gone, 0)}
    broken = torch.stack([(which == 0) | (which == 2), (which == 1) | (which == 2)], dim=2).flatten(1, 2)
    given["offset"] = given["offset"].double().masked_fill(broken, value).to(dtype)  # 1e9 is inf in half precision
    given["mask"] = given["mask"].masked_fill(which == 1, nan)

    got = run(function, CASE.options, given)
    expected = run(reference.deform_conv2d, CASE.options, as_double(masked))
    expected["mask"] = expected["mask"].masked_fill(gone, 0)
    assert not got["offset"].unflatten(1, (-1, 2))[gone[:, :, None].expand_as(pairs)].any()
    assert not got["mask"][gone].any()
    assert_near(got, expected, BOUNDS[dtype])


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("shift", ["between pixels", "on pixels"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_broken_pixels_reach_their_readers_alone(
    device: torch.device, channels_last: bool, shift: str, value: float
) -> None:
    """The reference says which samples read a pixel: those of all four corners, a corner of weight 0 included."""
    given = tensors(CASE, device, torch.float32)
    if shift == "on pixels":
        given["offset"] = given["offset"].floor()
    for place in [(0, 1, 3, 2), (1, 7, 0, 0), (1, 0, 6, 5)]:
        given["input"][place] = value
    if channels_last:
        given["input"] = given["input"].contiguous(memory_format=torch.channels_last)
    got = run(deform_conv2d, CASE.options, given)
    assert got["output"].isfinite().any()
    assert got["input"].isfinite().all()
    assert not got["output"].isfinite().all()
    assert_near(got, run(reference.deform_conv2d, CASE.options, as_double(given)), BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_offsets_read_beyond_no_border(device: torch.device, dtype: torch.dtype) -> None:
    """A sampler starts at y = -1 and x = -1 along its border: derivatives there are those of the cell inside."""
    given = tensors(Case((1, 1, 2, 2), 1, (3, 3), padding=1), device, dtype)
    given["offset"].zero_()
    given["input"] = torch.tensor([[[[1, 2], [3, 5]]]], device=device, dtype=dtype)
    given["weight"].fill_(1)
    given["output"].fill_(1)
    for function in FUNCTIONS.values():
        gradient = run(function, {"padding": 1}, given)["offset"].reshape(3, 3, 2, 2, 2)
        # Output pixel (0, 0): tap (0, 1) reads (-1, 0), tap (1, 0) reads (0, -1), tap (2, 2) the last pixel.
        assert gradient[0, 1, :, 0, 0].tolist() == [1, 0]
        assert gradient[1, 0, :, 0, 0].tolist() == [0, 1]
        assert gradient[0, 0, :, 0, 0].tolist() == [0, 0]
        assert gradient[1, 1, :, 0, 0].tolist() == [2, 1]
        assert gradient[2, 2, :, 0, 0].tolist() == [-5, -5]


def crowded(device: torch.device, dtype: torch.dtype, image: tuple[int, ...] = (2, 16, 9, 8)) -> dict[str, Tensor]:
    """Every sample of an image falls into one cell."""
    n, channels, height, width = image
    case = Case((n, channels, height, width), 4, (3, 3), padding=1, offset_groups=2, masked=True)
    given = tensors(case, device, dtype)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    taps = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), dim=2) - 1
    places = torch.stack([y, x])[None] + taps.reshape(9, 2, 1, 1)
    target = off_integers((n, 2, 9, 2, height, width), 4, 5)
    given["offset"] = (target - places).flatten(1, 3).to(device, dtype)
    return given


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_samples_of_one_pixel(device: torch.device, dtype: torch.dtype, deterministic: bool) -> None:
    """648 samples add to each of four pixels: sums in half precision would be off by far."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    given = crowded(device, dtype)
    given["output"] = given["output"].abs()
    given["weight"] = given["weight"].abs()
    got = run(deform_conv2d, {"padding": 1}, given)
    assert_near(got, run(reference.deform_conv2d, {"padding": 1}, as_double(given)), BOUNDS[dtype])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("nbytes", [30_000, 256 * 2**20])
def test_deterministic_bit_for_bit(device: torch.device, count: int, nbytes: int) -> None:
    given = crowded(device, torch.float32)
    with workspace(nbytes), threads(count):
        first, *others = [run(deform_conv2d, {"padding": 1}, given) for _ in range(4)]
    for again in others:
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(count: int, deterministic: bool) -> None:
    """The CPU backend splits its work among threads; samples of one pixel then meet."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    given = crowded(torch.device("cpu"), torch.float32, (2, 32, 20, 24))
    with threads(count):
        got = run(deform_conv2d, {"padding": 1}, given)
    assert_near(got, run(reference.deform_conv2d, {"padding": 1}, as_double(given)), BOUNDS[torch.float32])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", _backend.cpu_module().levels())
def test_every_instruction_set(level: str, dtype: torch.dtype, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    for channels in (1, 3, 8, 21, 40, 67):  # vectors and what is left over of them
        case = Case((1, channels, 6, 5), 2, (3, 3), padding=1, masked=channels % 2 == 0)
        given = tensors(case, torch.device("cpu"), dtype)
        with instruction_set(level):
            got = run(deform_conv2d, case.options, given)
        assert_near(got, run(reference.deform_conv2d, case.options, as_double(given)), BOUNDS[dtype])


def test_calls_from_several_threads(device: torch.device) -> None:
    given = tensors(CASE, device, torch.float32)
    expected = run(deform_conv2d, CASE.options, given)

    def work() -> None:
        for _ in range(3):
            got = run(deform_conv2d, CASE.options, given)
            assert all(torch.equal(got[name], expected[name]) for name in got)

    in_threads(work)
