"""Fused operators for weakly supervised semantic segmentation.

Bad input raises TypeError or ValueError before anything is computed, naming the argument and what was got.
"""

from . import reference
from ._columns import set_workspace_limit
from .clip import clip_features
from .deform import deform_conv2d
from .image_bank import ImageBank
from .ocr import annotation_correlation, ocr_loss, out_of_candidate_rate
from .patch import patch_merge, patch_split
from .patch_learning import PatchLearning
from .prototype import class_prototypes, prototype_cam
from .sampler import DeformConv2d, DeformSampler
from .sfc import distribution_coefficients, msdw_loss, normalize_cam

__version__ = "0.1.0"

__all__ = [
    "DeformConv2d",
    "DeformSampler",
    "ImageBank",
    "PatchLearning",
    "annotation_correlation",
    "class_prototypes",
    "clip_features",
    "deform_conv2d",
    "distribution_coefficients",
    "msdw_loss",
    "normalize_cam",
    "ocr_loss",
    "out_of_candidate_rate",
    "patch_merge",
    "patch_split",
    "prototype_cam",
    "reference",
    "set_workspace_limit",
]
