"""Deformable convolution on a GPU: samples laid out in columns, chunk by chunk, and PyTorch's products with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._backend import call
from ._checks import check_int

_workspace = 256 * 2**20


def set_workspace_limit(nbytes: int) -> None:
    """Bounds the columns that `deform_conv2d` holds at a time on a GPU, by default to 256 MiB. (A CPU needs none.)

    The samples of as many output pixels as fit are laid out in columns, multiplied, and replaced by the next; one pixel
    at a time where not even one fits. The limit holds for forward and backward, in this process. The deterministic
    input gradient needs 40 bytes more per sample and offset group of a chunk.

    Raises:
        TypeError, ValueError: if nbytes is not a positive int.
    """
    global _workspace
    _workspace = check_int("nbytes", nbytes, 1)


def _chunks(rows: int, row_bytes: int, product_width: int, device: torch.device) -> list[slice]:
    """Slices of rows whose columns fit the workspace, of nearly equal size."""
    most = max(1, _workspace // row_bytes)
    if rows <= most:
        return [slice(0, rows)]
    size = -(-rows // -(-rows // most))
    if device.type == "cuda":
        # Whole waves of the product's tiles of 128x128 leave no multiprocessor without one.
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        wave = 128 * processors // math.gcd(processors, -(-product_width // 128))
        size = min(-(-size // wave), most // wave) * wave or size
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class Columns:
    """The operands of a call as the kernels and the products want them. Rows are output pixels, over all images."""

    def __init__(self, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, settings: list[int]) -> None:
        self.input, self.offset, self.mask = input, offset, mask
        self.settings = (weight.shape[2], weight.shape[3], *settings)
        self.groups, self.offset_groups = settings[6:]
        self.device = input.device
        self.rows = offset.shape[0] * offset.shape[2] * offset.shape[3]
        self.outputs = weight.shape[0]
        # [groups, Cout / groups, K * Cin / groups], in the order of the columns.
        taps_outside = weight.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        self.matrix = taps_outside.reshape(self.groups, self.outputs // self.groups, -1)

    def convolve(self, bias: Tensor | None) -> Tensor:
        """[rows, Cout]."""
        chunks, memory = self._chunks(self.outputs)
        result = self.input.new_empty(self.rows, self.groups, self.matrix.shape[1])
        for chunk in chunks:
            columns = memory[: chunk.stop - chunk.start]
            self._sample(chunk.start, columns)
            part = result[chunk]
            if self.groups == 1 and bias is not None:
                torch.addmm(bias, columns.flatten(1), self.matrix[0].t(), out=part.flatten(1))
            else:
                _multiply(columns, self.matrix.transpose(1, 2), part)
        rows = result.flatten(1)
        return rows if bias is None or self.groups == 1 else rows.add_(bias)

    def differentiate(
        self,
        gradient: Tensor,
        input_gradient: Tensor | None,
        offset_gradient: Tensor | None,
        mask_gradient: Tensor | None,
        weight_wanted: bool,
    ) -> Tensor | None:
        """Fills the gradients given (adds to the input's, [N, H, W, Cin]); returns the weight's, shaped as `matrix`.

        gradient is the output's, [rows, groups, Cout / groups].
        """
        chunks, memory = self._chunks(self.matrix.shape[0] * self.matrix.shape[2])
        total = None
        sorts = torch.are_deterministic_algorithms_enabled()
        derives = offset_gradient is not None or mask_gradient is not None
        scattered = None if sorts else input_gradient
        for chunk in chunks:
            part, columns = gradient[chunk], memory[: chunk.stop - chunk.start]
            if derives or input_gradient is not None:
                _multiply(part, self.matrix, columns)
            if derives or scattered is not None:
                wanted = (offset_gradient, mask_gradient, scattered)
                where = (self.input, self.offset, self.mask, self.settings, chunk.start)
                call("deform_differentiate", self.device, *where, columns, *wanted)
            if sorts and input_gradient is not None:
                self._gather(chunk.start, columns, input_gradient)
            if weight_wanted:
                self._sample(chunk.start, columns)
                share = torch.bmm(part.permute(1, 2, 0), columns.transpose(0, 1))
                if len(chunks) > 1:
                    share = share.to(self.offset.dtype)  # sums over chunks in the wide type
                total = share if total is None else total.add_(share)
        return total

    def _chunks(self, product_width: int) -> tuple[list[slice], Tensor]:
        """Slices of rows, and memory for the columns of the largest."""
        width = self.matrix.shape[2]
        row_bytes = self.groups * width * self.input.element_size()
        chunks = _chunks(self.rows, row_bytes, product_width, self.device)
        return chunks, self.input.new_empty(chunks[0].stop, self.groups, width)

    def _sample(self, first: int, columns: Tensor) -> None:
        call("deform_sample", self.device, self.input, self.offset, self.mask, self.settings, first, columns)

    def _gather(self, first: int, columns: Tensor, input_gradient: Tensor) -> None:
        """Adds to the input's gradient in a fixed order: that of a stable sort of the samples' corners by pixel."""
        n, height, width, _ = input_gradient.shape
        shape = (columns.shape[0], self.offset_groups * self.settings[0] * self.settings[1] * 4)
        targets = torch.empty(shape, dtype=torch.int64, device=self.device)
        weights = input_gradient.new_empty(shape)
        where = (self.input, self.offset, self.mask, self.settings, first)
        call("deform_find_targets", self.device, *where, targets, weights)
        targets, order = targets.flatten().sort(stable=True)
        every = torch.arange(n * height * width * self.offset_groups + 1, device=self.device)
        starts = torch.searchsorted(targets, every)
        found = (weights, order, starts, input_gradient)
        call("deform_gather", self.device, self.input, self.offset, self.settings, columns, *found)


def _multiply(rows: Tensor, matrices: Tensor, out: Tensor) -> None:
    """out [R, g, N] = rows [R, g, M] times matrices [g, M, N]."""
    if matrices.shape[0] == 1:
        torch.mm(rows.flatten(1), matrices[0], out=out.flatten(1))
    else:
        torch.bmm(rows.transpose(0, 1), matrices, out=out.transpose(0, 1))
