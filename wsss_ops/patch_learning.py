"""Patch learning: the last blocks of a network run on the whole map and, each for itself, on the patches of a grid.

Li et al., Progressive Patch Learning for Weakly Supervised Semantic Segmentation, TMM 2022 (arXiv 2209.07828), figures
2 and 5: both branches share the blocks, and their results are concatenated. Maps that do not divide evenly, and how
patches keep their place behind strided blocks, are our reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import lcm
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._checks import FLOATS, check_bool, check_int, check_pair, check_tensor
from .patch import patch_merge, patch_split

PROBE = 1024  # pixels a side: many strides long, so that padding and rounding do not hide the stride
LARGEST_STRIDE = 64


@contextmanager
def _in_eval_mode(blocks: nn.Module) -> Iterator[None]:
    training = [module for module in blocks.modules() if module.training]
    blocks.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class PatchLearning(nn.Module):
    """A chain of blocks with a patch branch beside the whole map.

    The blocks up to position run on the whole map. Those behind it run on that map and, with the same weights, on each
    patch of its grid as on an image of its own, with zero padding at the patch's borders. The patches' results are
    merged and concatenated, along channels, to the whole map's.

    Patches start at multiples of the stride of the blocks behind position, and zeros pad them to such a multiple, so
    that a cell of the merged map lies where the same cell of the whole map does: farther from the borders of patches
    and of the map than the blocks see, the two are equal. The stride is found in the first call, by running these
    blocks once in eval mode on shapes alone (meta tensors); they must not be exchanged afterwards for blocks of another
    stride.

    BatchNorm in training mode normalises the patches, padding included, and the whole maps as two batches, and its
    running statistics average over both; keep it in eval mode where both should be normalised alike.

    Args:
        blocks: the chain; [N, D, H, W] -> [N, D', H', W'].
        position: how many blocks come before the split, 0 to len(blocks).
        grid: (gh, gw), rows and columns of patches.
        detach: no gradient reaches the blocks before position through the patches (the paper's explicit mode).

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if position is not from 0 to len(blocks), or grid is below 1.
    """

    _split = staticmethod(patch_split)  # those of the references are others
    _merge = staticmethod(patch_merge)

    def __init__(self, blocks: nn.Sequential, position: int, grid: Sequence[int], *, detach: bool = False) -> None:
        super().__init__()
        if not isinstance(blocks, nn.Sequential):
            raise TypeError(f"blocks must be a torch.nn.Sequential, got {type(blocks).__name__}")
        self.position = check_int("position", position, 0)
        if position > len(blocks):
            raise ValueError(f"position must be at most {len(blocks)}, the number of blocks, got {position}")
        self.grid = check_pair("grid", grid, 1)
        self.blocks, self.detach = blocks, check_bool("detach", detach)
        self._stride: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D, H, W] -> [N, 2 * D', H', W']: the whole map's D' channels, then the merged patches'.

        Raises:
            TypeError: if x is no tensor of float64, float32, float16 or bfloat16.
            ValueError: if x is not 4-d; if the blocks behind position do not run on meta tensors, or do not map
                patches of h x w pixels to h / stride x w / stride cells: those with an odd kernel do where they pad
                half of it.
            RuntimeError: if x is on a GPU and the CUDA backend was not built.
        """
        check_tensor("x", x, "N, D, H, W", FLOATS)
        split = self.blocks[: self.position](x)
        patches = self.patches(split)  # first: the blocks may change their input in place
        whole = self.blocks[self.position :](split)
        return torch.cat([whole, self._merge(patches, self.grid, whole.shape[2:])], 1)

    def patches(self, x: Tensor) -> Tensor:
        """The blocks behind position on each patch, not merged yet: x [N, D, H, W], the map that is split ->
        [N * gh * gw, D', ph', pw'] in the order of `patch_split`."""
        rows, columns = self._stride or self._find_stride(x.shape[1])
        patches = self._split(x.detach() if self.detach else x, self.grid, lcm(rows, columns))
        expected = (patches.shape[2] // rows, patches.shape[3] // columns)
        size = tuple(patches.shape[2:])
        result: Tensor = self.blocks[self.position :](patches)
        if tuple(result.shape[2:]) != expected:
            raise ValueError(
                f"blocks must map patches of {size} pixels at stride {(rows, columns)} to {expected} cells (padding: "
                f"half the kernel), got {tuple(result.shape[2:])}"
            )
        return result

    def _find_stride(self, channels: int) -> tuple[int, int]:
        blocks = self.blocks[self.position :]
        state = {
            name: tensor.to("meta", torch.float32 if tensor.is_floating_point() else None)
            for name, tensor in chain(blocks.named_parameters(), blocks.named_buffers())
        }
        probe = torch.empty(1, channels, PROBE, PROBE, device="meta", dtype=torch.float32)
        try:
            with torch.no_grad(), _in_eval_mode(blocks):  # a synchronised BatchNorm would wait for other processes
                shape = functional_call(blocks, state, (probe,)).shape
        except Exception as error:  # of whatever the blocks do
            raise ValueError(
                f"blocks behind position must run on meta tensors, by which their stride is found, got "
                f"{type(error).__name__}: {error}"
            ) from error
        if len(shape) != 4 or min(shape[2:]) < PROBE // LARGEST_STRIDE or max(shape[2:]) > PROBE:
            raise ValueError(
                f"blocks must map maps to maps, at a stride of 1 to {LARGEST_STRIDE}, got shape {list(shape)} for "
                f"{list(probe.shape)}"
            )
        self._stride = cast(tuple[int, int], tuple(round(PROBE / side) for side in shape[2:]))
        return self._stride

    def extra_repr(self) -> str:
        text = f"position={self.position}, grid={self.grid}"
        return text + (", detach=True" if self.detach else "")
