"""Deformable convolution, the sampler of ESOL, as samples in columns and a matrix product.

Li et al., Expansion and Shrinkage of Localization for Weakly-Supervised Semantic Segmentation, NeurIPS 2022 (arXiv
2209.07761), section 3, after Dai et al., ICCV 2017 and Zhu et al., CVPR 2019. A drop-in for torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._backend import call, offers
from ._checks import FLOATS, check_device, check_dtype, check_shape, check_tensor, check_two
from ._columns import Columns
from ._layout import empty_like_format, is_channels_last, wide_dtype
from ._library import is_autocast_on, no_second_derivative, register


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

    Tap k of output pixel p reads `input` at p * stride - padding + tap * dilation + offset, between floor and floor
    + 1; corners outside the image count as zero.

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

        Gradients: those of torchvision, the offset's at integer coordinates being the right-hand one. Only what is
        asked for is computed: for the offset alone one matrix product and one pass over its result. Unlike there, a
        sample at a non-finite offset is zero and has zero gradients. On CUDA, additions to the input's gradient come in
        no fixed order, or sorted under torch.use_deterministic_algorithms(True); a CPU is always deterministic. There
        is no second derivative.

    Precision: coordinates and sums are computed in float32 (float64 for float64), on a CPU the products too. On CUDA
    products are as PyTorch's matmul settings say. The forward of float32 with one weight group and up to 256 outputs
    takes each number there as the sum of two in TF32, on tensor cores, which by a model of their rounding is as near
    as float32's own arithmetic; but an infinity gives NaN, and so does a number beyond 3.4e38. (Where these settings
    allow TF32 it is one.)

    Memory: see `set_workspace_limit`.

    Raises:
        TypeError: if a tensor is of another dtype, or stride, padding or dilation hold no ints.
        ValueError: if shapes do not fit each other, devices differ, the output would be empty, or stride,
            padding or dilation are out of range (at least 1, 0 and 1).
        RuntimeError: if input is on a GPU and the CUDA backend was not built; in a second derivative.
    """
    pairs = (check_two("stride", stride, 1), check_two("padding", padding, 0), check_two("dilation", dilation, 1))
    groups, offset_groups = _check(input, offset, weight, bias, mask, *pairs)
    if is_autocast_on(input.device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    else:
        for name, other in (("weight", weight), ("bias", bias)):
            if other is not None:
                check_dtype(name, other, "input", input)
    wide = wide_dtype(input.dtype)
    offset = offset.to(wide)
    mask = None if mask is None else mask.to(wide)
    settings = [number for pair in pairs for number in pair] + [groups, offset_groups]
    result: Tensor = _convolve(input, offset, weight, bias, mask, settings)
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
    check_shape("offset", offset, (n, offset.shape[1], *size))
    others = [("offset", offset), ("weight", weight)]
    if mask is not None:
        check_tensor("mask", mask, "N, G * kH * kW, Ho, Wo", FLOATS)
        check_shape("mask", mask, (n, offset_groups * taps, *size))
        others.append(("mask", mask))
    if bias is not None:
        check_tensor("bias", bias, "Cout", FLOATS)
        check_shape("bias", bias, (outputs,))
        others.append(("bias", bias))
    for name, other in others:
        check_device(name, other, "input", input)
    return groups, offset_groups


# The operation's arguments beside tensors, `settings`: stride, padding and dilation, each (y, x), then groups and
# offset groups. Offset and mask come in the wide type: float32, or float64 where the input is.


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def _in_format_of(like: Tensor, x: Tensor) -> Tensor:
    """x, a channels_last view, in `like`'s dtype and memory format, with exactly the strides of a new tensor."""
    channels_last = is_channels_last(like)
    if channels_last and x.dtype == like.dtype:
        return x
    return empty_like_format(x.shape, like, channels_last).copy_(x)


def _panels(weight: Tensor, columns: int, like: Tensor) -> Tensor:
    """Memory for the weight in panels, by rows of `columns` numbers, which the CPU rounds up to 32 at most."""
    groups_taps_rows = weight.numel() // columns
    return like.new_empty(groups_taps_rows * -(-columns // 32) * 32)


def _empty_output(input: Tensor, offset: Tensor, weight: Tensor, *_: Any) -> Tensor:
    shape = (offset.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
    return empty_like_format(shape, input, is_channels_last(input))


def _forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, settings: list[int]
) -> Tensor:
    pixels = _dense_channels(input)
    if not offers(input.device, "deform_convolve"):
        n, outputs, height, width = offset.shape[0], weight.shape[0], offset.shape[2], offset.shape[3]
        rows = Columns(pixels, offset, weight, mask, settings).convolve(bias)
        return _in_format_of(input, rows.view(n, height, width, outputs).permute(0, 3, 1, 2))
    output = _empty_output(input, offset, weight)
    groups = input.shape[1] // weight.shape[1]
    panels = _panels(weight, weight.shape[0] // groups, offset)
    wide_bias = None if bias is None else bias.to(offset.dtype).contiguous()
    where = (pixels, offset, mask, (*weight.shape[2:], *settings))
    call("deform_convolve", input.device, *where, weight, wide_bias, panels, output)
    return output


class _Targets(NamedTuple):
    """Memory of the gradients that are wanted, all in the wide type."""

    offset: Tensor | None
    mask: Tensor | None
    input: Tensor | None  # [N, H, W, Cin], to be added to


def _backward(
    gradient: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    settings: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of those of (input, offset, weight, mask) that are wanted, in this order."""
    for_input, for_offset, for_weight, for_mask = wanted
    n, channels, height, width = input.shape
    targets = _Targets(
        offset=torch.empty_like(offset) if for_offset else None,
        mask=torch.empty_like(mask) if mask is not None and for_mask else None,
        input=offset.new_zeros(n, height, width, channels) if for_input else None,
    )
    differentiate = _differentiate_by_tiles if offers(input.device, "deform_convolve") else _differentiate_by_columns
    pixels = _dense_channels(input)
    weight_gradient = differentiate(gradient, pixels, offset, weight, mask, settings, targets, for_weight)
    by_input = None if targets.input is None else _in_format_of(input, targets.input.permute(0, 3, 1, 2))
    results = (by_input, targets.offset, weight_gradient, targets.mask)
    return [result for result in results if result is not None]


def _differentiate_by_tiles(
    gradient: Tensor,
    pixels: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    settings: list[int],
    targets: _Targets,
    for_weight: bool,
) -> Tensor | None:
    """Fills the targets, and returns the weight's gradient if it is wanted: on a CPU."""
    rows = gradient.to(offset.dtype).contiguous(memory_format=torch.channels_last)
    where = (pixels, offset, mask, (*weight.shape[2:], *settings))
    if any(target is not None for target in targets):
        panels = _panels(weight, weight.shape[1], offset)
        call("deform_differentiate", pixels.device, *where, weight, panels, rows, *targets)
    if not for_weight:
        return None
    weight_gradient = empty_like_format(weight.shape, offset, is_channels_last(weight))
    call("deform_differentiate_weight", pixels.device, *where, rows, weight_gradient)
    return weight_gradient.to(weight.dtype)


def _differentiate_by_columns(
    gradient: Tensor,
    pixels: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    settings: list[int],
    targets: _Targets,
    for_weight: bool,
) -> Tensor | None:
    """The same on a GPU."""
    columns = Columns(pixels, offset, weight, mask, settings)
    rows = gradient.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    rows = rows.reshape(-1, columns.groups, columns.outputs // columns.groups)
    if any(target is not None for target in targets):
        columns.differentiate(rows, targets.input, targets.offset, targets.mask)
    if not for_weight:
        return None
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    taps_outside = columns.differentiate_weight(rows).reshape(outputs, kernel_h, kernel_w, group_channels)
    return _in_format_of(weight, taps_outside.permute(0, 3, 1, 2))


def _fake_backward(
    gradient: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    settings: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    results = []
    if wanted[0]:
        results.append(empty_like_format(input.shape, input, is_channels_last(input)))
    if wanted[1]:
        results.append(torch.empty_like(offset))
    if wanted[2]:
        results.append(empty_like_format(weight.shape, weight, is_channels_last(weight)))
    if wanted[3]:
        assert mask is not None
        results.append(torch.empty_like(mask))
    return results


_convolve_backward = register(
    "deform_conv2d_backward(Tensor gradient, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int[] settings, "
    "bool[] wanted) -> Tensor[]",
    _backward,
    _fake_backward,
    no_second_derivative("deform_conv2d"),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, _, mask, ctx.settings = inputs
    ctx.save_for_backward(input, offset, weight, mask)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    for_input, for_offset, for_weight, for_bias, for_mask = ctx.needs_input_grad[:5]
    wanted = [for_input, for_offset, for_weight, for_mask]
    results = iter(
        _convolve_backward(gradient, input, offset, weight, mask, ctx.settings, wanted) if any(wanted) else ()
    )
    by_input, by_offset, by_weight = (next(results) if want else None for want in wanted[:3])
    by_bias = gradient.sum((0, 2, 3)) if for_bias else None
    return by_input, by_offset, by_weight, by_bias, next(results) if for_mask else None, None


_convolve = register(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, int[] settings) -> Tensor",
    _forward,
    _empty_output,
    _differentiate,
    _save,
)
