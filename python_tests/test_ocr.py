"""ocr_loss against the float64 reference on every backend: sizes and options, layouts, dtypes, reductions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import FLOATS, LAYOUTS, relative_error
from ocr_cases import OPTIONS, SIZES, WAYS, Case, as_double, assert_matches, run, tensors
from torch import Tensor

from wsss_ops import ocr_loss, out_of_candidate_rate, reference


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_matches_reference(device: torch.device, size: str, options: str) -> None:
    case = replace(SIZES[size], **OPTIONS[options])
    given = tensors(case, device)
    assert_matches(ocr_loss, given, reduction="none")
    assert_matches(ocr_loss, given, reduction="mean")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_layouts(device: torch.device, case: Case, layout: str) -> None:
    """Of the logits, read as they are; the other tensors have odd strides too."""
    given = tensors(case, device, layout=layout)
    given["tags"] = given["tags"].repeat_interleave(2, 1)[:, ::2]
    given["prior"] = given["prior"].T.contiguous().T
    given["ignore"] = given["ignore"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_matches(ocr_loss, given, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 5, 50, 100, 200, 512, 900])
def test_numbers_of_classes_side_by_side(device: torch.device, classes: int, dtype: torch.dtype) -> None:
    """channels_last: how many pixels a block stages depends on how many classes they have."""
    for shape in [(1, classes, 5, 7), (1, classes, 2, 40)]:
        assert_matches(ocr_loss, tensors(Case(shape), device, dtype, "channels_last"), reduction="none")


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_expanded_gradient(device: torch.device, case: Case) -> None:
    """Of a sum over pixels: one number with strides of 0."""
    given = tensors(case, device)
    weight = torch.tensor(0.5, device=device).expand(case.shape[0], *case.out_size)
    got = run(ocr_loss, given, weight, reduction="none")
    expected = run(ocr_loss, given, torch.tensor(0.5, device=device), reduction="sum")
    assert relative_error(got["gradient"], expected["gradient"]) < 1e-6


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced_channels_last"])
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_gradient_keeps_memory_format(device: torch.device, case: Case, layout: str) -> None:
    kept = torch.contiguous_format if layout == "nchw" else torch.channels_last
    got = run(ocr_loss, tensors(case, device, layout=layout))
    assert got["gradient"].is_contiguous(memory_format=kept)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_dtypes(device: torch.device, case: Case, dtype: torch.dtype, layout: str) -> None:
    given = tensors(case, device, dtype, layout)
    assert_matches(ocr_loss, given, reduction="none")
    assert_matches(ocr_loss, given, reduction="sum")


def plain_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """The sum as PyTorch's operators compute it in the dtype of the logits, all tagged classes in I."""
    tagged = tags[:, :, None, None]
    candidate = ~tags[:, :, None, None].expand_as(logits).gather(1, logits.argmax(1, keepdim=True))[:, 0]
    z = logits.masked_fill(tagged, -torch.inf).logsumexp(1) + (-logits).masked_fill(~tagged, -torch.inf).logsumexp(1)
    return torch.nn.functional.softplus(z)[candidate].sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_half_precision_errs_no_more_than_pytorch(device: torch.device, dtype: torch.dtype, spread: float) -> None:
    given = tensors(Case((2, 21, 16, 16)), device, dtype)
    logits, tags = (given["logits"] * spread).requires_grad_(), given["tags"]
    exact = run(reference.ocr_loss, {"logits": logits.double(), "tags": tags}, reduction="sum")
    got = run(ocr_loss, {"logits": logits, "tags": tags}, reduction="sum")
    loss = plain_loss(logits, tags)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert relative_error(got["loss"], exact["loss"]) <= relative_error(loss, exact["loss"])
    assert relative_error(got["gradient"], exact["gradient"]) <= relative_error(gradient, exact["gradient"])


@pytest.mark.parametrize("case", WAYS.values(), ids=WAYS)
def test_reductions_agree(device: torch.device, case: Case) -> None:
    given = tensors(case, device)
    each, count = ocr_loss(**given, reduction="none", return_count=True)
    assert each.shape == (case.shape[0], *case.out_size)
    assert int(count) == int((each > 0).sum()) > 0
    total = ocr_loss(**given, reduction="sum")
    assert total.shape == ()
    assert relative_error(total, each.double().sum()) < 1e-6
    assert relative_error(ocr_loss(**given), each.double().sum() / count) < 1e-6


def test_shards_give_the_mean_of_the_whole(device: torch.device) -> None:
    """Sums over parts of a batch, as processes hold them, divided by the sum of counts."""
    given = tensors(Case((4, 21, 6, 7)), device)
    whole = run(ocr_loss, given)
    parts = [
        run(
            ocr_loss,
            {**given, "logits": given["logits"][part], "tags": given["tags"][part], "ignore": None},
            reduction="sum",
        )
        for part in (slice(0, 1), slice(1, 4))
    ]
    count = sum(part["count"] for part in parts)
    assert relative_error(sum(part["loss"] for part in parts) / count, whole["loss"]) < 1e-6
    assert relative_error(torch.cat([part["gradient"] for part in parts]) / count, whole["gradient"]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_tags_are_any_numbers_but_zero(device: torch.device, dtype: torch.dtype) -> None:
    given = tensors(WAYS["few"], device)
    numbers = given["tags"].to(dtype) * 3
    if dtype.is_floating_point:
        numbers = torch.where(
            given["tags"], torch.tensor([-0.5, torch.nan, 1e-30], dtype=dtype, device=device).repeat(7), 0
        )
    assert torch.equal(ocr_loss(**{**given, "tags": numbers}), ocr_loss(**given))


@pytest.mark.parametrize("size", SIZES)
def test_rate_matches_reference(device: torch.device, size: str) -> None:
    case = replace(SIZES[size], ignore=True)
    given = tensors(case, device)
    options = {name: given[name] for name in ("ignore", "size", "align_corners")}
    rate = out_of_candidate_rate(given["logits"].requires_grad_(), given["tags"], **options)
    assert rate.dtype == torch.float32
    assert not rate.requires_grad
    expected = reference.out_of_candidate_rate(as_double(given)["logits"], given["tags"], **options)
    assert relative_error(rate, expected) < 1e-6
