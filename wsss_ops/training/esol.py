"""ESOL: CAM, then sampling offsets that expand what it shows, then offsets that shrink it to the object.

Li et al., Expansion and Shrinkage of Localization for Weakly-Supervised Semantic Segmentation, NeurIPS 2022 (arXiv
2209.07761). README.md here says what is the paper's and what is our reading.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_ops import normalize_cam
from wsss_ops.training.backbones import Backbone
from wsss_ops.training.batches import Batch
from wsss_ops.training.cam import CAM, CamSystem, SettingsAfterCam, StagedCamNetwork
from wsss_ops.training.settings import Settings, option
from wsss_ops.training.system import Stage

EXPANSION, SHRINKAGE = 1, 2  # the stages behind the CAM


@dataclass(frozen=True, kw_only=True)
class EsolSettings(SettingsAfterCam):
    """Settings of ESOL: those of the CAM stage, and of the two samplers."""

    expansion_epochs: int = option(int, 1, "passes over the training images in the expansion stage", above=0)
    shrinkage_epochs: int = option(int, 2, "passes over the training images in the shrinkage stage", above=0)
    expansion_lr: float = option(float, 3e-5, "learning rate of the expansion's offsets", above=0)
    shrinkage_lr: float = option(float, 3e-5, "learning rate of the shrinkage's offsets", above=0)
    expansion_classifier_lr: float = option(
        float, 0.0, "learning rate of the classifier in the expansion stage; 0: it stays fixed", at_least=0
    )
    shrinkage_classifier_lr: float = option(
        float, 1e-3, "learning rate of the classifier in the shrinkage stage; 0: it stays fixed", at_least=0
    )
    expansion_at: str = option(
        str, "features", "what the expansion samples: the backbone's features, with the weight of the 3x3 layer behind "
        "them, or the maps of that layer, with the identity", choices=("features", "maps"),
    )  # fmt: skip
    expansion_offset: float = option(float, 4.0, "bound of the expansion's offsets, in cells of the map", above=0)
    shrinkage_offset: float = option(float, 1.0, "bound of the shrinkage's offsets, in cells of the map", above=0)
    alpha: float = option(
        float, 1.0, "weight of the inverse supervision, -alpha times the classification loss", above=0
    )
    beta: float = option(float, 0.7, "feature clipping: limit as a share of the image's largest feature", above=0)
    area: float = option(float, 0.3, "weight of the area loss in the shrinkage stage (the paper's lambda)", at_least=0)


class EsolNetwork(StagedCamNetwork):
    """The CAM network with a sampler for each of the later stages; `stage` says which of them are in use.

    The expansion samples the backbone's features with the weight of the CAM's 3x3 layer (`sampler`), or that layer's
    maps with the identity; the shrinkage its result with the identity.
    """

    def __init__(self, backbone: Backbone, num_classes: int, ops: ModuleType, settings: EsolSettings,
                 width: int = 256) -> None:  # fmt: skip
        super().__init__(backbone, num_classes, width)
        frozen = {"freeze_weight": True, "detach_input": True}
        self.samples_maps = settings.expansion_at == "maps"
        channels = width if self.samples_maps else backbone.out_channels
        self.expansion = ops.DeformSampler(channels, width, max_offset=settings.expansion_offset, **frozen)
        self.shrinkage = ops.DeformSampler(width, width, max_offset=settings.shrinkage_offset, **frozen)
        for identity in (self.expansion, self.shrinkage) if self.samples_maps else (self.shrinkage,):
            nn.init.dirac_(identity.weight)
            nn.init.zeros_(identity.bias)
        self.clip, self.alpha, self.beta = ops.clip_features, settings.alpha, settings.beta

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [N, 3, H, W], normalised -> logits [N, num_classes] and CAM [N, num_classes, h, w]."""
        if self.stage == CAM:
            return super().forward(images)
        if self.stage == EXPANSION:
            maps = self.expand(images)
        else:
            with torch.no_grad():
                maps = self.expand(images)
            maps = self.shrinkage(maps).relu()
        cam = self.classifier(maps)
        return cam.mean((2, 3)), cam

    def expand(self, images: Tensor) -> Tensor:
        """The clipped features of the expansion sampler; their gradient reaches its offsets reversed."""
        sampled: Tensor = _Reversed.apply(self.expansion(self.source(images)), self.alpha)
        return cast(Tensor, self.clip(sampled.relu(), self.beta))

    @torch.no_grad()
    def source(self, images: Tensor) -> Tensor:
        """What the expansion samples."""
        features = self.backbone(images)
        return cast(Tensor, self.sampler(features).relu()) if self.samples_maps else features

    def offsets(self, images: Tensor) -> Tensor:
        """Of the later stages' sampler, in cells of the map: [N, 18, h, w], for each tap y before x."""
        if self.stage == EXPANSION:
            return cast(Tensor, self.expansion.offsets(self.source(images)))
        return cast(Tensor, self.shrinkage.offsets(self.expand(images)))


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -alpha: one backward pass then lets what lies before it climb the
    loss and what lies behind descend it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.alpha * gradient, None


class EsolSystem(CamSystem):
    """Expansion and shrinkage: a CAM, sampled by offsets that grow it, then by offsets that tighten it."""

    Settings: ClassVar[type[Settings]] = EsolSettings
    uses_ops = True
    network: EsolNetwork

    def __init__(self, settings: EsolSettings, num_classes: int, ops: ModuleType, *, pretrained: bool = True) -> None:
        super().__init__(settings, num_classes, ops, pretrained=pretrained)
        self.network = EsolNetwork(self.network.backbone, num_classes - 1, ops, settings)

    def stages(self) -> list[Stage]:
        return [
            Stage("cam", self.settings.epochs),
            Stage("expansion", self.settings.expansion_epochs),
            Stage("shrinkage", self.settings.shrinkage_epochs),
        ]

    def enter(self, stage: int) -> list[dict[str, Any]]:
        network, settings = self.network, self.settings
        network.stage = stage
        network.requires_grad_(False)
        if stage == CAM:
            for layer in (network.sampler, network.classifier):
                layer.requires_grad_(True)
            return super().enter(stage)
        if stage == EXPANSION and not network.samples_maps:  # on resumption too: the 3x3 layer has not changed since
            network.expansion.load_state_dict(network.sampler.state_dict(), strict=False)
        sampler, lr, classifier_lr = (
            (network.expansion, settings.expansion_lr, settings.expansion_classifier_lr)
            if stage == EXPANSION
            else (network.shrinkage, settings.shrinkage_lr, settings.shrinkage_classifier_lr)
        )
        sampler.offset_branch.requires_grad_(True)
        groups = [{"params": list(sampler.offset_branch.parameters()), "lr": lr}]
        if classifier_lr > 0:
            network.classifier.requires_grad_(True)
            groups.append({"params": list(network.classifier.parameters()), "lr": classifier_lr})
        return groups

    def displacements(self, images: Tensor) -> Tensor | None:
        if self.network.stage == CAM:
            return None
        taps = self.network.offsets(images).unflatten(1, (9, 2))
        # Of the identity only the middle tap has a weight: the others sample for nothing.
        identity = self.network.stage == SHRINKAGE or self.network.samples_maps
        chosen = taps[:, 4] if identity else taps.mean(1)
        return self.stride * chosen

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, cam = self.network(batch.images)
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.tags)
        figures = {"loss": loss.detach()}
        if self.network.stage == SHRINKAGE:
            covered = area_loss(cam.float(), batch.tags)
            loss = loss + self.settings.area * covered
            figures |= {"loss": loss.detach(), "area": covered.detach()}
        return loss, figures


def area_loss(cam: Tensor, tags: Tensor) -> Tensor:
    """The mean over classes present of the mean activation of their normalised maps: cam [N, C, h, w], tags [N, C]."""
    return (normalize_cam(cam).mean((2, 3)) * tags).sum() / tags.sum().clamp_min(1)
