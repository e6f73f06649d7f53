"""A training step of PPL's stages, with other split and merge in the same system.

Two crops of 256 pixels through EfficientNet-Lite0 at stride 16, whose last six blocks learn. Progressive: these blocks
and the 3x3 layer run on the whole map and on its 2 x 2 patches; explicit: a second branch, of two blocks, on 4 x 4 as
well. The floor is the same step where each branch sees the whole map again: nothing is moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import cast

import torch
from torch import Tensor

import wsss_ops
from wsss_ops import reference
from wsss_ops.training.ppl import PplSettings, PplSystem

from ..measure import Function
from .case import Case
from .training_step import CLASSES, SIDE, make_batch, training_step

IMAGES = 2


class WholeMaps(wsss_ops.PatchLearning):
    """Its one patch is the map."""

    @staticmethod
    def _split(x: Tensor, grid: Sequence[int], multiple: int = 1) -> Tensor:
        return x


def merge_nothing(patches: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    return patches


def ppl_case(mode: str, device: str) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        batch = make_batch(IMAGES, on)
        unmoved = cast(ModuleType, SimpleNamespace(PatchLearning=WholeMaps, patch_merge=merge_nothing))
        kinds = {"floor: whole maps": unmoved, "wsss_ops": wsss_ops, "reference": reference}
        return {kind: training_step(make_system(ops, mode), 1, batch) for kind, ops in kinds.items()}

    return Case(
        name=f"PPL {mode}",
        op="ppl",
        work=f"N{IMAGES} {SIDE}x{SIDE}, EfficientNet-Lite0 at stride 16, a whole training step",
        device=device,
        build=build,
    )


def make_system(ops: ModuleType, mode: str) -> PplSystem:
    torch.manual_seed(0)  # equal weights for all
    settings = PplSettings(backbone="efficientnet_lite0", mode=mode, positions=(6, 2), grids=(2, 4))
    return PplSystem(settings, CLASSES, ops, pretrained=False)


CASES = [ppl_case(mode, device) for device in ("cpu", "cuda") for mode in ("progressive", "explicit")]
