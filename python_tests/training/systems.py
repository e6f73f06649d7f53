"""Little systems for tests of the harness."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from wsss_ops.training.inference import combine, infer_parts
from wsss_ops.training.settings import Settings
from wsss_ops.training.system import Classifier, Stage


def infer_cams(system, images, tags, scales, flip=True):
    """The parts of `infer_parts` as one CAM [N, C-1, H, W] in 0..1."""
    return combine(system, infer_parts(system, images, tags, scales, flip))


class ToySystem(Classifier):
    """Shows the brightness of the image, at stride 4; has nothing to learn."""

    stride = 4

    def __init__(self, num_classes=2, **settings):
        self.num_classes = num_classes
        self.settings = Settings(**settings)
        self.network = nn.Identity()

    def stages(self):
        return []

    def enter(self, stage):
        raise NotImplementedError

    def loss(self, batch):
        raise NotImplementedError

    def cam(self, images):
        grey = F.avg_pool2d(images.mean(1, keepdim=True) + 2.2, 5, 4, 2, count_include_pad=False)
        return grey.expand(-1, self.num_classes, -1, -1)


class TwoParts(ToySystem):
    """Shows where the image is bright and, three times as heavy, where it is dark and tagged."""

    parts: ClassVar = {"bright": 1.0, "dark": 3.0}

    def cams(self, images, tags):
        bright = self.cam(images)
        return [bright, (2.5 - bright) * tags[:, :, None, None]]


class TwoStages(Classifier):
    """Calls an operator, ops.scale, and learns a 1x1 convolution in one stage and a bias in the next."""

    stride = 1

    def __init__(self, settings, num_classes, ops, *, pretrained=True):
        self.settings, self.ops = settings, ops
        self.network = nn.Conv2d(3, num_classes - 1, 1)
        self.entered = []

    def stages(self):
        return [Stage("weight", 2), Stage("bias", 1)]

    def enter(self, stage):
        self.entered.append(stage)
        chosen = self.network.weight if stage == 0 else self.network.bias
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter is chosen)
        return [{"params": [chosen], "lr": 0.1}]

    def loss(self, batch):
        logits = self.ops.scale(self.network(batch.images)).mean((2, 3))
        noise = torch.rand_like(logits) * 0.1  # a step must be seeded to be repeatable
        loss = F.binary_cross_entropy_with_logits(logits + noise, batch.tags)
        return loss, {"loss": loss.detach()}

    def cam(self, images):
        return self.network(images)
