"""Memory formats and element types: which ones a tensor is in, and what is handed to the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, coordinates and statistics of numbers of `dtype` are computed in."""
    return torch.promote_types(dtype, torch.float32)


def tagged(tags: Tensor) -> Tensor:
    """Which classes are present, dense and bool: any number but 0, NaN too. Not copied where tags are that already."""
    return tags.to(torch.bool).contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are innermost in a 4-d tensor; slices count, and one channel alone is NCHW."""
    return x.stride(1) == 1 and x.stride(3) >= x.shape[1] > 1


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_like_format(shape: Sequence[int], like: Tensor, channels_last: bool) -> Tensor:
    """Uninitialised, of `like`'s dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


def with_dense_rows(x: Tensor, channels_last: bool) -> Tensor:
    """x, or a copy of it in the memory format given where the pixels of a row are not next to each other."""
    pixel = x.shape[1] if channels_last else 1
    if x.stride(3) == pixel or x.shape[3] <= 1:
        return x
    return x.contiguous(memory_format=memory_format(channels_last))
