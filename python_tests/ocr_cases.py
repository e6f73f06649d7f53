"""What the tests of ocr_loss share: cases, their tensors, and an operator's results with the logits' gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import LAYOUTS, relative_error
from torch import Tensor

from wsss_ops import reference

# Norm of the difference from the float64 reference, relative to it: of the loss, and of the gradient, which has the
# logits' type. For half precision 3/4 of the distance between neighbouring numbers.
LOSS_BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
GRADIENT_BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 0.75 * 2**-10,
    torch.bfloat16: 0.75 * 2**-7,
}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; `prior` and `ignore` stand for random ones."""

    shape: tuple[int, int, int, int]  # N, C, h, w
    size: tuple[int, int] | None = None
    align_corners: bool = False
    prior: bool = False
    ignore: bool = False
    threshold: float = 0.0
    margin: float = 0.0
    scale: float = 1.0

    @property
    def out_size(self) -> tuple[int, int]:
        return self.size or self.shape[2:]


SIZES = {
    "one pixel": Case((1, 5, 1, 1)),
    "one class": Case((2, 1, 3, 4)),
    "2 classes": Case((1, 2, 3, 5)),
    "21 classes": Case((2, 21, 7, 9)),
    "24 classes": Case((1, 24, 5, 6)),
    "25 classes": Case((1, 25, 5, 6)),
    "81 classes": Case((3, 81, 6, 11)),
    "512 classes": Case((1, 512, 3, 9)),
    "several blocks": Case((2, 3, 30, 41)),
    "8 times": Case((2, 21, 4, 4), (32, 32)),
    "up": Case((1, 21, 5, 7), (13, 30)),
    "down": Case((1, 9, 12, 15), (5, 4)),
    "down and up": Case((2, 30, 9, 3), (4, 31)),
    "from one pixel": Case((1, 4, 1, 1), (5, 6)),
    "to one pixel": Case((2, 4, 6, 5), (1, 1)),
    "along one axis": Case((1, 26, 6, 5), (6, 11)),
    "several chunks": Case((1, 5, 2, 40), (3, 300)),
    "far down": Case((1, 3, 4, 300), (2, 2)),
    "130 classes, up": Case((1, 130, 2, 3), (5, 7)),
}
# A case for each of the ways through the kernels, with all that chooses among pixels and classes.
WAYS = {
    "few": Case((2, 21, 6, 7), prior=True, ignore=True, threshold=0.2),
    "many": Case((2, 27, 6, 7), prior=True, ignore=True, threshold=0.2),
    "resized": Case((2, 21, 4, 5), (11, 9), prior=True, ignore=True, threshold=0.2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prior": {"prior": True, "ignore": True, "scale": 1.5},
    "threshold": {"threshold": 0.3, "margin": 0.25, "align_corners": True},
    "prior and threshold": {"prior": True, "threshold": 0.1, "margin": -2.0, "scale": 0.5},
}


def tensors(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float32, layout: str = "nchw"
) -> dict[str, Any]:
    """Arguments of ocr_loss. Pixels that rounding could put into another class or group are ignored."""
    n, classes, _, _ = case.shape
    logits = (2 * torch.randn(case.shape, dtype=torch.float64)).to(dtype)
    logits = LAYOUTS[layout](logits)
    tags = torch.rand(n, classes) < 0.4
    tags[:, 0] = True
    prior = torch.rand(classes, classes) * (torch.rand(classes, classes) < 0.6) if case.prior else None
    ignore = ambiguous(case, logits, tags, prior)
    if case.ignore:
        ignore |= torch.rand(ignore.shape) < 0.2
    return {
        "logits": LAYOUTS[layout](logits.to(device)),
        "tags": tags.to(device),
        "prior": None if prior is None else prior.to(device),
        "ignore": ignore.to(device) if case.ignore or ignore.any() else None,
        "threshold": case.threshold,
        "margin": case.margin,
        "scale": case.scale,
        "size": case.size,
        "align_corners": case.align_corners,
    }


def ambiguous(case: Case, logits: Tensor, tags: Tensor, prior: Tensor | None) -> Tensor:
    """[N, H, W]: whether two scores come close to each other, or a correlation to the threshold."""
    scores = logits.double()
    if case.size is not None:
        scores = torch.nn.functional.interpolate(scores, case.size, mode="bilinear", align_corners=case.align_corners)
    best, winner = scores.topk(min(2, scores.shape[1]), 1)
    close = best[:, 0] - best[:, -1] < 1e-3 if scores.shape[1] > 1 else torch.zeros_like(best[:, 0], dtype=torch.bool)
    if case.threshold > 0:
        relevance = scores
        if prior is not None:
            relevance = scores + prior.double().log()[winner[:, 0]].permute(0, 3, 1, 2)
        relevance = relevance.masked_fill(~tags[:, :, None, None], -torch.inf)
        share = (relevance - relevance.amax(1, keepdim=True)).exp()
        close |= ((share - case.threshold).abs() < 1e-3).any(1)
    return close


def run(
    function: Callable[..., Any], given: dict[str, Any], gradient: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Loss, count and the logits' gradient, by default of the loss's sum. No tensor may change."""
    before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)}
    logits = given["logits"].detach().requires_grad_()
    loss, count = function(**{**given, "logits": logits, "return_count": True, **options})
    (logits_gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss) if gradient is None else gradient)
    for name, value in before.items():
        assert torch.equal(given[name].nan_to_num(), value.nan_to_num()), name
    return {"loss": loss.detach(), "count": count, "gradient": logits_gradient}


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "logits": given["logits"].detach().double().contiguous()}


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """`expected` from the float64 reference, `got` from logits of `dtype`."""
    assert got["gradient"].dtype == dtype
    assert got["loss"].dtype == torch.promote_types(dtype, torch.float32)
    assert got["count"].dtype == torch.int64
    assert torch.equal(got["count"], expected["count"])
    assert relative_error(got["loss"], expected["loss"]) <= LOSS_BOUNDS[dtype]
    assert relative_error(got["gradient"], expected["gradient"]) <= GRADIENT_BOUNDS[dtype]


def assert_matches(function: Callable[..., Any], given: dict[str, Any], **options: Any) -> None:
    """The function on what is given against the float64 reference, with a random gradient of the loss."""
    twin = as_double(given)
    loss = reference.ocr_loss(**{**twin, **options})
    gradient = torch.randn(loss.shape, dtype=torch.float64, device=loss.device)
    expected = run(reference.ocr_loss, twin, gradient, **options)
    dtype = given["logits"].dtype
    got = run(function, given, gradient.to(torch.promote_types(dtype, torch.float32)), **options)
    assert_near(got, expected, dtype)
