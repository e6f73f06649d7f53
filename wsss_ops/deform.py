"""Deformable convolution, the sampler of ESOL, as samples in columns and a matrix product.

Li et al., Expansion and Shrinkage of Localization for Weakly-Supervised Semantic Segmentation, NeurIPS 2022 (arXiv
2209.07761), section 3, after Dai et al., ICCV 2017 and Zhu et al., CVPR 2019. A drop-in for torchvision.ops.deform_conv2d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import FLOATS, check_tensor, check_two
from ._columns import convolve


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
    """Convolution that samples its input bilinearly at displaced points; arguments as torchvision.ops.deform_conv2d.

    Tap k of output pixel p reads `input` at p * stride - padding + tap * dilation + offset, between floor and floor + 1;
    corners outside the image count as zero.

    Args:
        input: [N, Cin, H, W]; float64, float32, float16 or bfloat16. channels_last is read as it is (slices too);
            other memory formats are copied to it first.
        offset: [N, 2 * G * K, Ho, Wo] in pixels, with K = kH * kW taps and G offset groups, each for Cin / G channels:
            channel 2 * (g * K + k) is the y, the next one the x displacement of tap k. Any float dtype (coordinates are
            computed in float32 or wider) and strides.
        weight: [Cout, Cin / groups, kH, kW] in input's dtype.
        bias: [Cout] in input's dtype, or None.
        stride, padding, dilation: an int or (y, x).
        mask: [N, G * K, Ho, Wo], a factor for each sample, or None for ones. Any float dtype and strides.

    Returns:
        [N, Cout, Ho, Wo] in input's dtype and memory format; Ho = (H + 2 * padding - dilation * (kH - 1) - 1) // stride
        + 1. Under autocast input, weight and bias are cast first, offset and mask to float32.

        Gradients: those of torchvision, the offset's at integer coordinates being the right-hand one. Only what is asked for is
        computed: for the offset alone one matrix product and one pass over its result. Unlike there, a sample at a
        non-finite offset is zero and has zero gradients. Additions to the input's gradient come in no fixed order on
        CUDA; under torch.use_deterministic_algorithms(True) they are sorted first. There is no second derivative.

    Memory: see `set_workspace_limit`.

    Raises:
        TypeError, ValueError: naming the argument and what was got.
    """
    pairs = (check_two("stride", stride, 1), check_two("padding", padding, 0), check_two("dilation", dilation, 1))
    groups, offset_groups = _check(input, offset, weight, bias, mask, *pairs)
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        name, other = ("weight", weight) if weight.dtype != input.dtype else ("bias", bias)
        raise TypeError(f"{name} must have input's dtype {input.dtype}, got {other.dtype}")
    wide = torch.promote_types(input.dtype, torch.float32)
    offset = offset.to(wide)
    mask = None if mask is None else mask.to(wide)
    settings = [number for pair in pairs for number in pair] + [groups, offset_groups]
    result: Tensor = convolve(input, offset, weight, bias, mask, settings)
    return result


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """(Ho, Wo) of a convolution; not positive where the kernel is larger than the padded image."""
    height, width = (
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return height, width


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """groups and offset groups, which shapes tell."""
    check_tensor("input", input, "N, Cin, H, W", FLOATS)
    check_tensor("offset", offset, "N, 2 * G * kH * kW, Ho, Wo", FLOATS)
    check_tensor("weight", weight, "Cout, Cin / groups, kH, kW", FLOATS)
    n, channels, height, width = input.shape
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got shape {list(weight.shape)}")
    if channels == 0 or channels % group_channels != 0:
        raise ValueError(
            f"weight must have a divisor of input's {channels} channels as its second size, got {list(weight.shape)}"
        )
    groups = channels // group_channels
    if outputs % groups != 0:
        raise ValueError(f"weight must have a multiple of {groups} (groups) outputs, got shape {list(weight.shape)}")
    taps = kernel_h * kernel_w
    offset_groups, rest = divmod(offset.shape[1], 2 * taps)
    if rest != 0 or offset_groups == 0:
        raise ValueError(f"offset must have a multiple of 2 * {kernel_h} * {kernel_w} channels, got {offset.shape[1]}")
    if channels % offset_groups != 0:
        raise ValueError(
            f"offset is for {offset_groups} offset groups ({offset.shape[1]} channels), which do not divide input's "
            f"{channels} channels"
        )
    size = output_size((height, width), (kernel_h, kernel_w), stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(f"the output's size would be {size}: input of {(height, width)} pixels is too small")
    if offset.shape[0] != n or tuple(offset.shape[2:]) != size:
        raise ValueError(f"offset must be [{n}, {offset.shape[1]}, {size[0]}, {size[1]}], got {list(offset.shape)}")
    others = [("offset", offset), ("weight", weight)]
    if mask is not None:
        check_tensor("mask", mask, "N, G * kH * kW, Ho, Wo", FLOATS)
        expected = [n, offset_groups * taps, *size]
        if list(mask.shape) != expected:
            raise ValueError(f"mask must be {expected}, got {list(mask.shape)}")
        others.append(("mask", mask))
    if bias is not None:
        check_tensor("bias", bias, "Cout", FLOATS)
        if bias.shape[0] != outputs:
            raise ValueError(f"bias must have weight's {outputs} outputs, got {bias.shape[0]}")
        others.append(("bias", bias))
    for name, other in others:
        if other.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {other.device}")
    return groups, offset_groups
