"""clip_features as a maximum and a where."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_features(x: Tensor, beta: float) -> Tensor:
    """As wsss_ops.clip_features; its autograd derivative defines the gradient."""
    if x.numel() == 0:
        return x.clone()
    known = torch.where(x.isnan(), -torch.inf, x.detach())
    # In float64 no beta > 0 becomes 0, which times infinity would be NaN.
    limit = known.amax((1, 2, 3), keepdim=True).double() * beta
    limit = limit.to(torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    return torch.where(x > limit, limit, x)
