"""deform_conv2d's kernel for CUDA that samples and multiplies in one, in 16-bit types. (A CPU never has columns.)"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from deform_cases import BOUNDS, Case, as_double, assert_near, run, tensors
from harness import LAYOUTS
from torch import Tensor

from wsss_ops import _backend, deform_conv2d, reference
from wsss_ops._columns import Columns

CASES = {
    "one channel group, two outputs": Case((1, 8, 5, 6), 2, (1, 1)),
    "less than a step of channels": Case((2, 24, 5, 6), 16, (3, 3), padding=1, stride=2, masked=True),
    "steps with a rest": Case((1, 136, 4, 5), 18, (1, 2), padding=(0, 1)),
    "many taps": Case((1, 16, 4, 5), 8, (5, 7), padding=2, biased=False),
    "offset groups": Case((2, 64, 6, 5), 34, (2, 3), padding=1, dilation=2, offset_groups=4, masked=True),
    "offset groups of several steps": Case((1, 160, 4, 4), 10, (2, 1), offset_groups=2, masked=True),
    "tiles over images' ends": Case((3, 8, 9, 10), 128, (2, 2), padding=1),
    "over 128 outputs": Case((1, 72, 5, 5), 130, (3, 2), padding=1, masked=True),
    "256 outputs": Case((1, 64, 3, 4), 256, (2, 2), biased=False),
}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call could use the kernel; small ones do then, too."""
    answers = []
    can: Callable[[Columns], bool] = Columns._can_multiply_samples

    def ask(columns: Columns) -> bool:
        answers.append(can(columns))
        return answers[-1]

    monkeypatch.setattr(Columns, "_can_multiply_samples", ask)
    monkeypatch.setattr(Columns, "_fills_device", lambda columns: True)
    return answers


def uses_columns(device: torch.device) -> bool:
    return not _backend.offers(device, "deform_convolve")


def output(given: dict[str, Tensor], case: Case, function: Callable[..., Tensor] = deform_conv2d) -> dict[str, Tensor]:
    return run(function, case.options, given, [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(device: torch.device, case: Case, dtype: torch.dtype, used: list[bool]) -> None:
    given = tensors(case, device, dtype)
    assert_near(output(given, case), output(as_double(given), case, reference.deform_conv2d), BOUNDS[dtype])
    assert used == [True] * uses_columns(device)


@pytest.mark.parametrize(
    ("capability", "shared", "outputs", "fits"),
    [(9, 227, 256, True), (8, 99, 128, True), (8, 99, 130, False), (7, 227, 16, False)],
)
def test_needs_a_gpu_with_enough_shared_memory(
    emulated_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    shared: int,
    outputs: int,
    fits: bool,
) -> None:
    facts = SimpleNamespace(major=capability, shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(_backend, "_cuda", emulated_module)
    input, weight = torch.zeros(1, 8, 2, 2).bfloat16(), torch.zeros(outputs, 8, 1, 1).bfloat16()
    input = input.contiguous(memory_format=torch.channels_last)
    columns = Columns(input, torch.zeros(1, 2, 2, 2), weight, None, [1, 1, 0, 0, 1, 1, 1, 1])
    columns.device = torch.device("cuda")
    assert columns._can_multiply_samples() == fits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, layout: str, used: list[bool]) -> None:
    """Of every tensor; slices whose pixels are not 16 bytes apart go by columns."""
    case = Case((2, 16, 5, 4), 6, (3, 3), padding=1, offset_groups=2, masked=True)
    given = tensors(case, device, torch.bfloat16)
    for name in ("input", "offset", "mask", "weight"):
        given[name] = LAYOUTS[layout](given[name])
    given["bias"] = given["bias"].repeat_interleave(2)[::2]
    got = output(given, case)
    assert_near(got, output(as_double(given), case, reference.deform_conv2d), BOUNDS[torch.bfloat16])
    leaves = {name: tensor for name, tensor in given.items() if name != "output"}
    assert got["output"].stride() == reference.deform_conv2d(**leaves, **case.options).stride()


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 8, 5, 6), 3, (1, 1)),
        Case((1, 8, 5, 6), 258, (1, 1)),
        Case((1, 12, 5, 6), 4, (1, 1)),
        Case((1, 16, 5, 6), 4, (1, 1), offset_groups=4),
        Case((1, 16, 5, 6), 4, (1, 1), groups=2),
    ],
    ids=["odd outputs", "258 outputs", "12 channels", "offset groups of 4", "groups"],
)
def test_other_cases_go_by_columns(device: torch.device, case: Case, used: list[bool]) -> None:
    given = tensors(case, device, torch.bfloat16)
    expected = output(as_double(given), case, reference.deform_conv2d)
    assert_near(output(given, case), expected, BOUNDS[torch.bfloat16])
    assert used == [False] * uses_columns(device)


def test_offsets_that_are_not_numbers(device: torch.device, used: list[bool]) -> None:
    """Such samples are zero, and so are those far away."""
    case = Case((1, 8, 4, 4), 2, (1, 1), biased=False)
    given = tensors(case, device, torch.float16)
    given["offset"] = torch.zeros_like(given["offset"])
    expected = output(given, case)["output"]
    for pixel, value in enumerate([torch.nan, torch.inf, -torch.inf, 60000.0]):
        given["offset"][0, pixel % 2, pixel, pixel] = value
        expected[0, :, pixel, pixel] = 0
    assert torch.equal(output(given, case)["output"], expected)


def test_nothing_to_sample(device: torch.device, used: list[bool]) -> None:
    for image in ((0, 8, 4, 4), (1, 8, 0, 4)):
        case = Case(image, 2, (2, 2), padding=1)
        given = tensors(case, device, torch.bfloat16)
        assert torch.equal(output(given, case)["output"], given["bias"][:, None, None].expand(case.shapes["output"]))


def test_half_precision_rounds_only_samples_and_result(device: torch.device, used: list[bool]) -> None:
    """A sum of 4096 equal samples, which in half precision would stop growing at 2048."""
    input, weight = torch.ones(1, 512, 3, 3, device=device).half(), torch.ones(2, 512, 2, 4, device=device).half()
    offset = torch.full((1, 16, 1, 1), 0.25, device=device)
    sample = deform_conv2d(input, offset, weight, padding=(0, 1), stride=(4, 4))
    wide = reference.deform_conv2d(input.double(), offset.double(), weight.double(), padding=(0, 1), stride=(4, 4))
    torch.testing.assert_close(sample.double(), wide, rtol=1e-3, atol=0)
