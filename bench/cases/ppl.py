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
from wsss_ops.training.batches import Batch
from wsss_ops.training.loop import channels_last, make_optimiser, train_step
from wsss_ops.training.ppl import PplSettings, PplSystem
from wsss_ops.training.processes import Processes

from ..measure import Function
from .case import Case

IMAGES, SIDE, CLASSES = 2, 256, 21


class WholeMaps(wsss_ops.PatchLearning):
    """Its one patch is the map."""

    @staticmethod
    def _split(x: Tensor, grid: Sequence[int], multiple: int = 1) -> Tensor:
        return x


def merge_nothing(patches: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    return patches


def ppl_case(mode: str, device: str) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        tags = torch.zeros(IMAGES, CLASSES - 1, device=on)
        tags[:, 3] = 1
        batch = Batch(
            torch.randn(IMAGES, 3, SIDE, SIDE, device=on).contiguous(memory_format=torch.channels_last),
            tags,
            torch.ones(IMAGES, SIDE, SIDE, dtype=torch.bool, device=on),
            torch.arange(IMAGES, device=on),
        )
        unmoved = cast(ModuleType, SimpleNamespace(PatchLearning=WholeMaps, patch_merge=merge_nothing))
        kinds = {"floor: whole maps": unmoved, "wsss_ops": wsss_ops, "reference": reference}
        return {kind: training_step(ops, mode, batch) for kind, ops in kinds.items()}

    return Case(
        name=f"PPL {mode}",
        op="ppl",
        work=f"N{IMAGES} {SIDE}x{SIDE}, EfficientNet-Lite0 at stride 16, a whole training step",
        device=device,
        build=build,
    )


def training_step(ops: ModuleType, mode: str, batch: Batch) -> Function:
    torch.manual_seed(0)  # equal weights for all
    settings = PplSettings(backbone="efficientnet_lite0", mode=mode, positions=(6, 2), grids=(2, 4))
    system = PplSystem(settings, CLASSES, ops, pretrained=False)
    network = system.network.to(batch.images.device)
    channels_last(network)
    optimiser = make_optimiser(system.enter(1), system.settings.weight_decay)
    network.train()
    processes = Processes()
    return lambda: train_step(system, optimiser, batch, processes)


CASES = [ppl_case(mode, device) for device in ("cpu", "cuda") for mode in ("progressive", "explicit")]
