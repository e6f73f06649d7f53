"""The operators in plain PyTorch, under the same names: the definition that tests compare the kernels with."""

from .patch import patch_merge, patch_split

__all__ = ["patch_merge", "patch_split"]
