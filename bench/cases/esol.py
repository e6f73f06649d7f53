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
from wsss_ops.training.batches import Batch
from wsss_ops.training.esol import EXPANSION, SHRINKAGE, EsolSettings, EsolSystem
from wsss_ops.training.loop import channels_last, make_optimiser, train_step
from wsss_ops.training.processes import Processes

from ..measure import Function
from .case import Case

IMAGES, SIDE, CLASSES = 4, 256, 21


def operators(convolve: Callable[..., Any]) -> ModuleType:
    """The operators that ESOL calls, its samplers on another deformable convolution and the rest in plain PyTorch."""

    class DeformSampler(wsss_ops.DeformSampler):
        _convolve = staticmethod(convolve)

    return cast(ModuleType, SimpleNamespace(DeformSampler=DeformSampler, clip_features=reference.clip_features))


def convolve_plainly(input, offset, weight, bias, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return nn.functional.conv2d(input, weight, bias, stride, padding, dilation)


def esol_case(name: str, stage: int, device: str) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        tags = torch.zeros(IMAGES, CLASSES - 1, device=on)
        tags[:, 3] = 1
        batch = Batch(
            torch.randn(IMAGES, 3, SIDE, SIDE, device=on).contiguous(memory_format=torch.channels_last),
            tags,
            torch.ones(IMAGES, SIDE, SIDE, dtype=torch.bool, device=on),
            torch.arange(IMAGES, device=on),
        )
        kinds = {
            "floor: convolutions": operators(convolve_plainly),
            "wsss_ops": wsss_ops,
            "reference": reference,
        }
        if importlib.util.find_spec("torchvision") is not None:
            import torchvision

            kinds["torchvision"] = operators(torchvision.ops.deform_conv2d)
        return {kind: training_step(ops, stage, batch) for kind, ops in kinds.items()}

    return Case(
        name=f"ESOL {name}",
        op="esol",
        work=f"N{IMAGES} {SIDE}x{SIDE}, EfficientNet-Lite0 at stride 16, a whole training step",
        device=device,
        build=build,
    )


def training_step(ops: ModuleType, stage: int, batch: Batch) -> Function:
    torch.manual_seed(0)  # equal weights for all: a network whose ReLUs have died would take another time
    settings = EsolSettings(backbone="efficientnet_lite0", expansion_classifier_lr=1e-3, shrinkage_classifier_lr=1e-3)
    system = EsolSystem(settings, CLASSES, ops, pretrained=False)
    network = system.network.to(batch.images.device)
    channels_last(network)
    for sampler in (network.expansion, network.shrinkage):
        nn.init.normal_(sampler.offset_branch.bias, std=1.0)  # as after some training: between the cells
    optimiser = make_optimiser(system.enter(stage), system.settings.weight_decay)
    network.train()
    processes = Processes()
    return lambda: train_step(system, optimiser, batch, processes)


CASES = [
    esol_case(name, stage, device)
    for device in ("cpu", "cuda")
    for name, stage in (("expansion", EXPANSION), ("shrinkage", SHRINKAGE))
]
