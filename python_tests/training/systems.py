"""Little systems for tests of the harness, and a batch and its gradients for tests of systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_ops.training.batches import Batch
from wsss_ops.training.inference import combine, infer_parts
from wsss_ops.training.settings import Settings
from wsss_ops.training.system import Classifier, Stage, System


def infer_cams(system: Classifier, images: Tensor, tags: Tensor, scales: Sequence[float], flip: bool = True) -> Tensor:
    """The parts of `infer_parts` as one CAM [N, C-1, H, W] in 0..1."""
    return combine(system, infer_parts(system, images, tags, scales, flip))


class ToySystem(Classifier):
    """Shows the brightness of the image, at stride 4; has nothing to learn."""

    stride = 4

    def __init__(self, num_classes: int = 2, **settings: Any) -> None:
        self.num_classes = num_classes
        self.settings = Settings(**settings)
        self.network = nn.Identity()

    def stages(self) -> list[Stage]:
        return []

    def enter(self, stage: int) -> list[dict[str, Any]]:
        raise NotImplementedError

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def cam(self, images: Tensor) -> Tensor:
        grey = F.avg_pool2d(images.mean(1, keepdim=True) + 2.2, 5, 4, 2, count_include_pad=False)
        return grey.expand(-1, self.num_classes, -1, -1)


class TwoParts(ToySystem):
    """Shows where the image is bright and, three times as heavy, where it is dark and tagged."""

    parts: ClassVar = {"bright": 1.0, "dark": 3.0}

    def cams(self, images: Tensor, tags: Tensor) -> list[Tensor]:
        bright = self.cam(images)
        return [bright, (2.5 - bright) * tags[:, :, None, None]]


class TwoStages(Classifier):
    """Calls an operator, ops.scale, and learns a 1x1 convolution in one stage and a bias in the next."""

    stride = 1

    def __init__(self, settings: Any, num_classes: int, ops: Any, *, pretrained: bool = True) -> None:
        self.settings, self.ops = settings, ops
        self.network = nn.Conv2d(3, num_classes - 1, 1)
        self.entered: list[int] = []

    def stages(self) -> list[Stage]:
        return [Stage("weight", 2), Stage("bias", 1)]

    def enter(self, stage: int) -> list[dict[str, Any]]:
        self.entered.append(stage)
        chosen = self.network.weight if stage == 0 else self.network.bias
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter is chosen)
        return [{"params": [chosen], "lr": 0.1}]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.ops.scale(self.network(batch.images)).mean((2, 3))
        noise = torch.rand_like(logits) * 0.1  # a step must be seeded to be repeatable
        loss = F.binary_cross_entropy_with_logits(logits + noise, batch.tags)
        return loss, {"loss": loss.detach()}

    def cam(self, images: Tensor) -> Tensor:
        return self.network(images)


def batch(seed: int = 1) -> Batch:
    """Four images of two classes; the first is padded at its upper side."""
    torch.manual_seed(seed)
    images = torch.randn(4, 3, 33, 33)
    tags = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    valid = torch.ones(4, 33, 33, dtype=torch.bool)
    valid[0, :12] = False
    return Batch(images, tags, valid)


def gradients(system: System, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss, of the parameters that have any."""
    system.network.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in system.network.named_parameters() if p.grad is not None}
