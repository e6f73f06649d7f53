"""Prototype CAM as masks and means, a class at a time, and cosine_similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def prototype_cam(
    features: Tensor | Sequence[Tensor],
    cam: Tensor,
    tags: Tensor,
    *,
    valid: Tensor | None = None,
    size: Sequence[int] | None = None,
    background_scale: float = 0.3,
    detach_prototypes: bool = False,
) -> Tensor:
    """As wsss_ops.prototype_cam; its autograd derivative defines the gradient."""
    height, width = cam.shape[2:] if size is None else size
    if isinstance(features, Tensor):
        dtype = features.dtype
        pixels = _resize(_wide(features), height, width)
    else:
        dtype = features[0].dtype
        pixels = torch.cat([_resize(_normalise(_wide(level)), height, width) for level in features], 1)
    seeds = _seeds(cam.detach(), tags, valid, background_scale, height, width)
    prototypes = _means(pixels, seeds, cam.shape[1])
    if detach_prototypes:
        prototypes = prototypes.detach()
    maps = []
    for c in range(cam.shape[1]):
        cosines = F.cosine_similarity(pixels, prototypes[:, c, :, None, None], dim=1, eps=1e-8)
        present = (seeds == c).any((1, 2))[:, None, None]
        maps.append(torch.where(present, cosines.relu(), 0))
    return torch.stack(maps, 1).to(dtype)


def class_prototypes(features: Tensor, assignment: Tensor, num_classes: int) -> Tensor:
    """As wsss_ops.class_prototypes."""
    return _means(_wide(features), assignment, num_classes).to(features.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalise(level: Tensor) -> Tensor:
    return level / (torch.linalg.vector_norm(level, dim=1, keepdim=True) + 1e-5)


def _resize(level: Tensor, height: int, width: int) -> Tensor:
    if level.shape[2:] == (height, width):
        return level
    return F.interpolate(level, (height, width), mode="bilinear", align_corners=False)


def _seeds(cam: Tensor, tags: Tensor, valid: Tensor | None, background_scale: float, height: int, width: int) -> Tensor:
    """The class of each pixel, [N, height, width], or -1."""
    scaled = _wide(cam).clone()
    scaled[:, 0] *= background_scale
    winner = scaled.argmax(1)
    known = (tags != 0).gather(1, winner.flatten(1)).view_as(winner)
    if valid is not None:
        known = known & valid
    seeds = torch.where(known, winner, -1)
    rows = torch.arange(height, device=cam.device) * cam.shape[2] // height
    columns = torch.arange(width, device=cam.device) * cam.shape[3] // width
    return seeds[:, rows[:, None], columns]


def _means(features: Tensor, assignment: Tensor, classes: int) -> Tensor:
    """[N, classes, D]."""
    means = []
    for c in range(classes):
        own = assignment[:, None] == c
        means.append(torch.where(own, features, 0).sum((2, 3)) / own.sum((2, 3)).clamp_min(1))
    return torch.stack(means, 1)
