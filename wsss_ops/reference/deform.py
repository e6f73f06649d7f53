"""deform_conv2d as four gathers per tap and one product over taps and channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._layout import is_channels_last, memory_format


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """As wsss_ops.deform_conv2d, in float32 or wider throughout; its autograd derivatives define the gradients."""
    n, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    out_height, out_width = offset.shape[2:]
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * kh * kw)
    (step_y, step_x), (pad_y, pad_x), (apart_y, apart_x) = _pair(stride), _pair(padding), _pair(dilation)

    dtype = torch.promote_types(input.dtype, torch.float32)
    images = input.to(dtype).reshape(n, offset_groups, channels // offset_groups, height, width)
    shifts = offset.to(dtype).reshape(n, offset_groups, kh, kw, 2, out_height, out_width)
    rows = torch.arange(out_height, device=input.device, dtype=dtype)[:, None] * step_y - pad_y
    columns = torch.arange(out_width, device=input.device, dtype=dtype) * step_x - pad_x

    masks = None
    if mask is not None:
        masks = mask.to(dtype).reshape(n, offset_groups, kh, kw, out_height, out_width)

    samples = []
    for i in range(kh):
        for j in range(kw):
            shift_y, shift_x = shifts[:, :, i, j].unbind(2)
            factor = None if masks is None else masks[:, :, i, j]
            samples.append(_sample(images, rows + i * apart_y + shift_y, columns + j * apart_x + shift_x, factor))

    pixels = out_height * out_width
    sampled = torch.stack(samples, dim=3).reshape(n, groups, group_channels * kh * kw, pixels)
    weights = weight.to(dtype).reshape(groups, out_channels // groups, group_channels * kh * kw)
    result = (weights @ sampled).reshape(n, out_channels, out_height, out_width)
    if bias is not None:
        result = result + bias.to(dtype)[:, None, None]
    return result.to(input.dtype).contiguous(memory_format=memory_format(is_channels_last(input)))


def _sample(images: Tensor, y: Tensor, x: Tensor, factor: Tensor | None) -> Tensor:
    """images [N, G, D, H, W] at the points y, x [N, G, h, w] -> [N, G, D, h, w]: bilinear, zero beyond the images.

    factor [N, G, h, w], or None for ones, is multiplied in; beyond the images it counts as 0, whatever it is. Every
    corner inside an image is read, even where its weight is 0: NaN pixels reach such samples too.
    """
    n, groups, channels, height, width = images.shape
    # Comparisons with NaN are false: non-finite points end here too, and `where` passes no gradient back to them.
    inside = (y >= -1) & (y < height) & (x >= -1) & (x < width)
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    below, right = y - top, x - left  # the floor is a constant: at integers this gives right-hand derivatives

    factor = inside.to(y.dtype) if factor is None else torch.where(inside, factor, 0)
    pixels = F.pad(images.flatten(3), (0, 1))  # with a zero behind them for what lies beyond
    total = images.new_zeros((n, groups, channels, *y.shape[2:]))
    for row, weight_y in ((top.long(), 1 - below), (top.long() + 1, below)):
        for column, weight_x in ((left.long(), 1 - right), (left.long() + 1, right)):
            known = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(known, row * width + column, height * width)
            corner = pixels.gather(3, index.flatten(2)[:, :, None].expand(-1, -1, channels, -1))
            total = total + corner.reshape(total.shape) * (weight_y * weight_x * factor)[:, :, None]
    return total


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second
