"""DeformConv2d and DeformSampler on the reference operator."""

from __future__ import annotations

from .. import sampler
from .deform import deform_conv2d


class DeformConv2d(sampler.DeformConv2d):
    """As wsss_ops.DeformConv2d."""

    _convolve = staticmethod(deform_conv2d)


class DeformSampler(sampler.DeformSampler):
    """As wsss_ops.DeformSampler."""

    _convolve = staticmethod(deform_conv2d)
