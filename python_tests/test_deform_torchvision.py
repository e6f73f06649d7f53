"""deform_conv2d and its reference have the values and gradients of torchvision.ops.deform_conv2d.

deform_golden.json holds what torchvision 0.27.1 (torch 2.12.1, CPU, float64) computes for GOLDEN, result and gradients
flattened. With torchvision's deform_conv2d it is json.dumps({name: {key: tensor.flatten().tolist() for key, tensor in
run(deform_conv2d, case.options, golden_tensors(name)).items()} for name, case in GOLDEN.items()}). All tensors are
small multiples of powers of two, so that every sum is exact in float32, in any order.

One departure, on purpose: at NaN and infinite offsets torchvision returns NaN, here samples and gradients are 0.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deform_cases import BOUNDS, CASES, Case, as_double, assert_near, run, tensors
from torch import Tensor

from wsss_ops import deform_conv2d, reference

BORDERS = "every border against every other"
GOLDEN = {
    # 14 x 15 output pixels, each at a point of its own around an image of 4 x 5.
    BORDERS: Case((1, 2, 4, 5), 1, (1, 1), padding=5, masked=True),
    "zero offsets": Case((1, 2, 3, 4), 2, (3, 3), padding=1),
    "groups": Case((2, 4, 5, 4), 2, (2, 2), (2, 1), (1, 2), (1, 2), groups=2, offset_groups=2, masked=True),
}


def pattern(shape: tuple[int, ...], step: int, values: list[float]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.tensor([values[i * step % len(values)] for i in range(count)], dtype=torch.float64).reshape(shape)


def points(size: int) -> Tensor:
    """Along one axis: beyond the image, on its borders, on pixels and between them."""
    last = size - 1.0
    inner = [0.0, 0.25, 0.5, 1.0, last - 1, last - 0.5]
    return torch.tensor([-2.5, -1.25, -1.0, -0.75, *inner, last, last + 0.5, size, size + 0.5, size + 2.0])


def golden_tensors(name: str) -> dict[str, Tensor]:
    whole = [float(value) for value in range(-3, 4)]
    given = {
        key: pattern(shape, step, [value / 2 for value in whole])
        for step, (key, shape) in enumerate(GOLDEN[name].shapes.items(), start=2)
    }
    given["input"] = pattern(GOLDEN[name].image, 5, [*whole, 2, -1, 1, 3])
    if name == BORDERS:
        y, x = points(4)[1:], points(5)
        given["offset"][0, 0] = (y - torch.arange(14) + 5)[:, None]
        given["offset"][0, 1] = x - torch.arange(15) + 5
    elif name == "zero offsets":
        given["offset"].zero_()
    return given


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(device: torch.device, name: str, channels_last: bool, dtype: torch.dtype) -> None:
    expected = json.loads(Path(__file__).with_name("deform_golden.json").read_text())[name]
    given = {key: tensor.to(device, dtype) for key, tensor in golden_tensors(name).items()}
    if channels_last:
        given["input"] = given["input"].contiguous(memory_format=torch.channels_last)
    for function in (deform_conv2d, reference.deform_conv2d):
        got = run(function, GOLDEN[name].options, given)
        assert {key: tensor.flatten().tolist() for key, tensor in got.items()} == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("between", [True, False], ids=["between pixels", "on pixels and borders"])
def test_live(device: torch.device, case: Case, between: bool) -> None:
    operators = pytest.importorskip("torchvision.ops", reason="needs torchvision; test_golden has results of it")
    given = tensors(case, device, torch.float64)
    if not between:
        given["offset"] = given["offset"].floor()
    expected = run(operators.deform_conv2d, case.options, as_double(given))
    for function in (deform_conv2d, reference.deform_conv2d):
        assert_near(run(function, case.options, given), expected, BOUNDS[torch.float64])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_zero_offsets_are_a_convolution(device: torch.device, case: Case) -> None:
    """Values and gradients of input, weight and bias; where the sampler of ESOL starts."""
    given = tensors(case, device, torch.float64)
    given["offset"].zero_()
    if case.masked:
        given["mask"].fill_(1)
    options = {**case.options, "groups": case.groups}
    plain = {key: tensor for key, tensor in given.items() if key not in ("offset", "mask")}
    expected = run(torch.nn.functional.conv2d, options, plain)
    for function in (deform_conv2d, reference.deform_conv2d):
        got = run(function, case.options, given)
        assert_near({key: got[key] for key in expected}, expected, BOUNDS[torch.float64])
