"""The ops under `ocr_loss` and `out_of_candidate_rate`, whose arguments have been checked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._backend import call, module_for
from ._layout import empty_like_format, is_channels_last, tagged, wide_dtype
from ._library import no_second_derivative, register


def _log_prior(prior: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Transposed, for then the pixels of a vector read one row each for a class."""
    if prior is None:
        return None
    return torch.where(prior > 0, prior, 0).to(wide_dtype(prior.dtype)).log().to(dtype).T.contiguous()


def _settings(threshold: float, margin: float, scale: float) -> tuple[float, float, float]:
    return (math.log(threshold) if threshold > 0 else -math.inf), margin, scale


def _parts(logits: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    parts, _ = module_for(logits.device).ocr_scratch(logits.shape, height, width)
    return logits.new_empty(parts, dtype=torch.double), logits.new_empty(parts, dtype=torch.int64)


def _empty_outputs(
    logits: Tensor,
    tags: Tensor,
    prior: Tensor | None,
    ignore: Tensor | None,
    threshold: float,
    margin: float,
    scale: float,
    height: int,
    width: int,
    align_corners: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, count, and for the backward winner and outside_sum of csrc/ocr/op.h."""
    pixels = (logits.shape[0], height, width)
    wide = wide_dtype(logits.dtype)
    return (
        logits.new_empty(pixels if reduction == "none" else (), dtype=wide),
        logits.new_empty((), dtype=torch.int64),
        logits.new_empty(pixels, dtype=torch.int16),
        logits.new_empty(pixels, dtype=wide),
    )


def _forward(
    logits: Tensor,
    tags: Tensor,
    prior: Tensor | None,
    ignore: Tensor | None,
    threshold: float,
    margin: float,
    scale: float,
    height: int,
    width: int,
    align_corners: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (threshold, margin, scale, height, width, align_corners, reduction)
    loss, count, winner, outside_sum = _empty_outputs(logits, tags, prior, ignore, *options)
    if winner.numel() == 0:
        return loss.zero_(), count.zero_(), winner, outside_sum
    call(
        "ocr_forward",
        logits.device,
        logits,
        tagged(tags),
        _log_prior(prior, wide_dtype(logits.dtype)),
        None if ignore is None else ignore.contiguous(),
        _settings(threshold, margin, scale),
        height,
        width,
        align_corners,
        reduction == "mean",
        loss,
        count,
        winner,
        outside_sum,
        *_parts(logits, height, width),
    )
    return loss, count, winner, outside_sum


def _empty_gradient(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_like_format(logits.shape, logits, is_channels_last(logits))


def _backward(
    grad: Tensor,
    logits: Tensor,
    tags: Tensor,
    prior: Tensor | None,
    count: Tensor,
    winner: Tensor,
    outside_sum: Tensor,
    threshold: float,
    margin: float,
    scale: float,
    align_corners: bool,
    reduction: str,
) -> Tensor:
    gradient = _empty_gradient(grad, logits)
    if winner.numel() == 0 or gradient.numel() == 0:
        return gradient.zero_()
    height, width = winner.shape[1:]
    scratch = None
    if (height, width) != logits.shape[2:]:
        _, numbers = module_for(logits.device).ocr_scratch(logits.shape, height, width)
        scratch = outside_sum.new_empty(numbers)
    call(
        "ocr_backward",
        logits.device,
        logits,
        tagged(tags),
        _log_prior(prior, outside_sum.dtype),
        _settings(threshold, margin, scale),
        height,
        width,
        align_corners,
        reduction == "mean",
        grad.contiguous(),
        count,
        winner,
        outside_sum,
        gradient,
        scratch,
    )
    return gradient


def _empty_count(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=torch.int64)


def _count(logits: Tensor, tags: Tensor, ignore: Tensor | None, height: int, width: int, align_corners: bool) -> Tensor:
    count = _empty_count(logits)
    if logits.shape[0] * height * width == 0:
        return count.zero_()
    call(
        "ocr_forward",
        logits.device,
        logits,
        tagged(tags),
        None,
        None if ignore is None else ignore.contiguous(),
        _settings(0.0, 0.0, 1.0),
        height,
        width,
        align_corners,
        False,
        None,
        count,
        None,
        None,
        *_parts(logits, height, width),
    )
    return count


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tags, prior, _, *ctx.options = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, tags, prior, *saved)


def _loss_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    threshold, margin, scale, _, _, align_corners, reduction = ctx.options
    gradient = None
    if grad is not None:
        gradient = _ocr_loss_backward(grad, *ctx.saved_tensors, threshold, margin, scale, align_corners, reduction)
    return (gradient, *[None] * 10)


_ocr_loss_backward = register(
    "ocr_loss_backward(Tensor grad, Tensor logits, Tensor tags, Tensor? prior, Tensor count, Tensor winner, "
    "Tensor outside_sum, float threshold, float margin, float scale, bool align_corners, str reduction) -> Tensor",
    _backward,
    _empty_gradient,
    no_second_derivative("ocr_loss"),
)
ocr_loss = register(
    "ocr_loss(Tensor logits, Tensor tags, Tensor? prior, Tensor? ignore, float threshold, float margin, float scale, "
    "SymInt height, SymInt width, bool align_corners, str reduction) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
    _loss_backward,
    _save,
)
ocr_count = register(
    "ocr_count(Tensor logits, Tensor tags, Tensor? ignore, SymInt height, SymInt width, bool align_corners) -> Tensor",
    _count,
    _empty_count,
)
