"""PatchLearning on the reference operators."""

from __future__ import annotations

from .. import patch_learning
from .patch import patch_merge, patch_split


class PatchLearning(patch_learning.PatchLearning):
    """As wsss_ops.PatchLearning."""

    _split = staticmethod(patch_split)
    _merge = staticmethod(patch_merge)
