"""deform_conv2d against the float64 reference on every backend: cases, layouts, dtypes, and each gradient by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from deform_cases import BOUNDS, CASES, NAMES, Case, as_double, assert_near, run, tensors
from harness import FLOATS, LAYOUTS, workspace

from wsss_ops import _backend, deform_conv2d, reference
from wsss_ops._columns import Columns

FULL = Case((2, 6, 6, 5), 4, (3, 2), padding=1, groups=2, offset_groups=2, masked=True)


@pytest.fixture(params=[True, False], ids=["deterministic", "default"])
def deterministic(request: pytest.FixtureRequest) -> None:
    """Either way to the input's gradient; what other tests leave out, because they ask for determinism."""
    torch.use_deterministic_algorithms(request.param, warn_only=True)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("deterministic")
def test_matches_reference(device: torch.device, case: Case, layout: str) -> None:
    given = tensors(case, device, torch.float32)
    given["input"] = LAYOUTS[layout](given["input"])
    got = run(deform_conv2d, case.options, given)
    assert_near(got, run(reference.deform_conv2d, case.options, as_double(given)), BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["2x4", "groups across offset groups", "64 channels", "160 channels"])
@pytest.mark.usefixtures("deterministic")
def test_dtypes(device: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given = tensors(case, device, dtype)
    got = run(deform_conv2d, case.options, given)
    assert all(tensor.dtype == dtype for tensor in got.values())
    assert_near(got, run(reference.deform_conv2d, case.options, as_double(given)), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_offsets_and_mask_wider_than_the_input(device: torch.device, dtype: torch.dtype) -> None:
    """As mixed precision has them. Offsets a thousandth apart, which half precision cannot tell from each other."""
    case = Case((1, 8, 16, 16), 4, (1, 1), masked=True)
    dtypes = dict.fromkeys(case.shapes, dtype) | {"offset": torch.float32, "mask": torch.float32}
    given = tensors(case, device, dtypes)
    given["offset"] = torch.linspace(2.3, 2.5, given["offset"].numel(), device=device).reshape(given["offset"].shape)
    got = run(deform_conv2d, case.options, given)
    assert {name: tensor.dtype for name, tensor in got.items()} == dtypes
    assert_near(got, run(reference.deform_conv2d, case.options, as_double(given)), BOUNDS[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("deterministic")
def test_layouts(device: torch.device, layout: str) -> None:
    """Every tensor in every layout; the next tensor has the next layout, so that they differ within a call."""
    given = tensors(FULL, device, torch.float32)
    turn = list(LAYOUTS).index(layout)
    for step, name in enumerate(["input", "offset", "mask", "weight", "output"]):
        given[name] = list(LAYOUTS.values())[(turn + step) % len(LAYOUTS)](given[name])
    given["bias"] = given["bias"].repeat_interleave(2)[::2]
    got = run(deform_conv2d, FULL.options, given)
    assert_near(got, run(reference.deform_conv2d, FULL.options, as_double(given)), BOUNDS[torch.float32])
    leaves = {name: tensor for name, tensor in given.items() if name != "output"}
    assert got["output"].stride() == reference.deform_conv2d(**leaves, **FULL.options).stride()


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced_channels_last"])
def test_keeps_memory_format(device: torch.device, layout: str) -> None:
    kept = torch.contiguous_format if layout == "nchw" else torch.channels_last
    given = tensors(FULL, device, torch.float32)
    del given["output"]
    given["input"] = LAYOUTS[layout](given["input"])
    assert deform_conv2d(**given, **FULL.options).is_contiguous(memory_format=kept)
    assert reference.deform_conv2d(**given, **FULL.options).is_contiguous(memory_format=kept)


class Recorder:
    """A backend's module that tells what its operations were called for."""

    def __init__(self, module: object, calls: list[str]) -> None:
        self.module = module
        self.calls = calls
        # Of deform_differentiate's arguments, the first gradient that it fills; `where` follows the last one.
        self.first_target = 7 if hasattr(module, "deform_convolve") else 6

    def __getattr__(self, name: str) -> Callable[..., None]:
        operation = getattr(self.module, name)

        def recorded(*arguments: object) -> None:
            if name == "deform_differentiate":
                kinds = zip(("offset", "mask", "input"), arguments[self.first_target : -1], strict=False)
                self.calls.extend(kind for kind, target in kinds if target is not None)
            else:
                self.calls.append(name)
            operation(*arguments)

        return recorded


@pytest.fixture
def calls(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels and matrix products, as they are called; of deform_differentiate the gradients that it computes."""
    called: list[str] = []
    on_cpu = device.type == "cpu"
    recorder = Recorder(_backend.cpu_module() if on_cpu else _backend.cuda_module(), called)
    monkeypatch.setattr(_backend, "_on_cpu" if on_cpu else "_cuda", recorder)
    multiply = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *operands, **out: called.append("product") or multiply(*operands, **out))
    return called


NEEDED_ON_CUDA = {
    "output": ["deform_sample", "product"],
    "input": ["product", "deform_scatter"],
    "offset": ["product", "offset"],
    "mask": ["product", "mask"],
    "weight": ["deform_sample", "product"],
    "bias": [],
}
NEEDED_ON_CPU = {  # kernels that multiply by themselves
    "output": ["deform_convolve"],
    "input": ["input"],
    "offset": ["offset"],
    "mask": ["mask"],
    "weight": ["deform_differentiate_weight"],
    "bias": [],
}


@pytest.mark.parametrize("wanted", NAMES)
def test_computes_only_what_is_asked_for(device: torch.device, calls: list[str], wanted: str) -> None:
    torch.use_deterministic_algorithms(False)
    run(deform_conv2d, FULL.options, tensors(FULL, device, torch.float32), [wanted])
    needed = NEEDED_ON_CPU if _backend.offers(device, "deform_convolve") else NEEDED_ON_CUDA
    assert calls == needed["output"] + needed[wanted]


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.usefixtures("deterministic")
def test_each_gradient_alone(device: torch.device, wanted: str) -> None:
    given = tensors(FULL, device, torch.float32)
    got = run(deform_conv2d, FULL.options, given, [wanted])
    assert_near(got, run(reference.deform_conv2d, FULL.options, as_double(given), [wanted]), BOUNDS[torch.float32])


@pytest.mark.parametrize("image", [(0, 6, 6, 5), (2, 6, 0, 5), (2, 6, 6, 0)])
def test_nothing_to_sample(device: torch.device, image: tuple[int, int, int, int]) -> None:
    """No images, or images of no pixels: within padding the result is the bias."""
    case = Case(image, 4, (3, 2), padding=2, groups=2, masked=True)
    given = tensors(case, device, torch.float32)
    for function in (deform_conv2d, reference.deform_conv2d):
        got = run(function, case.options, given)
        assert {name: tensor.shape for name, tensor in got.items()} == case.shapes
        assert torch.equal(got.pop("output"), given["bias"][:, None, None].expand(case.shapes["output"]))
        assert_near({"bias": got.pop("bias")}, {"bias": given["output"].sum((0, 2, 3))}, BOUNDS[torch.float32])
        assert not any(gradient.any() for gradient in got.values())


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("nbytes", [1, 500, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("deterministic")
def test_small_workspaces(
    device: torch.device, dtype: torch.dtype, nbytes: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns in many chunks, over images' ends, give what one chunk gives, within the rounding of one sum; for the
    weight's gradient chunks of taps, where those occupy the GPU, or of pixels."""
    monkeypatch.setattr(Columns, "_processors", lambda columns: processors)
    case = Case((3, 4, 4, 3), 4, (3, 3), padding=1, groups=2, offset_groups=2, masked=True)
    given = tensors(case, device, dtype)
    with workspace(nbytes):
        got = run(deform_conv2d, case.options, given)
    assert_near(got, run(deform_conv2d, case.options, given), BOUNDS[dtype])
    assert_near(got, run(reference.deform_conv2d, case.options, as_double(given)), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_chunks_are_wide(device: torch.device, dtype: torch.dtype) -> None:
    """256 chunks add to the weight's gradient: in half precision such a sum would stop growing."""
    case = Case((1, 2, 16, 16), 2, (1, 1), biased=False)
    given = {name: tensor.abs() for name, tensor in tensors(case, device, dtype).items()}
    given["offset"] = torch.full_like(given["offset"], 0.25)
    with workspace(1):
        got = run(deform_conv2d, case.options, given, ["weight"])
    assert_near(got, run(reference.deform_conv2d, case.options, as_double(given), ["weight"]), BOUNDS[dtype])
