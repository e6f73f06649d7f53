"""msdw_loss against the float64 reference on every backend, and what goes with it: normalised CAMs, coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    FLOATS,
    LAYOUTS,
    another_stream,
    in_threads,
    instruction_set,
    no_waiting,
    relative_error,
    threads,
    untouched,
)
from torch import Tensor

from wsss_ops import _backend, distribution_coefficients, msdw_loss, normalize_cam, reference

LOSS_BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 0.75 * 2**-10, torch.bfloat16: 0.75 * 2**-7}
# N, C, H, W and the size of cam_w_small.
SHAPES = {
    "one pixel": ((1, 2, 1, 1), (1, 1)),
    "background alone": ((2, 1, 4, 5), (2, 3)),
    "half": ((2, 5, 9, 7), (5, 4)),
    "21 classes": ((2, 21, 16, 18), (8, 9)),
    "81 classes": ((1, 81, 4, 3), (2, 2)),
    "many pixels": ((1, 3, 33, 40), (17, 20)),
    "same size": ((2, 3, 4, 5), (4, 5)),
    "larger": ((2, 3, 3, 4), (7, 9)),
    "from one pixel": ((1, 3, 1, 1), (3, 2)),
    "to one pixel": ((1, 3, 6, 5), (1, 1)),
    "several threads": ((4, 21, 25, 41), (17, 17)),  # smaller ones have one thread of a CPU
}


CAMS = ("cam_w", "cam_p", "cam_w_small")


def tensors(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, layout: str = "nchw"
) -> dict[str, Any]:
    shape, small = SHAPES[name]
    sizes = {"cam_w": shape, "cam_p": shape, "cam_w_small": (*shape[:2], *small)}
    cams = {cam: torch.rand(size, dtype=torch.float64).to(dtype).to(device) for cam, size in sizes.items()}
    cams["cam_p"][-1, 0, 0, :2] = 1  # equal maxima
    tags = torch.rand(shape[:2], device=device) < 0.6
    return {
        **{cam: LAYOUTS[layout](value) for cam, value in cams.items()},
        "tags": tags,
        "coefficients": torch.rand(shape[1] - 1, device=device),
    }


def run(function: Callable[..., Tensor], given: dict[str, Any]) -> list[Tensor]:
    """The loss, and the gradients of the three cams for a loss gradient of 0.7. No tensor may change."""
    cams = {name: given[name].detach().requires_grad_() for name in CAMS}
    before = [value.detach().clone() for value in given.values() if isinstance(value, Tensor)]
    loss = function(**{**given, **cams})
    gradients = torch.autograd.grad(loss * 0.7, list(cams.values()))
    assert all(map(torch.equal, before, (value for value in given.values() if isinstance(value, Tensor))))
    return [loss.detach(), *gradients]


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if name.startswith("cam") else value for name, value in given.items()}


def assert_matches(given: dict[str, Any]) -> None:
    dtype = given["cam_w"].dtype
    got, expected = run(msdw_loss, given), run(reference.msdw_loss, as_double(given))
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(got[0], expected[0]) <= LOSS_BOUNDS[dtype]
    assert [(one.shape, one.dtype) for one in got[1:]] == [(other.shape, dtype) for other in expected[1:]]
    # All at once: of a map of one pixel, which is its own maximum, cam_p's gradient is hardly more than rounding.
    gradients = (torch.cat([gradient.flatten() for gradient in tensors[1:]]) for tensors in (got, expected))
    assert relative_error(*gradients) <= BOUNDS[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(device: torch.device, shape: str) -> None:
    given = tensors(shape, device)
    assert_matches(given)
    assert_matches({**given, "prototype_weight": 0.0, "scale_weight": -2.0})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts_and_dtypes(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    given = tensors("half", device, dtype, layout)
    given["tags"] = given["tags"].repeat_interleave(2, 1)[:, ::2]
    assert_matches(given)
    gradient = run(msdw_loss, given)[1]
    if layout in ("nchw", "channels_last"):
        assert gradient.stride() == given["cam_w"].stride()


def test_mixed_dtypes(device: torch.device) -> None:
    """Gradients come back in each cam's own."""
    given = tensors("half", device)
    given["cam_p"], given["cam_w_small"] = given["cam_p"].bfloat16(), given["cam_w_small"].double()
    got, expected = run(msdw_loss, given), run(reference.msdw_loss, as_double(given))
    assert [tensor.dtype for tensor in got] == [torch.float64, torch.float32, torch.bfloat16, torch.float64]
    assert all(relative_error(one, other) < 0.01 for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gradcheck(device: torch.device, layout: str) -> None:
    """Away from equal maxima and equal cams, where the derivative jumps."""
    given = tensors("half", device, torch.float64, layout)
    given["cam_p"][-1, 0, 0, :2] = torch.tensor([0.2, 0.3], dtype=torch.float64)
    cams = [given.pop(name).requires_grad_() for name in CAMS]
    assert torch.autograd.gradcheck(lambda *cams: msdw_loss(*cams, **given), cams)


def test_equal_maxima_share_the_gradient(device: torch.device) -> None:
    cam_p = torch.tensor([0.5, 1.0, 1.0, 0.0], device=device).view(1, 1, 2, 2).requires_grad_()
    cam_w = torch.full((1, 1, 2, 2), 2.0, device=device)
    msdw_loss(cam_w, cam_p, cam_w, torch.ones(1, 1, device=device), torch.ones(0, device=device)).backward()
    gradient = cam_p.grad.flatten()
    assert gradient[1] == gradient[2] != gradient[0]
    expected = cam_p.detach().clone().requires_grad_()
    (1.6 * (cam_w - expected / (expected.amax() + 1e-5)).abs().mean()).backward()
    assert relative_error(gradient, expected.grad.flatten()) < 1e-6


def test_opcheck(device: torch.device) -> None:
    given = tensors("half", device)
    cams = [given[name].requires_grad_() for name in CAMS]
    ops = torch.ops.wsss_ops
    arguments = (*cams, given["tags"], given["coefficients"], 1.6, 0.8)
    torch.library.opcheck(ops.msdw_loss.default, arguments)
    cams = [cam.detach() for cam in cams]
    loss, maxima = ops.msdw_loss(*cams, *arguments[3:])
    torch.library.opcheck(ops.msdw_loss_backward.default, (loss, *cams, *arguments[3:5], maxima, 1.6, 0.8))


def step(cam_w: Tensor, cam_p: Tensor, cam_w_small: Tensor, tags: Tensor, coefficients: Tensor) -> Tensor:
    return msdw_loss(normalize_cam(cam_w * 2), cam_p + 1, cam_w_small, tags, coefficients) * 3


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_compile(device: torch.device, layout: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for shape in ("half", "21 classes"):  # the second makes sizes dynamic
        given = tensors(shape, device, layout=layout)
        got, expected = run(compiled, given), run(step, given)
        assert all(relative_error(one, other) < 1e-5 for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_empty(device: torch.device, shape: tuple[int, ...]) -> None:
    cam = torch.ones(shape, device=device)
    given = {"tags": torch.ones(shape[:2], device=device), "coefficients": torch.ones(2, device=device)}
    small = torch.ones(shape[0], 3, 2, 2, device=device)
    loss, *gradients = run(msdw_loss, {"cam_w": cam, "cam_p": cam.clone(), "cam_w_small": small, **given})
    assert loss == 0
    assert not gradients[2].any()
    assert normalize_cam(cam).shape == shape


def test_nan_stays_with_the_loss(device: torch.device) -> None:
    """NaN pixels make the loss NaN; no access goes astray."""
    for name in CAMS:
        given = tensors("half", device)
        given["tags"][:] = True
        given[name][0, 1, 2, 2] = torch.nan
        assert msdw_loss(**given).isnan()
        gradients = run_without_comparison(given)
        assert all(gradient[1].isfinite().all() for gradient in gradients)  # of the other image


def run_without_comparison(given: dict[str, Any]) -> tuple[Tensor, ...]:
    cams = [given[name].requires_grad_() for name in CAMS]
    return torch.autograd.grad(msdw_loss(**given), cams)


def test_second_derivative_is_refused(device: torch.device) -> None:
    given = tensors("half", device)
    cam_w = given["cam_w"].requires_grad_()
    (gradient,) = torch.autograd.grad(msdw_loss(**given), cam_w, create_graph=True)
    with pytest.raises(RuntimeError, match="msdw_loss has no second derivative"):
        gradient.sum().backward()


def test_repeats_exactly(device: torch.device) -> None:
    given = tensors("many pixels", device)
    first = run(msdw_loss, given)
    assert all(map(torch.equal, run(msdw_loss, given), first))


@pytest.mark.parametrize("level", _backend.cpu_module().levels())
def test_instruction_sets_and_threads(level: str) -> None:
    """Every instruction set is right, and none depends on the number of threads.

    Half precision has its pitfalls in so many pixels: the weights keep gradients above float16's subnormals, and at
    this size resized pixels, which may equal cam_w_small's, are exact.
    """
    weights = {"prototype_weight": 160.0, "scale_weight": 80.0}
    for dtype, layout in product(FLOATS, ("nchw", "channels_last")):
        given = {**tensors("several threads", torch.device("cpu"), dtype, layout), **weights}
        with instruction_set(level):
            with threads(1):
                alone = run(msdw_loss, given)
            with threads(3):
                assert_matches(given)
                assert all(map(torch.equal, run(msdw_loss, given), alone))


@pytest.mark.parametrize("cam", CAMS)
def test_more_than_2_31_elements_apart(device: torch.device, cam: str) -> None:
    """Images, classes, rows and pixels whose offsets do not fit 32 bits, in memory that is reserved but hardly used."""
    storage = untouched(2**32 + 2**10, torch.bfloat16, device)
    given = tensors("same size", device, torch.bfloat16)
    for stride in [(2**32 - 70, 20, 5, 1), (64, 2**31 + 16, 8, 1), (24, 8, 2**30 + 3, 1), (60, 20, 5, 2**30 + 3)]:
        apart = storage.as_strided(given[cam].shape, stride)
        apart.copy_(given[cam])
        assert_matches({**given, cam: apart})


def test_negated_views(device: torch.device) -> None:
    """DLPack does not carry PyTorch's lazy negation: it must be resolved before."""
    given = tensors("half", device)
    negated = {name: torch.complex(given[name], -given[name]).conj().imag for name in CAMS}
    assert all(cam.is_neg() for cam in negated.values())
    assert torch.equal(msdw_loss(**{**given, **negated}), msdw_loss(**given))


def test_calls_from_several_threads(device: torch.device) -> None:
    given = tensors("21 classes", device)
    expected = run(msdw_loss, given)

    def work() -> None:
        for _ in range(5):
            assert all(map(torch.equal, run(msdw_loss, given), expected))

    in_threads(work)


def test_current_stream_and_graphs() -> None:
    """Launches go to PyTorch's current stream, and can be captured; nothing waits for the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: streams and graphs exist nowhere else")
    given = tensors("21 classes", torch.device("cuda"))
    expected = run(msdw_loss, given)
    values = given["cam_w"].clone()
    with another_stream():
        given["cam_w"].zero_()
        torch.cuda._sleep(50_000_000)
        given["cam_w"].copy_(values)
        cams = [given[name].requires_grad_() for name in CAMS]
        with no_waiting():
            gradients = torch.autograd.grad(msdw_loss(**given) * 0.7, cams)
    assert all(map(torch.equal, gradients, expected[1:]))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(msdw_loss(**given) * 0.7, cams)
    captured[0].zero_()
    graph.replay()
    assert all(map(torch.equal, captured, expected[1:]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_normalize_cam(dtype: torch.dtype) -> None:
    """Each map by its own maximum, after relu; the small one shows the 1e-5."""
    small = 2**-16
    cam = torch.tensor(
        [[[[2, -3], [0.5, 4]], [[-1, -2], [0, -4]]], [[[0.25, 1], [-1, 0]], [[small, 0], [0, small / 2]]]]
    )
    positive = [[[[2, 0], [0.5, 4]], [[0, 0], [0, 0]]], [[[0.25, 1], [0, 0]], [[small, 0], [0, small / 2]]]]
    maxima = [[[[4]], [[0]]], [[[1]], [[small]]]]
    expected = torch.tensor(positive, dtype=torch.float64) / (torch.tensor(maxima, dtype=torch.float64) + 1e-5)
    got = normalize_cam(cam.to(dtype))
    assert got.dtype == dtype
    assert relative_error(got, expected) <= BOUNDS[dtype]
    assert torch.autograd.gradcheck(normalize_cam, torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True))


# How many images of VOC 2012's trainaug have each class, commonest (person) first, and the sums of distances to the
# other counts, as both stand in the authors' published code.
VOC_COUNTS = [4155, 1228, 1188, 1150, 1005, 714, 705, 649, 613, 590, 567, 522, 504, 503, 492, 468, 445, 393, 300, 267]
VOC_SUMS = [66642, 13956, 13316, 12784, 11044, 8134, 8062, 7726, 7582, 7536, 7536, 7626, 7698, 7704, 7792, 8032, 8308]
VOC_SUMS += [9036, 10524, 11118]
VOC_RESAMPLED = 660 * 4 * 3 / 20  # there too: 4 images a step, shared by 20 classes


def test_coefficients_of_voc() -> None:
    apart = torch.tensor(VOC_SUMS) / (torch.tensor(VOC_COUNTS) + VOC_RESAMPLED)
    got = distribution_coefficients(VOC_COUNTS, VOC_RESAMPLED)
    assert got.dtype == torch.float32
    assert torch.allclose(got, apart / apart.mean(), rtol=1e-6)
    assert torch.allclose(got, reference.distribution_coefficients(VOC_COUNTS, VOC_RESAMPLED), rtol=1e-6)
    assert torch.equal(distribution_coefficients(torch.tensor(VOC_COUNTS), VOC_RESAMPLED), got)


def test_coefficients_of_equal_counts() -> None:
    assert distribution_coefficients([7, 7, 7], 0).tolist() == [1, 1, 1]
    assert reference.distribution_coefficients([7, 7, 7], 0).tolist() == [1, 1, 1]


def test_coefficients_are_found_without_reading_values() -> None:
    """As a compiled graph must, and as counts on a GPU are."""
    find = torch.compile(distribution_coefficients, backend="eager", fullgraph=True)
    counts = torch.tensor(VOC_COUNTS)
    assert torch.equal(find(counts, VOC_RESAMPLED), distribution_coefficients(counts, VOC_RESAMPLED))
    assert distribution_coefficients(counts.to("meta"), 1.0).shape == counts.shape


def test_coefficients_of_numpy_scalars() -> None:
    counts = [np.int64(3), np.float32(4), 5]
    assert torch.equal(distribution_coefficients(counts, np.float32(1)), distribution_coefficients([3, 4, 5], 1))


Bad = tuple[Callable[[Tensor, Tensor, Tensor], object], type[Exception], str]
BAD: dict[str, Bad] = {
    "cam_w": (lambda c, t, k: msdw_loss(c[0], c, c, t, k), ValueError, r"cam_w must have the 4 dimensions"),
    "cam_w dtype": (lambda c, t, k: msdw_loss(c.int(), c, c, t, k), TypeError, r"cam_w must be one of .*got int32"),
    "cam_p": (lambda c, t, k: msdw_loss(c, c[..., :2], c, t, k), ValueError, r"cam_p must have shape \[2, 3, 4, 5\]"),
    "cam_p device": (lambda c, t, k: msdw_loss(c, c.to("meta"), c, t, k), ValueError, r"cam_p must be on cam_w's"),
    "cam_w_small": (
        lambda c, t, k: msdw_loss(c, c, c[:, :2, :2], t, k),
        ValueError,
        r"cam_w_small must have shape \[2, 3, 2, 5\], got \[2, 2, 2, 5\]",
    ),
    "no small pixels": (
        lambda c, t, k: msdw_loss(c, c, c[..., :0], t, k),
        ValueError,
        r"cam_w_small must have pixels, got shape \[2, 3, 4, 0\]",
    ),
    "no classes": (
        lambda c, t, k: msdw_loss(c[:, :0], c[:, :0], c[:, :0], t[:, :0], k),
        ValueError,
        r"cam_w must have at least 1 class",
    ),
    "tags": (lambda c, t, k: msdw_loss(c, c, c, t[:1], k), ValueError, r"tags must have shape \[2, 3\], got \[1, 3\]"),
    "coefficients": (
        lambda c, t, k: msdw_loss(c, c, c, t, torch.ones(3)),
        ValueError,
        r"coefficients must have shape \[2\], got \[3\]",
    ),
    "weight": (
        lambda c, t, k: msdw_loss(c, c, c, t, k, scale_weight=float("nan")),
        ValueError,
        r"scale_weight must be finite",
    ),
    "cam": (lambda c, t, k: normalize_cam(c[0]), ValueError, r"cam must have the 4 dimensions"),
    "counts": (
        lambda c, t, k: distribution_coefficients([], 1),
        ValueError,
        r"at least one number, all finite and at least 0",
    ),
    "counts of NumPy": (
        lambda c, t, k: distribution_coefficients(np.ones(2), 1),
        TypeError,
        r"class_counts must be a torch.Tensor or a sequence, got ndarray",
    ),
    "negative counts": (lambda c, t, k: distribution_coefficients([1, -2], 1), ValueError, r"got \[1.0, -2.0\]"),
    "infinite counts": (
        lambda c, t, k: distribution_coefficients([1, math.inf], 1),
        ValueError,
        r"must be finite as a float, got inf",
    ),
    "text counts": (
        lambda c, t, k: distribution_coefficients(["a"], 1),
        TypeError,
        r"class_counts must be a number, got 'a'",
    ),
    "infinite tensor": (
        lambda c, t, k: distribution_coefficients(torch.tensor([math.inf]), 1),
        ValueError,
        r"all finite",
    ),
    "zero": (lambda c, t, k: distribution_coefficients([1, 0], 0), ValueError, r"above 0 where nothing is resampled"),
    "resampled": (lambda c, t, k: distribution_coefficients([1, 2], -1), ValueError, r"resampled_per_class must be at"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(device: torch.device, case: str) -> None:
    function, error, message = BAD[case]
    cam = torch.ones(2, 3, 4, 5, device=device)
    with pytest.raises(error, match=message):
        function(cam, torch.ones(2, 3, device=device), torch.ones(2, device=device))
