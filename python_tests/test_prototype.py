"""prototype_cam and class_prototypes against the float64 reference on every backend: sizes, layouts, dtypes, seeds."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from harness import FLOATS, LAYOUTS, instruction_set, relative_error, threads
from prototype_cases import BOUNDS, SIZES, WAYS, Case, as_double, assert_matches, levels_of, run, tensors
from torch import Tensor

from wsss_ops import _backend, class_prototypes, prototype_cam, reference


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("size", SIZES)
def test_matches_reference(device: torch.device, size: str, layout: str) -> None:
    assert_matches(prototype_cam, tensors(SIZES[size], device, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_layouts(device: torch.device, case: Case, layout: str) -> None:
    """Of the features; the other tensors have odd strides too."""
    given = tensors(case, device, layout=layout)
    given["cam"] = LAYOUTS["sliced_channels_last"](given["cam"])
    given["tags"] = given["tags"].repeat_interleave(2, 1)[:, ::2]
    if given["valid"] is not None:
        given["valid"] = given["valid"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_matches(prototype_cam, given)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_dtypes(device: torch.device, case: Case, dtype: torch.dtype, layout: str) -> None:
    assert_matches(prototype_cam, tensors(case, device, dtype, layout))


def test_levels_of_several_layouts(device: torch.device) -> None:
    given = tensors(WAYS["levels"], device)
    for layouts in [("channels_last", "nchw", "sliced"), ("transposed", "channels_last", "stepped")]:
        levels = [LAYOUTS[layout](level) for layout, level in zip(layouts, given["features"], strict=True)]
        assert_matches(prototype_cam, {**given, "features": levels})


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_expanded_gradient(device: torch.device, case: Case) -> None:
    """Of a sum: one number with strides of 0."""
    given = tensors(case, device)
    result = prototype_cam(**given)
    one = torch.ones((), device=device)
    for got, expected in zip(
        run(prototype_cam, given, one.expand(result.shape)), run(prototype_cam, given), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced_channels_last"])
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_gradients_keep_memory_format(device: torch.device, case: Case, layout: str) -> None:
    kept = torch.contiguous_format if layout == "nchw" else torch.channels_last
    result, *gradients = run(prototype_cam, tensors(case, device, layout=layout))
    assert result.is_contiguous()
    assert all(gradient.is_contiguous(memory_format=kept) for gradient in gradients)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_of_the_cam(device: torch.device, dtype: torch.dtype) -> None:
    """It need not have that of the features; close scores are told apart as it has them."""
    given = tensors(WAYS["one tensor"], device)
    given["cam"] = (1 + 2**-12 * given["cam"]).to(dtype)
    assert_matches(prototype_cam, given)


def test_ties_go_to_the_first_class(device: torch.device) -> None:
    features = torch.randn(1, 4, 3, 5, device=device)
    cam = torch.ones(1, 4, 3, 5, device=device)
    for background_scale, winner in [(0.3, 1), (1.0, 0), (-1.0, 1)]:
        result = prototype_cam(features, cam, torch.ones(1, 4, device=device), background_scale=background_scale)
        assert result[0].flatten(1).any(1).nonzero().flatten().tolist() == [winner]


def test_untagged_and_invalid_pixels_belong_to_no_class(device: torch.device) -> None:
    features = torch.rand(1, 3, 2, 4, device=device)
    cam = torch.zeros(1, 3, 2, 4, device=device)
    cam[0, 1, 0], cam[0, 2, 1] = 1, 1
    tags = torch.tensor([[1, 1, 0]], device=device)
    valid = torch.ones(1, 2, 4, dtype=torch.bool, device=device)
    valid[0, 0, 1:] = False
    result = prototype_cam(features, cam, tags, valid=valid)
    assert not result[0, [0, 2]].any()
    expected = torch.nn.functional.cosine_similarity(features, features[:, :, :1, :1], dim=1)
    assert relative_error(result[:, 1], expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16])
def test_tags_are_any_numbers_but_zero(device: torch.device, dtype: torch.dtype) -> None:
    given = tensors(WAYS["one tensor"], device)
    numbers = given["tags"].to(dtype) * 3
    if dtype.is_floating_point:
        numbers = torch.where(given["tags"], torch.tensor(math.nan, dtype=dtype, device=device), 0)
    assert torch.equal(prototype_cam(**{**given, "tags": numbers}), prototype_cam(**given))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_nan_features(device: torch.device, case: Case, layout: str) -> None:
    """At a pixel of no class: NaN in its own results alone, of the classes that have pixels."""
    case = Case(case.levels, case.classes, case.cam_size, single=case.single, valid=True)
    given = tensors(case, device, layout=layout)
    given["valid"][0, -1, -1] = False
    plain = prototype_cam(**given)
    levels = levels_of(given)
    levels[0][0, 1, -1, -1] = math.nan
    result = prototype_cam(**given)
    expected = plain.clone()
    expected[0, :, -1, -1] = torch.where(plain[0].flatten(1).any(1), math.nan, 0)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~result.isnan()], plain[~result.isnan()])


def test_nan_features_of_a_class(device: torch.device) -> None:
    """Through the prototype NaN reaches the class, and no other."""
    given = tensors(WAYS["one tensor"], device)
    given["features"][0, 0, 2, 2] = math.nan
    assert_matches_nan(given)
    given["cam"][0, :, 3] = math.nan
    given["cam"][1, 2] = math.nan
    assert_matches_nan(given)


def assert_matches_nan(given: dict[str, Tensor]) -> None:
    got, expected = prototype_cam(**given), reference.prototype_cam(**as_double(given))
    assert torch.equal(got.isnan(), expected.isnan())
    assert relative_error(got.nan_to_num(), expected.nan_to_num()) < 1e-6


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_tiny_and_zero_features(device: torch.device, layout: str) -> None:
    """Lengths below the eps of the cosine, and pixels without features as behind a ReLU: as PyTorch has it."""
    given = tensors(Case(((6, 5, 7),), 3, (5, 7)), device, torch.float64, layout)
    given["features"][0] *= 1e-9
    given["features"][1, :, 1:3] = 0
    assert_matches(prototype_cam, given)
    given["features"].zero_()
    result, gradient = run(prototype_cam, given)
    assert not result.any()
    assert not gradient.any()


def test_zero_levels(device: torch.device) -> None:
    given = tensors(WAYS["levels"], device, torch.float64)
    given["features"][0][:, :, 4:] = 0
    given["features"][1].zero_()
    assert_matches(prototype_cam, given)


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_repeats_exactly(device: torch.device, case: Case) -> None:
    given = tensors(case, device)
    first = run(prototype_cam, given)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(run(prototype_cam, given), first, strict=True))


@pytest.mark.parametrize("level", _backend.cpu_module().levels())
def test_instruction_sets_and_threads(level: str) -> None:
    """Every instruction set is right, and none depends on the number of threads."""
    cases = [Case(((150, 12, 13),), 6, (12, 13)), Case(((40, 32, 36), (100, 16, 18)), 4, (16, 18), single=False)]
    for case, dtype, layout in product(cases, FLOATS, ("nchw", "channels_last")):
        given = tensors(case, torch.device("cpu"), dtype, layout)
        with instruction_set(level):
            with threads(1):
                alone = run(prototype_cam, given)
            with threads(3):
                assert_matches(prototype_cam, given)
                assert all(map(torch.equal, run(prototype_cam, given), alone))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_class_prototypes(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    """Numbers outside [0, C) count as -1."""
    features = LAYOUTS[layout]((torch.randn(3, 17, 6, 5, dtype=torch.float64) + 1).to(dtype).to(device))
    assignment = torch.randint(-2, 6, (3, 6, 5), device=device)
    assignment[0, 0, :2] = torch.tensor([2**40, -(2**40)], device=device)
    assignment[1] = 1
    assignment = LAYOUTS[layout](assignment[:, None])[:, 0]
    exact = features.double().contiguous().requires_grad_()
    expected = reference.class_prototypes(exact, torch.where(assignment < 5, assignment, -1), 5)
    source = features.detach().requires_grad_()
    got = class_prototypes(source, assignment, 5)
    assert got.shape == (3, 5, 17)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= BOUNDS[dtype]
    gradient = torch.randn(expected.shape, dtype=torch.float64, device=device).to(dtype)
    (got_gradient,) = torch.autograd.grad(got, source, gradient)
    (expected_gradient,) = torch.autograd.grad(expected, exact, gradient.double())
    assert got_gradient.dtype == dtype
    assert relative_error(got_gradient, expected_gradient) <= BOUNDS[dtype]
    assert got_gradient.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in layout)
