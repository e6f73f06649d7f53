"""The operators in plain PyTorch, under the same names: the definition that tests compare the kernels with."""

from .clip import clip_features
from .deform import deform_conv2d
from .patch import patch_merge, patch_split
from .sampler import DeformConv2d, DeformSampler

__all__ = ["DeformConv2d", "DeformSampler", "clip_features", "deform_conv2d", "patch_merge", "patch_split"]
