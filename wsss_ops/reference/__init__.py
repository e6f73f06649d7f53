"""The operators in plain PyTorch, under the same names: the definition that tests compare the kernels with."""

from ..sfc import normalize_cam  # plain PyTorch itself
from .clip import clip_features
from .deform import deform_conv2d
from .ocr import annotation_correlation, ocr_loss, out_of_candidate_rate
from .patch import patch_merge, patch_split
from .patch_learning import PatchLearning
from .prototype import class_prototypes, prototype_cam
from .sampler import DeformConv2d, DeformSampler
from .sfc import distribution_coefficients, msdw_loss

__all__ = [
    "DeformConv2d",
    "DeformSampler",
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
]
