"""The losses of SFC and what they need, as PyTorch has the pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def msdw_loss(
    cam_w: Tensor,
    cam_p: Tensor,
    cam_w_small: Tensor,
    tags: Tensor,
    coefficients: Tensor,
    *,
    prototype_weight: float = 1.6,
    scale_weight: float = 0.8,
) -> Tensor:
    """As wsss_ops.msdw_loss; its autograd derivative defines the gradient."""
    dtype = torch.promote_types(torch.promote_types(cam_w.dtype, cam_p.dtype), cam_w_small.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    cam_w, cam_p, cam_w_small = (cam.to(wide) for cam in (cam_w, cam_p, cam_w_small))
    if cam_w.numel() == 0:
        return (cam_w.sum() + cam_p.sum() + cam_w_small.sum()) * 0
    factors = F.pad(coefficients.to(wide), (1, 0), value=1)[:, None, None]
    normalised = cam_p / (cam_p.amax((2, 3), keepdim=True) + 1e-5)
    loss = prototype_weight * (factors * (cam_w - normalised).abs()).mean()
    resized = F.interpolate(cam_w, cam_w_small.shape[2:], mode="bilinear", align_corners=True)
    present = (tags != 0)[:, :, None, None]
    foreground = (factors * torch.where(present, (resized - cam_w_small).abs(), 0))[:, 1:]
    return loss + scale_weight * foreground.sum() / max(foreground.numel(), 1)


def distribution_coefficients(class_counts: Tensor | Sequence[float], resampled_per_class: float) -> Tensor:
    """As wsss_ops.distribution_coefficients."""
    counts = [float(count) for count in class_counts]
    apart = [sum(abs(count - other) for other in counts) / (count + resampled_per_class) for count in counts]
    mean = sum(apart) / len(apart)
    return torch.tensor([value / mean if mean > 0 else 1.0 for value in apart])
