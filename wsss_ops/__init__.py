"""Fused operators for weakly supervised semantic segmentation."""

from .patch import patch_merge, patch_split

__version__ = "0.1.0"

__all__ = ["patch_merge", "patch_split"]
