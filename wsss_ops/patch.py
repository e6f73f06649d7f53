"""Patch operations of progressive patch learning: P splits a feature map into patches, M merges them again.

Li et al., Progressive Patch Learning for Weakly Supervised Semantic Segmentation, TMM 2022 (arXiv 2209.07828),
section III. The paper gives P and M for maps that divide evenly; padding the last row and column of patches with zeros
and cropping them off again is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._backend import call
from ._checks import FLOATS, INTEGERS, check_int, check_pair, check_tensor
from ._layout import empty_like_format, is_channels_last, memory_format, with_dense_rows
from ._library import register


def patch_split(x: Tensor, grid: Sequence[int], multiple: int = 1) -> Tensor:
    """Splits maps into a grid of patches that are then images of their own (the paper's P).

    Args:
        x: [N, D, H, W]; float64, float32, float16, bfloat16, an integer type or bool; NCHW or channels_last, any
            strides (copied first only where the pixels of a row are not next to each other).
        grid: (gh, gw), rows and columns of patches.
        multiple: patch sides are rounded up to a multiple of this many pixels: the stride of the layers that
            follow, so that their outputs keep the geometry of the map when merged.

    Returns:
        [N * gh * gw, D, ph, pw] with ph = ceil(H / gh) rounded up to a multiple, pw likewise, in x's dtype and memory
        format. Patch n * gh * gw + row * gw + column is the patch of image n at (row, column) of the grid; what lies
        beyond the image is zero. The gradient is `patch_merge` of the patches' gradient, exactly.

    Raises:
        TypeError: if x is no tensor of these dtypes, or grid or multiple hold no ints.
        ValueError: if x is not 4-d, or grid or multiple are below 1.
        RuntimeError: if x is on a GPU and the CUDA backend was not built.
    """
    check_tensor("x", x, "N, D, H, W", FLOATS + INTEGERS)
    gh, gw = check_pair("grid", grid, 1)
    ph, pw = patch_size((x.shape[2], x.shape[3]), (gh, gw), check_int("multiple", multiple, 1))
    patches: Tensor = _patch_split(x, gh, gw, ph, pw)
    return patches


def patch_merge(patches: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Puts patches back together and crops the result (the paper's M): the inverse of `patch_split`.

    Args:
        patches: [N * gh * gw, D, ph, pw] in the order of `patch_split`; dtypes and memory formats as there, any
            strides (copied first unless dense).
        grid: (gh, gw), rows and columns of patches.
        size: (H, W) of the result in pixels, at most (gh * ph, gw * pw).

    Returns:
        [N, D, H, W] in the dtype and memory format of patches. The gradient is the split of the result's gradient,
        zero for pixels that were cropped off.

    Raises:
        TypeError: if patches is no tensor of these dtypes, or grid or size hold no ints.
        ValueError: if patches is not 4-d or holds no multiple of gh * gw, grid is below 1, or size is out of its range.
        RuntimeError: if patches is on a GPU and the CUDA backend was not built.
    """
    check_tensor("patches", patches, "N * gh * gw, D, ph, pw", FLOATS + INTEGERS)
    gh, gw = check_pair("grid", grid, 1)
    height, width = check_pair("size", size, 0)
    count, _, ph, pw = patches.shape
    if count % (gh * gw) != 0:
        raise ValueError(f"patches must hold a multiple of {gh} * {gw} patches (grid), got {count}")
    if height > gh * ph or width > gw * pw:
        raise ValueError(
            f"size must be at most {(gh * ph, gw * pw)} for a grid of {(gh, gw)} patches of {(ph, pw)} pixels, "
            f"got {(height, width)}"
        )
    merged: Tensor = _patch_merge(patches, gh, gw, height, width)
    return merged


def patch_size(size: tuple[int, int], grid: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
    """(ph, pw) of the patches of a map of `size`: each side ceil(side / grid side) rounded up to a multiple."""
    ph, pw = (-(-side // (count * multiple)) * multiple for side, count in zip(size, grid, strict=True))
    return ph, pw


def _empty_patches(x: Tensor, gh: int, gw: int, ph: int, pw: int) -> Tensor:
    return empty_like_format((x.shape[0] * gh * gw, x.shape[1], ph, pw), x, is_channels_last(x))


def _empty_map(patches: Tensor, gh: int, gw: int, height: int, width: int) -> Tensor:
    shape = (patches.shape[0] // (gh * gw), patches.shape[1], height, width)
    return empty_like_format(shape, patches, is_channels_last(patches))


def _split(x: Tensor, gh: int, gw: int, ph: int, pw: int) -> Tensor:
    channels_last = is_channels_last(x)
    patches = _empty_patches(x, gh, gw, ph, pw)
    call("patch_split", x.device, with_dense_rows(x, channels_last), patches, gh, gw, channels_last)
    return patches


def _merge(patches: Tensor, gh: int, gw: int, height: int, width: int) -> Tensor:
    channels_last = is_channels_last(patches)
    merged = _empty_map(patches, gh, gw, height, width)
    dense = patches.contiguous(memory_format=memory_format(channels_last))
    call("patch_merge", patches.device, dense, merged, gh, gw, channels_last)
    return merged


def _keep_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, ctx.gh, ctx.gw, _, _ = inputs
    ctx.height, ctx.width = source.shape[2:]


def _split_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _patch_merge(grad, ctx.gh, ctx.gw, ctx.height, ctx.width), None, None, None, None


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _patch_split(grad, ctx.gh, ctx.gw, ctx.height, ctx.width), None, None, None, None


_patch_split = register(
    "patch_split(Tensor x, SymInt gh, SymInt gw, SymInt ph, SymInt pw) -> Tensor",
    _split,
    _empty_patches,
    _split_backward,
    _keep_sizes,
)
_patch_merge = register(
    "patch_merge(Tensor patches, SymInt gh, SymInt gw, SymInt height, SymInt width) -> Tensor",
    _merge,
    _empty_map,
    _merge_backward,
    _keep_sizes,
)
