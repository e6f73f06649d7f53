"""Feature clipping of ESOL: strong responses are limited, so that weak ones get a fair share of the gradient.

Li et al., Expansion and Shrinkage of Localization for Weakly-Supervised Semantic Segmentation, NeurIPS 2022 (arXiv
2209.07761), section 3, the expansion stage: min(F, beta * max F) of the features F. That the maximum is an image's own
and carries no gradient is our reading.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._backend import call
from ._checks import FLOATS, check_positive, check_tensor
from ._layout import empty_like_format, is_channels_last, wide_dtype
from ._library import register

_CHUNK_BYTES = 1 << 14  # what the threads of a CUDA block have in flight at once
_MOST_CHUNKS = 256  # of an image in the forward pass, where each block reads the maxima of all


def clip_features(x: Tensor, beta: float) -> Tensor:
    """min(x, beta * max of x over D, H, W), for each image by itself.

    Args:
        x: [N, D, H, W]; float64, float32, float16 or bfloat16; NCHW, channels_last or any order of dimensions in which
            the numbers of an image are one dense run of memory (copied first where they are not).
        beta: a finite number above 0, below 1 as a rule.

    Returns:
        [N, D, H, W] in x's dtype and memory order. The limit is computed in float32 or wider and rounded to x's dtype;
        NaN does not count for the maximum and stays where it is. The gradient passes where x is not above the limit
        and is zero elsewhere; the limit carries none. The same in every run; x is kept for the backward pass.

    Raises:
        TypeError: if x is no tensor of these dtypes, or beta no number.
        ValueError: if x is not 4-d, or beta not finite or not above 0.
        RuntimeError: if x is on a GPU and the CUDA backend was not built.
    """
    check_tensor("x", x, "N, D, H, W", FLOATS)
    clipped: Tensor = _clip_features(x, check_positive("beta", beta))[0]
    return clipped


def _is_flat(x: Tensor) -> bool:
    """Whether the numbers of each image are one dense run of memory, whatever the order of its dimensions."""
    dense = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1 and stride != dense:
            return False
        dense *= size
    return True


def _empty_flat(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape and dtype, images in x's order if that is flat, one after another."""
    if not _is_flat(x):
        return empty_like_format(x.shape, x, is_channels_last(x))
    strides = (x.shape[1] * x.shape[2] * x.shape[3], *x.stride()[1:])
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _chunks(x: Tensor) -> int:
    """How many chunks an image is cut into."""
    return -(-x.numel() * x.element_size() // (x.shape[0] * _CHUNK_BYTES))


def _empty_outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_flat(x), x.new_empty(x.shape[0])


def _clip(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    clipped, limits = _empty_outputs(x)
    if x.numel() > 0:
        maxima = x.new_empty((x.shape[0], min(_chunks(x), _MOST_CHUNKS)), dtype=wide_dtype(x.dtype))
        source = x if _is_flat(x) else clipped.copy_(x)
        call("clip_features", x.device, source, beta, clipped, limits, maxima)
    return clipped, limits


def _empty_gradient(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _empty_flat(x)


def _differentiate(grad: Tensor, x: Tensor, limits: Tensor) -> Tensor:
    x_grad = _empty_gradient(grad, x)
    if x.numel() > 0:
        source = x if _is_flat(x) else torch.empty_like(x_grad).copy_(x)
        if grad.stride()[1:] != x_grad.stride()[1:]:
            grad = x_grad.copy_(grad)
        call("clip_features_backward", x.device, grad, source, limits, x_grad, _chunks(x))
    return x_grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # x costs no memory where the layer before keeps it too, as a ReLU does.
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _clip_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return _clip_features_backward(grad, *ctx.saved_tensors), None


def _keep_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _clip_features_backward(grad, *ctx.saved_tensors), None, None


_clip_features = register(
    "clip_features(Tensor x, float beta) -> (Tensor, Tensor)",
    _clip,
    _empty_outputs,
    _clip_backward,
    _keep,
)
_clip_features_backward = register(
    "clip_features_backward(Tensor grad, Tensor x, Tensor limits) -> Tensor",
    _differentiate,
    _empty_gradient,
    _differentiate_backward,
    _keep_again,
)
