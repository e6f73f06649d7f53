"""A training step of SFC's calibration, with other operators in the same system.

Four crops of 256 pixels and four images of the bank through EfficientNet-Lite0 at stride 16, at full and at half size.
The floor is the same two passes with the classification loss alone. `reference` is the operators' twins, `bmm` and
`broadcast` these with the prototypes of prototype.py: the fastest form in plain PyTorch that we know, and the authors'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import wsss_ops
from wsss_ops import reference
from wsss_ops.training.batches import Batch
from wsss_ops.training.sfc import SfcSettings, SfcSystem, halve

from ..measure import Function
from .case import Case
from .prototype import by_broadcast, by_products
from .training_step import CLASSES, SIDE, make_batch, training_step

IMAGES = BANK = 4


class TwoPasses(SfcSystem):
    """Both sizes, classified."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, tags, _ = self.with_bank(batch)
        logits = [self.network(scaled)[0] for scaled in (images, halve(images))]
        loss = torch.stack([F.binary_cross_entropy_with_logits(one.float(), tags) for one in logits]).mean()
        return loss, {"loss": loss.detach()}


def operators(prototypes: Callable[[list[Tensor], Tensor, Tensor], Tensor]) -> ModuleType:
    """The operators that SFC calls in plain PyTorch, with another form of the prototypes. These crops have no padding,
    and the background is scaled as the system does by default."""

    def prototype_cam(features: list[Tensor], cam: Tensor, tags: Tensor, **_: Any) -> Tensor:
        return prototypes(features, cam, tags != 0)

    names = {name: getattr(reference, name) for name in ("msdw_loss", "normalize_cam")}
    return cast(ModuleType, SimpleNamespace(prototype_cam=prototype_cam, **names))


def sfc_case(device: str) -> Case:
    def build(on: torch.device, compiled: bool) -> Mapping[str, Function]:
        systems = {
            "floor: classification": make_system(TwoPasses, wsss_ops),
            "wsss_ops": make_system(SfcSystem, wsss_ops),
            "reference": make_system(SfcSystem, reference),
            "bmm": make_system(SfcSystem, operators(by_products)),
            "broadcast": make_system(SfcSystem, operators(by_broadcast)),
        }
        batch = make_batch(IMAGES, on)
        return {kind: training_step(system, 1, batch) for kind, system in systems.items()}

    return Case(
        name="SFC",
        op="sfc",
        work=f"N{IMAGES} + {BANK} {SIDE}x{SIDE}, EfficientNet-Lite0 at stride 16, a whole training step",
        device=device,
        build=build,
    )


def make_system(kind: type[SfcSystem], ops: ModuleType) -> SfcSystem:
    torch.manual_seed(0)  # equal weights for all
    settings = SfcSettings(backbone="efficientnet_lite0", bank=BANK)
    return kind(settings, CLASSES, ops, pretrained=False)


CASES = [sfc_case(device) for device in ("cpu", "cuda")]
