"""Deformable convolution on a GPU: samples laid out in columns, chunk by chunk, and PyTorch's products with them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._backend import call, module_for
from ._checks import check_int

_workspace = 96 * 2**20
_TILE = 128  # rows and columns of a result that a multiprocessor computes at a time
_MOST_OUTPUTS = 256  # of the kernel that samples and multiplies: tiles of more would take the same samples anew


def set_workspace_limit(nbytes: int) -> None:
    """Bounds the columns that `deform_conv2d` holds at a time on a GPU, by default to 96 MiB. (A CPU needs none.)

    The samples of as many output pixels as fit are laid out in columns, multiplied, and replaced by the next; one pixel
    at a time where not even one fits. (For the gradient of a large weight: of all pixels, at as many taps as fit.) The
    limit holds for forward and backward, in this process. The deterministic input gradient needs 112 bytes
    more per sample and offset group of a chunk, and 16 per pixel and offset group of the input.

    Raises:
        TypeError, ValueError: if nbytes is not a positive int.
    """
    global _workspace
    _workspace = check_int("nbytes", nbytes, 1)


@functools.lru_cache
def _chunks(rows: int, most: int, width: int, processors: int) -> list[slice]:
    """Slices of `rows`, at most `most` long, whose products with a matrix of `width` columns leave few multiprocessors
    idle: a product takes as many turns as its tiles need of all multiprocessors."""
    fewest = -(-rows // most)

    def divide(chunks: int) -> list[slice]:
        size = min(-(-rows // chunks // _TILE) * _TILE, most)
        return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]

    def turns(chunks: list[slice]) -> int:
        tiles = (-(-(chunk.stop - chunk.start) // _TILE) * -(-width // _TILE) for chunk in chunks)
        return sum(-(-number // processors) for number in tiles)

    candidates = [divide(count) for count in range(fewest, fewest + 16)]
    enough = 1.05 * min(turns(chunks) for chunks in candidates)  # each chunk costs launches, too
    return next(chunks for chunks in candidates if turns(chunks) <= enough)


def _in_parts(count: int, most: int) -> list[slice]:
    """Slices of `count` things, at most `most` long and nearly equally so."""
    size = -(-count // -(-count // most))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _part(tensor: Tensor, start: int, stop: int) -> Tensor:
    """tensor[start:stop]; a microsecond sooner where that is all of it."""
    return tensor if stop - start == tensor.shape[0] else tensor[start:stop]


class Columns:
    """The operands of a call as the kernels and the products want them. Rows are output pixels, over all images.

    Columns, and the weight as `matrix`, are [rows or Cout / groups, groups, taps, Cin / groups] in this order or with
    the groups in front.
    """

    def __init__(self, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, settings: list[int]) -> None:
        self.input, self.offset, self.mask = input, offset, mask
        self.settings = (weight.shape[2], weight.shape[3], *settings)
        self.groups, self.offset_groups = settings[6:]
        self.device = input.device
        self.rows = offset.shape[0] * offset.shape[2] * offset.shape[3]
        self.outputs, self.width = weight.shape[:2]
        self.taps = weight.shape[2] * weight.shape[3]
        # [groups, Cout / groups, taps, Cin / groups]
        taps_outside = weight.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        self.matrix = taps_outside.reshape(self.groups, -1, self.taps, self.width)

    def convolve(self, bias: Tensor | None) -> Tensor:
        """[rows, Cout]."""
        result = self.input.new_empty(self.rows, self.outputs)
        if self._can_multiply_samples() and self._fills_device():
            addend = None if bias is None else bias.contiguous()
            where = (self.input, self.offset, self.mask, self.settings)
            call("deform_multiply", self.device, *where, self.matrix, addend, result, _tf32_is_allowed())
            return result
        one_group = self.matrix.view(self.outputs, -1).t() if self.groups == 1 else None
        chunks = self._row_chunks(self.outputs)
        memory = self._memory(chunks, self.taps)
        for chunk in chunks:
            columns, part = _part(memory, 0, chunk.stop - chunk.start), _part(result, chunk.start, chunk.stop)
            self._sample(chunk.start, 0, columns)
            if one_group is None:
                by_group = part.view(-1, self.groups, self.outputs // self.groups).transpose(0, 1)
                _multiply(columns.flatten(2).transpose(0, 1), self.matrix.flatten(2).transpose(1, 2), by_group)
            elif bias is None:
                torch.mm(columns.flatten(1), one_group, out=part)
            else:
                torch.addmm(bias, columns.flatten(1), one_group, out=part)
        return result if bias is None or self.groups == 1 else result.add_(bias)

    def differentiate(
        self,
        gradient: Tensor,
        input_gradient: Tensor | None,
        offset_gradient: Tensor | None,
        mask_gradient: Tensor | None,
    ) -> None:
        """Fills the gradients given; adds to the input's, [N, H, W, Cin].

        gradient is the output's, [rows, groups, Cout / groups].
        """
        sorts = torch.are_deterministic_algorithms_enabled()
        chunks = self._row_chunks(self.groups * self.taps * self.width)
        memory = self._memory(chunks, self.taps)
        for chunk in chunks:
            columns = memory[: chunk.stop - chunk.start]
            _multiply(gradient[chunk].transpose(0, 1), self.matrix.flatten(2), columns.flatten(2).transpose(0, 1))
            where = (self.input, self.offset, self.mask, self.settings, chunk.start, columns)
            if offset_gradient is not None or mask_gradient is not None:
                call("deform_differentiate", self.device, *where, offset_gradient, mask_gradient)
            if input_gradient is not None and sorts:
                self._gather(chunk.start, columns, input_gradient)
            elif input_gradient is not None:
                call("deform_scatter", self.device, *where, input_gradient)

    def differentiate_weight(self, gradient: Tensor) -> Tensor:
        """The weight's gradient, shaped as `matrix`, from the output's, [rows, groups, Cout / groups]."""
        if self.rows == 0:
            return torch.zeros_like(self.matrix)
        rows, taps = self._weight_parts()
        total = torch.empty_like(self.matrix) if len(rows) == 1 else self.offset.new_zeros(self.matrix.shape)
        by_output = gradient.permute(1, 2, 0)
        for some in taps:
            memory = self._memory(rows, some.stop - some.start)
            share = total[:, :, some].view(*total.shape[:2], -1)  # of total's memory, never a copy
            for chunk in rows:
                columns = memory[: chunk.stop - chunk.start]
                self._sample(chunk.start, some.start, columns)
                operands = (by_output[:, :, chunk], columns.flatten(2).transpose(0, 1))
                if len(rows) == 1:
                    _multiply(*operands, share)
                else:
                    share += torch.bmm(*operands)
        return total

    def _weight_parts(self) -> tuple[list[slice], list[slice]]:
        """Rows and taps whose columns are multiplied at a time for the weight's gradient.

        Some taps and all rows where that occupies the device: each product is then complete, and nothing is added up in
        memory, which costs most where the weight is large. Else all taps and some rows, whose products are summed in
        the wide type; with either, one tap and some rows where no more fits.
        """
        fit = max(1, _workspace // (self.groups * self.width * self.input.element_size()))  # pixels at one tap
        tiles = self.groups * -(-self.outputs // self.groups // _TILE) * -(-self.width // _TILE)
        if tiles < self._processors() and fit >= self.taps:
            return _in_parts(self.rows, fit // self.taps), [slice(0, self.taps)]
        return _in_parts(self.rows, fit), _in_parts(self.taps, max(1, fit // self.rows))

    def _can_multiply_samples(self) -> bool:
        """Whether the kernel that samples and multiplies in one can do this call, on this device."""
        if self.input.dtype == torch.float64 or self.groups != 1:
            return False
        if self.outputs > _MOST_OUTPUTS or self.outputs % 2 != 0:
            return False
        vector = 16 // self.input.element_size()
        numbers = [self.width // self.offset_groups, *(self.input.stride(dim) for dim in (0, 2, 3))]
        addresses = [self.input.data_ptr(), self.matrix.data_ptr()]
        if any(number % vector for number in numbers) or any(address % 16 for address in addresses):
            return False
        if self.device.type != "cuda":
            return True
        facts: Any = torch.cuda.get_device_properties(self.device)
        needed = module_for(self.device).deform_product_bytes(self.outputs)
        return bool(facts.major >= 8 and facts.shared_memory_per_block_optin >= needed)

    def _fills_device(self) -> bool:
        """Whether at least every second multiprocessor has a tile of that kernel, which has as many rows as _TILE."""
        return self.rows * 2 >= _TILE * self._processors()

    def _processors(self) -> int:
        if self.device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def _row_chunks(self, product_width: int) -> list[slice]:
        row_bytes = self.groups * self.taps * self.width * self.input.element_size()
        most = max(1, _workspace // row_bytes)
        if self.rows <= most:
            return [slice(0, self.rows)]
        return _chunks(self.rows, most, product_width, self._processors())

    def _memory(self, chunks: list[slice], taps: int) -> Tensor:
        """For the columns of the first chunk, which is the largest."""
        return self.input.new_empty(chunks[0].stop, self.groups, taps, self.width)

    def _sample(self, first: int, first_tap: int, columns: Tensor) -> None:
        where = (self.input, self.offset, self.mask, self.settings, first, first_tap)
        call("deform_sample", self.device, *where, columns)

    def _gather(self, first: int, columns: Tensor, input_gradient: Tensor) -> None:
        """Adds to the input's gradient in a fixed order: that of a stable sort of the samples' corners by pixel."""
        n, height, width, _ = input_gradient.shape
        shape = (columns.shape[0], self.offset_groups * self.settings[0] * self.settings[1] * 4)
        targets = torch.empty(shape, dtype=torch.int64, device=self.device)
        weights = input_gradient.new_empty(shape)
        where = (self.input, self.offset, self.mask, self.settings, first)
        call("deform_find_targets", self.device, *where, columns, targets, weights)
        targets, order = targets.flatten().sort(stable=True)
        every = torch.arange(n * height * width * self.offset_groups + 1, device=self.device)
        starts = torch.searchsorted(targets, every)
        found = (weights, order, starts, input_gradient)
        call("deform_gather", self.device, self.input, self.offset, self.settings, columns, *found)


def _tf32_is_allowed() -> bool:
    """As PyTorch's own products ask, which raise where a precision was set and `allow_tf32` is read, from 2.9 on."""
    matmul: Any = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out [groups, M, N] = a [groups, M, K] times b [groups, K, N], any of them in any strides that BLAS has."""
    if out.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)
