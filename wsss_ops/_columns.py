"""The deformable convolution's op: samples laid out in columns, chunk by chunk, and the products with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._backend import call, offers
from ._checks import check_int
from ._layout import empty_like_format, is_channels_last
from ._library import register
from ._products import product

_workspace = 256 * 2**20
# On a CPU, columns that are still in the caches when the product reads them are worth more than long products.
_CPU_WORKSPACE = 24 * 2**20


def set_workspace_limit(nbytes: int) -> None:
    """Bounds the columns that `deform_conv2d` holds at a time, by default to 256 MiB (on a CPU always to 24 MiB).

    The samples of as many output pixels as fit are laid out in columns, multiplied, and replaced by the next; one pixel
    at a time where not even one fits. The limit holds for forward and backward, in this process. PyTorch's products
    may need scratch of their own: on a CPU the backward holds the columns twice.

    Raises:
        TypeError, ValueError: if nbytes is not a positive int.
    """
    global _workspace
    _workspace = check_int("nbytes", nbytes, 1)


def _chunks(rows: int, row_bytes: int, product_width: int, device: torch.device) -> list[slice]:
    """Slices of rows whose columns fit the workspace, of nearly equal size."""
    limit = min(_workspace, _CPU_WORKSPACE) if device.type == "cpu" else _workspace
    most = max(1, limit // row_bytes)
    if rows <= most:
        return [slice(0, rows)]
    size = -(-rows // -(-rows // most))
    if device.type == "cuda":
        # Whole waves of the product's tiles of 128x128 leave no multiprocessor without one.
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        wave = 128 * processors // math.gcd(processors, -(-product_width // 128))
        size = min(-(-size // wave), most // wave) * wave or size
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class _Work:
    """The operands of a call as the kernels and the products want them."""

    def __init__(self, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, settings: list[int]) -> None:
        self.groups, self.offset_groups = settings[6:]
        self.device = input.device
        dense = input.stride(1) == 1 or input.shape[1] == 1
        self.input = input if dense else input.contiguous(memory_format=torch.channels_last)
        self.offset, self.mask = offset, mask
        self.settings = (weight.shape[2], weight.shape[3], *settings)
        self.rows = offset.shape[0] * offset.shape[2] * offset.shape[3]
        # [groups, Cout / groups, K * Cin / groups], in the order of the columns.
        taps_outside = weight.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        self.matrix = taps_outside.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def chunks(self, product_width: int) -> tuple[list[slice], Tensor]:
        """Slices of output pixels, and memory for the columns of the largest."""
        width = self.matrix.shape[2]
        row_bytes = self.groups * width * self.input.element_size()
        chunks = _chunks(self.rows, row_bytes, product_width, self.device)
        return chunks, self.input.new_empty(chunks[0].stop, self.groups, width)

    def sample(self, first: int, columns: Tensor) -> None:
        call("deform_sample", self.device, self.input, self.offset, self.mask, self.settings, first, columns)


def _output_size(offset: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    return offset.shape[0], weight.shape[0], offset.shape[2], offset.shape[3]


def _in_format_of(like: Tensor, x: Tensor) -> Tensor:
    """x, a channels_last view, in `like`'s dtype and memory format, with exactly the strides of a new tensor."""
    channels_last = is_channels_last(like)
    if channels_last and x.dtype == like.dtype:
        return x
    return empty_like_format(x.shape, like, channels_last).copy_(x)


def _forward(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, settings: list[int]
) -> Tensor:
    work = _Work(input, offset, weight, mask, settings)
    n, outputs, height, width = _output_size(offset, weight)
    chunks, memory = work.chunks(outputs)
    multiply = product("forward", memory, work.matrix, memory)
    result = None if len(chunks) == 1 else input.new_empty(work.rows, outputs)
    for chunk in chunks:
        columns = memory[: chunk.stop - chunk.start]
        work.sample(chunk.start, columns)
        part = multiply(columns, work.matrix, bias)
        if result is None:
            result = part
        else:
            result[chunk] = part
    assert result is not None
    return _in_format_of(input, result.view(n, height, width, outputs).permute(0, 3, 1, 2))


def _fake(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, settings: list[int]
) -> Tensor:
    return empty_like_format(_output_size(offset, weight), input, is_channels_last(input))


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
    work = _Work(input, offset, weight, mask, settings)
    groups, _, width = work.matrix.shape
    chunks, memory = work.chunks(groups * width)
    rows = gradient.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(work.rows, groups, -1)

    n, channels, in_height, in_width = input.shape
    input_gradient = offset.new_zeros(n, in_height, in_width, channels) if for_input else None
    offset_gradient = torch.empty_like(offset) if for_offset else None
    mask_gradient = torch.empty_like(mask) if for_mask and mask is not None else None
    weight_gradient = None
    sorts = torch.are_deterministic_algorithms_enabled() and offers(work.device, "deform_gather")

    for chunk in chunks:
        part, columns = rows[chunk], memory[: chunk.stop - chunk.start]
        if for_input or for_offset or for_mask:
            by_columns = product("columns_gradient", part, work.matrix, columns)(part, work.matrix, columns)
            scattered = None if sorts else input_gradient
            if for_offset or for_mask or scattered is not None:
                targets = (offset_gradient, mask_gradient, scattered)
                call(
                    "deform_differentiate",
                    work.device, work.input, offset, mask, work.settings, chunk.start, by_columns, *targets,
                )  # fmt: skip
            if sorts and input_gradient is not None:
                _gather(work, chunk.start, by_columns, input_gradient)
        if for_weight:
            work.sample(chunk.start, columns)
            multiply = product("weight_gradient", part, work.matrix, columns)
            share = multiply(part, columns, work.matrix)
            if len(chunks) > 1:
                share = share.to(offset.dtype)  # sums over chunks in the wide type
            weight_gradient = share if weight_gradient is None else weight_gradient.add_(share)

    results = []
    if input_gradient is not None:
        results.append(_in_format_of(input, input_gradient.permute(0, 3, 1, 2)))
    if offset_gradient is not None:
        results.append(offset_gradient)
    if weight_gradient is not None:
        outputs, group_channels, kernel_h, kernel_w = weight.shape
        taps_outside = weight_gradient.reshape(outputs, kernel_h, kernel_w, group_channels)
        results.append(_in_format_of(weight, taps_outside.permute(0, 3, 1, 2)))
    if mask_gradient is not None:
        results.append(mask_gradient)
    return results


def _gather(work: _Work, first: int, by_columns: Tensor, input_gradient: Tensor) -> None:
    """Adds to the input's gradient in a fixed order: that of a stable sort of the samples' corners by pixel."""
    n, height, width, _ = input_gradient.shape
    corners = by_columns.shape[0] * work.offset_groups * work.settings[0] * work.settings[1] * 4
    shape = (by_columns.shape[0], corners // by_columns.shape[0])
    targets = torch.empty(shape, dtype=torch.int64, device=work.device)
    weights = torch.empty(shape, dtype=input_gradient.dtype, device=work.device)
    call("deform_find_targets", work.device, work.input, work.offset, work.mask, work.settings, first, targets, weights)
    targets, order = targets.flatten().sort(stable=True)
    all_targets = torch.arange(n * height * width * work.offset_groups + 1, device=work.device)
    starts = torch.searchsorted(targets, all_targets)
    call(
        "deform_gather",
        work.device, work.input, work.offset, work.settings, by_columns, weights, order, starts, input_gradient,
    )  # fmt: skip


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
        results.append(torch.empty_like(mask))
    return results


def _no_second_derivative(ctx: Any, gradients: Any) -> Any:
    raise RuntimeError("deform_conv2d has no second derivative: call backward without create_graph=True")


_convolve_backward = register(
    "deform_conv2d_backward(Tensor gradient, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int[] settings, "
    "bool[] wanted) -> Tensor[]",
    _backward,
    _fake_backward,
    _no_second_derivative,
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


# settings: stride, padding and dilation, each (y, x), then groups and offset groups.
convolve = register(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, int[] settings) -> Tensor",
    _forward,
    _fake,
    _differentiate,
    _save,
)
