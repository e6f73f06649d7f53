"""deform_conv2d's kernel for CUDA that samples and multiplies in one, on tensor cores. (A CPU never has columns.)"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from deform_cases import BOUNDS, Case, as_double, assert_near, run, tensors
from harness import LAYOUTS, relative_error
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(device: torch.device, case: Case, dtype: torch.dtype, used: list[bool]) -> None:
    given = tensors(case, device, dtype)
    assert_near(output(given, case), output(as_double(given), case, reference.deform_conv2d), BOUNDS[dtype])
    assert used == [True] * uses_columns(device)


@pytest.fixture
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    yield
    matmul.allow_tf32 = before


def test_tf32_where_it_is_allowed(device: torch.device, used: list[bool], tf32: None) -> None:
    case = CASES["over 128 outputs"]
    given = tensors(case, device, torch.float32)
    got, expected = output(given, case), output(as_double(given), case, reference.deform_conv2d)
    assert_near(got, expected, 2.0**-11)
    assert (relative_error(got["output"], expected["output"]) > 2.0**-14) == uses_columns(device)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9")
def test_tf32_by_the_newer_setting() -> None:
    """In a process of its own: PyTorch takes the older setting no more once this one was used."""
    code = """if True:
        import torch
        from wsss_ops._columns import _tf32_is_allowed
        allowed = [_tf32_is_allowed()]
        for precision in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            allowed.append(_tf32_is_allowed())
        assert allowed == [False, True, False], allowed
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_long_sums_of_float32(device: torch.device, used: list[bool]) -> None:
    """Of one sign, where cutting off instead of rounding would show."""
    case = Case((1, 512, 8, 8), 16, (2, 4), biased=False)
    given = {name: tensor.abs() for name, tensor in tensors(case, device, torch.float32).items()}
    assert_near(output(given, case), output(as_double(given), case, reference.deform_conv2d), 2e-6)


def test_numbers_that_are_not_finite(device: torch.device, used: list[bool]) -> None:
    """What infinities and NaN reach is not finite, and nothing else is touched."""
    case = Case((1, 8, 6, 6), 4, (1, 1), biased=False)
    given = tensors(case, device, torch.float32)
    given["offset"].zero_()
    for pixel, value in enumerate([torch.nan, torch.inf, -torch.inf, 1e38]):
        given["input"][0, pixel, pixel, pixel] = value
    expected = output(as_double(given), case, reference.deform_conv2d)["output"]
    assert torch.equal(output(given, case)["output"].isfinite(), expected.float().isfinite())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: torch.device, layout: str, dtype: torch.dtype, used: list[bool]) -> None:
    """Of every tensor; slices whose pixels are not 16 bytes apart go by columns."""
    case = Case((2, 16, 5, 4), 6, (3, 3), padding=1, offset_groups=2, masked=True)
    given = tensors(case, device, dtype)
    for name in ("input", "offset", "mask", "weight"):
        given[name] = LAYOUTS[layout](given[name])
    given["bias"] = given["bias"].repeat_interleave(2)[::2]
    got = output(given, case)
    assert_near(got, output(as_double(given), case, reference.deform_conv2d), BOUNDS[dtype])
    leaves = {name: tensor for name, tensor in given.items() if name != "output"}
    assert got["output"].stride() == reference.deform_conv2d(**leaves, **case.options).stride()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case((1, 8, 5, 6), 3, (1, 1)), torch.bfloat16),
        (Case((1, 8, 5, 6), 258, (1, 1)), torch.bfloat16),
        (Case((1, 12, 5, 6), 4, (1, 1)), torch.bfloat16),
        (Case((1, 6, 5, 6), 4, (1, 1)), torch.float32),
        (Case((1, 16, 5, 6), 4, (1, 1), offset_groups=4), torch.bfloat16),
        (Case((1, 16, 5, 6), 4, (1, 1), groups=2), torch.bfloat16),
        (Case((1, 8, 5, 6), 4, (1, 1)), torch.float64),
    ],
    ids=["odd outputs", "258 outputs", "12 channels", "6 channels", "offset groups of 4", "groups", "float64"],
)
def test_other_cases_go_by_columns(device: torch.device, case: Case, dtype: torch.dtype, used: list[bool]) -> None:
    given = tensors(case, device, dtype)
    expected = output(as_double(given), case, reference.deform_conv2d)
    assert_near(output(given, case), expected, BOUNDS[dtype])
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
