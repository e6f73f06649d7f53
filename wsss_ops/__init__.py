"""Fused operators for weakly supervised semantic segmentation."""

from . import reference
from ._columns import set_workspace_limit
from .clip import clip_features
from .deform import deform_conv2d
from .patch import patch_merge, patch_split
from .sampler import DeformConv2d, DeformSampler

__version__ = "0.1.0"

__all__ = [
    "DeformConv2d",
    "DeformSampler",
    "clip_features",
    "deform_conv2d",
    "patch_merge",
    "patch_split",
    "reference",
    "set_workspace_limit",
]
