"""A training step of ESOL's expansion and shrinkage, with other operators in the same system.

Four crops of 256 pixels through EfficientNet-Lite0 at stride 16, whose 1280 channels the expansion samples; the
backbone is fixed in both stages, its forward part of the step, and the classifier learns. The floor is the same step
with plain convolutions in place of the samplers, whose offset branches then learn nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

import wsss_ops
from wsss_ops import reference
from wsss_ops.training.esol import EXPANSION, SHRINKAGE, EsolSettings, EsolSystem

from ..measure import Function
from .case import Case
from .training_step import CLASSES, SIDE, make_batch, training_step

IMAGES = 4


def operators(convolve: Callable[..., Any]) -> ModuleType:
    """The operators that ESOL calls, its samplers on another deformable convolution and the rest in plain PyTorch."""

    class DeformSampler(wsss_ops.DeformSampler):
        _convolve = staticmethod(convolve)

    return cast(ModuleType, SimpleNamespace(DeformSampler=DeformSampler, clip_features=reference.clip_features))


def convolve_plainly(input, offset, weight, bias, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return nn.functional.conv2d(input, weight, bias, stride, padding, dilation)


def esol_case(name: str, stage: int, device: str) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        batch = make_batch(IMAGES, on)
        kinds = {
            "floor: convolutions": operators(convolve_plainly),
            "wsss_ops": wsss_ops,
            "reference": reference,
        }
        if importlib.util.find_spec("torchvision") is not None:
            import torchvision

            kinds["torchvision"] = operators(torchvision.ops.deform_conv2d)
        return {kind: training_step(make_system(ops), stage, batch) for kind, ops in kinds.items()}

    return Case(
        name=f"ESOL {name}",
        op="esol",
        work=f"N{IMAGES} {SIDE}x{SIDE}, EfficientNet-Lite0 at stride 16, a whole training step",
        device=device,
        build=build,
    )


def make_system(ops: ModuleType) -> EsolSystem:
    torch.manual_seed(0)  # equal weights for all: a network whose ReLUs have died would take another time
    settings = EsolSettings(backbone="efficientnet_lite0", expansion_classifier_lr=1e-3, shrinkage_classifier_lr=1e-3)
    system = EsolSystem(settings, CLASSES, ops, pretrained=False)
    for sampler in (system.network.expansion, system.network.shrinkage):
        nn.init.normal_(sampler.offset_branch.bias, std=1.0)  # as after some training: between the cells
    return system


CASES = [
    esol_case(name, stage, device)
    for device in ("cpu", "cuda")
    for name, stage in (("expansion", EXPANSION), ("shrinkage", SHRINKAGE))
]
