"""patch_split and patch_merge as pad, reshape and permute."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def patch_split(x: Tensor, grid: Sequence[int], multiple: int = 1) -> Tensor:
    """As wsss_ops.patch_split; the memory format of the result is PyTorch's choice."""
    n, d, height, width = x.shape
    gh, gw = grid
    ph = -(-height // (gh * multiple)) * multiple
    pw = -(-width // (gw * multiple)) * multiple
    padded = F.pad(x, (0, gw * pw - width, 0, gh * ph - height))
    cells = padded.reshape(n, d, gh, ph, gw, pw).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(n * gh * gw, d, ph, pw)


def patch_merge(patches: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """As wsss_ops.patch_merge; the memory format of the result is PyTorch's choice."""
    count, d, ph, pw = patches.shape
    gh, gw = grid
    cells = patches.reshape(count // (gh * gw), gh, gw, d, ph, pw).permute(0, 3, 1, 4, 2, 5)
    merged = cells.reshape(count // (gh * gw), d, gh * ph, gw * pw)
    return merged[:, :, : size[0], : size[1]]
