"""Levels of a network's features as one tensor: normalised, resized and laid side by side, each in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._backend import call
from ._layout import empty_like_format, is_channels_last
from ._library import no_second_derivative, register


def resize_levels(levels: Sequence[Tensor], height: int, width: int, normalise: bool) -> Tensor:
    """[N, D_l, h_l, w_l] each -> [N, sum of D_l, height, width], channels_last if the first level is.

    With `normalise` a level's pixels are divided by (their L2 norm over channels + 1e-5) before they are resized
    bilinearly (align_corners=False). Any strides.
    """
    resized: Tensor = _resize_levels(list(levels), height, width, normalise)
    return resized


def _empty_resized(levels: Sequence[Tensor], height: int, width: int, *_: Any) -> Tensor:
    first = levels[0]
    shape = (first.shape[0], sum(level.shape[1] for level in levels), height, width)
    return empty_like_format(shape, first, is_channels_last(first))


def _resize(levels: Sequence[Tensor], height: int, width: int, normalise: bool) -> Tensor:
    resized = _empty_resized(levels, height, width)
    for level, part in zip(levels, _parts(resized, levels), strict=True):
        if part.numel() > 0:
            call("prototype_level", level.device, level, normalise, part)
    return resized


def _parts(resized: Tensor, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The channels of each level."""
    return resized.split([level.shape[1] for level in levels], 1)


def _empty_gradients(grad: Tensor, levels: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [empty_like_format(level.shape, level, is_channels_last(level)) for level in levels]


def _differentiate(grad: Tensor, levels: Sequence[Tensor], normalise: bool) -> list[Tensor]:
    gradients = _empty_gradients(grad, levels)
    for level, part, gradient in zip(levels, _parts(grad, levels), gradients, strict=True):
        if gradient.numel() == 0:
            continue
        if part.numel() == 0:
            gradient.zero_()
        else:
            call("prototype_level_backward", level.device, part, level, normalise, gradient)
    return gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, _, _, ctx.normalise = inputs
    ctx.save_for_backward(*levels)


def _levels_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None, None]:
    return _resize_levels_backward(grad, list(ctx.saved_tensors), ctx.normalise), None, None, None


_resize_levels_backward = register(
    "resize_levels_backward(Tensor grad, Tensor[] levels, bool normalise) -> Tensor[]",
    _differentiate,
    _empty_gradients,
    no_second_derivative("prototype_cam"),
)
_resize_levels = register(
    "resize_levels(Tensor[] levels, SymInt height, SymInt width, bool normalise) -> Tensor",
    _resize,
    _empty_resized,
    _levels_backward,
    _keep,
)
