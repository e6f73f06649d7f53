"""ocr_loss where values are special: by hand, ties, saturation, priors, untagged images, NaN; and determinism."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import FLOATS, instruction_set, relative_error, threads
from ocr_cases import GRADIENT_BOUNDS, WAYS, Case, as_double, assert_matches, run, tensors
from torch import Tensor

from wsss_ops import _backend, ocr_loss, out_of_candidate_rate, reference


def pixel(
    scores: list[float], tags: list[int], device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """An image of one pixel."""
    return {
        "logits": torch.tensor(scores, dtype=dtype, device=device)[None, :, None, None],
        "tags": torch.tensor([tags], device=device),
    }


def both(given: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ocr_loss, and the reference in float64."""
    return run(ocr_loss, given, **options), run(reference.ocr_loss, as_double(given), **options)


def assert_both_near(given: dict[str, Any], bound: float = 2e-6, **options: Any) -> dict[str, Tensor]:
    got, expected = both(given, **options)
    assert torch.equal(got["count"], expected["count"])
    assert relative_error(got["loss"], expected["loss"]) <= bound
    assert relative_error(got["gradient"], expected["gradient"]) <= bound
    return got


def test_by_hand(device: torch.device) -> None:
    """Class 1 wins and is not tagged: one pair of O = {1, 2} and I = {0, 3} for each difference."""
    given = pixel([0.5, 2.0, -1.0, 1.0], [1, 0, 0, 1], device)
    pairs = [s + 0.25 - t for s in (2.0, -1.0) for t in (0.5, 1.0)]
    got = run(ocr_loss, given, margin=0.25, scale=2.0)
    assert math.isclose(got["loss"], math.log1p(sum(math.exp(2 * pair) for pair in pairs)), rel_tol=1e-6)
    gradient = got["gradient"].flatten().tolist()
    total = 1 + sum(math.exp(2 * pair) for pair in pairs)
    assert math.isclose(gradient[1], 2 * (math.exp(2 * pairs[0]) + math.exp(2 * pairs[1])) / total, rel_tol=1e-6)
    assert math.isclose(gradient[0], -2 * (math.exp(2 * pairs[0]) + math.exp(2 * pairs[2])) / total, rel_tol=1e-6)
    assert math.isclose(sum(gradient), 0, abs_tol=1e-6)


@pytest.mark.parametrize("classes", [3, 30])
@pytest.mark.parametrize(("tags", "count"), [([1, 0, 0], 0), ([0, 1, 0], 1), ([0, 0, 1], 1)])
def test_first_of_equal_scores_wins(device: torch.device, classes: int, tags: list[int], count: int) -> None:
    given = pixel([1.0] * classes, tags + [0] * (classes - 3), device)
    assert assert_both_near(given)["count"] == count
    later = (
        pixel([0.0, 0.0, *[1.0] * (classes - 2)], [1, 0, *tags] + [0] * (classes - 5), device) if classes > 5 else given
    )
    assert assert_both_near(later)["count"] == count


@pytest.mark.parametrize("classes", [3, 30])
@pytest.mark.parametrize(
    ("dtype", "spread"),
    [
        (torch.float64, 1e30),
        (torch.float32, 1e4),
        (torch.float32, 1e30),
        (torch.float16, 1e4),
        (torch.bfloat16, 1e4),
        (torch.bfloat16, 1e30),
    ],
)
def test_saturation(device: torch.device, dtype: torch.dtype, spread: float, classes: int) -> None:
    """Scores that far apart: the loss is their difference, the gradient 1 and -1."""
    rest = [0.0] * (classes - 3)
    for tags in ([1, 0, 0], [1, 0, 1]):
        given = pixel([-spread, spread, 0.5 * spread, *rest], tags + [0] * (classes - 3), device, dtype)
        got = assert_both_near(given)
        assert got["gradient"].flatten()[:2].tolist() == [-1.0, 1.0]
        assert not got["gradient"].flatten()[2:].any()
    given = pixel([spread, spread, 0.0, *rest], [0, 1, 0] + [0] * (classes - 3), device, dtype)  # large, but equal
    got = assert_both_near(given, GRADIENT_BOUNDS[dtype], margin=1.0)
    assert 0.5 < got["gradient"][0, 0] < 0.8


@pytest.mark.parametrize("margin", [-20.0, -80.0, -200.0])
def test_small_losses_keep_their_digits(device: torch.device, margin: float) -> None:
    """Pixels that are hardly out of candidate: log(1 + x) and its slope for x down to what float32 holds."""
    given = tensors(Case((1, 21, 5, 5)), device)
    got, expected = both(given, margin=margin, reduction="sum")
    if expected["loss"] > 1e-37:
        assert relative_error(got["loss"], expected["loss"]) <= 2e-6
        assert relative_error(got["gradient"], expected["gradient"]) <= 5e-6
    else:
        assert got["loss"] < 1e-36
        assert bool((got["gradient"].abs() < 1e-36).all())


def test_correlation_does_not_underflow(device: torch.device) -> None:
    """softmax of the tagged classes is 0 in float32, and their order still decides; so does a prior of 1e-40."""
    given = pixel([-500.0, 500.0, -501.0, -504.0], [1, 0, 1, 1], device)
    got = assert_both_near(given, threshold=0.1)  # e^-1 is in, e^-4 not
    assert (got["gradient"].flatten() != 0).tolist() == [True, True, True, False]
    prior = torch.full((4, 4), 1e-300, dtype=torch.float64, device=device)
    prior[1, 2] = 1e-298
    got = assert_both_near(given, threshold=0.1, prior=prior)
    assert (got["gradient"].flatten() != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("classes", [4, 30])
def test_prior_not_above_zero_counts_as_zero(device: torch.device, classes: int) -> None:
    scores = [0.0, 3.0, 1.0, 2.0, *[-1.0] * (classes - 4)]
    given = pixel(scores, [1, 0, 1, 1] + [0] * (classes - 4), device)
    prior = torch.ones(classes, classes, device=device)
    prior[1, 0], prior[1, 2] = -1.0, torch.nan
    clean = prior.clone()
    clean[1, 0] = clean[1, 2] = 0
    got = assert_both_near(given, prior=clean)
    assert (got["gradient"].flatten()[:4] != 0).tolist() == [False, True, False, True]
    for name, value in run(ocr_loss, given, prior=prior).items():
        assert torch.equal(value, got[name])
    prior[1, 3] = 0  # none is left: all tagged classes are in, whatever the threshold
    for threshold in (0.0, 0.9):
        got = assert_both_near(given, prior=prior.nan_to_num(), threshold=threshold)
        assert (got["gradient"].flatten()[:4] != 0).all()


def test_prior_of_integers(device: torch.device) -> None:
    given = tensors(WAYS["few"], device)
    table = (given["prior"] > 0).long()
    assert torch.equal(ocr_loss(**{**given, "prior": table}), ocr_loss(**{**given, "prior": table.float()}))


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_images_without_tags_or_with_all(device: torch.device, case: Case) -> None:
    given = tensors(case, device)
    given["tags"][0] = False
    got = run(ocr_loss, given, reduction="none")
    assert not got["loss"][0].any()
    assert got["loss"][1].any()
    given["tags"][1] = True
    got = run(ocr_loss, given)
    assert got["loss"] == 0
    assert got["count"] == 0
    assert not got["gradient"].any()
    assert out_of_candidate_rate(given["logits"], given["tags"], size=case.size) == 0


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_ignored_pixels_contribute_nothing(device: torch.device, case: Case) -> None:
    given = tensors(case, device)
    given["ignore"] = torch.ones(case.shape[0], *case.out_size, dtype=torch.bool, device=device)
    got = run(ocr_loss, given)
    assert (got["loss"], got["count"]) == (0, 0)
    assert not got["gradient"].any()
    options = {"ignore": given["ignore"], "size": case.size}
    assert out_of_candidate_rate(given["logits"], given["tags"], **options) == 0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_nan_stays_at_its_own_pixels(device: torch.device, case: Case, reduction: str) -> None:
    """A NaN score makes NaN of its pixel's loss and gradient, and of sum and mean."""
    given = tensors(case, device)
    clean = run(ocr_loss, given, reduction="none")["gradient"]
    given["logits"][0, 3, 1, 2] = torch.nan
    got, expected = both(given, reduction=reduction)
    assert torch.equal(got["count"], expected["count"])
    assert torch.equal(got["loss"].isnan(), expected["loss"].isnan())
    assert bool(got["loss"].isnan().any())
    broken = got["gradient"].isnan()
    assert torch.equal(broken[0, :, 1, 2], torch.ones_like(broken[0, :, 1, 2]))
    if case.size is None:
        assert broken.sum() == case.shape[1]
    if reduction != "mean":  # which another count divides
        assert torch.equal(got["gradient"].masked_fill(broken, 0), clean.masked_fill(broken, 0))


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_nan_that_does_not_count(device: torch.device, case: Case) -> None:
    """In an ignored pixel, or an image without tags."""
    given = tensors(case, device)
    given["logits"][0, 3, 1, 2] = torch.nan
    scores = reference.ocr_loss(**{**given, "ignore": None}, reduction="none")
    given["ignore"] = given["ignore"] | scores.isnan()
    got = run(ocr_loss, given)
    assert bool(got["loss"].isfinite())
    assert bool(got["gradient"].isfinite().all())
    given["ignore"], given["tags"][0] = None, False
    got = run(ocr_loss, given)
    assert bool(got["loss"].isfinite())
    assert bool(got["gradient"].isfinite().all())


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_infinite_scores_harm_no_other_pixel(device: torch.device, case: Case) -> None:
    given = tensors(case, device)
    expected = run(ocr_loss, given, reduction="sum")["gradient"]
    given["logits"][0, 0, 0, 0] = torch.inf
    given["logits"][0, 4, 0, 1] = -torch.inf
    got = run(ocr_loss, given, reduction="sum")["gradient"]
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0, :, 3:, 3:], expected[0, :, 3:, 3:])


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_same_numbers_in_every_run(device: torch.device, case: Case) -> None:
    larger = Case((3, case.shape[1], 20, 21) if case.size is None else (3, case.shape[1], 9, 8), case.size and (30, 29))
    given = tensors(larger, device)
    first = run(ocr_loss, given)
    for count in (1, 3, torch.get_num_threads()):
        with threads(count):
            for name, value in run(ocr_loss, given).items():
                assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("level", _backend.cpu_module().levels())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["few", "resized"])
def test_instruction_sets(name: str, dtype: torch.dtype, level: str) -> None:
    for layout in ("nchw", "channels_last"):
        given = tensors(WAYS[name], torch.device("cpu"), dtype, layout)
        with instruction_set(level):
            assert_matches(ocr_loss, given, reduction="none")
